"""The program of the pipeline `question_answer` in its cron variant, which polls the bucket itself, without Dagster.

``python -m qa_platform.cron`` is one tick: it corrects records, archives what earlier ticks finished, lists the bucket, claims files,
answers them, and writes the same output to ``/pfs/out`` as the other variant, for `push-answers-to-sql` to load. It shares the code for
listing, planning, claiming, splitting and answering with the rest of the platform.

No file is lost or repeated: a source stays in ``incoming/`` until its answers are in the table, and a file stays claimed until it is
loaded. A file is ``running`` only while this program works on it, and again while it waits to be loaded. A running file without a live
claim therefore means that its worker died on it, or that it was not loaded in time: it is charged, and eventually parked.
"""

import logging
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from qa_platform.answering.engine import Answerer
from qa_platform.answering.shard import answer_shard
from qa_platform.batches.holding import lease
from qa_platform.batches.intake import set_aside, split_file
from qa_platform.batches.pending import look, reconcile, tidy
from qa_platform.clients import bucket
from qa_platform.clients.refusals import bucket_errors
from qa_platform.clients.services import Services
from qa_platform.clients.source import SourceChanged
from qa_platform.contract import MANIFEST, FileStatus, FileVersion, file_id, partition_key, shard_name
from qa_platform.errors import DeviceFailed, QaPlatformError
from qa_platform.ingest import FileRejected
from qa_platform.ledger import FileRecord, Ledger
from qa_platform.loading import migrate
from qa_platform.settings import BucketSettings, DatumSettings, PostgresSettings, WorkerSettings
from qa_platform.text import escaped_lines

_log = logging.getLogger("question_answer")

# The owner of the claims on files that are answered but not yet loaded, and how long loading may take. After that a file is answered again.
LOADING = "cron: to be loaded"
LOADING_SECONDS = 3600
_DIED = "the worker that answered it died, or its answers were not loaded in time"


def main() -> int:
    """Run one tick. Returns the exit status: 0, or 1 after logging one line that says why."""
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    worker = WorkerSettings()
    try:
        migrate.upgrade(PostgresSettings(), accept_newer=True)
        services = Services.from_environment(bucket.account_client(BucketSettings()))
        tick(services, worker.pfs_root / "out", job_id=DatumSettings().pach_job_id, threads=worker.threads, device=worker.device)
    except QaPlatformError as error:
        _log.error("%s", error)
        return 1
    return 0


def tick(services: Services, out: Path, *, job_id: str, threads: int = 0, device: str = "cpu") -> list[FileVersion]:
    """Answer one batch of waiting files into ``out``. Returns the files that were answered.

    Args:
        job_id: Pachyderm's job. It owns the claims during the tick, and is recorded with the files.

    Raises:
        InputError: the model cannot be used, or there is no such device.
        TransientError: the bucket or PostgreSQL is unavailable. The next tick, or the retry of this datum, repeats the work.
    """
    with Ledger(services.postgres) as ledger:
        return Tick(services, ledger, out, job_id).answer(threads, device)


