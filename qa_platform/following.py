"""A batch's two Pachyderm jobs, followed until they end: their log lines, how far they are, and why they failed."""

import logging
import queue
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import grpc
from pachyderm_sdk import Client
from pachyderm_sdk.api import pfs, pps

from qa_platform.contract import ANSWER_PIPELINE, BLAMELESS, LOAD_PIPELINE, MANIFEST, QUESTIONS_REPO, Manifest
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

    It is empty when no file is to blame: the job was killed (then ``killed``), could not run, or everything in it failed for one
    ``cause``. ``innocent`` says that this is more than likely: the job was killed, or its workers said so themselves.
    """

    def __init__(self, message: str, guilty: Mapping[str, str], *, killed: bool = False, innocent: bool = False, cause: str = "") -> None:
        super().__init__(message)
        self.guilty = guilty
        self.killed = killed
        self.innocent = innocent or killed
        self.cause = cause or message


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
        rows = rows_of_datums(client, commit_id)
        for pipeline in PIPELINES:
            _follow(settings, client, _Meter(client, job_of(pipeline, commit_id), rows), log, observe)


def stop_jobs(client: Client, commit_id: str, *, reason: str) -> None:
    """Stop those jobs of a commit that have not ended."""
    for pipeline in PIPELINES:
        job = job_of(pipeline, commit_id)
        if client.pps.inspect_job(job=job).state in IN_PROGRESS:
            client.pps.stop_job(job=job, reason=reason)


def rows_of_datums(client: Client, commit_id: str) -> dict[str, int]:
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


def rows_done(client: Client, commit_id: str, rows: Mapping[str, int]) -> Counter[str]:
    """The rows of a commit that are answered, by file id; ``rows`` are those of `rows_of_datums`."""
    done: Counter[str] = Counter()
    for datum in client.pps.list_datum(job=job_of(ANSWER_PIPELINE, commit_id)):
        if datum.state in _DONE_DATUMS:
            for file in datum.data:
                path = file.file.path.strip("/")
                done[path.split("/")[0]] += rows.get(path, 0)
    return done


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
    verdict = _Verdict({})
    if info.state == pps.JobState.JOB_FAILURE:
        with pachd_errors(f"asking for the failed datums of {pipeline}@{info.job.id}"):
            verdict = _judge(client, info.job)
    shown = "".join(f"\n--- {file}\n{text}" for file, text in verdict.logs.items())
    reason = f"Pachyderm job {pipeline}@{info.job.id} ended as {state_name(info.state)}: {info.reason or 'no reason given'}"
    return JobFailed(f"{reason}{shown}", verdict.guilty, killed=killed, innocent=verdict.innocent, cause=verdict.cause or reason)


@dataclass(frozen=True)
class _Verdict:
    """The last log lines of the files that failed, by file id, and what became of the question whose fault it is, as in `JobFailed`."""

    logs: Mapping[str, str]
    guilty: Mapping[str, str] = field(default_factory=dict)
    innocent: bool = False
    cause: str = ""


def _judge(client: Client, job: pps.Job) -> _Verdict:
    failed: dict[str, pps.Datum] = {}
    something_worked = manifest_failed = False
    for datum in client.pps.list_datum(job=job):
        for file in datum.data:
            path = file.file.path.strip("/")
            if datum.state == pps.DatumState.FAILED:
                failed.setdefault(path.split("/")[0], datum.datum)
                manifest_failed |= path.endswith(f"/{MANIFEST}")
            elif datum.state in _DONE_DATUMS:
                # A manifest is passed on without being looked at.
                something_worked |= not path.endswith(f"/{MANIFEST}")
    logs = {file: _datum_log(client, job, datum) for file, datum in failed.items()}
    said = {file: cause for file, text in logs.items() if (cause := said_blameless(text))}
    if logs.keys() == said.keys():
        return _Verdict(logs, innocent=bool(said), cause=next(iter(said.values()), ""))
    reasons = {_reason(file, text) for file, text in logs.items()}
    if not something_worked and len(reasons) == 1 and (len(failed) > 1 or manifest_failed):
        return _Verdict(logs, cause=f"all {len(failed)} files failed alike: {reasons.pop() or 'their workers died without a word'}")
    return _Verdict(logs, {file: text for file, text in logs.items() if file not in said})


# As the programs of the two pipelines write it, at a line's beginning: a file's name may hold the same words.
_SAID = re.compile(rf"^(?:ERROR [\w.-]+: |[\d-]+ [\d:,]+ ERROR ){re.escape(BLAMELESS)}(.*)$", re.MULTILINE)


def said_blameless(log: str) -> str:
    """What a worker's log names as the cause where it says that no file is to blame; "" where it does not."""
    found = _SAID.findall(log)
    return found[-1] if found else ""


def _reason(file: str, log: str) -> str:
    """The last line of a log, without what differs from file to file."""
    line = next((line for line in reversed(log.splitlines()) if line.strip()), "").replace(file, "…")
    return re.sub(r"'[^']*'|\"[^\"]*\"|\b[0-9a-f]{8,}\b|\d+", "…", line).strip()


def _datum_log(client: Client, job: pps.Job, datum: pps.Datum) -> str:
    messages = client.pps.get_logs(pipeline=job.pipeline, job=job, datum=pps.Datum(id=datum.id, job=job), tail=SHOWN_LOG_LINES)
    return "\n".join(user_lines(messages))[-_SHOWN_LOG_CHARACTERS:]


def user_lines(messages: Iterable[pps.LogMessage]) -> list[str]:
    """What the pipeline's own program said, without Pachyderm's lines about it."""
    return [message.message.rstrip("\n") for message in messages if message.user]
