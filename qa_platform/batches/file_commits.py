"""The Pachyderm commits that hold a file, in the repos of both pipelines, and their removal.

A commit is a batch with other files too. It goes as a whole, with what the pipelines made of it, as the nightly housekeeping removes it.
"""

import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import grpc
from pachyderm_sdk import Client
from pachyderm_sdk.api import pfs

from qa_platform.batches import commits
from qa_platform.clients.pachyderm import is_code, open_tar
from qa_platform.contract import ANSWER_PIPELINE, LOAD_PIPELINE, MANIFEST, QUESTIONS_REPO, Manifest, file_id

# How often the empty commit is tried that becomes the head, where a commit to be removed is one.
_TRIES = 2
# How long the pipelines may take over the empty commit.
_EMPTY_SECONDS = 300.0
_PAUSE_SECONDS = 0.2


@dataclass(frozen=True)
class _Repo:
    """A repo that holds files. ``folder`` and ``manifests`` are the patterns of a file's folder and manifests, ``{}`` being its id."""

    name: str
    type: str
    folder: str
    manifests: str = ""

    @property
    def repo(self) -> pfs.Repo:
        return pfs.Repo(name=self.name, type=self.type, project=pfs.Project(name="default"))

    def commit(self, commit_id: str) -> pfs.Commit:
        return pfs.Commit(repo=self.repo, id=commit_id)


# Those of type meta have the inputs and outputs of every datum. A failed job leaves there what the job before it had.
_REPOS = (
    _Repo(QUESTIONS_REPO, "user", "/{}", f"/{{}}/*/{MANIFEST}"),
    _Repo(ANSWER_PIPELINE, "user", "/{}", f"/{{}}/{MANIFEST}"),
    _Repo(ANSWER_PIPELINE, "meta", f"/pfs/*/{QUESTIONS_REPO}/{{}}", f"/pfs/*/{QUESTIONS_REPO}/{{}}/*/{MANIFEST}"),
    _Repo(LOAD_PIPELINE, "user", "/{}.csv"),
    _Repo(LOAD_PIPELINE, "meta", f"/pfs/*/{ANSWER_PIPELINE}/{{}}", f"/pfs/*/{ANSWER_PIPELINE}/{{}}/{MANIFEST}"),
)


@dataclass
class FileCommit:
    """A commit of any of the repos that holds a file.

    Args:
        generations: those that its manifests name; none where it holds a part of the file without a manifest.
        others: the number of other files in it.
    """

    id: str
    generations: set[int] = field(default_factory=set)
    others: int = 0

    def holds(self, generations: Collection[int]) -> bool:
        """Whether any of these generations may be in it."""
        return not self.generations or not self.generations.isdisjoint(generations)


def find_file_commits(client: Client, name: str) -> list[FileCommit]:
    """Every commit that holds a file, in any repo. All commits that are kept are searched.

    Raises:
        grpc.RpcError: pachd refuses, is unavailable, or is still finishing a commit.
    """
    found: dict[str, FileCommit] = {}
    for repo in _REPOS:
        for info in _list(client, repo):
            # An output that is not finished has its input in `questions`; until then it cannot be read.
            if repo.name == QUESTIONS_REPO or commits.is_finished(info):
                _look(client, repo, info.commit.id, file_id(name), found)
    return list(found.values())


def _list(client: Client, repo: _Repo) -> list[pfs.CommitInfo]:
    try:
        return list(client.pfs.list_commit(repo=repo.repo, all=True))
    except grpc.RpcError as error:
        if is_code(error, grpc.StatusCode.NOT_FOUND):
            return []
        raise


def _look(client: Client, repo: _Repo, commit_id: str, folder: str, found: dict[str, FileCommit]) -> None:
    commit = repo.commit(commit_id)
    try:
        if not list(client.pfs.glob_file(commit=commit, pattern=repo.folder.format(folder))):
            return
        holder = found.setdefault(commit_id, FileCommit(commit_id))
        holder.generations.update(_generations(client, commit, repo.manifests.format(folder)))
        if repo.name == QUESTIONS_REPO:
            holder.others = len(list(client.pfs.list_file(file=pfs.File(commit=commit, path="/")))) - 1
    except grpc.RpcError as error:
        # Removed while it was read.
        if not is_code(error, grpc.StatusCode.NOT_FOUND):
            raise


