"""Follows a batch's two Pachyderm jobs until they end.

The outcome of a file depends only on what Pachyderm stores: the states of jobs and datums, the reasons in a pipeline's meta repo, the
paths of its output. Log lines are for people, and may be late or missing.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

import grpc
from pachyderm_sdk import Client
from pachyderm_sdk.api import pfs, pps

from qa_platform.batches.blame import FailedDatum, Verdict, judge
from qa_platform.batches.contents import Contents, contents
from qa_platform.batches.failure import JobFailed, JobFailure
from qa_platform.batches.log_lines import LogLines
from qa_platform.batches.progress import Meter, Progress
from qa_platform.batches.starting import CannotStart, Start, WorkerKilled
from qa_platform.clients.pachyderm import IN_PROGRESS, is_code, is_unfinished, job_of, lists_the_bucket, session, state_name
from qa_platform.clients.services import Log
from qa_platform.contract import ANSWER_PIPELINE, LOAD_PIPELINE, MANIFEST, PIPELINES, SHARD_INFO
from qa_platform.errors import TransientError
from qa_platform.settings import PachydermSettings
from qa_platform.text import escaped_lines

# The shortest and the longest pause between two polls of a job, in seconds.
_POLL_SECONDS = (0.05, 2.0)
# How long to wait for the previous job's meta commit to close. Datums cannot be listed before that.
_CLOSING_SECONDS = 120.0
# The maximum number of failed datums whose reasons are read, per file and per job.
_REASONS_OF_FILE = 3
_REASONS = 500


@dataclass(frozen=True)
class Watcher:
    """Receives news of a batch's jobs: a log for people, every progress step, and what the jobs wait for ("" when they continue)."""

    log: Log
    progress: Callable[[Progress], object] = lambda progress: None
    waiting: Callable[[str], object] = lambda reason: None


def follow_jobs(settings: PachydermSettings, commit_id: str, *, watcher: Watcher) -> None:
    """Follow the jobs of a commit in ``questions``, one pipeline after the other, until the last has succeeded.

    Raises:
        JobFailed: a job failed, was killed, could not start, or lost a part of its output.
        TransientError: pachd was unavailable for longer than the retries last.
    """
    with session(settings, f"following the jobs of commit {commit_id}") as client:
        batch = _Following(settings, client, commit_id, contents(client, commit_id), watcher)
        batch.follow(ANSWER_PIPELINE)
        missing = batch.missing_output()
        try:
            batch.follow(LOAD_PIPELINE)
        except JobFailed as error:
            if not missing:
                raise
            watcher.log.warning("%s", error)
        if missing:
            raise JobFailed(_lost_output(commit_id, missing))


def refuse_stopped(client: Client) -> None:
    """Refuse to launch jobs while a pipeline is stopped, has failed, or lists the bucket by itself: a commit would get no job.

    Raises:
        TransientError: a pipeline is stopped, has failed, or is the cron variant.
    """
    for pipeline in PIPELINES:
        info = client.pps.inspect_pipeline(pipeline=job_of(pipeline, "").pipeline, details=True)
        if lists_the_bucket(info):
            raise TransientError(
                f"pipeline {pipeline} is the variant that lists the bucket by itself, without Dagster",
                advice="`qa-platform pachyderm apply --no-cron` replaces it; the files are then retried",
            )
        if info.state == pps.PipelineState.PIPELINE_FAILURE:
            raise TransientError(
                f"pipeline {pipeline} has failed: {info.reason or 'no reason given'}",
                advice="`qa-platform pachyderm apply` starts it again; the files are then retried",
            )
        if info.stopped:
            raise TransientError(f"pipeline {pipeline} is stopped", advice=f"pachctl start pipeline {pipeline}; the files are then retried")


def stop_jobs(client: Client, commit_id: str, *, reason: str) -> None:
    """Stop the jobs of a commit that have not ended."""
    for pipeline in PIPELINES:
        job = job_of(pipeline, commit_id)
        if client.pps.inspect_job(job=job).state in IN_PROGRESS:
            client.pps.stop_job(job=job, reason=reason)


