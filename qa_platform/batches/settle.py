"""Settles the files that are not loaded after the jobs: charges, defers or requeues each of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from qa_platform.batches.blame import Verdict
from qa_platform.batches.failure import JobFailure
from qa_platform.batches.plan import batch_id
from qa_platform.clients.services import Log
from qa_platform.contract import FileStatus, file_id
from qa_platform.ledger import FileRecord, Ledger
from qa_platform.settings import WorkSettings
from qa_platform.text import escaped_lines

_NOT_LOADED = JobFailure(
    "the Pachyderm jobs succeeded, but their files are not in the table: does the loader's secret dbaccess name the same database "
    "as this run's PG_* variables? `qa-platform pachyderm apply` sends it again"
)
# The maximum number of files that a message names.
_NAMED = 10


@dataclass(frozen=True)
class Settlement:
    """Settles the files of a run's batch.

    Args:
        alone: the batch had one file.
    """

    ledger: Ledger
    work: WorkSettings
    run_id: str
    log: Log
    alone: bool

    def settle(self, left: Sequence[FileRecord], failure: JobFailure | None) -> JobFailure | None:
        """Charge the guilty files. Release the other files that are not loaded, uncharged, for another batch.

        Returns:
            The failure, even if no job failed.
        """
        if not left:
            return failure
        failure = failure or _NOT_LOADED
        if failure.verdict.guilty or failure.verdict.suspects:
            for record in left:
                self._settle_file(record, failure.verdict)
            return failure
        versions = [record.version for record in left]
        self.ledger.defer(self.run_id, versions, error=failure.cause, work=self.work, suspect_after=self._suspect_after(failure))
        self.log.error("%d files wait for another attempt, uncharged. No file is to blame: %s", len(left), escaped_lines(failure.cause))
        return failure

    def _settle_file(self, record: FileRecord, verdict: Verdict) -> None:
        """Charge a guilty file; retry a suspect alone, and charge it if that fails too; requeue any other file at once."""
        version, folder = record.version, file_id(record.version.name)
        why = verdict.guilty.get(folder) or verdict.suspects.get(folder, "")
        if not why:
            self.ledger.requeue(self.run_id, [version])
        elif folder in verdict.guilty or (self.alone and (record.was_deferred or record.attempts)):
            status = self.ledger.charge(self.run_id, version, error=why, work=self.work, load_id=record.load_id)
            self.log.error("%s failed and is now %s. %s", version.shown, status, escaped_lines(why))
        else:
            its_own = batch_id([(version, record.load_id)])
            error = f"retried alone: {why}"
            self.ledger.defer(self.run_id, [version], error=error, work=self.work, blameless=False, batch_id=its_own)
            self.log.error("%s is retried alone. %s", version.shown, escaped_lines(why))

    def _suspect_after(self, failure: JobFailure) -> float | None:
        """Seconds until an uncharged file that keeps failing while others are loaded becomes a suspect; None for never."""
        if failure.killed or failure.not_started or failure.missing:
            return None
        # A blameless fault is believed only for a while. Otherwise a file that fills the workers' disk would be retried for ever.
        return self.work.retry_most_seconds if failure.verdict.blameless else 0


def parked(records: Sequence[FileRecord]) -> JobFailure | None:
    """The failure of a batch with parked files, which are not retried; None if it has none."""
    failed = [record for record in records if record.status is FileStatus.FAILED]
    if not failed:
        return None
    lines = [f"{record.version.shown}: {escaped_lines(record.error)}" for record in failed[:_NAMED]]
    more = [f"and {len(failed) - _NAMED} more"] if len(failed) > _NAMED else []
    message = "\n".join([f"{len(failed)} of {len(records)} files are parked as failed:", *lines, *more])
    return JobFailure(message, Verdict({file_id(record.version.name): record.error for record in failed}))
