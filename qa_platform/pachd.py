"""The connection to Pachyderm, and the commit protocol by which a batch of files becomes one commit and one job per pipeline.

A batch is one self-contained commit in the repo ``questions`` whose description is the batch id. That makes it findable: a run
that was killed anywhere is run again, finds the commit of its batch, and adopts it with its jobs.
"""

import json
import logging
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import grpc
from pachyderm_sdk import Client
from pachyderm_sdk.api import pfs, pps
from pachyderm_sdk.constants import GRPC_CHANNEL_OPTIONS
from pachyderm_sdk.interceptor import MetadataClientInterceptor

from qa_platform.contract import QUESTIONS_REPO
from qa_platform.errors import InputError, TransientError
from qa_platform.ingest import Write
from qa_platform.settings import PachydermSettings

PIECE = 2**20
# A file set vanishes when nobody adds it to a commit in this time; a batch is ingested well within it, or starts again.
FILE_SET_SECONDS = 6 * 3600
# How many of the newest commits are searched for a batch that was begun before.
RECENT_COMMITS = 200
# How many log lines of a failed datum are shown.
SHOWN_LOG_LINES = 20
_POLL_SECONDS = (0.05, 2.0)

_IN_PROGRESS = (
    pps.JobState.JOB_CREATED,
    pps.JobState.JOB_STARTING,
    pps.JobState.JOB_RUNNING,
    pps.JobState.JOB_EGRESSING,
    pps.JobState.JOB_FINISHING,
)

# Deadlines and bounded retries are gRPC's own. Streams of files and logs last as long as their content does.
_LONG = [{"service": "pfs_v2.API", "method": m} for m in ("ModifyFile", "CreateFileSet", "GetFile", "GetFileTAR", "SubscribeCommit")]
_LONG += [{"service": "pps_v2.API", "method": m} for m in ("GetLogs", "SubscribeJob")]
_RETRY = {
    "maxAttempts": 5,
    "initialBackoff": "0.2s",
    "maxBackoff": "5s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}
_SERVICE_CONFIG = {
    "methodConfig": [
        {"name": _LONG, "timeout": "21600s", "retryPolicy": _RETRY},
        {"name": [{}], "timeout": "60s", "retryPolicy": _RETRY},
    ]
}
_CHANNEL_OPTIONS = [
    *GRPC_CHANNEL_OPTIONS,
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    ("grpc.keepalive_time_ms", 30_000),
]


class JobFailed(TransientError):
    """A Pachyderm job did not succeed. ``guilty`` maps the ids of the files whose datums failed to those datums' log lines.

    It is empty when no file is to blame: the job was killed, or could not run.
    """

    def __init__(self, message: str, guilty: dict[str, str]) -> None:
        super().__init__(message)
        self.guilty = guilty


def connect(settings: PachydermSettings) -> Client:
    """A client of the pachd at ``settings.pachd_address``, with a deadline on every call and retries while it is away.

    Raises:
        InputError: the address is not ``grpc://host:port`` or ``grpcs://host:port``.
    """
    address = urlsplit(settings.pachd_address)
    if address.scheme not in ("grpc", "grpcs") or not address.hostname or not address.port:
        raise InputError(f"PACHD_ADDRESS is {settings.pachd_address!r}: it has the form grpc://host:port, or grpcs:// with TLS")
    client = Client(
        host=address.hostname,
        port=address.port,
        tls=address.scheme == "grpcs",
        root_certs=settings.pach_ca_bundle.read_bytes() if settings.pach_ca_bundle else None,
        auth_token=settings.pach_token.get_secret_value() or None,
    )
    # The SDK takes no channel options, so the channel is made once more, with ours.
    client._channel.close()
    client._channel = grpc.intercept_channel(_open_channel(client), MetadataClientInterceptor(client._grpc_metadata))
    client._init_api()
    return client


def _open_channel(client: Client) -> grpc.Channel:
    if client.root_certs is None:
        return grpc.insecure_channel(client.address, options=_CHANNEL_OPTIONS)
    credentials = grpc.ssl_channel_credentials(root_certificates=client.root_certs)
    return grpc.secure_channel(client.address, credentials, options=_CHANNEL_OPTIONS)


@contextmanager
def session(settings: PachydermSettings, doing: str) -> Iterator[Client]:
    """A client for the length of a block, with `pachd_errors` around it."""
    client = connect(settings)
    try:
        with pachd_errors(doing):
            yield client
    finally:
        client._channel.close()


@contextmanager
def pachd_errors(doing: str) -> Iterator[None]:
    """Turn what gRPC raises into the platform's own errors; ``doing`` says what was being done, for the message."""
    try:
        yield
    except ConnectionError as error:
        raise TransientError(f"{doing}: pachd cannot be reached; check PACHD_ADDRESS and that it is up") from error
    except grpc.RpcError as error:
        code, details = error.code(), error.details()
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED, grpc.StatusCode.ABORTED):
            raise TransientError(f"{doing}: pachd is away ({code.name}: {details})") from error
        raise InputError(f"{doing}: pachd refused ({code.name}: {details})") from error


