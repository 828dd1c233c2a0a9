"""The connection to Pachyderm, and the commit protocol by which a batch of files becomes one commit and one job per pipeline.

A batch is one self-contained commit in the repo ``questions`` whose description is the batch id. That makes it findable: a run
that was killed anywhere is run again, finds the commit of its batch, and adopts it with its jobs.
"""

import json
import queue
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import grpc
from pachyderm_sdk import Client
from pachyderm_sdk.api import pfs
from pachyderm_sdk.constants import GRPC_CHANNEL_OPTIONS
from pachyderm_sdk.interceptor import MetadataClientInterceptor

from qa_platform.contract import QUESTIONS_REPO
from qa_platform.errors import InputError, TransientError
from qa_platform.ingest import Write
from qa_platform.settings import PachydermSettings

# A file set vanishes when nobody adds it to a commit in this time; a batch is ingested well within it, or starts again.
FILE_SET_SECONDS = 6 * 3600
# How many of the newest commits are searched for a batch that was begun before.
RECENT_COMMITS = 200

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
    client._channel = grpc.intercept_channel(open_channel(client), MetadataClientInterceptor(client._grpc_metadata))
    client._init_api()
    return client


def open_channel(client: Client) -> grpc.Channel:
    """A channel of its own to where a client is connected, with the same deadlines and retries."""
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
    except BrokenPipeError:
        # Of whoever reads what is fetched.
        raise
    except ConnectionError as error:
        raise TransientError(f"{doing}: pachd cannot be reached; check PACHD_ADDRESS and that it is up") from error
    except grpc.RpcError as error:
        code, details = error.code(), error.details()
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED, grpc.StatusCode.ABORTED):
            raise TransientError(f"{doing}: pachd is away ({code.name}: {details})") from error
        if code is grpc.StatusCode.NOT_FOUND:
            raise NotThere(f"{doing}: pachd does not have it ({code.name}: {details})") from error
        raise InputError(f"{doing}: pachd refused ({code.name}: {details})") from error


def is_code(error: Exception, code: grpc.StatusCode) -> bool:
    """Whether an error of the SDK carries this gRPC status."""
    return isinstance(error, grpc.RpcError) and error.code() == code


class NotThere(InputError):
    """What was asked for is not, or no more, in Pachyderm."""


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
            with suppress(Exception):
                put(_Abandoned(str(error)))
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


def old_batches(client: Client, before: datetime, *, limit: int) -> list[str]:
    """The oldest batches' commits that were finished before a time, at most ``limit``, oldest first; never the newest commit.

    Those before the newest are the ones that `squash` takes: each has a child.
    """
    repo = pfs.Repo.from_uri(QUESTIONS_REPO)
    head = client.pfs.inspect_commit(commit=pfs.Commit.from_uri(f"{QUESTIONS_REPO}@master"), wait=pfs.CommitState.STARTED).commit.id
    # To its end, which a stream that is left in its middle complains of.
    infos = list(client.pfs.list_commit(repo=repo, reverse=True, number=limit + 1, origin_kind=pfs.OriginKind.USER))
    return [info.commit.id for info in infos if info.started < before and info.commit.id != head and info.finished.timestamp() > 0][:limit]


def squash(client: Client, commit_id: str) -> bool:
    """Remove a commit and what the pipelines made of it; whether that was done. What its children hold of it stays theirs."""
    try:
        client.pfs.squash_commit_set(commit_set=pfs.CommitSet(id=commit_id))
    except grpc.RpcError as error:
        # What pachd will not part with now, a commit at work or at a head: that is no failure of the others.
        if error.code() in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND):
            return False
        raise
    return True


def drop_commit(client: Client, commit_id: str) -> None:
    """Get an open commit in ``questions`` out of the way, with all that came from it.

    Pachyderm refuses to drop what a later set was made from: a pipeline was updated while the commit was open. Then it is finished
    with an error, and the jobs that wait for it end as UNRUNNABLE.
    """
    try:
        client.pfs.drop_commit_set(commit_set=pfs.CommitSet(id=commit_id))
    except grpc.RpcError as error:
        if "subvenant" not in (error.details() or ""):
            raise
        client.pfs.finish_commit(commit=pfs.Commit(repo=pfs.Repo.from_uri(QUESTIONS_REPO), id=commit_id), error="abandoned")


def commit_batch(client: Client, batch_id: str, file_sets: Sequence[str]) -> str | None:
    """Make one commit in ``questions`` that holds exactly these file sets.

    Returns:
        Its id, which is that of its jobs too; None if somebody else's commit is open at the head.
    """
    branch = pfs.Branch.from_uri(f"{QUESTIONS_REPO}@master")
    try:
        commit = client.pfs.start_commit(branch=branch, description=batch_id)
    except grpc.RpcError as error:
        if "has not been finished" in (error.details() or ""):
            return None
        raise
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
    # What is not there is said by this; the SDK would fail to read an archive.
    client.pfs.inspect_file(file=file)
    with client.pfs.pfs_tar_file(file=file) as tar:
        for member in tar:
            name = member.name.strip("/")
            if member.isfile() and name.startswith(prefix):
                member.name = name.removeprefix(prefix)
                tar.extract(member, target, filter="data")


def copy_file(client: Client, uri: str, target: IO[bytes]) -> None:
    """Write one file of a repo (``repo@commit:/path``) to ``target``."""
    # Not the SDK's `pfs_file`, which hides what pachd says.
    for piece in client.pfs.get_file(file=pfs.File.from_uri(uri)):
        target.write(piece.value)
