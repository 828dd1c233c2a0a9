"""One batch of files, from the bucket to the table: claim, ingest, commit, wait, archive.

This is the whole way as plain code. Dagster calls it and tells people what came of it; it knows nothing of Dagster. Killed at
any point, it is simply run again with the same batch: what is done is found, and not done twice.
"""

import logging
import math
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import grpc
from google.api_core.exceptions import GoogleAPIError
from google.cloud import storage
from pachyderm_sdk import Client
from pachyderm_sdk.api import pps

from qa_platform import bookkeeping, bucket, following, pachd
from qa_platform.bookkeeping import FileRecord
from qa_platform.contract import ANSWER_PIPELINE, INCOMING, QUESTIONS_REPO, FileStatus, FileVersion, Manifest, file_id
from qa_platform.database import connect
from qa_platform.errors import InputError, QaPlatformError, TransientError
from qa_platform.following import JobFailed
from qa_platform.ingest import FileRejected, Write, split
from qa_platform.loading.load import load_file
from qa_platform.planning import ARCHIVABLE, DONE, Batch
from qa_platform.settings import IngestSettings, ModelSettings, PachydermSettings, PostgresSettings, WorkSettings

Log = logging.Logger | logging.LoggerAdapter

# How long a commit that somebody else holds open is waited for. Writing one takes well under a second once its files are in.
_OPEN_HEAD_SECONDS = 120
# How long files wait for another batch after jobs that failed without any file being to blame.
_BLAMELESS_SECONDS = 15.0
# How often one run launches a batch's jobs at most. An update of a pipeline kills its jobs; that is nobody's fault.
_LAUNCHES = 3


@dataclass(frozen=True)
class Services:
    """What a batch talks to, and how it is to be worked on."""

    bucket: storage.Bucket
    pachyderm: PachydermSettings
    postgres: PostgresSettings
    model: ModelSettings
    ingest: IngestSettings
    work: WorkSettings


class Follow(Protocol):
    """Waits until the jobs of a commit have succeeded, like `following.follow_jobs`, whose errors it raises.

    ``adopted`` says that an earlier run launched them.
    """

    def __call__(self, *, commit_id: str, adopted: bool) -> object: ...


Report = Callable[[Sequence[FileRecord]], object]


@dataclass(frozen=True)
class Outcome:
    """What became of a batch: the records of its files as they are now, and why not all of them are done, if so."""

    records: tuple[FileRecord, ...]
    failure: JobFailed | None = None


def answer_batch(
    services: Services,
    batch: Batch,
    *,
    token: str,
    run_id: str,
    log: Log,
    predecessors: Sequence[str] = (),
    follow: Follow | None = None,
    report: Report = lambda records: None,
) -> Outcome:
    """Answer the files of a batch, load the answers, and archive the sources. Interrupted, it stops the Pachyderm jobs.

    Args:
        token: what the files are claimed with so far; the claim passes to ``run_id``.
        predecessors: the runs that this one takes the place of, whose claims pass to it too.
        follow: waits for the jobs, and tells somebody of it; by default only ``log`` is told.
        report: tells somebody what became of the files. It is called before their sources are archived, so that whatever is archived
            has been told; files that were archived before are left out.

    Returns:
        The outcome. Files that another run holds are not in it.

    Raises:
        TransientError: a service was away. The claims are given back, and the same batch can be run again.
        InputError: a service refused what was asked of it; the message says what to do.
    """
    seconds = services.work.lease_seconds
    with connect(services.postgres) as connection:
        owned = bookkeeping.take_over(
            connection, batch.versions, token=token, predecessors=predecessors, owner=run_id, lease_seconds=seconds
        )
    versions = [record.version for record in owned]
    for name in sorted({v.name for v in batch.versions} - {v.name for v in versions}):
        log.warning("%s is left alone here: another run has claimed it", name)
    follow = follow or _LoggedFollow(services.pachyderm, log)
    try:
        with lease(services, run_id, log), _jobs_end_with_this_run(services, batch.id, log):
            todo = [r for r in owned if r.status not in DONE]
            failure = _answer(services, batch.id, todo, run_id=run_id, log=log, follow=follow)
            now = _records(services, versions)
            report([record for record in now if record.archived_at is None])
            archive_files(services, now, log=log)
    finally:
        with connect(services.postgres) as connection:
            bookkeeping.release(connection, run_id)
    return Outcome(tuple(_records(services, versions)), failure)


