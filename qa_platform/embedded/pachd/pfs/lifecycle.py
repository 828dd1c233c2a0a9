"""The lifecycle of a commit: a client starts and finishes it, and a moment later its files are complete."""

import time
from collections.abc import Callable
from contextlib import suppress

from qa_platform.embedded.pachd.errors import NotFound, PachError
from qa_platform.embedded.pachd.pfs.branches import Branches
from qa_platform.embedded.pachd.pfs.commits import Commits
from qa_platform.embedded.pachd.pfs.graph import Graph
from qa_platform.embedded.pachd.pfs.model import BranchKey, Commit, CommitRef, Kind, RepoKey
from qa_platform.embedded.pachd.pfs.names import check_name, new_id
from qa_platform.embedded.pachd.pfs.trees import CommitTrees
from qa_platform.embedded.pachd.storage.store import Store
from qa_platform.embedded.pachd.storage.trees import TreeError

# Whether a repo belongs to a pipeline.
IsPipeline = Callable[[RepoKey], bool]

_HAS_PROVENANCE = "SELECT 1 FROM commit_provenance WHERE downstream = ?"
_POLL_SECONDS = 0.1


class Lifecycle:
    """Starts and finishes commits.

    Args:
        finish_seconds: the shortest time that a commit is finishing.
        is_pipeline: whether a repo belongs to a pipeline. Clients cannot finish a pipeline's commits.
    """

    def __init__(
        self,
        store: Store,
        branches: Branches,
        commits: Commits,
        graph: Graph,
        trees: CommitTrees,
        *,
        finish_seconds: float,
        is_pipeline: IsPipeline,
    ) -> None:
        self._store = store
        self._db = store.metadata
        self._branches = branches
        self._commits = commits
        self._graph = graph
        self._trees = trees
        self._finish_seconds = finish_seconds
        self._is_pipeline = is_pipeline

    def start(self, branch: BranchKey, *, parent: CommitRef | None = None, description: str = "") -> Commit:
        """Start a commit on a branch, and propagate it. A branch that does not exist is created.

        Args:
            parent: the parent of the commit; None for the head of the branch.

        Raises:
            PachError: the name of the branch is invalid, the parent is open, or the branch has upstream branches.
            NotFound: the repo or the parent does not exist.
        """
        check_name(branch.name)
        with self._db.transaction():
            old = self._branches.find(branch)
            before = self._commits.get(parent) if parent is not None else self._commits.by_pk(old.head) if old is not None else None
            if before is not None and before.finishing is None:
                raise PachError(f"start commit in transaction: create commit: parent commit {before} has not been finished")
            if old is not None and self._branches.upstream(old):
                raise PachError(f"start commit in transaction: cannot start a commit on an output branch: {branch}")
            set_id = new_id()
            pk = self._graph.add_head(branch, set_id, before.pk if before else None, Kind.USER, description=description)
            self._graph.propagate(set_id, [branch], include=False)
            return self._commits.by_pk(pk)

    def add_finished(self, branch: BranchKey, set_id: str) -> Commit:
        """Create an empty finished commit of a set, without propagation: a pipeline's new version.

        Raises:
            NotFound: the repo does not exist.
        """
        with self._db.transaction():
            old = self._branches.find(branch)
            return self._commits.by_pk(self._graph.add_head(branch, set_id, old.head if old else None, Kind.USER, finished=True))

    def finish(self, ref: CommitRef, *, description: str = "", error: str = "", force: bool = False) -> None:
        """Mark a commit as finishing. `finish_next` completes it.

        Args:
            description: the new description of the commit; empty keeps the old one.
            error: why the commit failed; empty if it did not.
            force: permit a pipeline's commit.

        Raises:
            NotFound: the commit does not exist.
            PachError: the commit is not open, or belongs to a pipeline.
        """
        with self._db.transaction():
            commit = self._commits.get(ref)
            if commit.finishing is not None:
                raise PachError(f"commit {commit} has already finished")
            if not force and self._is_pipeline(commit.repo) and self._db.row(_HAS_PROVENANCE, commit.pk):
                raise PachError(f"cannot finish a pipeline output or meta commit, use 'stop job' instead: {commit}")
            self._db.execute(
                "UPDATE commit_ SET finishing = ?, error = ?, description = CASE WHEN ? = '' THEN description ELSE ? END WHERE pk = ?",
                time.time(), error, description, description, commit.pk,
            )  # fmt: skip

    def finish_next(self, *, alive: Callable[[], bool]) -> bool:
        """Wait for a finishing commit, and finish it. Returns False once ``alive`` is false.

        A commit is never finished before its nearest ancestor without an error.
        """
        commit = self._db.wait_until(self._next_to_finish, alive=alive)
        if commit is None:
            return False
        while (left := (commit.finishing or 0) + self._finish_seconds - time.time()) > 0 and alive():
            time.sleep(min(left, _POLL_SECONDS))
        with suppress(NotFound), self._store.gate.writing():
            self._finish(self._commits.by_pk(commit.pk))
        return True

    def _next_to_finish(self) -> Commit | None:
        return next((commit for commit in self._commits.unfinished() if self._commits.unfinished_base(commit) is None), None)

    def _finish(self, commit: Commit) -> None:
        error = commit.error
        try:
            root = self._trees.build(commit)
        except TreeError as problem:
            error, root = str(problem), None
        self.complete(commit.pk, root, error)

    def complete(self, pk: int, root: str | None, error: str) -> None:
        """Give a commit its files, and mark it as finished.

        Args:
            pk: the primary key of the commit.
            root: its tree; None if it has no files.
            error: why it failed; empty if it did not.
        """
        now = time.time()
        tree = self._store.trees.root(root)
        with self._db.transaction():
            self._db.execute(
                "UPDATE commit_ SET finishing = coalesce(finishing, ?), finished = ?, error = ?, root = ?, size = ? WHERE pk = ?",
                now, now, error, root, tree.size if tree else 0, pk,
            )  # fmt: skip
            self._db.execute("DELETE FROM fileset WHERE id IN (SELECT fileset FROM layer WHERE commit_ = ?)", pk)
            self._db.execute("DELETE FROM layer WHERE commit_ = ?", pk)
        self._trees.forget_open(pk)