@dataclass
class _Following:
    settings: PachydermSettings
    client: Client
    commit_id: str
    contents: Contents
    watcher: Watcher

    def follow(self, pipeline: str) -> None:
        """Wait until the job of a pipeline has succeeded.

        Raises:
            JobFailed: it ended without success, or could not start.
        """
        job = job_of(pipeline, self.commit_id)
        lines = LogLines(self.client, job, self.watcher.log)
        start = Start(self.client, job, patience=self.settings.start_seconds, waiting=self._tell_waiting)
        meter, pause, last = Meter(self.client, self.contents), _POLL_SECONDS[0], None
        while True:
            info = self.client.pps.inspect_job(job=job)
            lines.pass_on()
            if (seen := (info.state, info.data_processed, info.data_skipped, info.data_total)) != last:
                pause, last = _POLL_SECONDS[0], seen
            if progress := meter.read(info, lines.answered):
                self.watcher.log.info("%s", progress)
                self.watcher.progress(progress)
            if info.state not in IN_PROGRESS:
                break
            try:
                start.look(info, lines)
            except CannotStart as error:
                raise JobFailed(self._stopped(job, error)) from error
            time.sleep(pause)
            pause = min(pause * 1.5, _POLL_SECONDS[1])
        lines.pass_on(last=True)
        start.end()
        if info.state != pps.JobState.JOB_SUCCESS:
            raise JobFailed(self._failure(info))

    def _tell_waiting(self, reason: str) -> None:
        self.watcher.log.info("%s", f"waiting for Pachyderm: {reason}" if reason else "Pachyderm continues")
        self.watcher.waiting(reason)

    def _stopped(self, job: pps.Job, error: CannotStart) -> JobFailure:
        reason = str(error)
        with suppress(grpc.RpcError):
            stop_jobs(self.client, job.id, reason=f"qa-platform: {reason}")
        message = f"Pachyderm job {job.pipeline.name}@{job.id} was stopped: {reason}"
        if not isinstance(error, WorkerKilled):
            return JobFailure(message, Verdict(cause=reason), not_started=True)
        # If nothing else worked, the workers have too little memory for any file.
        suspects = {error.path.strip("/").split("/")[0]: reason} if error.has_worked else {}
        return JobFailure(message, Verdict(suspects=suspects, cause=reason))

    def missing_output(self) -> dict[str, frozenset[str]]:
        """The shards whose answers are not in the output of a job that succeeded, by file id."""
        commit = pfs.Commit.from_uri(f"{ANSWER_PIPELINE}@{self.commit_id}")
        paths: list[str] = []
        for pattern in (f"/*/*/{SHARD_INFO}", f"/*/{MANIFEST}"):
            paths += (info.file.path for info in self.client.pfs.glob_file(commit=commit, pattern=pattern))
        return self.contents.missing_in(paths)

    def _failure(self, info: pps.JobInfo) -> JobFailure:
        pipeline, killed = info.job.pipeline.name, info.state == pps.JobState.JOB_KILLED
        verdict = self._verdict(info.job) if info.state == pps.JobState.JOB_FAILURE else Verdict()
        shown = "".join(f"\n{file}: {why}" for file, why in {**verdict.guilty, **verdict.suspects}.items()) or (
            f"\n{verdict.cause}" if verdict.cause else ""
        )
        reason = f"Pachyderm job {pipeline}@{info.job.id} ended as {state_name(info.state)}: {info.reason or 'no reason given'}"
        return JobFailure(escaped_lines(f"{reason}{shown}"), verdict, killed=killed)

    def _verdict(self, job: pps.Job) -> Verdict:
        failed: dict[str, list[str]] = {}
        something_worked = False
        for datum in self._datums_of(job):
            paths = [file.file.path.strip("/") for file in datum.data]
            if datum.datum.job.id != job.id or not any(map(self.contents.rows, paths)):
                continue
            if datum.state == pps.DatumState.FAILED:
                failed.setdefault(paths[0].split("/")[0], []).append(datum.datum.id)
            elif datum.state == pps.DatumState.SUCCESS:
                something_worked = True
        chosen = [(file, datum) for file, datums in failed.items() for datum in datums[:_REASONS_OF_FILE]]
        reasons = [FailedDatum(job.pipeline.name, file, datum_reason(self.client, job, datum)) for file, datum in chosen[:_REASONS]]
        reasons += [FailedDatum(job.pipeline.name, file, "") for file, _ in chosen[_REASONS:]]
        return judge(reasons, something_worked=something_worked)

    def _datums_of(self, job: pps.Job) -> Iterator[pps.DatumInfo]:
        until = time.monotonic() + _CLOSING_SECONDS
        while True:
            try:
                return iter(list(self.client.pps.list_datum(job=job)))
            except grpc.RpcError as error:
                if not is_unfinished(error) or time.monotonic() > until:
                    raise
            time.sleep(0.5)


def datum_reason(client: Client, job: pps.Job, datum_id: str) -> str:
    """Why a datum failed, according to the pipeline's meta repo; "" if it has no reason."""
    repo = pfs.Repo(name=job.pipeline.name, type="meta", project=job.pipeline.project)
    file = pfs.File(commit=pfs.Commit(repo=repo, id=job.id), path=f"/meta/{datum_id}/meta")
    try:
        content = b"".join(piece.value for piece in client.pfs.get_file(file=file))
        return str(json.loads(content).get("reason", ""))
    except (ValueError, AttributeError):
        return ""
    except grpc.RpcError as error:
        if not is_code(error, grpc.StatusCode.NOT_FOUND):
            raise
        return ""


def _lost_output(commit_id: str, missing: Mapping[str, frozenset[str]]) -> JobFailure:
    shards = sum(map(len, missing.values()))
    return JobFailure(
        f"Pachyderm job {ANSWER_PIPELINE}@{commit_id} ended as success, but the answers of {shards} shards of {len(missing)} files are "
        "not in its output; a worker's process died and could not start again",
        missing=missing,
    )