def reload_files(services: Services, keys: Sequence[str], *, log: Log) -> tuple[FileRecord, ...]:
    """Load the answers of these partitions' files once more, from the Pachyderm commits that hold them. No model is asked.

    Raises:
        InputError: a file was never answered, or its commit is gone.
    """
    with connect(services.postgres) as connection:
        recorded = bookkeeping.newest_by_partition(connection, keys)
    for key in keys:
        record = recorded.get(key)
        if record is None or not record.pachyderm_commit:
            raise InputError(f"partition {key!r} was never answered, so there is nothing to load; materialise answered_questions with it")
        with tempfile.TemporaryDirectory(prefix="qa-reload-") as folder, connect(services.postgres) as connection:
            with pachd.session(services.pachyderm, f"fetching the answers of {record.version.name}") as client:
                pachd.fetch_folder(client, f"{ANSWER_PIPELINE}@{record.pachyderm_commit}:/{file_id(record.version.name)}", Path(folder))
            load_file(connection, Path(folder), commit_id=record.pachyderm_commit, job_id=record.pachyderm_job)
            log.info("%s: loaded again from commit %s", record.version.name, record.pachyderm_commit)
    versions = [record.version for record in recorded.values()]
    archive_files(services, _records(services, versions), log=log)
    return tuple(_records(services, versions))


def archive_files(services: Services, records: Sequence[FileRecord], *, log: Log, until: float = math.inf) -> None:
    """Archive what is done, until the monotonic clock says ``until``. What cannot be archived now is, at a later look at the bucket."""
    for record in records:
        if time.monotonic() > until:
            break
        try:
            archive_file(services, record, log=log)
        except (QaPlatformError, GoogleAPIError) as error:
            # Its answers are in the table; nothing else must wait for it.
            log.warning("%s is done, and could not be archived now: %s", record.version.name, error)


def archive_file(services: Services, record: FileRecord, *, log: Log) -> None:
    """Take the source of a file that is done out of ``incoming/``, and record where it lies. Does nothing for any other file."""
    if record.status not in ARCHIVABLE or record.archived_at is not None:
        return
    version, rejected = record.version, record.status is FileStatus.REJECTED
    place = record.place
    if place == INCOMING + version.name:
        place = bucket.archive(services.bucket, version, mode=services.work.archive, rejected=rejected)
    if rejected:
        report = bucket.write_report(services.bucket, version, {"file": version.name, "error": record.error})
        log.info("%s is rejected; the reason lies beside it in %s", version.name, report)
    with connect(services.postgres) as connection:
        bookkeeping.archived(connection, version, place=place)


def _records(services: Services, versions: Sequence[FileVersion]) -> list[FileRecord]:
    with connect(services.postgres) as connection:
        found = bookkeeping.records(connection, versions)
    return [found[version.name, version.generation] for version in versions]


@contextmanager
def lease(services: Services, run_id: str, log: Log) -> Iterator[None]:
    """Renew the run's claims in the background for as long as the block lasts."""
    over = threading.Event()

    def renew() -> None:
        while not over.wait(services.work.lease_seconds / 4):
            try:
                with connect(services.postgres) as connection:
                    bookkeeping.renew(connection, run_id, services.work.lease_seconds)
            except QaPlatformError as error:
                log.warning("The claims could not be renewed now, and will be tried again: %s", error)

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@dataclass(frozen=True)
class _LoggedFollow:
    pachyderm: PachydermSettings
    log: Log

    def __call__(self, *, commit_id: str, adopted: bool) -> None:
        following.follow_jobs(self.pachyderm, commit_id, log=self.log)


