"""Writes files: finds the commit that a write goes to, and adds layers to open commits."""

import re

from qa_platform.embedded.pachd.errors import HandlerPanic, NotFound, PachError
from qa_platform.embedded.pachd.pfs.branches import Branches
from qa_platform.embedded.pachd.pfs.commits import Commits
from qa_platform.embedded.pachd.pfs.lifecycle import Lifecycle
from qa_platform.embedded.pachd.pfs.model import BranchKey, Commit, CommitRef
from qa_platform.embedded.pachd.pfs.names import begins_with_commit_id
from qa_platform.embedded.pachd.pfs.trees import CommitTrees
from qa_platform.embedded.pachd.storage.store import Store


class Writing:
    """Adds file sets to commits, as layers. A commit's files are its parent's files with its layers applied in order."""

    def __init__(self, store: Store, branches: Branches, commits: Commits, lifecycle: Lifecycle, trees: CommitTrees) -> None:
        self._store = store
        self._db = store.metadata
        self._branches = branches
        self._commits = commits
        self._lifecycle = lifecycle
        self._trees = trees
        # File sets of an earlier server that was killed before adding them to their commits.
        self._db.execute("DELETE FROM fileset WHERE expires IS NULL AND id NOT IN (SELECT fileset FROM layer)")

    def target(self, ref: CommitRef) -> tuple[Commit | None, BranchKey | None]:
        """The target of a write to a reference: an open commit, or a branch that gets a new commit. One of the two is None.

        Raises:
            NotFound: the repo or the commit does not exist.
            HandlerPanic: the id is neither a commit's id nor a branch's name, and the reference has no branch.
            PachError: the commit is not open, or the branch has upstream branches and no open commit.
        """
        name = ref.id or ref.branch
        if begins_with_commit_id(ref.id) or re.search(r"[~^.]", name):
            try:
                commit = self._commits.get(ref)
            except NotFound:
                # As Pachyderm: a commit that is gone, with a branch beside its id, is a write by the branch's name.
                if not ref.branch:
                    raise
                return self._target_on(BranchKey(ref.repo, ref.branch), must_exist=False, one_off=True)
            if commit.finishing is not None:
                raise PachError(f"commit {commit} has already finished")
            return commit, None
        return self._target_on(BranchKey(ref.repo, name), must_exist=not ref.branch)

    def _target_on(self, key: BranchKey, *, must_exist: bool, one_off: bool = False) -> tuple[Commit | None, BranchKey | None]:
        branch = self._branches.find(key)
        if branch is None:
            if must_exist:
                raise HandlerPanic
            return None, key
        head = self._commits.by_pk(branch.head)
        if head.finishing is None:
            if one_off:
                raise PachError(f"create commit: parent commit {head} has not been finished")
            return head, None
        if self._branches.upstream(branch):
            raise PachError(f"start commit in transaction: cannot start a commit on an output branch: {key}")
        return None, key

    def add_fileset(self, ref: CommitRef, fileset: str, *, owned: bool = False) -> None:
        """Add a file set to an open commit. If the reference is a branch without one, create a commit with just the file set.

        Args:
            owned: the commit takes over the file set. Otherwise it gets a copy, and the file set can be added again.

        Raises:
            PachError: the file set is unknown; or as `target`.
            NotFound: the repo or the commit does not exist.
        """
        with self._db.transaction():
            self._store.filesets.check(fileset)
            fileset = fileset if owned else self._store.filesets.compose([fileset], None)
            commit, branch = self.target(ref)
            if commit is None:
                assert branch is not None
                commit = self._lifecycle.start(branch)
                self._add_layer(commit.pk, fileset)
                self._lifecycle.finish(CommitRef(ref.repo, commit.id))
            else:
                self._add_layer(commit.pk, fileset)

    def _add_layer(self, commit: int, fileset: str) -> None:
        self._db.execute("INSERT INTO layer SELECT ?, coalesce(max(seq), 0) + 1, ? FROM layer WHERE commit_ = ?", commit, fileset, commit)

    def clear(self, ref: CommitRef) -> None:
        """Remove what has been written to an open commit.

        Raises:
            NotFound: the commit does not exist.
            PachError: the commit is not open.
        """
        with self._db.transaction():
            commit = self._commits.get(ref)
            if commit.finishing is not None:
                raise PachError("cannot clear finished commit")
            self._store.gate.garbage.set()
            self._db.execute("DELETE FROM fileset WHERE id IN (SELECT fileset FROM layer WHERE commit_ = ?)", commit.pk)
            self._db.execute("DELETE FROM layer WHERE commit_ = ?", commit.pk)
        self._trees.forget_open(commit.pk)
