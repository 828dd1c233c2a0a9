"""A batch's two Pachyderm jobs, followed until they end: their log lines, how far they are, and why they failed."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import grpc
from pachyderm_sdk import Client
from pachyderm_sdk.api import pfs, pps

from qa_platform.contract import ANSWER_PIPELINE, LOAD_PIPELINE, MANIFEST, QUESTIONS_REPO, Manifest
from qa_platform.errors import TransientError
from qa_platform.pachd import connect, open_channel, pachd_errors, session
from qa_platform.settings import PachydermSettings

# In the order in which they work on a commit.
PIPELINES = (ANSWER_PIPELINE, LOAD_PIPELINE)
# How many log lines of a failed datum are shown.
SHOWN_LOG_LINES = 20
_SHOWN_LOG_CHARACTERS = 8000
_POLL_SECONDS = (0.05, 2.0)

IN_PROGRESS = frozenset(
    {
        pps.JobState.JOB_CREATED,
        pps.JobState.JOB_STARTING,
        pps.JobState.JOB_RUNNING,
        pps.JobState.JOB_EGRESSING,
        pps.JobState.JOB_FINISHING,
    }
)
_DONE_DATUMS = frozenset({pps.DatumState.SUCCESS, pps.DatumState.SKIPPED})

Log = logging.Logger | logging.LoggerAdapter


class JobFailed(TransientError):
    """A Pachyderm job did not succeed. ``guilty`` maps the ids of the files whose datums failed to those datums' log lines.

    It is empty when no file is to blame: the job was killed (then ``killed``), or could not run.
    """

    def __init__(self, message: str, guilty: dict[str, str], *, killed: bool = False) -> None:
        super().__init__(message)
        self.guilty = guilty
        self.killed = killed


@dataclass(frozen=True)
class Progress:
    """How far a job is. Rows are those of the datums that are done; ``seconds_left`` is None while nothing can be said."""

    pipeline: str
    job_id: str
    state: str
    datums: int
    datums_total: int
    rows: int
    rows_total: int
    seconds_left: float | None

    def __str__(self) -> str:
        left = "" if self.seconds_left is None else f", about {self.seconds_left:.0f} s left"
        rows = f", {self.rows} of {self.rows_total} rows" if self.rows_total else ""
        return f"{self.pipeline}: {self.state}, {self.datums} of {self.datums_total} datums done{rows}{left}"


def state_name(state: int) -> str:
    """``running``, ``success`` and so on. The SDK leaves numbers where the protocol has enums."""
    return str(pps.JobState(state).name).removeprefix("JOB_").lower()


def job_of(pipeline: str, job_id: str) -> pps.Job:
    """The job of a pipeline in the default project."""
    return pps.Job(pipeline=pps.Pipeline(project=pfs.Project(name="default"), name=pipeline), id=job_id)


def follow_jobs(
    settings: PachydermSettings, commit_id: str, *, log: Log, observe: Callable[[Progress], object] = lambda progress: None
) -> None:
    """Follow the jobs of a commit in ``questions``, one pipeline after the other, until the last has succeeded.

    Their log lines and their progress go to ``log`` as they happen; ``observe`` is called with every step of the progress too.

    Raises:
        JobFailed: one failed, was killed, or could not run.
        TransientError: pachd was away for longer than the retries last.
    """
    with session(settings, f"following the jobs of commit {commit_id}") as client:
        rows = _rows_of_datums(client, commit_id)
        for pipeline in PIPELINES:
            _follow(settings, client, _Meter(client, job_of(pipeline, commit_id), rows), log, observe)


def stop_jobs(client: Client, commit_id: str, *, reason: str) -> None:
    """Stop those jobs of a commit that have not ended."""
    for pipeline in PIPELINES:
        job = job_of(pipeline, commit_id)
        if client.pps.inspect_job(job=job).state in IN_PROGRESS:
            client.pps.stop_job(job=job, reason=reason)


def _rows_of_datums(client: Client, commit_id: str) -> dict[str, int]:
    """The rows of every shard and of every file of a commit, by the path of its datum without slashes at the ends."""
    rows: dict[str, int] = {}
    manifests = pfs.File.from_uri(f"{QUESTIONS_REPO}@{commit_id}:/*/{MANIFEST}")
    with client.pfs.pfs_tar_file(file=manifests) as tar:
        for member in tar:
            content = tar.extractfile(member)
            if content is None:
                continue
            folder = member.name.strip("/").removesuffix(f"/{MANIFEST}")
            manifest = Manifest.from_json(content.read())
            rows[folder] = manifest.rows
            rows |= {f"{folder}/{shard.name}": shard.rows for shard in manifest.shards}
    return rows


class _Meter:
    """Turns what Pachyderm says of a job into `Progress`. The speed is that of the rows that were done while it looked."""

    def __init__(self, client: Client, job: pps.Job, rows: dict[str, int]) -> None:
        self.job = job
        self._client = client
        self._rows = rows
        depth = 1 if job.pipeline.name == ANSWER_PIPELINE else 0
        self._total = sum(count for path, count in rows.items() if path.count("/") == depth)
        self._begun: tuple[float, int] | None = None

    def read(self, info: pps.JobInfo) -> Progress:
        done, left = 0, None
        if info.data_processed + info.data_skipped:
            done = sum(self._rows_of(datum) for datum in self._client.pps.list_datum(job=self.job) if datum.state in _DONE_DATUMS)
        if info.state == pps.JobState.JOB_RUNNING:
            begun, before = self._begun = self._begun or (time.monotonic(), done)
            if done > before:
                left = (self._total - done) * (time.monotonic() - begun) / (done - before)
        datums = info.data_processed + info.data_skipped
        return Progress(self.job.pipeline.name, self.job.id, state_name(info.state), datums, info.data_total, done, self._total, left)

    def _rows_of(self, datum: pps.DatumInfo) -> int:
        return sum(self._rows.get(file.file.path.strip("/"), 0) for file in datum.data)


def _follow(settings: PachydermSettings, client: Client, meter: _Meter, log: Log, observe: Callable[[Progress], object]) -> None:
    pipeline = meter.job.pipeline.name
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    follower = _LogFollower(settings, meter.job, lines)
    pause, last = _POLL_SECONDS[0], None
    try:
        while True:
            info = client.pps.inspect_job(job=meter.job, details=True)
            _pass_on(lines, log, pipeline)
            if (seen := (info.state, info.data_processed, info.data_skipped, info.data_total)) != last:
                pause, last = _POLL_SECONDS[0], seen
                progress = meter.read(info)
                log.info("%s", progress)
                observe(progress)
            if info.state not in IN_PROGRESS:
                break
            time.sleep(pause)
            pause = min(pause * 1.5, _POLL_SECONDS[1])
        follower.finish()
        _pass_on(lines, log, pipeline)
    finally:
        follower.close()
    if info.state != pps.JobState.JOB_SUCCESS:
        raise _failure(client, info)


def _pass_on(lines: "queue.SimpleQueue[str]", log: Log, pipeline: str) -> None:
    while not lines.empty():
        log.info("%s | %s", pipeline, lines.get())


class _LogFollower:
    """A thread that puts a job's log lines into a queue while they are written. Logs are for people: its errors end it quietly."""

    # Following never ends by itself. After the job's end no line for this long means that there are no more.
    QUIET_SECONDS = 0.3

    def __init__(self, settings: PachydermSettings, job: pps.Job, lines: "queue.SimpleQueue[str]") -> None:
        client = connect(settings)
        # Not through the SDK's stub: a cancelled call of that one prints a traceback.
        self._channel = open_channel(client)
        follow = self._channel.unary_stream("/pps_v2.API/GetLogs", bytes, pps.LogMessage.FromString)
        self._call = follow(pps.GetLogsRequest(pipeline=job.pipeline, job=job, follow=True), metadata=client._grpc_metadata)
        client._channel.close()
        self._lines = lines
        self._last_line = time.monotonic()
        self._thread = threading.Thread(target=self._follow, name=f"logs-{job.id}", daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        try:
            for message in self._call:
                if message.user:
                    self._lines.put(message.message.rstrip("\n"))
                    self._last_line = time.monotonic()
        except grpc.RpcError:
            return

    def finish(self) -> None:
        self._last_line = time.monotonic()
        while self._thread.is_alive() and time.monotonic() - self._last_line < self.QUIET_SECONDS:
            time.sleep(self.QUIET_SECONDS / 10)

    def close(self) -> None:
        self._call.cancel()
        self._channel.close()


def _failure(client: Client, info: pps.JobInfo) -> JobFailed:
    pipeline, killed = info.job.pipeline.name, info.state == pps.JobState.JOB_KILLED
    guilty: dict[str, str] = {}
    if info.state == pps.JobState.JOB_FAILURE:
        with pachd_errors(f"asking for the failed datums of {pipeline}@{info.job.id}"):
            for datum in client.pps.list_datum(job=info.job):
                if datum.state == pps.DatumState.FAILED:
                    log_lines = _datum_log(client, info.job, datum.datum)
                    for file in datum.data:
                        guilty[file.file.path.strip("/").split("/")[0]] = log_lines
    shown = "".join(f"\n--- {file}\n{text}" for file, text in guilty.items())
    reason = info.reason or "no reason given"
    return JobFailed(f"Pachyderm job {pipeline}@{info.job.id} ended as {state_name(info.state)}: {reason}{shown}", guilty, killed=killed)


def _datum_log(client: Client, job: pps.Job, datum: pps.Datum) -> str:
    messages = client.pps.get_logs(pipeline=job.pipeline, job=job, datum=pps.Datum(id=datum.id, job=job), tail=SHOWN_LOG_LINES)
    return "\n".join(user_lines(messages))[-_SHOWN_LOG_CHARACTERS:]


def user_lines(messages: Iterable[pps.LogMessage]) -> list[str]:
    """What the pipeline's own program said, without Pachyderm's lines about it."""
    return [message.message.rstrip("\n") for message in messages if message.user]
