"""One batch of files, from the bucket to the table: claim, ingest, commit, wait, archive.

This is the whole way as plain code. Dagster calls it and tells people what came of it; it knows nothing of Dagster. Killed at
any point, it is simply run again with the same batch: what is done is found, and not done twice.
"""

import logging
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import grpc
from google.cloud import storage
from pachyderm_sdk import Client
from pachyderm_sdk.api import pps

from qa_platform import bookkeeping, bucket, following, pachd
from qa_platform.bookkeeping import FileRecord
from qa_platform.contract import (
    ANSWER_PIPELINE,
    BLAMELESS,
    INCOMING,
    QUESTIONS_REPO,
    FileStatus,
    FileVersion,
    Manifest,
    ModelChoice,
    file_id,
)
from qa_platform.database import connect
from qa_platform.errors import InputError, QaPlatformError, TransientError
from qa_platform.following import JobFailed
from qa_platform.ingest import FileRejected, Write, report_on_file, split
from qa_platform.loading.load import load_file
from qa_platform.planning import ARCHIVABLE, DONE, Batch
from qa_platform.settings import IngestSettings, PachydermSettings, PostgresSettings, WorkSettings

Log = logging.Logger | logging.LoggerAdapter

# How long a commit that somebody else holds open is waited for. Writing one takes well under a second once its files are in.
_OPEN_HEAD_SECONDS = 120
# How often one run launches a batch's jobs at most. An update of a pipeline kills its jobs; that is nobody's fault.
_LAUNCHES = 3


@dataclass(frozen=True)
class Services:
    """What a batch talks to, and how it is to be worked on."""

    bucket: storage.Bucket
    pachyderm: PachydermSettings
    postgres: PostgresSettings
    model: ModelChoice
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
        TransientError: a service was away. The claims are given back, and the same batch can be run again, by the sensor after a while.
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
    except QaPlatformError as error:
        with connect(services.postgres) as connection:
            bookkeeping.put_off_run(connection, run_id, error=f"{BLAMELESS}{error}", work=services.work)
        raise
    finally:
        with connect(services.postgres) as connection:
            bookkeeping.release(connection, run_id)
    return Outcome(tuple(_records(services, versions)), failure)


def reload_files(services: Services, keys: Sequence[str], *, run_id: str, log: Log) -> tuple[FileRecord, ...]:
    """Load the answers of these partitions' files once more, from the Pachyderm commits that hold them. No model is asked.

    Returns:
        Their records. Files that another run holds are not in it.

    Raises:
        InputError: a file was never answered, or its commit is gone.
    """
    with connect(services.postgres) as connection:
        recorded = bookkeeping.newest_by_partition(connection, keys)
        for key in keys:
            if key not in recorded or not recorded[key].pachyderm_commit:
                raise InputError(
                    f"partition {key!r} was never answered, so there is nothing to load; materialise answered_questions with it"
                )
        versions = [recorded[key].version for key in keys]
        seconds = services.work.lease_seconds
        owned = bookkeeping.take_over(connection, versions, token=run_id, owner=run_id, lease_seconds=seconds)
    for name in sorted({v.name for v in versions} - {r.version.name for r in owned}):
        log.warning("%s is left alone here: another run has claimed it", name)
    try:
        with lease(services, run_id, log):
            for record in owned:
                _reload(services, record)
                log.info("%s: loaded again from commit %s", record.version.name, record.pachyderm_commit)
            archive_files(services, _records(services, [r.version for r in owned]), log=log)
    finally:
        with connect(services.postgres) as connection:
            bookkeeping.release(connection, run_id)
    return tuple(_records(services, [r.version for r in owned]))


def _reload(services: Services, record: FileRecord) -> None:
    name, commit = record.version.name, record.pachyderm_commit
    with tempfile.TemporaryDirectory(prefix="qa-reload-") as folder, connect(services.postgres) as connection:
        try:
            with pachd.session(services.pachyderm, f"fetching the answers of {name}") as client:
                pachd.fetch_folder(client, f"{ANSWER_PIPELINE}@{commit}:/{file_id(name)}", Path(folder))
        except (pachd.NotThere, tarfile.TarError) as error:
            raise InputError(
                f"{name}: Pachyderm has commit {commit} no more (QA_COMMITS_KEPT_DAYS); to answer it anew, materialise answered_questions"
            ) from error
        loaded = load_file(connection, Path(folder), commit_id=commit, job_id=record.pachyderm_job)
    if loaded.status is FileStatus.SUPERSEDED:
        raise InputError(f"{name}: not loaded again, since something newer is there or asked for; wait for the sensor")


