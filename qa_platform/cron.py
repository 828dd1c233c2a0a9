"""The program of the pipeline `question_answer` where it looks into the bucket by itself, on a cron tick, without Dagster.

``python -m qa_platform.cron`` is one tick: it archives what earlier ticks finished, looks at the bucket, claims files, answers them, and
leaves in ``/pfs/out`` what the other variant leaves, which `push-answers-to-sql` loads. Looking, planning, claims, splitting and
answering are the platform's own.

Nothing is lost or repeated: a source stays in ``incoming/`` until its answers are in the table, and a file is claimed from here until it
is loaded. It is ``running`` only while this program works on it and, again, while it waits to be loaded. So a file that is running
and that nobody has a claim on any more is one that its worker died of, or that was not loaded in time: it is charged, and parked
in the end.
"""

import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from google.cloud import storage

from qa_platform import bookkeeping, bucket
from qa_platform.answering.engine import Answerer
from qa_platform.answering.shard import answer_shard
from qa_platform.batch import Services, lease, set_aside, split_file
from qa_platform.bookkeeping import FileRecord
from qa_platform.contract import BLAMELESS, MANIFEST, FileStatus, FileVersion, file_id, partition_key
from qa_platform.database import connect
from qa_platform.errors import QaPlatformError
from qa_platform.ingest import FileRejected
from qa_platform.loading import migrate
from qa_platform.pachyderm_secrets import service_account
from qa_platform.planning import ARCHIVABLE
from qa_platform.settings import (
    BucketSettings,
    DatumSettings,
    IngestSettings,
    ModelSettings,
    PachydermSettings,
    PostgresSettings,
    WorkerSettings,
    WorkSettings,
)
from qa_platform.waiting import look, tidy

_log = logging.getLogger("question_answer")

# Who claims what is answered and not loaded yet, and how long loading may take. After that the file is answered once more.
LOADING = "cron: to be loaded"
LOADING_SECONDS = 3600
_DIED = "the worker that answered it died, or its answers were not loaded in time"


def main() -> int:
    """One tick. Exit status 0, or 1 with one line that says why."""
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    worker = WorkerSettings()
    try:
        migrate.upgrade(PostgresSettings())
        tick(_services(), worker.pfs_root / "out", job_id=DatumSettings().pach_job_id, threads=worker.threads)
    except QaPlatformError as error:
        _log.error("%s", error)
        return 1
    return 0


def _services() -> Services:
    settings = BucketSettings()
    project = settings.google_cloud_project
    if settings.gcs_access.get_secret_value().strip():
        # From memory: no credential is written to a file.
        client = storage.Client.from_service_account_info(json.loads(service_account(settings.gcs_access)), project=project)
    else:
        client = storage.Client(project=project)
    opened = bucket.open_bucket(client, settings.storage_bucket)
    return Services(opened, PachydermSettings(), PostgresSettings(), ModelSettings().pinned, IngestSettings(), WorkSettings())


def tick(services: Services, out: Path, *, job_id: str, threads: int = 0) -> list[FileVersion]:
    """Answer one batch of what waits into ``out``; the files that were answered.

    Args:
        job_id: Pachyderm's job, which owns the claims meanwhile and is recorded with the files.

    Raises:
        TransientError: the bucket or PostgreSQL is away. The next tick, or this datum's next try, does it again.
    """
    _let_go(services, job_id)
    with bucket.bucket_errors("looking at the bucket"):
        found = look(services).plan
        tidy(services, found, _log)
    _log.info("%d files wait", found.waiting)
    if not found.batches:
        return []
    answerer = Answerer(services.model, threads=threads)
    answerer.warm_up()
    answered = []
    with lease(services, job_id, _log), _given_back_after_an_error(services, job_id):
        for version in _first(services, [version for batch in found.batches for version in batch.versions]):
            record = _claimed(services, version, job_id)
            if record is not None and _answer_file(services, answerer, record, out, job_id):
                answered.append(version)
        return _hand_over(services, answered, out, job_id)


@contextmanager
def _given_back_after_an_error(services: Services, job_id: str) -> Iterator[None]:
    """An error that ends the tick is nobody's fault; a death, which ends it without one, is that of the running file."""
    try:
        yield
    except Exception:
        with connect(services.postgres) as connection:
            bookkeeping.release(connection, job_id)
        raise


def _let_go(services: Services, job_id: str) -> None:
    """Give up claims that are over: of files that are loaded, and of an earlier try of this same datum, which died."""
    with connect(services.postgres) as connection:
        held = bookkeeping.claimed(connection)
        recorded = bookkeeping.newest_by_partition(connection, [partition_key(n) for n, o in held.items() if o in (LOADING, job_id)])
        for record in recorded.values():
            owner, name = held[record.version.name], record.version.name
            if owner == job_id and record.status is FileStatus.RUNNING:
                _charge(services, record.version, job_id, _DIED)
            elif owner == job_id or record.status in ARCHIVABLE:
                bookkeeping.release(connection, owner, [name])


