"""Commits: resolving references, relations between commits, and listings."""

import re
import sqlite3

from qa_platform.embedded.pachd.errors import HandlerPanic, NotFound, PachError
from qa_platform.embedded.pachd.pfs.branches import Branches
from qa_platform.embedded.pachd.pfs.model import BranchKey, Commit, CommitRef, Kind, RepoKey
from qa_platform.embedded.pachd.pfs.names import is_commit_id
from qa_platform.embedded.pachd.pfs.repos import Repos
from qa_platform.embedded.pachd.storage.database import Database

_ANCESTRY = re.compile(r"(?P<base>[^~^.]*)(?:(?P<steps>[~^]+)|[~^](?P<back>\d+)|\.(?P<number>\d+))?")
_SELECT = (
    "SELECT c.*, r.project, r.name AS repo_name, r.type AS repo_type, p.id AS parent_id FROM commit_ c "
    "JOIN repo r ON r.pk = c.repo LEFT JOIN commit_ p ON p.pk = c.parent"
)
# The commits with an id, and all commits in their provenance.
_OF_SET = (
    "WITH RECURSIVE found(pk) AS (SELECT pk FROM commit_ WHERE id = ? UNION "
    "SELECT upstream FROM commit_provenance JOIN found ON downstream = found.pk)"
)