def archive_files(services: Services, records: Sequence[FileRecord], *, log: Log) -> None:
    """Archive what is done. What cannot be archived now is, at a later look at the bucket."""
    for record in records:
        try:
            archive_file(services, record, log=log)
        except Exception as error:
            # Its answers are in the table; whatever it is, nothing else must wait for it.
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
        report = bucket.write_report(services.bucket, version, report_on_file(record.error))
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
    versions, in_vain = [record.version for record in files], False
    for _ in range(_LAUNCHES):
        failure = None
        if not files:
            break
        with connect(services.postgres) as connection:
            bookkeeping.start(connection, run_id, [r.version for r in files], run_id=run_id, batch_id=batch_id)
        with pachd.session(services.pachyderm, f"bringing batch {batch_id} into a commit") as client:
            adopted = None if in_vain else _adopt(client, batch_id, log)
            commit_id = adopted or _ingest(services, client, batch_id, files, run_id=run_id, log=log)
        if commit_id is None:
            break
        with connect(services.postgres) as connection:
            in_commit = [r.version for r in _running(services, versions, run_id)]
            bookkeeping.record_commit(connection, run_id, in_commit, commit=commit_id, job=commit_id)
        try:
            follow(commit_id=commit_id, adopted=adopted is not None)
        except JobFailed as error:
            failure = error
        files = _running(services, versions, run_id)
        in_vain = bool(files and adopted and not failure)
        if in_vain:
            # Its jobs are done, and will not do anything more: the table was restored from before, or the loader wrote elsewhere.
            log.warning("Commit %s is done, but %d of its files are not in the table; they are launched again", commit_id, len(files))
        elif failure and failure.killed:
            log.warning("%s. That is no fault of the files; what is not loaded is launched again", failure)
        else:
            break
    return _settle(services, versions, failure, run_id=run_id, log=log)


def _running(services: Services, versions: Sequence[FileVersion], run_id: str) -> list[FileRecord]:
    """The files that this run works on: neither done, nor taken over by another run after this one had lost its claim."""
    return [r for r in _records(services, versions) if r.status is FileStatus.RUNNING and r.claim_owner in ("", run_id)]


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
    for number, record in enumerate(files):
        try:
            if file_set := _ingest_file(services, client, record, run_id=run_id, log=log):
                file_sets.append(file_set)
        except (grpc.RpcError, ConnectionError):
            raise
        except QaPlatformError as error:
            # The bucket would keep each of the others waiting as long.
            log.warning(
                "%s could not be read; it is put off, and what comes after it goes into another batch: %s", record.version.name, error
            )
            with connect(services.postgres) as connection:
                reason, later = f"{BLAMELESS}{error}", [other.version for other in files[number + 1 :]]
                bookkeeping.put_off(connection, run_id, [record.version], error=reason, work=services.work, suspect_after=0)
                if file_sets:
                    bookkeeping.requeue(connection, run_id, later)
                else:
                    # Else objects that nobody may read would make run after run, one file each, before anything newer.
                    bookkeeping.put_off(connection, run_id, later, error=reason, work=services.work)
            if not file_sets:
                raise
            break
        except Exception as error:
            # Whatever else one file brings up must not hold the others; it is charged to that file, and shown.
            log.exception("%s could not be read", record.version.name)
            with connect(services.postgres) as connection:
                bookkeeping.charge(connection, run_id, record.version, error=f"{type(error).__name__}: {error}", work=services.work)
    if not file_sets:
        return None
    commit_id = None
    while commit_id is None:
        _make_way(services, client, batch_id, log)
        # None: another run was faster, and has the head now.
        commit_id = pachd.commit_batch(client, batch_id, file_sets)
    log.info("Commit %s in %s holds the batch", commit_id, QUESTIONS_REPO)
    return commit_id