def is_code(error: Exception, code: grpc.StatusCode) -> bool:
    """Whether an error of the SDK carries this gRPC status."""
    return isinstance(error, grpc.RpcError) and error.code() == code


def make_file_set(client: Client, folder: str, fill: Callable[[Write], object]) -> str:
    """Make a file set out of what ``fill`` writes below ``/<folder>/``, while it writes; its id.

    ``fill`` gets a function ``write(path, chunks)``. When it raises, so does this, and no file set is left.
    """
    pieces: queue.Queue[pfs.AddFile | BaseException | None] = queue.Queue(maxsize=16)

    def requests() -> Iterator[pfs.ModifyFileRequest]:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield pfs.ModifyFileRequest(add_file=piece)

    with ThreadPoolExecutor(1, thread_name_prefix="file-set") as pool:
        sending = pool.submit(client.pfs.create_file_set, requests())

        def put(piece: pfs.AddFile | BaseException | None) -> None:
            # When the call has ended nobody takes pieces any more, and its result says why.
            while not sending.done():
                with suppress(queue.Full):
                    pieces.put(piece, timeout=0.2)
                    return
            sending.result()

        def write(path: str, chunks: Iterable[bytes]) -> None:
            for chunk in chunks:
                put(pfs.AddFile(path=f"/{folder}/{path}", raw=chunk))

        try:
            fill(write)
        except BaseException as error:
            if not sending.done():
                pieces.put(_Abandoned(str(error)))
            raise
        put(None)
        file_set: str = sending.result().file_set_id
    client.pfs.renew_file_set(file_set_id=file_set, ttl_seconds=FILE_SET_SECONDS)
    return file_set


class _Abandoned(Exception):
    """Raised inside the stream of a file set, so that pachd throws away what came so far."""


def find_batch(client: Client, batch_id: str) -> pfs.CommitInfo | None:
    """The newest commit in ``questions`` that holds this batch, finished or open, or None."""
    repo = pfs.Repo.from_uri(QUESTIONS_REPO)
    infos = client.pfs.list_commit(repo=repo, number=RECENT_COMMITS, origin_kind=pfs.OriginKind.USER)
    return next((info for info in infos if info.description == batch_id), None)


def open_head(client: Client) -> pfs.CommitInfo | None:
    """The head of ``questions@master`` if somebody left it open, else None."""
    info = client.pfs.inspect_commit(commit=pfs.Commit.from_uri(f"{QUESTIONS_REPO}@master"), wait=pfs.CommitState.STARTED)
    return None if is_finishing(info) else info


def is_finishing(info: pfs.CommitInfo) -> bool:
    """Whether FinishCommit was called on a commit. An unset time is the epoch to the SDK, not None."""
    return bool(info.finishing.timestamp() > 0)


def drop_commit(client: Client, commit_id: str) -> None:
    """Drop a commit and all that came from it."""
    client.pfs.drop_commit_set(commit_set=pfs.CommitSet(id=commit_id))


def commit_batch(client: Client, batch_id: str, file_sets: Sequence[str]) -> str:
    """Make one commit in ``questions`` that holds exactly these file sets, and return its id, which is that of its jobs too."""
    branch = pfs.Branch.from_uri(f"{QUESTIONS_REPO}@master")
    commit = client.pfs.start_commit(branch=branch, description=batch_id)
    commit.branch = branch
    clear = pfs.DeleteFile(path="/")
    client.pfs.modify_file(iter([pfs.ModifyFileRequest(set_commit=commit), pfs.ModifyFileRequest(delete_file=clear)]))
    for file_set in file_sets:
        client.pfs.add_file_set(commit=commit, file_set_id=file_set)
    client.pfs.finish_commit(commit=commit)
    return commit.id