@contextmanager
def _jobs_end_with_this_run(services: Services, batch_id: str, log: Log) -> Iterator[None]:
    """Stop the batch's jobs when this process is told to end. After an error they go on: another run adopts them."""
    try:
        yield
    except Exception:
        raise
    except BaseException:
        log.warning("Interrupted: stopping the Pachyderm jobs of this batch")
        with suppress(QaPlatformError), pachd.session(services.pachyderm, f"stopping the jobs of batch {batch_id}") as client:
            if info := pachd.find_batch(client, batch_id):
                if pachd.is_finishing(info):
                    following.stop_jobs(client, info.commit.id, reason="the run that launched it was terminated")
                else:
                    pachd.drop_commit(client, info.commit.id)
        raise


def _answer(services: Services, batch_id: str, files: Sequence[FileRecord], *, run_id: str, log: Log, follow: Follow) -> JobFailed | None:
    """Get the files into the table. A failed job is returned, not raised, since its good files are done all the same."""
    failure: JobFailed | None = None
    versions = [record.version for record in files]
    for _ in range(_LAUNCHES):
        failure = None
        if not files:
            break
        with connect(services.postgres) as connection:
            bookkeeping.start(connection, run_id, [r.version for r in files], run_id=run_id, batch_id=batch_id)
        with pachd.session(services.pachyderm, f"bringing batch {batch_id} into a commit") as client:
            adopted = _adopt(client, batch_id, log)
            commit_id = adopted or _ingest(services, client, batch_id, files, run_id=run_id, log=log)
        if commit_id is None:
            break
        in_commit = [r.version for r in _records(services, versions) if r.status is FileStatus.RUNNING]
        with connect(services.postgres) as connection:
            bookkeeping.record_commit(connection, in_commit, commit=commit_id, job=commit_id)
        try:
            follow(commit_id=commit_id, adopted=adopted is not None)
        except JobFailed as error:
            failure = error
        if failure is None or not failure.killed:
            break
        log.warning("%s. That is no fault of the files; what is not loaded is launched again", failure)
        files = [record for record in _records(services, versions) if record.status is FileStatus.RUNNING]
    _settle(services, versions, failure, log)
    return failure


def _adopt(client: Client, batch_id: str, log: Log) -> str | None:
    """The commit that an earlier run made for this batch, if its jobs run or have succeeded; else None, and nothing in the way."""
    info = pachd.find_batch(client, batch_id)
    if info is None:
        return None
    commit_id = info.commit.id
    if not pachd.is_finishing(info):
        log.info("Dropping commit %s, which an earlier run of this batch left unfinished", commit_id)
        pachd.drop_commit(client, commit_id)
        return None
    lost = (pps.JobState.JOB_FAILURE, pps.JobState.JOB_KILLED, pps.JobState.JOB_UNRUNNABLE)
    try:
        states = [client.pps.inspect_job(job=following.job_of(pipeline, commit_id)).state for pipeline in following.PIPELINES]
    except grpc.RpcError as error:
        # The commit is older than the pipeline, which was made anew in the meantime.
        if not pachd.is_code(error, grpc.StatusCode.NOT_FOUND):
            raise
        return None
    if any(state in lost for state in states):
        return None
    log.info("Adopting commit %s and its jobs, which an earlier run of this batch made", commit_id)
    return commit_id


def _ingest(services: Services, client: Client, batch_id: str, files: Sequence[FileRecord], *, run_id: str, log: Log) -> str | None:
    """Bring the files into one new commit; its id, or None if there was nothing to commit."""
    file_sets = []
    for record in files:
        try:
            file_sets.append(_ingest_file(services, client, record, run_id=run_id))
            log.info("%s: read and cut into shards", record.version.name)
        except (FileRejected, bucket.SourceChanged, *bucket.SOURCE_CHANGED_ERRORS) as error:
            set_aside(services, record, error, log)
        except (TransientError, GoogleAPIError, grpc.RpcError, ConnectionError):
            raise
        except Exception as error:
            # Whatever else one file brings up must not hold the others; it is charged to that file, and shown.
            log.exception("%s could not be read", record.version.name)
            with connect(services.postgres) as connection:
                bookkeeping.charge(
                    connection, record.version, error=f"{type(error).__name__}: {error}", max_attempts=services.work.max_attempts
                )
    if not file_sets:
        return None
    commit_id = None
    while commit_id is None:
        _make_way(services, client, batch_id, log)
        # None: another run was faster, and has the head now.
        commit_id = pachd.commit_batch(client, batch_id, file_sets)
    log.info("Commit %s in %s holds the batch", commit_id, QUESTIONS_REPO)
    return commit_id


