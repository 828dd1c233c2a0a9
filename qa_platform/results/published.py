"""Writing answered CSVs to the bucket, under QA_ANSWERED_PREFIX, once their files are finished.

The statement that finishes a file records that its CSV is owed. So no process has to survive until the CSV is written, and neither a
refusal nor an outage holds up a file or its archiving.
"""

import time
from contextlib import suppress
from functools import partial

from qa_platform.clients.answered_csvs import AnswersId, answered_name, write_answered
from qa_platform.clients.file_objects import delete_objects_of
from qa_platform.clients.services import Log, Services
from qa_platform.errors import QaPlatformError, TransientError
from qa_platform.ledger import FileRecord, Ledger
from qa_platform.results.answered_csv import answered_csv
from qa_platform.text import escaped, escaped_lines

# The maximum files per call, and the seconds after which a call starts no further file, so that a sensor's tick stays short.
_FILES = 500
SECONDS = 20.0


def publish(services: Services, log: Log, *, seconds: float = SECONDS) -> int:
    """Write the owed answered CSVs to the bucket. A failure is logged, recorded, and retried later.

    Args:
        seconds: start no further file after this time.

    Returns:
        The number of CSVs that are still owed; 0 if none are wanted, or if PostgreSQL fails.
    """
    if not services.work.answered_prefix:
        return 0
    until = time.monotonic() + seconds
    try:
        with Ledger(services.postgres) as ledger:
            for record in ledger.owed_csvs(limit=_FILES):
                if time.monotonic() > until or not _publish_or_record(services, ledger, record, log):
                    break
            return ledger.count_owed_csvs()
    except QaPlatformError as error:
        # The files are finished, so this last step must not fail the caller's work.
        log.warning("answered CSVs could not be written to the bucket now: %s", escaped_lines(str(error)))
        return 0


def _publish_or_record(services: Services, ledger: Ledger, record: FileRecord, log: Log) -> bool:
    """Write one answered CSV, or record why that failed. Returns False if a service is unavailable: the others would fail too."""
    try:
        _publish(services, ledger, record, log)
    except Exception as error:
        reason = str(error) if isinstance(error, QaPlatformError) else f"{type(error).__name__}: {error}"
        log.warning("%s is finished, but its answered CSV could not be written now: %s", record.version.shown, escaped_lines(reason))
        with suppress(QaPlatformError):
            ledger.record_csv_failure(record, error=reason, work=services.work)
        return not isinstance(error, TransientError)
    return True


def _publish(services: Services, ledger: Ledger, record: FileRecord, log: Log) -> None:
    version, prefix = record.version, services.work.answered_prefix
    there = ledger.in_the_table(version.name)
    if there is None or there.version.generation > version.generation:
        # Its rows were replaced. The newer generation has its own CSV owed, or is forgotten.
        ledger.clear_owed_csv(record)
        return

    def tell(what: str) -> None:
        log.warning("%s: %s", version.shown, what)

    content = partial(answered_csv, services.pachyderm, services.postgres, record, tell=tell)
    answers = AnswersId(version.name, version.generation, record.load_id, record.pachyderm_commit)
    if write_answered(services.bucket, prefix, answers, content, may_write=partial(ledger.begin_csv, record)):
        log.info("%s: its answered CSV lies in %s", version.shown, escaped(answered_name(prefix, version.name)))
        # A concurrent `forget` may have looked for the answered CSV before it was there.
        if not ledger.clear_owed_csv(record) and ledger.is_forgotten(version):
            delete_objects_of(services.bucket, version, prefix)