def _generations(client: Client, commit: pfs.Commit, pattern: str) -> Iterator[int]:
    # A pattern that matches nothing cannot be fetched.
    if pattern and list(client.pfs.glob_file(commit=commit, pattern=pattern)):
        with open_tar(client, pfs.File(commit=commit, path=pattern)) as tar:
            for member in tar:
                if content := tar.extractfile(member):
                    yield Manifest.from_json(content.read()).generation


def remove_commits(client: Client, ids: Collection[str]) -> Mapping[str, str]:
    """Remove commits, with what the pipelines made of them. Where one is a head, an empty commit is made after it first.

    Returns:
        Pachyderm's reasons by commit, where it refuses.

    Raises:
        grpc.RpcError: pachd is unavailable.
    """
    problem = _put_empty_commit(client) if _any_is_head(client, ids) else ""
    reasons = {}
    for commit_id in ids:
        if refused := _remove(client, commit_id):
            reasons[commit_id] = "; ".join(filter(None, (problem, refused)))
    return reasons


def _any_is_head(client: Client, ids: Collection[str]) -> bool:
    for repo in _REPOS:
        infos = _list(client, repo)
        parents = {info.parent_commit.id for info in infos if info.parent_commit}
        if any(info.commit.id in ids and info.commit.id not in parents for info in infos):
            return True
    return False


def _put_empty_commit(client: Client) -> str:
    """Make an empty batch the head of every repo; why that did not succeed, if so. Its jobs have no datums."""
    problem = ""
    for _ in range(_TRIES):
        try:
            return _try_empty_commit(client)
        except commits.CommitLost as error:
            # Its advice is for the run of a batch.
            problem = error.cause
    return problem


def _try_empty_commit(client: Client) -> str:
    head = commits.head(client)
    if commits.is_finishing(head):
        # The empty commit would stay open until then, and be in the way of batches.
        commits.wait_until_finished(client, head)
    commit_id = commits.commit_batch(client, commits.FORGET, ())
    if commit_id is None:
        return "another batch is being committed"
    until = time.monotonic() + _EMPTY_SECONDS
    for repo in _REPOS:
        while not _is_finished(client, repo, commit_id):
            if time.monotonic() > until:
                return f"{repo.name} has not finished the empty commit {commit_id} after {_EMPTY_SECONDS:.0f} s"
            time.sleep(_PAUSE_SECONDS)
    return ""


def _is_finished(client: Client, repo: _Repo, commit_id: str) -> bool:
    try:
        return commits.is_finished(client.pfs.inspect_commit(commit=repo.commit(commit_id), wait=pfs.CommitState.STARTED))
    except grpc.RpcError as error:
        # Its pipeline does not exist.
        if is_code(error, grpc.StatusCode.NOT_FOUND):
            return True
        raise


def _remove(client: Client, commit_id: str) -> str:
    """Squash a commit's set, or else each of its commits with those made of it; Pachyderm's reason if it refuses one of these."""
    refused = ""
    try:
        if commits.squash(client, commit_id):
            return ""
        # A set from the time when a pipeline was updated is refused as a whole.
        for repo in _REPOS:
            try:
                client.pfs.squash_commit(commit=repo.commit(commit_id), recursive=True)
            except grpc.RpcError as error:
                if error.code() in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.FAILED_PRECONDITION):
                    refused = error.details() or ""
                elif not is_code(error, grpc.StatusCode.NOT_FOUND):
                    raise
    except grpc.RpcError as error:
        if not is_code(error, grpc.StatusCode.PERMISSION_DENIED):
            raise
        return error.details() or "permission denied"
    return refused
