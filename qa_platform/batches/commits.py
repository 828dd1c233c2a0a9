"""The commit protocol: a batch of files becomes one commit in ``questions`` and one job per pipeline.

A batch is one self-contained commit whose description is the batch id. A run that was killed at any point is run again: it finds the
commit of its batch by that id and adopts it with its jobs.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Self

import grpc
from pachyderm_sdk import Client
from pachyderm_sdk.api import pfs

from qa_platform.clients.pachyderm import is_code, is_unfinished
from qa_platform.contract import QUESTIONS_REPO
from qa_platform.errors import TransientError
from qa_platform.ingest import Write

# The lifetime of a renewed file set: the maximum that Pachyderm grants.
FILE_SET_SECONDS = 1800
# How often the file sets of a batch are renewed. A few renewals may fail before one expires.
RENEW_SECONDS = 240
# How long to wait until Pachyderm has finished a commit after FinishCommit. Larger commits take longer.
_FINISHING_SECONDS = 900.0
_PAUSE_SECONDS = 0.1
# Pieces of a file, at most 1 MiB each, that are queued for sending.
_PIECES = 4
# The description of the empty commit that becomes the new head when a head is to be removed. No batch has this id.
FORGET = "forget"
# How many of the newest commits are searched for an earlier commit of a batch.
RECENT_COMMITS = 200


class FileSets:
    """The file sets of one batch. A thread renews them until the block ends.

    Args:
        life: the lifetime of a renewed file set, in seconds.
        every: seconds between two renewals.
    """

    def __init__(self, client: Client, *, life: float = FILE_SET_SECONDS, every: float = RENEW_SECONDS) -> None:
        self.ids: list[str] = []
        self._client = client
        self._life = round(life)
        self._every = every
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew_all, name="file-sets", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def make(self, folder: str, fill: Callable[[Write], object]) -> None:
        """Stream what ``fill`` writes below ``/<folder>/`` into a new file set.

        ``fill`` gets a function ``write(path, chunks)``. If it raises, so does this method, and no file set is left.
        """
        file_set = _make_file_set(self._client, folder, fill)
        # A new file set expires sooner than a renewed one.
        self._client.pfs.renew_file_set(file_set_id=file_set, ttl_seconds=self._life)
        self.ids.append(file_set)

    def _renew_all(self) -> None:
        while not self._over.wait(self._every):
            for file_set in tuple(self.ids):
                # A lost file set is noticed when it is added to the commit.
                with suppress(grpc.RpcError):
                    self._client.pfs.renew_file_set(file_set_id=file_set, ttl_seconds=self._life)


def _make_file_set(client: Client, folder: str, fill: Callable[[Write], object]) -> str:
    pieces: queue.Queue[pfs.AddFile | BaseException | None] = queue.Queue(maxsize=_PIECES)

    def requests() -> Iterator[pfs.ModifyFileRequest]:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield pfs.ModifyFileRequest(add_file=piece)

    with ThreadPoolExecutor(1, thread_name_prefix="file-set") as pool:
        sending = pool.submit(client.pfs.create_file_set, requests())

        def put(piece: pfs.AddFile | BaseException | None) -> None:
            # Once the call has ended, nothing takes pieces any more, and its result says why.
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
    return file_set


class _Abandoned(Exception):
    """Raised inside the stream of a file set, so that pachd discards what it has received."""


# gRPC logs a traceback when a stream is abandoned. Every damaged file abandons its stream, and the run logs the reason in one line.
logging.getLogger("grpc._channel").addFilter(lambda record: not (record.exc_info and isinstance(record.exc_info[1], _Abandoned)))


def find_batch(client: Client, batch_id: str) -> pfs.CommitInfo | None:
    """The newest commit in ``questions`` that holds this batch, finished or open, or None."""
    repo = pfs.Repo.from_uri(QUESTIONS_REPO)
    infos = client.pfs.list_commit(repo=repo, number=RECENT_COMMITS, origin_kind=pfs.OriginKind.USER)
    return next((info for info in infos if info.description == batch_id), None)


def head(client: Client, repo: str = QUESTIONS_REPO) -> pfs.CommitInfo:
    """The newest commit of a repo's branch ``master``: open, finishing or finished."""
    return client.pfs.inspect_commit(commit=pfs.Commit.from_uri(f"{repo}@master"), wait=pfs.CommitState.STARTED)


def is_finishing(info: pfs.CommitInfo) -> bool:
    """Whether FinishCommit was called on a commit. The SDK gives an unset time as the epoch, not as None."""
    return bool(info.finishing.timestamp() > 0)


def is_finished(info: pfs.CommitInfo) -> bool:
    """Whether Pachyderm has finished a commit, which it does some time after FinishCommit."""
    return bool(info.finished.timestamp() > 0)


def old_commits(client: Client, name: str, before: datetime, *, limit: int) -> list[str]:
    """The oldest finished commits of a repo that started before a time, at most ``limit``, oldest first; never the newest commit.

    The newest is left out because `squash` needs commits that have a child. A repo that does not exist has none.
    """
    repo = pfs.Repo.from_uri(name)
    try:
        newest = head(client, name).commit.id
    except grpc.RpcError as error:
        if is_code(error, grpc.StatusCode.NOT_FOUND):
            return []
        raise
    # Read the stream to its end: gRPC complains about one that is abandoned midway.
    infos = list(client.pfs.list_commit(repo=repo, reverse=True, number=limit + 1, origin_kind=pfs.OriginKind.USER))
    return [info.commit.id for info in infos if info.started < before and info.commit.id != newest and is_finished(info)][:limit]


