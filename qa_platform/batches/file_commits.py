"""Finds and removes the Pachyderm commits that hold a file, in the repos of both pipelines.

A commit is a batch and usually holds other files too. It is removed as a whole, with the pipelines' output for it, just as the nightly
housekeeping does.
"""

import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import grpc
from pachyderm_sdk import Client
from pachyderm_sdk.api import pfs

from qa_platform.batches import commits
from qa_platform.clients.pachyderm import is_code, job_of, lists_the_bucket, open_tar
from qa_platform.contract import ANSWER_PIPELINE, LOAD_PIPELINE, MANIFEST, QUESTIONS_REPO, Manifest, file_id

# Attempts to make the empty commit that becomes the new head when the old head is to be removed.
_TRIES = 2
# How long the pipelines may take to process the empty commit.
_EMPTY_SECONDS = 300.0
_PAUSE_SECONDS = 0.2


@dataclass(frozen=True)
class _Repo:
    """A repo that holds files. ``folder`` and ``manifests`` are patterns for a file's folder and manifests; ``{}`` stands for its id."""

    name: str
    type: str
    folder: str
    manifests: str = ""

    @property
    def repo(self) -> pfs.Repo:
        return pfs.Repo(name=self.name, type=self.type, project=pfs.Project(name="default"))

    def commit(self, commit_id: str) -> pfs.Commit:
        return pfs.Commit(repo=self.repo, id=commit_id)


# Meta repos hold the inputs and outputs of every datum. After a failed job they still hold those of the previous job.
_REPOS = (
    _Repo(QUESTIONS_REPO, "user", "/{}", f"/{{}}/*/{MANIFEST}"),
    _Repo(ANSWER_PIPELINE, "user", "/{}", f"/{{}}/{MANIFEST}"),
    _Repo(ANSWER_PIPELINE, "meta", f"/pfs/*/{QUESTIONS_REPO}/{{}}", f"/pfs/*/{QUESTIONS_REPO}/{{}}/*/{MANIFEST}"),
    # In the cron variant, whose input names no file.
    _Repo(ANSWER_PIPELINE, "meta", "/pfs/*/out/{}", f"/pfs/*/out/{{}}/{MANIFEST}"),
    _Repo(LOAD_PIPELINE, "user", "/{}.csv"),
    _Repo(LOAD_PIPELINE, "meta", f"/pfs/*/{ANSWER_PIPELINE}/{{}}", f"/pfs/*/{ANSWER_PIPELINE}/{{}}/{MANIFEST}"),
)


@dataclass
class FileCommit:
    """A commit, in any of the repos, that holds a file.

    Args:
        generations: the file's generations that its manifests name; empty if it holds a part of the file without a manifest.
        others: the number of other files in it.
    """

    id: str
    generations: set[int] = field(default_factory=set)
    others: int = 0

    def holds(self, generations: Collection[int]) -> bool:
        """Whether any of these generations may be in it."""
        return not self.generations or not self.generations.isdisjoint(generations)


def find_file_commits(client: Client, name: str) -> list[FileCommit]:
    """Every commit that holds a file, in any repo. Searches all existing commits.

    Raises:
        grpc.RpcError: pachd refuses, is unavailable, or is still finishing a commit.
    """
    found: dict[str, FileCommit] = {}
    for repo in _REPOS:
        for info in _list(client, repo):
            # An unfinished output cannot be read. Its input is found in `questions`.
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
    """Remove commits with the pipelines' output for them. If one is a head, an empty commit is made after it first.

    Returns:
        Pachyderm's reasons for refusals, by commit id.

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
    """Make an empty batch, whose jobs have no datums, the head of every repo. Returns why this failed, or "" if it succeeded."""
    if _has_ticks(client):
        return "it is the newest commit; repeat the command after the pipeline's next tick"
    problem = ""
    for _ in range(_TRIES):
        try:
            return _try_empty_commit(client)
        except commits.CommitLost as error:
            # Without the error's advice, which is meant for the run of a batch.
            problem = error.cause
    return problem


def _has_ticks(client: Client) -> bool:
    """Whether the answering pipeline is the cron variant. Its ticks make commits, batches do not."""
    try:
        info = client.pps.inspect_pipeline(pipeline=job_of(ANSWER_PIPELINE, "").pipeline, details=True)
    except grpc.RpcError as error:
        if is_code(error, grpc.StatusCode.NOT_FOUND):
            return False
        raise
    return lists_the_bucket(info)


def _try_empty_commit(client: Client) -> str:
    head = commits.head(client)
    if commits.is_finishing(head):
        # Otherwise the empty commit would stay open until then and block batches.
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
        # The pipeline does not exist.
        if is_code(error, grpc.StatusCode.NOT_FOUND):
            return True
        raise


def _remove(client: Client, commit_id: str) -> str:
    """Squash a commit set, or else each of its commits with everything derived from it. Returns Pachyderm's reason if it refuses."""
    refused = ""
    try:
        if commits.squash(client, commit_id):
            return ""
        # Pachyderm refuses a set as a whole if it was a head when a pipeline was updated.
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
