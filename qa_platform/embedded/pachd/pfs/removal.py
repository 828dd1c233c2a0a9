"""Removal: deletes repos and branches, drops and squashes commits.

Dropping a commit undoes it; it must be the newest. Squashing removes it as a step: its changes stay in its children.
"""

from qa_platform.embedded.pachd.errors import NotFound, PachError
from qa_platform.embedded.pachd.pfs.branches import Branches
from qa_platform.embedded.pachd.pfs.commits import Commits
from qa_platform.embedded.pachd.pfs.graph import Graph
from qa_platform.embedded.pachd.pfs.model import BranchKey, Commit, CommitRef, Kind, RepoKey
from qa_platform.embedded.pachd.pfs.names import new_id
from qa_platform.embedded.pachd.pfs.repos import Repos
from qa_platform.embedded.pachd.pfs.trees import CommitTrees
from qa_platform.embedded.pachd.storage.store import Store


class Removal:
    """Deletes, drops and squashes. The garbage collector frees the content later."""

    def __init__(self, store: Store, repos: Repos, branches: Branches, commits: Commits, graph: Graph, trees: CommitTrees) -> None:
        self._garbage = store.gate.garbage
        self._db = store.metadata
        self._repos = repos
        self._branches = branches
        self._commits = commits
        self._graph = graph
        self._trees = trees

    def delete_repo(self, key: RepoKey, *, force: bool = False) -> bool:
        """Delete a repo with its branches and commits. Returns whether it existed.

        Args:
            force: delete it even if branches of other repos have its branches in their provenance.

        Raises:
            PachError: branches of other repos have its branches in their provenance.
        """
        with self._db.transaction():
            try:
                pk = self._repos.pk(key)
            except NotFound:
                return False
            for branch in self._branches.of(key) if not force else ():
                self._branches.check_deletable(branch, context=f"delete repo: delete branch {branch.key}: ")
            self._db.execute("DELETE FROM branch_provenance WHERE upstream IN (SELECT pk FROM branch WHERE repo = ?)", pk)
            self._db.execute("DELETE FROM branch WHERE repo = ?", pk)
            self._db.execute("DELETE FROM repo WHERE pk = ?", pk)
            self._garbage.set()
            return True

    def delete_branch(self, key: BranchKey, *, force: bool) -> None:
        """Delete a branch. Its commits stay.

        Args:
            force: delete it even if other branches have it in their provenance.

        Raises:
            NotFound: the repo or the branch does not exist.
            PachError: other branches have it in their provenance.
        """
        with self._db.transaction():
            branch = self._branches.get(key)
            if not force:
                self._branches.check_deletable(branch)
            self._db.execute("DELETE FROM branch_provenance WHERE upstream = ?", branch.pk)
            self._db.execute("DELETE FROM branch WHERE pk = ?", branch.pk)

    def drop_set(self, set_id: str) -> None:
        """Drop the commits of a set with their files and jobs. Branches move back to the parents. An unknown set is no error.

        Raises:
            PachError: a commit has children or commits of other sets downstream, or updated a pipeline.
        """
        with self._db.transaction():
            self._forget(self._whole_set(set_id), drop=True)

    def squash_set(self, set_id: str) -> None:
        """Squash the commits of a set. An unknown set is no error.

        Raises:
            PachError: a commit has no children, an open child or commits of other sets downstream, or updated a pipeline.
        """
        with self._db.transaction():
            self._forget(self._whole_set(set_id), drop=False)

    def drop(self, ref: CommitRef, *, recursive: bool) -> None:
        """Drop a commit.

        Args:
            recursive: drop all commits downstream too.

        Raises:
            NotFound: the commit does not exist.
            PachError: a commit has children or updated a pipeline; or there are commits downstream, and ``recursive`` is false.
        """
        with self._db.transaction():
            self._forget(self._with_subvenance(ref, "drop", recursive=recursive), drop=True)

    def squash(self, ref: CommitRef, *, recursive: bool) -> None:
        """Squash a commit.

        Args:
            recursive: squash all commits downstream too.

        Raises:
            NotFound: the commit does not exist.
            PachError: a commit has no children, an open child, or updated a pipeline; or there are commits downstream, and ``recursive``
                is false.
        """
        with self._db.transaction():
            self._forget(self._with_subvenance(ref, "squash", recursive=recursive), drop=False)

    def _whole_set(self, set_id: str) -> list[Commit]:
        commits = [commit for commit in self._commits.find_set(set_id) if commit.id == set_id]
        later = {after.id for commit in commits for after in self._commits.subvenance(commit.pk)} - {set_id}
        if later:
            raise PachError(f'commit set "{set_id}" cannot be dropped because it has subvenant commit sets: {", ".join(sorted(later))}')
        return commits

    def _with_subvenance(self, ref: CommitRef, verb: str, *, recursive: bool) -> list[Commit]:
        first = self._commits.get(ref)
        commits = {first.pk: first}
        waiting = [first]
        while waiting:
            later = [commit for commit in self._commits.subvenance(waiting.pop().pk) if commit.pk not in commits]
            commits |= {commit.pk: commit for commit in later}
            waiting += later
        if len(commits) > 1 and not recursive:
            raise PachError(f"cannot {verb} commit ({first}) with subvenance without recursive")
        return list(commits.values())

    def _forget(self, commits: list[Commit], *, drop: bool) -> None:
        for commit in commits:
            self._check_removable(commit, drop=drop)
        for commit in commits:
            self._remove(commit)
        self._garbage.set()

    def _check_removable(self, commit: Commit, *, drop: bool) -> None:
        children = self._commits.children(commit.pk)
        if commit.repo.type == "spec" and commit.kind == Kind.USER:
            raise PachError(f"cannot squash commit {commit} because it updated a pipeline")
        if drop and children:
            raise PachError(f"cannot drop a commit that has children: {commit}")
        if not drop and not children:
            raise PachError(
                f"cannot squash a commit that has no children as that would cause data loss, use the drop operation instead: {commit}"
            )
        for child in children:
            if child.finished is None:
                raise PachError(f"cannot squash until child commit {child} is finished")

    def _remove(self, commit: Commit) -> None:
        """Remove a commit. Its branches move to its parent, or to a new empty commit; its children get its parent."""
        # Read again, because the parent may have just been removed.
        parent = self._commits.by_pk(commit.pk).parent
        for name in self._branches.with_head(commit.pk):
            key = BranchKey(commit.repo, name)
            if parent is None:
                self._graph.add_empty(key, new_id())
            else:
                self._branches.set_head(key, parent)
        self._db.execute("UPDATE commit_ SET parent = ? WHERE parent = ?", parent, commit.pk)
        self._db.execute("DELETE FROM fileset WHERE id IN (SELECT fileset FROM layer WHERE commit_ = ?)", commit.pk)
        self._db.execute("DELETE FROM commit_ WHERE pk = ?", commit.pk)
        self._trees.forget_open(commit.pk)