def _first(services: Services, versions: Iterable[FileVersion]) -> list[FileVersion]:
    """As many files as one batch may have: what a tick has answered is safe only when it ends."""
    chosen: list[FileVersion] = []
    size = 0
    for version in versions:
        size += version.size
        if chosen and (len(chosen) == services.work.batch_files or size > services.work.batch_bytes):
            break
        chosen.append(version)
    return chosen


def _claimed(services: Services, version: FileVersion, job_id: str) -> FileRecord | None:
    """Claim a file and mark it as being worked on. None where somebody was faster, or where it has to be charged."""
    with connect(services.postgres) as connection:
        if not bookkeeping.claim(connection, [version], owner=job_id, lease_seconds=services.work.lease_seconds):
            return None
        record = bookkeeping.records(connection, [version])[version.name, version.generation]
        if record.status is FileStatus.RUNNING:
            _charge(services, version, job_id, _DIED)
            return None
        bookkeeping.start(connection, job_id, [version], run_id="", batch_id="")
    return record


def _answer_file(services: Services, answerer: Answerer, record: FileRecord, out: Path, job_id: str) -> bool:
    """Answer one file into its folder in ``out``; whether that was done. Else nothing of it is left there."""
    target = out / file_id(record.version.name)
    try:
        with tempfile.TemporaryDirectory(prefix="qa-cron-") as folder:
            _answer_shards(services, answerer, record, Path(folder), target, job_id)
    except (FileRejected, bucket.SourceChanged) as error:
        shutil.rmtree(target, ignore_errors=True)
        set_aside(services, record, error, _log)
        return False
    except QaPlatformError as error:
        shutil.rmtree(target, ignore_errors=True)
        with connect(services.postgres) as connection:
            bookkeeping.put_off(connection, job_id, [record.version], error=f"{BLAMELESS}{error}", work=services.work, suspect_after=0)
        _log.exception("%s: something it needs is away; it will be tried again", record.version.name)
        return False
    except Exception as error:
        # Whatever else one file brings up must not hold the others.
        shutil.rmtree(target, ignore_errors=True)
        _log.exception("%s could not be answered", record.version.name)
        _charge(services, record.version, job_id, f"{type(error).__name__}: {error}")
        return False
    with connect(services.postgres) as connection:
        # No longer worked on, but still claimed: should the worker die of another file, this one is not to blame.
        bookkeeping.requeue(connection, job_id, [record.version])
        kept = bookkeeping.claim(connection, [record.version], owner=job_id, lease_seconds=services.work.lease_seconds)
    if not kept:
        shutil.rmtree(target)
    return bool(kept)


def _answer_shards(services: Services, answerer: Answerer, record: FileRecord, source: Path, target: Path, job_id: str) -> None:
    def write(path: str, chunks: Iterable[bytes]) -> None:
        place = source / path
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("ab") as file:
            file.writelines(chunks)

    manifest = split_file(services, record, write, run_id=job_id)
    for shard in manifest.shards:
        done = answer_shard(answerer, source / shard.name, target / shard.name)
        _log.info("%s, %s: %d rows in %.1f s", record.version.name, shard.name, done.rows, done.seconds)
    shutil.copyfile(source / MANIFEST, target / MANIFEST)


def _hand_over(services: Services, answered: Sequence[FileVersion], out: Path, job_id: str) -> list[FileVersion]:
    """Let what is answered wait to be loaded, claimed for as long as that may take; the files that are left in ``out``."""
    handed = []
    with connect(services.postgres) as connection:
        bookkeeping.start(connection, job_id, answered, run_id="", batch_id="")
        bookkeeping.record_commit(connection, job_id, answered, commit=job_id, job=job_id)
        taken = bookkeeping.take_over(connection, answered, token=job_id, owner=LOADING, lease_seconds=LOADING_SECONDS)
        bookkeeping.release(connection, job_id)
    mine = {record.version for record in taken}
    for version in answered:
        if version in mine:
            handed.append(version)
        else:
            shutil.rmtree(out / file_id(version.name))
    return handed


def _charge(services: Services, version: FileVersion, job_id: str, error: str) -> None:
    with connect(services.postgres) as connection:
        status = bookkeeping.charge(connection, job_id, version, error=error, work=services.work)
    _log.error("%s failed and is now %s: %s", version.name, status, error)


if __name__ == "__main__":
    sys.exit(main())
