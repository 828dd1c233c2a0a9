"""The graph of commits. It grows by clients' commits, and by their propagation to all downstream branches."""

import time
from collections.abc import Callable, Iterable

from qa_platform.embedded.pachd.errors import PachError
from qa_platform.embedded.pachd.pfs.branches import Branches
from qa_platform.embedded.pachd.pfs.commits import Commits
from qa_platform.embedded.pachd.pfs.model import BranchKey, Commit, CommitRef, Kind, RepoKey
from qa_platform.embedded.pachd.pfs.names import check_name, is_commit_id, new_id
from qa_platform.embedded.pachd.pfs.repos import Repos
from qa_platform.embedded.pachd.storage.database import Database

# Called inside the transaction with the commits that propagation has created.
OnPropagated = Callable[[list[Commit]], None]

# The given branches and all branches downstream of them, ordered by the longest path: each comes after its whole provenance.
_DOWNSTREAM_IN_ORDER = """
WITH RECURSIVE way(pk, depth) AS (
    SELECT pk, 0 FROM branch WHERE pk IN ({roots})
    UNION SELECT bp.downstream, way.depth + 1 FROM branch_provenance bp JOIN way ON bp.upstream = way.pk
)
SELECT b.*, r.project, r.name AS repo_name, r.type, max(way.depth) AS depth FROM way
JOIN branch b ON b.pk = way.pk JOIN repo r ON r.pk = b.repo GROUP BY b.pk ORDER BY depth, b.pk
"""


class Graph:
    """Creates commits and branches, and propagates commits downstream.

    Args:
        on_propagated: called inside the transaction with the commits that propagation has created.
    """

    def __init__(self, database: Database, repos: Repos, branches: Branches, commits: Commits, *, on_propagated: OnPropagated) -> None:
        self._db = database
        self._repos = repos
        self._branches = branches
        self._commits = commits
        self._on_propagated = on_propagated

    def create_branch(self, key: BranchKey, head: CommitRef | None, provenance: Iterable[BranchKey]) -> None:
        """Create or change a branch. Missing upstream branches are created too.

        Args:
            head: the commit that the branch moves to. Without it, the branch keeps its own head, or begins with an empty commit. That
                commit is finished, unless the branch has upstream branches: then it stays open until a client finishes it.
            provenance: the direct provenance of the branch.

        Raises:
            PachError: a name is invalid.
            NotFound: a repo or the head does not exist.
        """
        check_name(key.name)
        if is_commit_id(key.name):
            raise PachError(f"branch name ({key.name}) invalid: it looks like a commit id")
        with self._db.transaction():
            set_id = new_id()
            sources = list(provenance)
            for source in sources:
                check_name(source.name)
                self.ensure_branch(source, set_id)
            old = self._branches.find(key)
            changed = old is None or set(self._branches.upstream(old)) != set(sources)
            if head is not None:
                commit = self._commits.get(head)
                if old is not None and commit.id == old.head_id and not changed:
                    return
                self._branches.set_head(key, commit.pk)
            elif old is None:
                self._begin(key, set_id, sources)
            self._branches.set_provenance(key, sources)
            if head is not None or (sources and changed):
                self._propagate(set_id, [self._branches.get(key).pk], include=bool(sources) and changed)

    def ensure_branch(self, key: BranchKey, set_id: str) -> None:
        """Create a branch with an empty finished commit, if it does not exist.

        Raises:
            NotFound: the repo does not exist.
        """
        with self._db.transaction():
            if self._branches.find(key) is None:
                self.add_empty(key, set_id)

    def add_empty(self, branch: BranchKey, set_id: str) -> None:
        """Make an empty finished commit without a parent the head of a branch.

        Raises:
            NotFound: the repo does not exist.
        """
        self.add_head(branch, set_id, None, Kind.AUTO, finished=True)

    def add_head(
        self, branch: BranchKey, set_id: str, parent: int | None, kind: Kind, *, description: str = "", finished: bool = False
    ) -> int:
        """Create a commit and move its branch to it, without propagation.

        Args:
            parent: the primary key of the parent; None for no parent.
            finished: create a finished, empty commit instead of an open one.

        Returns:
            The primary key of the commit.

        Raises:
            NotFound: the repo does not exist.
        """
        now = time.time()
        done = now if finished else None
        pk = self._db.execute(
            "INSERT INTO commit_ (repo, id, branch, parent, kind, description, started, finishing, finished) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            self._repos.pk(branch.repo), set_id, branch.name, parent, int(kind), description, now, done, done,
        )  # fmt: skip
        self._branches.set_head(branch, pk)
        return pk

    def propagate(self, set_id: str, branches: Iterable[BranchKey], *, include: bool = True) -> None:
        """Create open commits of a set in all branches downstream of the given ones.

        Args:
            include: create them in the given branches too.

        Raises:
            NotFound: a branch does not exist.
        """
        with self._db.transaction():
            self._propagate(set_id, [self._branches.get(key).pk for key in branches], include=include)

    def _begin(self, key: BranchKey, set_id: str, upstream: list[BranchKey]) -> None:
        """Give a new branch its first commit."""
        first = self.add_head(key, set_id, None, Kind.AUTO, finished=not upstream)
        heads = [(first, self._branches.get(source).head) for source in upstream]
        self._db.execute_many("INSERT OR IGNORE INTO commit_provenance VALUES (?, ?)", heads)

    def _propagate(self, set_id: str, changed: list[int], *, include: bool) -> None:
        made = []
        for row in self._db.rows(_DOWNSTREAM_IN_ORDER.format(roots=",".join(map(str, changed)))):
            if (row["pk"] in changed and not include) or self._commits.exists(row["repo"], set_id):
                continue
            key = BranchKey(RepoKey(row["project"], row["repo_name"], row["type"]), row["name"])
            pk = self.add_head(key, set_id, row["head"], Kind.AUTO)
            self._db.execute(
                "INSERT OR IGNORE INTO commit_provenance SELECT ?, b.head FROM branch_provenance bp "
                "JOIN branch b ON b.pk = bp.upstream WHERE bp.downstream = ?",
                pk, row["pk"],
            )  # fmt: skip
            made.append(self._commits.by_pk(pk))
        if made:
            self._on_propagated(made)
