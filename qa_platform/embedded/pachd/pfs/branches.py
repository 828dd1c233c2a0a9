"""Branches: their heads and their provenance."""

import time
from collections.abc import Iterable

from qa_platform.embedded.pachd.errors import NotFound, PachError
from qa_platform.embedded.pachd.pfs.model import Branch, BranchKey, RepoKey
from qa_platform.embedded.pachd.pfs.repos import Repos
from qa_platform.embedded.pachd.storage.database import Database


class Branches:
    """Reads branches, and writes their heads and their provenance. It creates no commits."""

    def __init__(self, database: Database, repos: Repos) -> None:
        self._db = database
        self._repos = repos

    def get(self, key: BranchKey) -> Branch:
        """A branch.

        Raises:
            NotFound: the repo or the branch does not exist.
        """
        branch = self.find(key)
        if branch is None:
            raise NotFound(f'branch "{key.name}" not found in repo {key.repo}')
        return branch

    def find(self, key: BranchKey) -> Branch | None:
        """A branch; None if it does not exist.

        Raises:
            NotFound: the repo does not exist.
        """
        row = self._db.row(
            "SELECT b.*, c.id AS head_id FROM branch b JOIN commit_ c ON c.pk = b.head WHERE b.repo = ? AND b.name = ?",
            self._repos.pk(key.repo), key.name,
        )  # fmt: skip
        return None if row is None else Branch(row["pk"], key, row["head"], row["head_id"], row["created"], row["updated"])

    def of(self, repo: RepoKey, *, reverse: bool = False) -> list[Branch]:
        """The branches of a repo, the most recently updated first; with ``reverse`` last.

        Raises:
            NotFound: the repo does not exist.
        """
        rows = self._db.rows("SELECT name FROM branch WHERE repo = ? ORDER BY updated DESC, pk DESC", self._repos.pk(repo))
        branches = [self.get(BranchKey(repo, row["name"])) for row in rows]
        return branches[::-1] if reverse else branches

    def with_head(self, commit: int) -> list[str]:
        """The names of the branches that have this commit as their head."""
        return [row["name"] for row in self._db.rows("SELECT name FROM branch WHERE head = ?", commit)]

    def set_head(self, key: BranchKey, commit: int) -> None:
        """Move a branch to a commit. A branch that does not exist is created.

        Raises:
            NotFound: the repo does not exist.
        """
        now = time.time()
        self._db.execute(
            "INSERT INTO branch (repo, name, head, created, updated) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (repo, name) DO UPDATE SET head = excluded.head, updated = excluded.updated",
            self._repos.pk(key.repo), key.name, commit, now, now,
        )  # fmt: skip

    def upstream(self, branch: Branch) -> list[BranchKey]:
        """The direct provenance of a branch."""
        return self._keys("SELECT upstream FROM branch_provenance WHERE downstream = ?", branch.pk)

    def closure(self, branch: Branch, *, downstream: bool) -> list[BranchKey]:
        """All branches in the provenance of a branch; with ``downstream``, all branches that have it in their provenance."""
        here, there = ("upstream", "downstream") if downstream else ("downstream", "upstream")
        return self._keys(
            f"WITH RECURSIVE found(pk) AS (SELECT {there} FROM branch_provenance WHERE {here} = ? UNION "  # noqa: S608
            f"SELECT {there} FROM branch_provenance JOIN found ON {here} = found.pk) SELECT pk FROM found",
            branch.pk,
        )

    def set_provenance(self, key: BranchKey, provenance: Iterable[BranchKey]) -> None:
        """Replace the direct provenance of a branch, without creating a commit.

        Raises:
            NotFound: one of the branches does not exist.
        """
        with self._db.transaction():
            branch = self.get(key)
            self._db.execute("DELETE FROM branch_provenance WHERE downstream = ?", branch.pk)
            upstream = [(branch.pk, self.get(source).pk) for source in provenance]
            self._db.execute_many("INSERT OR IGNORE INTO branch_provenance VALUES (?, ?)", upstream)

    def check_deletable(self, branch: Branch, *, context: str = "") -> None:
        """Refuse to delete a branch that is in the direct provenance of others.

        Args:
            context: a prefix of the message.

        Raises:
            PachError: the branch is in the direct provenance of others.
        """
        downstream = self._keys("SELECT downstream FROM branch_provenance WHERE upstream = ?", branch.pk)
        if downstream:
            named = " ".join(map(str, downstream))
            raise PachError(f'{context}branch "{branch.key}" cannot be deleted because it\'s in the direct provenance of [{named}]')

    def _keys(self, query: str, pk: int) -> list[BranchKey]:
        rows = self._db.rows(
            "SELECT b.name, r.project, r.name AS repo, r.type FROM branch b JOIN repo r ON r.pk = b.repo "  # noqa: S608
            f"WHERE b.pk IN ({query}) ORDER BY b.pk",
            pk,
        )
        return [BranchKey(RepoKey(row["project"], row["repo"], row["type"]), row["name"]) for row in rows]