class Commits:
    """Reads commits, and changes nothing."""

    def __init__(self, database: Database, repos: Repos, branches: Branches) -> None:
        self._db = database
        self._repos = repos
        self._branches = branches

    def get(self, ref: CommitRef) -> Commit:
        """The commit that a reference refers to.

        Raises:
            NotFound: the repo, branch or commit does not exist.
            HandlerPanic: the id is neither a commit's id nor a branch's name, and the reference has no branch.
            PachError: the ancestry is malformed, or goes beyond the first commit.
        """
        if not ref.id and not ref.branch:
            raise PachError("pick commit tx: cannot pick commit with no ID or branch")
        parsed = _ANCESTRY.fullmatch(ref.id or ref.branch)
        if parsed is None:
            raise PachError(f"pick commit tx: calculate offset {ref}: count offset and clean: invalid ancestry format")
        commit = self._base(ref, parsed["base"] or ref.branch)
        if parsed["number"]:
            return self._from_root(commit, int(parsed["number"]))
        return self._ancestor(commit, int(parsed["back"] or len(parsed["steps"] or "")))

    def by_pk(self, pk: int) -> Commit:
        """A commit by its primary key.

        Raises:
            NotFound: the commit does not exist.
        """
        row = self._db.row(f"{_SELECT} WHERE c.pk = ?", pk)
        if row is None:
            raise NotFound(f"commit {pk} not found")
        return _commit(row)

    def children(self, pk: int) -> list[Commit]:
        """The child commits of a commit."""
        return self._select("WHERE c.parent = ? ORDER BY c.pk", pk)

    def provenance(self, pk: int) -> list[Commit]:
        """The direct provenance of a commit."""
        return self._select("JOIN commit_provenance cp ON cp.upstream = c.pk WHERE cp.downstream = ? ORDER BY c.pk", pk)

    def subvenance(self, pk: int) -> list[Commit]:
        """The commits that have a commit in their direct provenance."""
        return self._select("JOIN commit_provenance cp ON cp.downstream = c.pk WHERE cp.upstream = ? ORDER BY c.pk", pk)

    def of(
        self,
        repo: RepoKey,
        *,
        to: CommitRef | None = None,
        after: CommitRef | None = None,
        number: int = 0,
        reverse: bool = False,
        kind: int = 0,
        started: float = 0.0,
    ) -> list[Commit]:
        """Commits of a repo, the newest first.

        Args:
            to: only this commit and its ancestors.
            after: ends before this ancestor of ``to``.
            number: the most commits; 0 for all.
            reverse: the oldest first.
            kind: only commits of this kind; 0 for all.
            started: only commits that started before this time, with ``reverse`` after it; 0 for all. Ignored with ``to``.

        Raises:
            NotFound: the repo or a commit does not exist.
            PachError: the arguments exclude each other.
        """
        pk = self._repos.pk(repo)
        stop = self.get(after).pk if after is not None else None
        if to is None and after is not None:
            raise PachError("cannot use `from` commit without `to` commit")
        if to is not None and reverse:
            raise PachError("cannot use 'Reverse' while also using 'From' or 'To'")
        commits = self._started(pk, started, reverse=reverse) if to is None else self._line(self.get(to), stop)
        if kind:
            commits = [commit for commit in commits if commit.kind == kind]
        if reverse:
            commits.reverse()
        return commits[:number] if number else commits

    def next_of(self, repo: int, *, after: int, branch: str, kind: int) -> Commit | None:
        """The oldest commit of a repo after a commit.

        Args:
            repo: the primary key of the repo.
            after: the primary key of that commit; 0 for the first commit.
            branch: only commits of this branch; empty for all.
            kind: only commits of this kind; 0 for all.
        """
        commits = self._select(
            "WHERE c.repo = ? AND c.pk > ? AND (? = '' OR c.branch = ?) AND (? = 0 OR c.kind = ?) ORDER BY c.pk LIMIT 1",
            repo, after, branch, branch, kind, kind,
        )  # fmt: skip
        return commits[0] if commits else None

    def unfinished(self) -> list[Commit]:
        """The finishing commits, the oldest first."""
        return self._select("WHERE c.finishing IS NOT NULL AND c.finished IS NULL ORDER BY c.pk")

    def of_set(self, set_id: str) -> list[Commit]:
        """The commits of a set and all commits in their provenance, in topological order.

        Raises:
            NotFound: there is no commit with that id.
        """
        commits = self.find_set(set_id)
        if not commits:
            raise NotFound(f"no commits found for commitset {set_id}")
        return commits

    def find_set(self, set_id: str) -> list[Commit]:
        """As `of_set`; empty if there is no commit with that id."""
        rows = self._db.rows(f"{_OF_SET} {_SELECT} WHERE c.pk IN (SELECT pk FROM found) ORDER BY c.pk", set_id)  # noqa: S608
        return [_commit(row) for row in rows]

    def set_ids(self) -> list[str]:
        """The ids of all sets, the newest first."""
        return [row["id"] for row in self._db.rows("SELECT id, max(pk) AS newest FROM commit_ GROUP BY id ORDER BY newest DESC")]

    def exists(self, repo: int, set_id: str) -> bool:
        """Whether a repo has a commit of a set."""
        return self._db.row("SELECT 1 FROM commit_ WHERE repo = ? AND id = ?", repo, set_id) is not None

    def unfinished_base(self, commit: Commit) -> Commit | None:
        """The nearest ancestor without an error, if that is unfinished."""
        pk = commit.parent
        while pk is not None:
            base = self.by_pk(pk)
            if not base.error:
                return base if base.finished is None else None
            pk = base.parent
        return None

    def _select(self, condition: str, *values: object) -> list[Commit]:
        return [_commit(row) for row in self._db.rows(f"{_SELECT} {condition}", *values)]

    def _base(self, ref: CommitRef, base: str) -> Commit:
        repo = self._repos.pk(ref.repo)
        if not is_commit_id(base):
            return self._head(ref, base)
        row = self._db.row(f"{_SELECT} WHERE c.repo = ? AND c.id = ?", repo, base) or self._db.row(
            f"{_OF_SET} {_SELECT} WHERE c.repo = ? AND c.pk IN (SELECT pk FROM found) ORDER BY c.pk DESC",  # noqa: S608
            base,
            repo,
        )
        if row is None:
            raise NotFound(f"pick commit tx: commit {ref.repo}@{base} not found")
        return _commit(row)

    def _head(self, ref: CommitRef, name: str) -> Commit:
        branch = self._branches.find(BranchKey(ref.repo, name))
        if branch is not None:
            return self.by_pk(branch.head)
        if not ref.branch:
            raise HandlerPanic
        raise NotFound(f'pick commit tx: branch "{ref.branch}" not found in repo {ref.repo}')

    def _ancestor(self, commit: Commit, steps: int) -> Commit:
        line = self._line(commit)
        if steps >= len(line):
            key = f"{commit.repo.project}/{commit.repo.name}.{commit.repo.type}@{commit.id}"
            raise PachError(
                f"pick commit tx: picking commit: invalid offset for ancestor of commit: {key}, "
                f"offset requested: {steps}, offset traversable: {len(line) - 1}"
            )
        return line[steps]

    def _from_root(self, commit: Commit, number: int) -> Commit:
        line = self._line(commit)
        if not 1 <= number <= len(line):
            raise PachError(f"pick commit tx: picking commit: invalid offset from branch root for head commit: {commit}, offset: {number}")
        return line[-number]

    def _line(self, commit: Commit, stop: int | None = None) -> list[Commit]:
        """The commit and its ancestors, up to and excluding ``stop``."""
        line: list[Commit] = []
        following: Commit | None = commit
        while following is not None and following.pk != stop:
            line.append(following)
            following = self.by_pk(following.parent) if following.parent is not None else None
        return line

    def _started(self, repo: int, time: float, *, reverse: bool) -> list[Commit]:
        """The commits of a repo that started before a time, with ``reverse`` after it; 0 for all."""
        commits = self._select("WHERE c.repo = ? ORDER BY c.pk DESC", repo)
        if not time:
            return commits
        # The protocol has times in microseconds.
        return [commit for commit in commits if (round(commit.started, 6) > time if reverse else round(commit.started, 6) < time)]


def _commit(row: sqlite3.Row) -> Commit:
    return Commit(
        pk=row["pk"],
        repo=RepoKey(row["project"], row["repo_name"], row["repo_type"]),
        id=row["id"],
        branch=row["branch"],
        parent=row["parent"],
        parent_id=row["parent_id"] or "",
        kind=Kind(row["kind"]),
        description=row["description"],
        started=row["started"],
        finishing=row["finishing"],
        finished=row["finished"],
        error=row["error"],
        root=row["root"],
        size=row["size"],
    )