def squash(client: Client, commit_id: str) -> bool:
    """Remove a commit and the pipelines' output for it. Its children keep what they took over from it.

    Returns:
        Whether it was removed. Pachyderm keeps a commit that is being processed or is a head. A commit that was a head when a pipeline was
        updated is kept for ever.

    Raises:
        grpc.RpcError: PERMISSION_DENIED, or pachd is unavailable.
    """
    try:
        client.pfs.squash_commit_set(commit_set=pfs.CommitSet(id=commit_id))
    except grpc.RpcError as error:
        if error.code() in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND):
            return False
        raise
    return True


def drop_commit(client: Client, commit_id: str) -> None:
    """Drop an open commit in ``questions`` with everything derived from it.

    If Pachyderm refuses, the commit is finished with an error instead, and the jobs that wait for it end as UNRUNNABLE. Pachyderm
    refuses if a pipeline was updated while the commit was open, since a later set derives from it, and if the robot lacks the right.
    """
    try:
        client.pfs.drop_commit_set(commit_set=pfs.CommitSet(id=commit_id))
    except grpc.RpcError as error:
        if "subvenant" not in (error.details() or "") and not is_code(error, grpc.StatusCode.PERMISSION_DENIED):
            raise
        client.pfs.finish_commit(commit=pfs.Commit(repo=pfs.Repo.from_uri(QUESTIONS_REPO), id=commit_id), error="abandoned")


def commit_batch(client: Client, batch_id: str, file_sets: Sequence[str]) -> str | None:
    """Make one commit in ``questions`` that holds exactly these file sets. If that fails halfway, the commit is dropped.

    Returns:
        The commit's id, which is also the id of its jobs; None if another commit is open at the head.

    Raises:
        CommitLost: another run dropped or abandoned the commit meanwhile.
        TransientError: the previous commit is not finished in time, or a file set has expired.
    """
    branch = pfs.Branch.from_uri(f"{QUESTIONS_REPO}@master")
    try:
        commit = client.pfs.start_commit(branch=branch, description=batch_id)
    except grpc.RpcError as error:
        if "has not been finished" in (error.details() or ""):
            return None
        raise
    try:
        with _lost_if_taken(commit):
            _fill(client, commit, file_sets)
            _finish(client, commit)
    except BaseException:
        with suppress(grpc.RpcError):
            drop_commit(client, commit.id)
        raise
    return commit.id


class CommitLost(TransientError):
    """Another run dropped or abandoned a commit before it was complete."""


@contextmanager
def _lost_if_taken(commit: pfs.Commit) -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        if _is_lost(error, commit):
            raise CommitLost(
                f"commit {commit.id} in {QUESTIONS_REPO} was abandoned by another run", advice="the batch is committed again"
            ) from error
        raise


def _is_lost(error: grpc.RpcError, commit: pfs.Commit) -> bool:
    is_gone = is_code(error, grpc.StatusCode.NOT_FOUND) and f"@{commit.id} not found" in (error.details() or "")
    return is_gone or _has_finished(error)


def _has_finished(error: grpc.RpcError) -> bool:
    return "has already finished" in (error.details() or "")


def _finish(client: Client, commit: pfs.Commit) -> None:
    try:
        client.pfs.finish_commit(commit=commit)
    except grpc.RpcError as error:
        # If the commit has no error, an earlier attempt of this call succeeded and only the response was lost.
        if not _has_finished(error) or client.pfs.inspect_commit(commit=commit, wait=pfs.CommitState.STARTED).error:
            raise


def _fill(client: Client, commit: pfs.Commit, file_sets: Sequence[str]) -> None:
    clear = pfs.DeleteFile(path="/")
    until = time.monotonic() + _FINISHING_SECONDS
    while True:
        try:
            client.pfs.modify_file(iter([pfs.ModifyFileRequest(set_commit=commit), pfs.ModifyFileRequest(delete_file=clear)]))
            break
        except grpc.RpcError as error:
            # Another run's commit came in between. Its files cannot be deleted until it is finished.
            if not is_unfinished(error) or time.monotonic() > until:
                raise
        time.sleep(_PAUSE_SECONDS)
    for file_set in file_sets:
        try:
            client.pfs.add_file_set(commit=commit, file_set_id=file_set)
        except grpc.RpcError as error:
            is_missing = is_code(error, grpc.StatusCode.NOT_FOUND) or "does not exist" in (error.details() or "")
            if is_missing and not _is_lost(error, commit):
                raise TransientError(
                    f"file set {file_set} has expired before it was committed", advice="the batch is read again"
                ) from error
            raise


def wait_until_finished(client: Client, info: pfs.CommitInfo) -> None:
    """Wait until Pachyderm has finished a commit on which FinishCommit was called.

    Raises:
        TransientError: it takes too long.
    """
    until = time.monotonic() + _FINISHING_SECONDS
    while not is_finished(info):
        if time.monotonic() > until:
            raise TransientError(
                f"Pachyderm has been finishing commit {info.commit.id} in {QUESTIONS_REPO} for {_FINISHING_SECONDS:.0f} s",
                advice="look at pachd's log; the batch is retried automatically",
            )
        time.sleep(_PAUSE_SECONDS)
        info = client.pfs.inspect_commit(commit=info.commit, wait=pfs.CommitState.STARTED)