def _ingest_file(services: Services, client: Client, record: FileRecord, *, run_id: str) -> str:
    def fill(write: Write) -> None:
        split_file(services, record, write, run_id=run_id)

    return pachd.make_file_set(client, file_id(record.version.name), fill)


def split_file(services: Services, record: FileRecord, write: Write, *, run_id: str) -> Manifest:
    """Read a file's source out of the bucket and cut it into shards, see `ingest.split`.

    Raises:
        FileRejected, bucket.SourceChanged, bucket.SOURCE_CHANGED_ERRORS: it cannot be read, or is gone; see `set_aside`.
    """
    with bucket.open_version(services.bucket, record.version, record.place) as source:
        return split(
            source,
            version=record.version,
            load_id=record.load_id,
            model=services.model.choice,
            settings=services.ingest,
            write=write,
            run_id=run_id,
        )


def set_aside(services: Services, record: FileRecord, error: Exception, log: Log) -> None:
    """Record why a file is not read: it is rejected, or superseded."""
    version = record.version
    # Believed only if a second look says the same: a file that is superseded is not looked at again.
    if not isinstance(error, FileRejected) and bucket.is_there(services.bucket, version, record.place):
        raise TransientError(f"{record.place}: the bucket says that generation {version.generation} is gone, yet it is there") from error
    with connect(services.postgres) as connection:
        if isinstance(error, FileRejected):
            log.warning("%s is rejected: %s", version.name, error)
            bookkeeping.reject_file(connection, version, reason=error.reason, detail=str(error))
        else:
            log.warning("%s was overwritten or deleted while it waited; generation %d is superseded", version.name, version.generation)
            bookkeeping.mark_superseded(connection, version)


def _make_way(services: Services, client: Client, batch_id: str, log: Log) -> None:
    """Wait until the head of ``questions`` is finished; drop it if it is this batch's, or of a run that holds no claim any more."""
    until = time.monotonic() + _OPEN_HEAD_SECONDS
    while info := pachd.open_head(client):
        with connect(services.postgres) as connection:
            alive = bookkeeping.batch_is_claimed(connection, info.description)
        if info.description == batch_id or (info.description and not alive):
            log.info("Dropping commit %s, left open by a run that is gone", info.commit.id)
            pachd.drop_commit(client, info.commit.id)
        elif time.monotonic() > until:
            raise TransientError(
                f"commit {info.commit.id} in {QUESTIONS_REPO} has been open for {_OPEN_HEAD_SECONDS} s; finish it or drop it with pachctl"
            )
        else:
            time.sleep(0.5)


def _settle(services: Services, versions: Sequence[FileVersion], failure: JobFailed | None, log: Log) -> None:
    """After the jobs: charge the guilty files, and free the others that are not loaded for another batch, uncharged."""
    with connect(services.postgres) as connection:
        for record in _records(services, versions):
            if record.status is not FileStatus.RUNNING:
                continue
            blame = failure.guilty.get(file_id(record.version.name)) if failure else _NOT_LOADED
            if blame is None:
                # With nobody to blame the trouble is a service's, which is given time.
                bookkeeping.requeue(connection, record.version, seconds=0 if failure and failure.guilty else _BLAMELESS_SECONDS)
                continue
            status = bookkeeping.charge(connection, record.version, error=blame, max_attempts=services.work.max_attempts)
            log.error("%s failed and is now %s. %s", record.version.name, status, blame)


_NOT_LOADED = (
    "its Pachyderm jobs succeeded, but it is not in the table: does the loader's secret dbaccess name the same database "
    "as this run's PG_* variables?"
)