def fetch_folder(client: Client, uri: str, target: Path) -> None:
    """Copy a folder of a repo (``repo@commit:/folder``) into ``target``, without the folder's own name."""
    file = pfs.File.from_uri(uri)
    prefix = file.path.strip("/") + "/"
    with client.pfs.pfs_tar_file(file=file) as tar:
        for member in tar:
            name = member.name.strip("/")
            if member.isfile() and name.startswith(prefix):
                member.name = name.removeprefix(prefix)
                tar.extract(member, target, filter="data")


def copy_file(client: Client, uri: str, target: IO[bytes]) -> None:
    """Write one file of a repo (``repo@commit:/path``) to ``target``."""
    with client.pfs.pfs_file(pfs.File.from_uri(uri)) as source:
        shutil.copyfileobj(source, target, PIECE)


def wait_for_job(
    settings: PachydermSettings,
    pipeline: str,
    job_id: str,
    *,
    log: logging.Logger | logging.LoggerAdapter,
) -> pps.JobInfo:
    """Follow a job until it ends: its log lines and its progress go to ``log`` as they happen.

    Returns:
        The successful job.

    Raises:
        JobFailed: it failed, was killed, or could not run.
        TransientError: pachd was away for longer than the retries last.
    """
    client = connect(settings)
    job = job_of(pipeline, job_id)
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    follower = _LogFollower(settings, job, lines)
    pause = _POLL_SECONDS[0]
    last: tuple[str, int, int] | None = None
    try:
        with pachd_errors(f"following job {pipeline}@{job_id}"):
            while True:
                info = client.pps.inspect_job(job=job, details=True)
                # The SDK leaves numbers where the protocol has enums.
                progress = (pps.JobState(info.state).name, info.data_processed + info.data_skipped, info.data_total)
                _pass_on(lines, log, pipeline)
                if progress != last:
                    log.info("%s: %s, %d of %d datums done", pipeline, *progress)
                    pause, last = _POLL_SECONDS[0], progress
                if info.state not in _IN_PROGRESS:
                    break
                time.sleep(pause)
                pause = min(pause * 1.5, _POLL_SECONDS[1])
        follower.finish()
        _pass_on(lines, log, pipeline)
    finally:
        follower.close()
    if info.state != pps.JobState.JOB_SUCCESS:
        raise _failure(client, info)
    return info


def job_of(pipeline: str, job_id: str) -> pps.Job:
    """The job of a pipeline in the default project."""
    return pps.Job(pipeline=pps.Pipeline(project=pfs.Project(name="default"), name=pipeline), id=job_id)


def _pass_on(lines: "queue.SimpleQueue[str]", log: logging.Logger | logging.LoggerAdapter, pipeline: str) -> None:
    while not lines.empty():
        log.info("%s | %s", pipeline, lines.get())


class _LogFollower:
    """A thread that puts a job's log lines into a queue while they are written. Logs are for people: its errors end it quietly."""

    # Following never ends by itself. After the job's end no line for this long means that there are no more.
    QUIET_SECONDS = 0.3

    def __init__(self, settings: PachydermSettings, job: pps.Job, lines: "queue.SimpleQueue[str]") -> None:
        client = connect(settings)
        # Not through the SDK's stub: a cancelled call of that one prints a traceback.
        self._channel = _open_channel(client)
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
    pipeline, name = info.job.pipeline.name, pps.JobState(info.state).name.removeprefix("JOB_").lower()
    guilty: dict[str, str] = {}
    if info.state == pps.JobState.JOB_FAILURE:
        with pachd_errors(f"asking for the failed datums of {pipeline}@{info.job.id}"):
            for datum in client.pps.list_datum(job=info.job):
                if datum.state == pps.DatumState.FAILED:
                    log_lines = _datum_log(client, info.job, datum.datum)
                    for file in datum.data:
                        guilty[file.file.path.strip("/").split("/")[0]] = log_lines
    shown = "".join(f"\n--- {file}\n{text}" for file, text in guilty.items())
    return JobFailed(f"Pachyderm job {pipeline}@{info.job.id} ended as {name}: {info.reason or 'no reason given'}{shown}", guilty)


def _datum_log(client: Client, job: pps.Job, datum: pps.Datum) -> str:
    messages = client.pps.get_logs(pipeline=job.pipeline, job=job, datum=pps.Datum(id=datum.id, job=job), tail=SHOWN_LOG_LINES)
    return "\n".join(message.message.rstrip("\n") for message in messages if message.user)[-8000:]
