"""Takes one batch of files from the bucket to the table: claim, read, commit, follow, settle, report, archive.

`BatchRun` is the whole process as plain code, in order. Dagster calls it and reports the outcome; it knows nothing of Dagster. If it
is killed at any point, it is run again with the same batch: it recognises finished work and does not repeat it.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol

import grpc
from pachyderm_sdk import Client
from pachyderm_sdk.api import pfs, pps

from qa_platform.batches import commits
from qa_platform.batches.archive import archive_files
from qa_platform.batches.failure import JobFailed, JobFailure
from qa_platform.batches.holding import lease
from qa_platform.batches.intake import Intake
from qa_platform.batches.jobs import Watcher, follow_jobs, refuse_stopped, stop_jobs
from qa_platform.batches.plan import Batch
from qa_platform.batches.settle import Settlement, parked
from qa_platform.clients import pachyderm
from qa_platform.clients.pachyderm import job_of
from qa_platform.clients.services import Log, Services
from qa_platform.contract import PIPELINES, QUESTIONS_REPO, FileStatus, FileVersion, file_id, shard_name
from qa_platform.errors import QaPlatformError, TransientError
from qa_platform.ledger import FileRecord, Ledger
from qa_platform.ledger.states import DONE
from qa_platform.settings import PachydermSettings
from qa_platform.text import escaped

# How long to wait for a commit that another run holds open. Writing one takes well under a second once its files are in.
_OPEN_HEAD_SECONDS = 120
# How often one run may launch a batch's jobs. A pipeline update kills its jobs, and a job can lose its output; neither is a file's fault.
_LAUNCHES = 3
_LOST = (pps.JobState.JOB_FAILURE, pps.JobState.JOB_KILLED, pps.JobState.JOB_UNRUNNABLE)


class Follow(Protocol):
    """Waits until the jobs of a commit have succeeded. Raises the errors of `jobs.follow_jobs`.

    ``adopted``: an earlier run launched them. ``waiting`` is called with what they wait for, "" when they continue.
    """

    def __call__(self, *, commit_id: str, adopted: bool, waiting: Callable[[str], object]) -> object: ...


Report = Callable[[Sequence[FileRecord]], object]


@dataclass(frozen=True)
class Outcome:
    """The outcome of a batch: the current records of its files, and the failure if not all of them are done."""

    records: tuple[FileRecord, ...]
    failure: JobFailure | None = None


@dataclass(frozen=True)
class _Launch:
    """One launch of the batch's jobs: the commit that holds its files, and the failure if not all of them were loaded."""

    commit_id: str
    files: int
    failure: JobFailure | None = None

    @property
    def missing(self) -> Mapping[str, frozenset[str]]:
        """Shards whose output is missing, by file id."""
        return self.failure.missing if self.failure else {}


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
    """Answer the files of a batch, load the answers, and archive the sources. If interrupted, stop the Pachyderm jobs.

    Args:
        token: the current owner of the claims on the files; they pass to ``run_id``.
        predecessors: the runs that this one replaces. Their claims pass to it too.
        follow: waits for the jobs and reports on them; by default it reports only to ``log``.
        report: reports the outcome of the files. It is called before their sources are archived, so that every archived file has been
            reported. Files that were archived before are left out.

    Returns:
        The outcome. Files that another run holds are left out.

    Raises:
        TransientError: a service was unavailable. The claims are released, and the sensor runs the same batch again after a while.
        InputError: a service refused a request; the message says what to do.
    """
    with Ledger(services.postgres) as ledger:
        run = BatchRun(services, ledger, batch, run_id, log, follow or _LoggedFollow(services.pachyderm, log), report)
        return run.answer(token, predecessors)


