"""Archiving: moves the source of a done file out of ``incoming/``."""

import threading
from collections.abc import Sequence
from contextlib import suppress

from qa_platform.batches.at_once import threads
from qa_platform.clients import bucket
from qa_platform.clients.file_objects import delete_objects_of
from qa_platform.clients.services import Log, Services
from qa_platform.contract import INCOMING, FileStatus
from qa_platform.errors import QaPlatformError, TransientError
from qa_platform.ingest import report_on_file
from qa_platform.ledger import FileRecord, Ledger
from qa_platform.ledger.states import ARCHIVABLE
from qa_platform.text import escaped, escaped_lines


def archive_files(services: Services, ledger: Ledger, records: Sequence[FileRecord], *, log: Log) -> None:
    """Archive done files, several at once. If one fails, its record says why, and the sensor `done_files` retries it."""
    unavailable = threading.Event()

    def archive(record: FileRecord) -> None:
        # In an outage each of the others would wait just as long, and a run keeps its slot in the queue until it ends.
        if not unavailable.is_set():
            try:
                archive_file(services, ledger, record, log=log)
            except TransientError:
                unavailable.set()
                raise

    with threads() as pool:
        for record, archiving in [(record, pool.submit(archive, record)) for record in records]:
            try:
                archiving.result()
            except Exception as error:
                # Any error: the answers are in the table, and one file must not hold up the others.
                log.warning("%s is done, and could not be archived now: %s", record.version.shown, escaped_lines(str(error)))
                with suppress(QaPlatformError):
                    ledger.record_archive_failure(record.version, error=_reason(error), work=services.work)


def archive_file(services: Services, ledger: Ledger, record: FileRecord, *, log: Log) -> None:
    """Move the source of a done file out of ``incoming/`` and record its new place. Does nothing for any other file.

    The record is read again before the source is deleted. If the file is to be answered again by then, the source stays.

    Raises:
        InputError: the bucket refuses it; the message says what to do.
        TransientError: the bucket is unavailable.
    """
    if record.status not in ARCHIVABLE or record.archived_at is not None:
        return
    version, rejected = record.version, record.status is FileStatus.REJECTED
    if rejected:
        # First, so that the owner finds the reason even if the file cannot be moved.
        report = bucket.write_report(services.bucket, version, report_on_file(record.rejection or record.error))
        log.info("%s is rejected; the reason lies in %s", version.shown, escaped(report))
    place: str | None = record.place
    # Also if the record names the copy but the upload still exists: an earlier attempt died before deleting it.
    if place == INCOMING + version.name or bucket.is_there(services.bucket, version, INCOMING + version.name):
        place = _leave_incoming(services, ledger, record, rejected=rejected)
    if place is None:
        log.info("%s stays where it is: it is to be answered again, or archived by another run", version.shown)
    is_recorded = place is not None and ledger.record_archived(version, place=place, owes_csv=bool(services.work.answered_prefix))
    # A concurrent `forget` may have listed the objects before the copy or the report existed.
    if not is_recorded and ledger.is_forgotten(version):
        delete_objects_of(services.bucket, version, services.work.answered_prefix)


def _leave_incoming(services: Services, ledger: Ledger, record: FileRecord, *, rejected: bool) -> str | None:
    """Archive in the bucket. The new place is recorded before the source is deleted, so that a retry knows where the source lies."""
    version, source, begun = record.version, record.place, False
    mode = services.work.archive
    place = bucket.place_when_done(version, mode=mode, rejected=rejected)

    def begin() -> bool:
        nonlocal begun
        begun = ledger.begin_archiving(version, source=source, place=place)
        return begun

    try:
        return bucket.archive(services.bucket, version, mode=mode, rejected=rejected, may_delete=begin)
    except BaseException:
        # Only what this call began: another run may be archiving the file right now.
        if begun:
            ledger.cancel_archiving(version, source=source, place=place)
        raise


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, QaPlatformError) else f"{type(error).__name__}: {error}"