@dataclass(frozen=True)
class Tick:
    """One tick. Its methods are the steps, in order."""

    services: Services
    ledger: Ledger
    out: Path
    job_id: str

    def answer(self, threads: int, device: str) -> list[FileVersion]:
        """Do all steps. See `tick`."""
        self._clear_stale_claims()
        with bucket_errors("looking at the bucket"):
            reconcile(self.services, _log)
            plan = look(self.services).plan
            tidy(self.services, plan, _log)
        _log.info("%d files wait", plan.waiting)
        if not plan.batches:
            return []
        answerer = Answerer(self.services.model, threads=threads, device=device, processes=0)
        answerer.warm_up()
        answered = []
        with lease(self.ledger, self.job_id, self.services.work.lease_seconds, _log), self._released_after_an_error():
            for version in self._one_batch([version for batch in plan.batches for version in batch.versions]):
                record = self._claim(version)
                try:
                    if record is not None and self._answer_file(answerer, record):
                        answered.append(version)
                except DeviceFailed as error:
                    # Only a new process can use the device: that of the next tick or, if there is nothing to hand over, of a retry.
                    if not answered:
                        raise
                    _log.error("the tick ends before its last file: %s", error)
                    break
            return self._hand_over(answered)

    def _clear_stale_claims(self) -> None:
        """Release the claims of an earlier attempt at this datum, and those on files that no longer wait to be loaded.

        Charge a file that the earlier attempt died on.
        """
        held = self.ledger.claimed()
        recorded = self.ledger.newest_by_partition([partition_key(n) for n, o in held.items() if o in (LOADING, self.job_id)])
        for record in recorded.values():
            name = record.version.name
            owner = held[name]
            if owner == self.job_id and record.status is FileStatus.RUNNING:
                self._charge(record, _DIED)
            elif owner == self.job_id or record.status is not FileStatus.RUNNING:
                self.ledger.release(owner, [name])

    @contextmanager
    def _released_after_an_error(self) -> Iterator[None]:
        """If the tick raises, no file is charged. If it dies, the file in progress is."""
        try:
            yield
        except Exception:
            self.ledger.release(self.job_id)
            raise

    def _one_batch(self, versions: Iterable[FileVersion]) -> list[FileVersion]:
        """The files of one batch. Its size is limited because a tick's answers are safe only when the tick ends."""
        chosen: list[FileVersion] = []
        size, work = 0, self.services.work
        for version in versions:
            size += version.size
            if chosen and (len(chosen) == work.batch_files or size > work.batch_bytes):
                break
            chosen.append(version)
        return chosen

    def _claim(self, version: FileVersion) -> FileRecord | None:
        """Claim a file and mark it as running. None if another owner was faster, or if the file had to be charged."""
        if not self.ledger.claim([version], owner=self.job_id, lease_seconds=self.services.work.lease_seconds):
            return None
        record = self.ledger.records([version])[version.name, version.generation]
        if record.status is FileStatus.RUNNING:
            self._charge(record, _DIED)
            return None
        return next(iter(self.ledger.start(self.job_id, [version], run_id="", batch_id="")), None)

    def _answer_file(self, answerer: Answerer, record: FileRecord) -> bool:
        """Answer one file into its folder in ``out``. Returns whether it was answered; if not, the folder is removed.

        Raises:
            DeviceFailed: the file is deferred, in case it is its rows on which the device fails.
        """
        version, target = record.version, self.out / file_id(record.version.name)
        try:
            with tempfile.TemporaryDirectory(prefix="qa-cron-") as folder:
                self._answer_shards(answerer, record, Path(folder), target)
        except Exception as error:
            shutil.rmtree(target, ignore_errors=True)
            self._settle(record, error)
            if isinstance(error, DeviceFailed):
                raise
            return False
        # Pending again, but still claimed: if the worker dies on another file, this one is not charged.
        self.ledger.requeue(self.job_id, [version])
        kept = self.ledger.claim([version], owner=self.job_id, lease_seconds=self.services.work.lease_seconds)
        if not kept:
            shutil.rmtree(target)
        return bool(kept)

    def _settle(self, record: FileRecord, error: Exception) -> None:
        """Record why a file could not be answered. No error of one file may hold up the others."""
        version = record.version
        if isinstance(error, (FileRejected, SourceChanged)):
            try:
                set_aside(self.services, self.ledger, record, error, _log)
                return
            except QaPlatformError as refused:
                error = refused
        if isinstance(error, QaPlatformError):
            self.ledger.defer(self.job_id, [version], error=str(error), work=self.services.work, suspect_after=0)
            _log.error("%s: a service that it needs is unavailable; it is retried later: %s", version.shown, error)
        else:
            _log.error("%s could not be answered", version.shown, exc_info=error)
            self._charge(record, f"{type(error).__name__}: {error}")

    def _answer_shards(self, answerer: Answerer, record: FileRecord, source: Path, target: Path) -> None:
        def write(path: str, chunks: Iterable[bytes]) -> None:
            file_path = source / path
            file_path.parent.mkdir(parents=True, exist_ok=True)
            with file_path.open("ab") as file:
                file.writelines(chunks)

        manifest = split_file(self.services, record, write, _log, on_read=partial(self.ledger.record_layout, record.version))
        for shard in manifest.shards:
            done = answer_shard(answerer, source / shard.name, target / shard.name)
            _log.info("%s, %s: %d rows in %.1f s", record.version.shown, shard.name, done.rows, done.seconds)
        shutil.copyfile(source / shard_name(0) / MANIFEST, target / MANIFEST)

    def _hand_over(self, answered: Sequence[FileVersion]) -> list[FileVersion]:
        """Leave answered files to the loader, claimed for as long as loading may take. Returns the files that stay in ``out``."""
        self.ledger.start(self.job_id, answered, run_id="", batch_id="")
        self.ledger.record_commit(self.job_id, answered, commit=self.job_id, job=self.job_id)
        taken = self.ledger.take_over(answered, token=self.job_id, owner=LOADING, lease_seconds=LOADING_SECONDS)
        self.ledger.release(self.job_id)
        mine = {record.version for record in taken}
        for version in answered:
            if version not in mine:
                shutil.rmtree(self.out / file_id(version.name))
        return [version for version in answered if version in mine]

    def _charge(self, record: FileRecord, error: str) -> None:
        status = self.ledger.charge(self.job_id, record.version, error=error, work=self.services.work, load_id=record.load_id)
        _log.error("%s failed and is now %s: %s", record.version.shown, status, escaped_lines(error))


if __name__ == "__main__":
    sys.exit(main())