@dataclass(frozen=True)
class BatchRun:
    """One run of one batch. Its methods are the steps, in order."""

    services: Services
    ledger: Ledger
    batch: Batch
    run_id: str
    log: Log
    follow: Follow
    report: Report = field(default=lambda records: None)

    def answer(self, token: str, predecessors: Sequence[str]) -> Outcome:
        """Run all steps. See `answer_batch`."""
        owned = self.claim(token, predecessors)
        versions = [record.version for record in owned]
        try:
            with lease(self.ledger, self.run_id, self.services.work.lease_seconds, self.log), self._jobs_end_with_this_run():
                failure = self.load([record for record in owned if record.status not in DONE])
                done = self._records(versions)
                self.report([record for record in done if record.archived_at is None])
                archive_files(self.services, self.ledger, done, log=self.log)
        except QaPlatformError as error:
            self.ledger.defer_run(self.run_id, error=str(error), work=self.services.work)
            raise
        finally:
            self.ledger.release(self.run_id)
        records = tuple(self._records(versions))
        # A file may be parked without any job: its last attempt failed while it was read, or it was parked before this run.
        return Outcome(records, failure or parked(records))

    # 1. Claim the files.

    def claim(self, token: str, predecessors: Sequence[str]) -> list[FileRecord]:
        """Take over the claims on the batch's files. Returns the records of those that this run now holds."""
        owned = self.ledger.take_over(
            self.batch.versions,
            token=token,
            predecessors=predecessors,
            owner=self.run_id,
            lease_seconds=self.services.work.lease_seconds,
        )
        for name in sorted({v.name for v in self.batch.versions} - {record.version.name for record in owned}):
            self.log.warning("%s is skipped: another run has claimed it", escaped(name))
        return owned

    # 2. Load them into the table: one launch of the two Pachyderm jobs, or a few if something was lost.

    def load(self, files: Sequence[FileRecord]) -> JobFailure | None:
        """Load the files into the table. Returns the failure if not all are loaded. The good files of a failed job are loaded anyway."""
        versions, launch, not_loaded = [record.version for record in files], None, False
        for number in range(_LAUNCHES):
            if not files:
                # Nothing is left to do, so a failure of the previous launch does not matter.
                launch = None
                break
            repeated_shards: Mapping[str, frozenset[str]] = launch.missing if launch else {}
            if not_loaded:
                # Pachyderm would skip these files: their datums count as done. The first shard carries the manifest.
                repeated_shards = {file_id(record.version.name): frozenset({shard_name(0)}) for record in files}
            launch = self.launch(files, f"{self.run_id}-{number}", repeated_shards, adopt=not repeated_shards)
            if launch is None:
                break
            files = self._running(versions)
            not_loaded = bool(files and not repeated_shards and not launch.failure)
            if not self._should_relaunch(launch, files, not_loaded=not_loaded):
                break
        return self.settle(versions, launch)

    def launch(
        self, files: Sequence[FileRecord], launch_id: str, repeated_shards: Mapping[str, frozenset[str]], *, adopt: bool
    ) -> _Launch | None:
        """Put the files into a commit and follow its jobs. None if no file is left to commit.

        Args:
            repeated_shards: shards whose output was missing before, by file id.
            adopt: use the commit that an earlier run made, if there is one.
        """
        versions = [record.version for record in files]
        # The current records: a retry requested since the claim already counts.
        files = self.ledger.start(self.run_id, versions, run_id=self.run_id, batch_id=self.batch.id)
        with pachyderm.session(self.services.pachyderm, f"bringing batch {self.batch.id} into a commit") as client:
            adopted = self.adopt(client) if adopt else None
            if adopted is None:
                refuse_stopped(client)
            intake = Intake(self.services, self.ledger, self.run_id, self.log, launch_id, repeated_shards)
            commit_id = adopted or self.commit(client, files, intake)
        if commit_id is None:
            return None
        committed = [record.version for record in self._running(versions)]
        self.ledger.record_commit(self.run_id, committed, commit=commit_id, job=commit_id)
        failure = self.follow_jobs(commit_id, adopted=adopted is not None)
        return _Launch(commit_id, len(committed), failure)

    # 3. Adopt an earlier run's commit, or read the files into a new one.

    def adopt(self, client: Client) -> str | None:
        """An earlier run's commit of this batch, if its jobs are running or have succeeded; else None. An open commit is dropped."""
        info = commits.find_batch(client, self.batch.id)
        if info is None:
            return None
        commit_id = info.commit.id
        if not commits.is_finishing(info):
            self.log.info("Dropping commit %s, which an earlier run of this batch left unfinished", commit_id)
            commits.drop_commit(client, commit_id)
            return None
        try:
            states = [client.pps.inspect_job(job=job_of(pipeline, commit_id)).state for pipeline in PIPELINES]
        except grpc.RpcError as error:
            # The pipeline was recreated after the commit.
            if not pachyderm.is_code(error, grpc.StatusCode.NOT_FOUND):
                raise
            return None
        if any(state in _LOST for state in states):
            return None
        self.log.info("Adopting commit %s and its jobs, which an earlier run of this batch made", commit_id)
        return commit_id

    def commit(self, client: Client, files: Sequence[FileRecord], intake: Intake) -> str | None:
        """Read the files into one new commit. Returns its id, or None if no file could be read."""
        with commits.FileSets(client) as file_sets:
            intake.read(files, file_sets)
            if not file_sets.ids:
                return None
            commit_id = None
            while commit_id is None:
                self.clear_the_head(client)
                # None: another run was faster and holds the head now.
                commit_id = commits.commit_batch(client, self.batch.id, file_sets.ids)
        self.log.info("Commit %s in %s holds the batch", commit_id, QUESTIONS_REPO)
        return commit_id

    def clear_the_head(self, client: Client) -> None:
        """Wait until the head of ``questions`` is finished. Drop an open head of this batch, or of a batch that no run claims any more.

        The empty commit of `forget` has no claim. It is dropped once it has been open for too long.

        Raises:
            TransientError: the wait takes too long.
        """
        until = time.monotonic() + _OPEN_HEAD_SECONDS
        while not commits.is_finishing(head := commits.head(client)):
            if self._is_left_behind(head, is_late=time.monotonic() > until):
                self.log.info("Dropping commit %s, left open by a run that is gone", head.commit.id)
                commits.drop_commit(client, head.commit.id)
            elif time.monotonic() > until:
                raise TransientError(
                    f"commit {head.commit.id} in {QUESTIONS_REPO} has been open for {_OPEN_HEAD_SECONDS} s",
                    advice="finish it or drop it with pachctl",
                )
            else:
                time.sleep(0.5)
        # Its files cannot be deleted before that.
        commits.wait_until_finished(client, head)

    def _is_left_behind(self, head: pfs.CommitInfo, *, is_late: bool) -> bool:
        if head.description == commits.FORGET:
            return is_late
        return head.description == self.batch.id or bool(head.description and not self.ledger.batch_is_claimed(head.description))

    # 4. Follow the jobs, which answer and load.

    def follow_jobs(self, commit_id: str, *, adopted: bool) -> JobFailure | None:
        """Wait for the jobs of the commit. Returns the failure if not all files are loaded."""
        try:
            self.follow(commit_id=commit_id, adopted=adopted, waiting=lambda reason: self.ledger.note_waiting(self.run_id, reason))
        except JobFailed as error:
            return error.failure
        return None

    def _should_relaunch(self, launch: _Launch, files: Sequence[FileRecord], *, not_loaded: bool) -> bool:
        """Whether to launch the jobs again. Logs the reason if so."""
        if not_loaded:
            # Its jobs are done and will not run again: the table was restored to an older state, or the loader wrote to another database.
            self.log.warning("Commit %s is done, but %d of its files are not in the table; relaunching them", launch.commit_id, len(files))
        elif launch.failure and (launch.failure.killed or launch.missing):
            self.log.warning("%s. No file is to blame; relaunching what is not loaded", launch.failure.message)
        else:
            return False
        return True

    # 5. Charge, requeue or defer the files that are not loaded.

    def settle(self, versions: Sequence[FileVersion], launch: _Launch | None) -> JobFailure | None:
        """Settle the files that are not loaded. Returns the failure, if there is one."""
        alone = launch is not None and launch.files == 1
        settlement = Settlement(self.ledger, self.services.work, self.run_id, self.log, alone)
        return settlement.settle(self._running(versions), launch.failure if launch else None)

    # Helpers for all steps.

    def _records(self, versions: Sequence[FileVersion]) -> list[FileRecord]:
        records = self.ledger.records(versions)
        return [records[version.name, version.generation] for version in versions]

    def _running(self, versions: Sequence[FileVersion]) -> list[FileRecord]:
        """The files that this run works on: not done, and not taken over by another run after this one lost its claim."""
        return [r for r in self._records(versions) if r.status is FileStatus.RUNNING and r.claim_owner in ("", self.run_id)]

    @contextmanager
    def _jobs_end_with_this_run(self) -> Iterator[None]:
        """Stop the batch's jobs when this process is told to end. After an error they continue, and another run adopts them."""
        try:
            yield
        except Exception:
            raise
        except BaseException:
            self.log.warning("Interrupted: stopping the Pachyderm jobs of this batch")
            doing = f"stopping the jobs of batch {self.batch.id}"
            with suppress(QaPlatformError), pachyderm.session(self.services.pachyderm, doing) as client:
                if info := commits.find_batch(client, self.batch.id):
                    if commits.is_finishing(info):
                        stop_jobs(client, info.commit.id, reason="the run that launched it was terminated")
                    else:
                        commits.drop_commit(client, info.commit.id)
            raise


@dataclass(frozen=True)
class _LoggedFollow:
    pachyderm: PachydermSettings
    log: Log

    def __call__(self, *, commit_id: str, adopted: bool, waiting: Callable[[str], object]) -> None:
        follow_jobs(self.pachyderm, commit_id, watcher=Watcher(self.log, waiting=waiting))
