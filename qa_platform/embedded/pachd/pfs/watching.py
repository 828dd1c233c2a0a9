"""Waits for commits, and follows the commits of a repo."""

from collections.abc import Callable, Iterator

from qa_platform.embedded.pachd.errors import NotFound
from qa_platform.embedded.pachd.pfs.commits import Commits
from qa_platform.embedded.pachd.pfs.model import Commit, CommitRef, RepoKey, Wait
from qa_platform.embedded.pachd.pfs.repos import Repos
from qa_platform.embedded.pachd.storage.database import Database


class Watching:
    """Blocks callers until commits have reached a state. A wait ends early when the caller is no longer ``alive``."""

    def __init__(self, database: Database, repos: Repos, commits: Commits) -> None:
        self._db = database
        self._repos = repos
        self._commits = commits

    def wait(self, commit: Commit, state: Wait, *, alive: Callable[[], bool]) -> Commit:
        """Wait until a commit is in a state, and return it. Once ``alive`` is false, return it as it is.

        Raises:
            NotFound: the commit was dropped in the meantime.
        """

        def look() -> Commit | None:
            now = self._commits.by_pk(commit.pk)
            return now if self._reached(now, state) else None

        return self._db.wait_until(look, alive=alive) or self._commits.by_pk(commit.pk)

    def _reached(self, commit: Commit, state: Wait) -> bool:
        if state <= Wait.STARTED or commit.finished is not None:
            return True
        if state == Wait.READY:
            return all(upstream.finished is not None for upstream in self._commits.provenance(commit.pk))
        return state == Wait.FINISHING and commit.finishing is not None

    def subscribe(
        self, repo: RepoKey, branch: str, *, after: CommitRef | None, state: Wait, kind: int, alive: Callable[[], bool]
    ) -> Iterator[Commit]:
        """The existing commits of a repo, the oldest first, then each new one. It ends when ``alive`` is false.

        Args:
            branch: only commits of this branch; empty for all.
            after: only commits after this one.
            state: each commit is yielded once it is in this state.
            kind: only commits of this kind; 0 for all.

        Raises:
            NotFound: the repo or ``after`` does not exist.
        """
        pk = self._repos.pk(repo)
        last = self._commits.get(after).pk if after is not None else 0

        def look() -> Commit | None:
            return self._commits.next_of(pk, after=last, branch=branch, kind=kind)

        while True:
            commit = self._db.wait_until(look, alive=alive)
            if commit is None:
                return
            last = commit.pk
            try:
                reached = self.wait(commit, state, alive=alive)
            except NotFound:
                continue
            if not alive():
                return
            yield reached