def _ingest_file(services: Services, client: Client, record: FileRecord, *, run_id: str, log: Log) -> str | None:
    """Bring one file into a file set; its id, or None for a file that is set aside."""

    def fill(write: Write) -> None:
        split_file(services, record, write, run_id=run_id)

    try:
        file_set = pachd.make_file_set(client, file_id(record.version.name), fill)
    except (FileRejected, bucket.SourceChanged) as error:
        set_aside(services, record, error, log)
        return None
    log.info("%s: read and cut into shards", record.version.name)
    return file_set


def split_file(services: Services, record: FileRecord, write: Write, *, run_id: str) -> Manifest:
    """Read a file's source out of the bucket and cut it into shards, see `ingest.split`.

    Raises:
        FileRejected, bucket.SourceChanged: it cannot be read, or is gone; see `set_aside`.
        InputError, TransientError: the bucket does not let us read it, or is away.
    """
    reading = bucket.bucket_errors(f"reading {record.version.name}")
    with reading, bucket.open_version(services.bucket, record.version, record.place) as source:
        try:
            return split(
                source,
                version=record.version,
                load_id=record.load_id,
                model=services.model,
                settings=services.ingest,
                write=write,
                run_id=run_id,
            )
        except FileRejected:
            # A download that went wrong must not be taken for a file that is wrong.
            source.read_to_the_end()
            raise


def set_aside(services: Services, record: FileRecord, error: Exception, log: Log) -> None:
    """Record why a file is not read: it is rejected, or superseded."""
    version = record.version
    if not isinstance(error, FileRejected):
        (now,) = _records(services, [version])
        if now.place != record.place:
            raise TransientError(f"{record.place} was archived to {now.place} while it was to be read") from error
        with bucket.bucket_errors(f"looking for {version.name}"):
            there = bucket.is_there(services.bucket, version, record.place)
        # Believed only if a second look says the same: a file that is superseded is not looked at again.
        if there:
            raise TransientError(
                f"{record.place}: the bucket says that generation {version.generation} is gone, yet it is there"
            ) from error
    with connect(services.postgres) as connection:
        if isinstance(error, FileRejected):
            log.warning("%s is rejected: %s", version.name, error)
            bookkeeping.reject_file(connection, version, error=str(error))
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


def _settle(services: Services, versions: Sequence[FileVersion], failure: JobFailed | None, *, run_id: str, log: Log) -> JobFailed | None:
    """After the jobs: charge the guilty files, and free the others that are not loaded for another batch, uncharged.

    Returns:
        The failure, also one that no job had a part in.
    """
    left = _running(services, versions, run_id)
    if not left:
        return failure
    failure = failure or JobFailed(_NOT_LOADED, {})
    charged = [record for record in left if file_id(record.version.name) in failure.guilty]
    others = [record.version for record in left if record not in charged]
    with connect(services.postgres) as connection:
        if not failure.guilty:
            error = f"{BLAMELESS}{failure.cause}"
            bookkeeping.put_off(
                connection, run_id, others, error=error, work=services.work, suspect_after=_suspect_after(services, failure)
            )
            log.error("%d files are put off. %s", len(others), error)
            return failure
        bookkeeping.requeue(connection, run_id, others)
        for record in charged:
            blame = failure.guilty[file_id(record.version.name)]
            status = bookkeeping.charge(connection, run_id, record.version, error=blame, work=services.work)
            log.error("%s failed and is now %s. %s", record.version.name, status, blame)
    return failure


def _suspect_after(services: Services, failure: JobFailed) -> float | None:
    """For how long files are put off that no failure is charged to, before one that fails on while others are loaded is suspected."""
    if failure.killed:
        return None
    # What workers say of themselves is believed for a while: a file that fills their disk would else be tried for ever.
    return services.work.retry_most_seconds if failure.innocent else 0


_NOT_LOADED = (
    "the Pachyderm jobs succeeded, but their files are not in the table: does the loader's secret dbaccess name the same database "
    "as this run's PG_* variables? `qa-platform pachyderm apply` sends it anew"
)
