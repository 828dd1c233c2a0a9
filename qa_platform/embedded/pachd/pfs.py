"""The rules of repos, branches, commits and their files. Times are seconds since the epoch."""

import re
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum

from qa_platform.embedded.pachd.errors import AlreadyExists, InvalidArgument, NotFound, PachError
from qa_platform.embedded.pachd.storage.store import Store
from qa_platform.embedded.pachd.storage.trees import DEFAULT_TAG, FileEntry, TreeEditor, TreeError

SCHEMA = """
CREATE TABLE IF NOT EXISTS project (name TEXT PRIMARY KEY, description TEXT NOT NULL, created REAL NOT NULL);
INSERT OR IGNORE INTO project VALUES ('default', '', CAST(strftime('%s', 'now') AS REAL));
CREATE TABLE IF NOT EXISTS repo (
    pk INTEGER PRIMARY KEY, project TEXT NOT NULL, name TEXT NOT NULL, type TEXT NOT NULL, description TEXT NOT NULL,
    created REAL NOT NULL, UNIQUE (project, name, type)
);
CREATE TABLE IF NOT EXISTS commit_ (
    pk INTEGER PRIMARY KEY AUTOINCREMENT, repo INTEGER NOT NULL REFERENCES repo(pk) ON DELETE CASCADE,
    id TEXT NOT NULL, branch TEXT NOT NULL,
    parent INTEGER REFERENCES commit_(pk) ON DELETE SET NULL, kind INTEGER NOT NULL, description TEXT NOT NULL, started REAL NOT NULL,
    finishing REAL, finished REAL, error TEXT NOT NULL DEFAULT '', root TEXT, size INTEGER NOT NULL DEFAULT 0,
    UNIQUE (repo, id)
);
CREATE INDEX IF NOT EXISTS commit_by_id ON commit_ (id);
CREATE INDEX IF NOT EXISTS commit_by_parent ON commit_ (parent);
CREATE INDEX IF NOT EXISTS commit_unfinished ON commit_ (finishing) WHERE finished IS NULL;
CREATE TABLE IF NOT EXISTS commit_provenance (
    downstream INTEGER NOT NULL REFERENCES commit_(pk) ON DELETE CASCADE,
    upstream INTEGER NOT NULL REFERENCES commit_(pk) ON DELETE CASCADE,
    PRIMARY KEY (downstream, upstream)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS commit_provenance_upstream ON commit_provenance (upstream);
CREATE TABLE IF NOT EXISTS branch (
    pk INTEGER PRIMARY KEY, repo INTEGER NOT NULL REFERENCES repo(pk) ON DELETE CASCADE, name TEXT NOT NULL,
    head INTEGER NOT NULL REFERENCES commit_(pk), created REAL NOT NULL, updated REAL NOT NULL, UNIQUE (repo, name)
);
CREATE INDEX IF NOT EXISTS branch_by_head ON branch (head);
CREATE TABLE IF NOT EXISTS branch_provenance (
    downstream INTEGER NOT NULL REFERENCES branch(pk) ON DELETE CASCADE, upstream INTEGER NOT NULL REFERENCES branch(pk),
    PRIMARY KEY (downstream, upstream)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS branch_provenance_upstream ON branch_provenance (upstream);
CREATE TABLE IF NOT EXISTS layer (
    commit_ INTEGER NOT NULL REFERENCES commit_(pk) ON DELETE CASCADE, seq INTEGER NOT NULL, fileset TEXT NOT NULL,
    PRIMARY KEY (commit_, seq)
) WITHOUT ROWID;
"""

_NAME = re.compile(r"[a-zA-Z0-9_-]+")
_COMMIT_ID = re.compile(r"[0-9a-f]{12}4[0-9a-f]{19}")
_ANCESTRY = re.compile(r"(?P<base>[^~^.]*)(?P<steps>(?:[~^]\d*|\.\d+)*)")
_GLOB_CHARACTERS = "*?[]{}!()@+^"
_SELECT_COMMIT = (
    "SELECT c.*, r.project, r.name AS repo_name, r.type AS repo_type, p.id AS parent_id FROM commit_ c "
    "JOIN repo r ON r.pk = c.repo LEFT JOIN commit_ p ON p.pk = c.parent"
)
_HAS_PROVENANCE = "SELECT 1 FROM commit_provenance WHERE downstream = ?"


class Kind(IntEnum):
    USER = 1
    AUTO = 2


class Wait(IntEnum):
    STARTED = 1
    READY = 2
    FINISHING = 3
    FINISHED = 4


@dataclass(frozen=True, order=True)
class RepoKey:
    project: str
    name: str
    type: str = "user"

    def __str__(self) -> str:
        return f"{self.project}/{self.name}" + ("" if self.type == "user" else f".{self.type}")


@dataclass(frozen=True)
class CommitRef:
    """A commit as callers name it: an id with ancestry, a branch, or both."""

    repo: RepoKey
    id: str = ""
    branch: str = ""

    def __str__(self) -> str:
        return f"{self.repo}@{self.id or self.branch}"


@dataclass(frozen=True)
class BranchKey:
    repo: RepoKey
    name: str

    def __str__(self) -> str:
        return f"{self.repo}@{self.name}"


@dataclass(frozen=True)
class Repo:
    pk: int
    key: RepoKey
    description: str
    created: float
    size: int
    branches: tuple[str, ...]


@dataclass(frozen=True)
class Branch:
    pk: int
    key: BranchKey
    head: int
    head_id: str
    created: float
    updated: float


@dataclass(frozen=True)
class Commit:
    """``root`` is the tree that a finished commit holds; ``parent_id`` is empty for the first one."""

    pk: int
    repo: RepoKey
    id: str
    branch: str
    parent: int | None
    parent_id: str
    kind: Kind
    description: str
    started: float
    finishing: float | None
    finished: float | None
    error: str
    root: str | None
    size: int

    def __str__(self) -> str:
        return f"{self.repo}@{self.id}"


def new_id() -> str:
    return uuid.uuid4().hex


def check_name(what: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise PachError(f"{what} name ({name}) invalid: only alphanumeric characters, underscores, and dashes are allowed")


def check_path(path: str) -> str:
    """The path with a slash before it.

    Raises:
        PachError: it has characters or segments that no path may have.
    """
    if not path.isascii() or not path.isprintable():
        raise PachError(f"path ({path!r}) invalid: only printable ASCII characters allowed")
    for character in path:
        if character in _GLOB_CHARACTERS:
            raise PachError(f"path ({path}) invalid: globbing character ({character}) not allowed in path")
    segments = path.split("/")
    if "." in segments or ".." in segments:
        raise PachError(f"path ({path}) invalid: relative paths are not allowed")
    return "/" + "/".join(segment for segment in segments if segment) + ("/" if path.endswith("/") and path.strip("/") else "")


class Pfs:
    """All of it works on the metadata in short transactions and is safe to call from many threads."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._db = store.metadata
        self._open_roots: dict[int, tuple[int, str | None]] = {}
        self._open_lock = threading.Lock()
        # Told, inside the transaction, of every commit that propagation made.
        self.on_propagated: Callable[[list[Commit]], None] = lambda commits: None
        self.is_pipeline: Callable[[RepoKey], bool] = lambda repo: False
        # Writes that an earlier server did not live to add to their commits.
        self._db.execute("DELETE FROM fileset WHERE expires IS NULL AND id NOT IN (SELECT fileset FROM layer)")

    # Projects and repos

    def create_project(self, name: str, description: str, *, update: bool) -> None:
        check_name("project", name)
        with self._db.transaction():
            if self._db.row("SELECT 1 FROM project WHERE name = ?", name):
                if not update:
                    raise AlreadyExists(f"project {name} already exists")
                self._db.execute("UPDATE project SET description = ? WHERE name = ?", description, name)
            else:
                self._db.execute("INSERT INTO project VALUES (?, ?, ?)", name, description, time.time())

    def projects(self) -> list[sqlite3.Row]:
        return self._db.rows("SELECT * FROM project ORDER BY name")

    def project(self, name: str) -> sqlite3.Row:
        row = self._db.row("SELECT * FROM project WHERE name = ?", name)
        if row is None:
            raise NotFound(f'project "{name}" not found')
        return row

    def delete_project(self, name: str) -> None:
        with self._db.transaction():
            self.project(name)
            if self._db.row("SELECT 1 FROM repo WHERE project = ?", name):
                raise PachError(f"cannot delete project {name}: it still has repos")
            self._db.execute("DELETE FROM project WHERE name = ?", name)

    def create_repo(self, key: RepoKey, description: str = "", *, update: bool = False) -> None:
        check_name("repo", key.name)
        with self._db.transaction():
            self.project(key.project)
            if self._db.row("SELECT 1 FROM repo WHERE project = ? AND name = ? AND type = ?", key.project, key.name, key.type):
                if not update:
                    raise AlreadyExists(f"repo {key} already exists")
                self._db.execute("UPDATE repo SET description = ? WHERE pk = ?", description, self.repo_pk(key))
            else:
                self._db.execute(
                    "INSERT INTO repo (project, name, type, description, created) VALUES (?, ?, ?, ?, ?)",
                    key.project, key.name, key.type, description, time.time(),
                )  # fmt: skip

    def repo_pk(self, key: RepoKey) -> int:
        pk = self._db.value("SELECT pk FROM repo WHERE project = ? AND name = ? AND type = ?", key.project, key.name, key.type)
        if pk is None:
            raise NotFound(f"repo {key} not found")
        return int(pk)

    def repo_exists(self, key: RepoKey) -> bool:
        try:
            self.repo_pk(key)
        except NotFound:
            return False
        return True

    def repo(self, key: RepoKey) -> Repo:
        row = self._db.row("SELECT * FROM repo WHERE pk = ?", self.repo_pk(key))
        assert row is not None
        return self._repo(row)

    def repos(self, type_: str, projects: Iterable[str]) -> list[Repo]:
        wanted = set(projects)
        rows = self._db.rows("SELECT * FROM repo ORDER BY created DESC, pk DESC")
        return [self._repo(row) for row in rows if (not type_ or row["type"] == type_) and (not wanted or row["project"] in wanted)]

    def delete_repo(self, key: RepoKey, *, force: bool = False) -> bool:
        """False where there was none."""
        with self._db.transaction():
            try:
                pk = self.repo_pk(key)
            except NotFound:
                return False
            downstream = self._db.row(
                "SELECT r.project, r.name FROM branch_provenance bp "
                "JOIN branch u ON u.pk = bp.upstream JOIN branch d ON d.pk = bp.downstream "
                "JOIN repo r ON r.pk = d.repo WHERE u.repo = ? AND d.repo != ?",
                pk, pk,
            )  # fmt: skip
            if downstream is not None and not force:
                raise PachError(f"cannot delete repo {key}: branches of repo {downstream['project']}/{downstream['name']} depend on it")
            self._db.execute("DELETE FROM branch_provenance WHERE upstream IN (SELECT pk FROM branch WHERE repo = ?)", pk)
            self._db.execute("DELETE FROM branch WHERE repo = ?", pk)
            self._db.execute("DELETE FROM repo WHERE pk = ?", pk)
            self.store.gate.garbage.set()
            return True

    def _repo(self, row: sqlite3.Row) -> Repo:
        branches = self._db.rows(
            "SELECT b.name, c.size FROM branch b JOIN commit_ c ON c.pk = b.head WHERE b.repo = ? ORDER BY b.name", row["pk"]
        )
        size = next((branch["size"] for branch in branches if branch["name"] == "master"), 0)
        key = RepoKey(row["project"], row["name"], row["type"])
        return Repo(row["pk"], key, row["description"], row["created"], size, tuple(branch["name"] for branch in branches))

    # Branches

    def branch(self, key: BranchKey) -> Branch:
        found = self._find_branch(key)
        if found is None:
            raise NotFound(f'branch "{key.name}" not found in repo {key.repo}')
        return found

    def branches(self, repo: RepoKey, *, reverse: bool = False) -> list[Branch]:
        rows = self._db.rows("SELECT name FROM branch WHERE repo = ? ORDER BY updated DESC, pk DESC", self.repo_pk(repo))
        found = [self.branch(BranchKey(repo, row["name"])) for row in rows]
        return found[::-1] if reverse else found

    def upstream(self, branch: Branch) -> list[BranchKey]:
        """The branches that this one is made from directly."""
        return self._branch_keys("SELECT upstream FROM branch_provenance WHERE downstream = ?", branch.pk)

    def closure(self, branch: Branch, *, downstream: bool) -> list[BranchKey]:
        """All branches that this one is made from, or that are made from it."""
        here, there = ("upstream", "downstream") if downstream else ("downstream", "upstream")
        return self._branch_keys(
            f"WITH RECURSIVE found(pk) AS (SELECT {there} FROM branch_provenance WHERE {here} = ? UNION "  # noqa: S608
            f"SELECT {there} FROM branch_provenance JOIN found ON {here} = found.pk) SELECT pk FROM found",
            branch.pk,
        )

    def create_branch(self, key: BranchKey, head: CommitRef | None, provenance: Iterable[BranchKey], *, set_id: str = "") -> None:
        """Makes or changes a branch. Without a head it keeps its own, or begins with an empty commit.

        That one is finished, unless the branch is made from others: then whoever fills the branch finishes it.
        """
        check_name("branch", key.name)
        if _COMMIT_ID.fullmatch(key.name):
            raise PachError(f"branch name ({key.name}) invalid: it looks like a commit id")
        with self._db.transaction():
            set_id = set_id or new_id()
            upstream = [self.branch(source).pk for source in provenance]
            old = self._find_branch(key)
            if head is not None:
                commit = self.commit(head)
                if old is not None and commit.id == old.head_id and not upstream:
                    return
                self._set_head(key, commit.pk)
            elif old is None:
                first = self._insert_commit(key, set_id, None, Kind.AUTO, "", finished=not upstream)
                self._set_head(key, first)
                self._db.execute_many(
                    "INSERT OR IGNORE INTO commit_provenance SELECT ?, head FROM branch WHERE pk = ?", [(first, pk) for pk in upstream]
                )
            branch = self.branch(key)
            self._db.execute("DELETE FROM branch_provenance WHERE downstream = ?", branch.pk)
            self._db.execute_many("INSERT OR IGNORE INTO branch_provenance VALUES (?, ?)", [(branch.pk, pk) for pk in upstream])
            if upstream:
                self._propagate(set_id, [branch.pk], include=True)
            elif head is not None:
                self._propagate(set_id, [branch.pk])

    def set_provenance(self, key: BranchKey, provenance: Iterable[BranchKey]) -> None:
        """Changes what a branch is made from, without making a commit."""
        with self._db.transaction():
            branch = self.branch(key)
            self._db.execute("DELETE FROM branch_provenance WHERE downstream = ?", branch.pk)
            upstream = [(branch.pk, self.branch(source).pk) for source in provenance]
            self._db.execute_many("INSERT OR IGNORE INTO branch_provenance VALUES (?, ?)", upstream)

    def ensure_branch(self, key: BranchKey, set_id: str) -> None:
        with self._db.transaction():
            if self._find_branch(key) is None:
                self._set_head(key, self._insert_commit(key, set_id, None, Kind.AUTO, "", finished=True))

    def delete_branch(self, key: BranchKey, *, force: bool) -> None:
        with self._db.transaction():
            branch = self.branch(key)
            downstream = self.closure(branch, downstream=True)
            if downstream and not force:
                raise PachError(f'branch "{key}" cannot be deleted: branches {", ".join(map(str, downstream))} depend on it')
            self._db.execute("DELETE FROM branch_provenance WHERE upstream = ?", branch.pk)
            self._db.execute("DELETE FROM branch WHERE pk = ?", branch.pk)

    def _find_branch(self, key: BranchKey) -> Branch | None:
        row = self._db.row(
            "SELECT b.*, c.id AS head_id FROM branch b JOIN commit_ c ON c.pk = b.head WHERE b.repo = ? AND b.name = ?",
            self.repo_pk(key.repo), key.name,
        )  # fmt: skip
        return None if row is None else Branch(row["pk"], key, row["head"], row["head_id"], row["created"], row["updated"])

    def _branch_keys(self, query: str, pk: int) -> list[BranchKey]:
        rows = self._db.rows(
            "SELECT b.name, r.project, r.name AS repo, r.type FROM branch b JOIN repo r ON r.pk = b.repo "  # noqa: S608
            f"WHERE b.pk IN ({query}) ORDER BY b.pk",
            pk,
        )
        return [BranchKey(RepoKey(row["project"], row["repo"], row["type"]), row["name"]) for row in rows]

    def _set_head(self, key: BranchKey, commit: int) -> None:
        now = time.time()
        self._db.execute(
            "INSERT INTO branch (repo, name, head, created, updated) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (repo, name) DO UPDATE SET head = excluded.head, updated = excluded.updated",
            self.repo_pk(key.repo), key.name, commit, now, now,
        )  # fmt: skip

    # Commits

    def commit(self, ref: CommitRef) -> Commit:
        """The commit that a reference means.

        Raises:
            NotFound: the repo, branch, commit or ancestor does not exist.
        """
        text = ref.id or ref.branch
        if not text:
            raise InvalidArgument("validate request: invalid Commit: a commit needs an id or a branch")
        parsed = _ANCESTRY.fullmatch(text)
        base, steps = (parsed["base"], parsed["steps"]) if parsed else (text, "")
        if ref.id and ref.branch and base and not _COMMIT_ID.fullmatch(base):
            raise PachError(f"invalid commit ID given with a branch ({ref.repo}@{ref.branch}): {base}")
        commit = self._base_commit(ref, base)
        for step, count in re.findall(r"([~^.])(\d*)", steps):
            commit = self._from_root(commit, int(count)) if step == "." else self._ancestor(ref, commit, int(count or 1))
        return commit

    def commit_by_pk(self, pk: int) -> Commit:
        row = self._db.row(f"{_SELECT_COMMIT} WHERE c.pk = ?", pk)
        if row is None:
            raise NotFound(f"commit {pk} not found")
        return _commit(row)

    def _base_commit(self, ref: CommitRef, base: str) -> Commit:
        repo = self.repo_pk(ref.repo)
        if not base and ref.branch:
            base = ref.branch
        if not _COMMIT_ID.fullmatch(base):
            return self.commit_by_pk(self.branch(BranchKey(ref.repo, base)).head)
        row = self._db.row(f"{_SELECT_COMMIT} WHERE c.repo = ? AND c.id = ?", repo, base) or self._db.row(
            "WITH RECURSIVE found(pk) AS (SELECT pk FROM commit_ WHERE id = ? UNION "  # noqa: S608
            "SELECT upstream FROM commit_provenance JOIN found ON downstream = found.pk) "
            f"{_SELECT_COMMIT} WHERE c.repo = ? AND c.pk IN (SELECT pk FROM found) ORDER BY c.pk DESC",
            base, repo,
        )  # fmt: skip
        if row is None:
            raise NotFound(f"commit {ref.repo}@{base} not found")
        return _commit(row)

    def _ancestor(self, ref: CommitRef, commit: Commit, steps: int) -> Commit:
        for _ in range(steps):
            if commit.parent is None:
                raise NotFound(f"commit {ref} not found: {commit} has no parent")
            commit = self.commit_by_pk(commit.parent)
        return commit

    def _from_root(self, commit: Commit, number: int) -> Commit:
        line = [commit]
        while line[-1].parent is not None:
            line.append(self.commit_by_pk(line[-1].parent))
        if not 1 <= number <= len(line):
            raise NotFound(f"commit {commit.repo}@{commit.branch}.{number} not found")
        return line[-number]

    def start_commit(self, branch: BranchKey, *, parent: CommitRef | None = None, description: str = "") -> Commit:
        check_name("branch", branch.name)
        with self._db.transaction():
            old = self._find_branch(branch)
            if old is not None and self.upstream(old):
                raise PachError(f"cannot start a commit on an output branch: {branch}")
            before = self.commit(parent) if parent is not None else self.commit_by_pk(old.head) if old is not None else None
            if before is not None and before.finishing is None:
                raise PachError(f"parent commit {before} has not been finished")
            set_id = new_id()
            pk = self._insert_commit(branch, set_id, before.pk if before else None, Kind.USER, description)
            self._set_head(branch, pk)
            self._propagate(set_id, [self.branch(branch).pk])
            return self.commit_by_pk(pk)

    def add_finished_commit(self, branch: BranchKey, set_id: str) -> Commit:
        """An empty finished commit of a set, which makes none downstream: a pipeline's new version."""
        with self._db.transaction():
            old = self._find_branch(branch)
            pk = self._insert_commit(branch, set_id, old.head if old else None, Kind.USER, "", finished=True)
            self._set_head(branch, pk)
            return self.commit_by_pk(pk)

    def finish_commit(self, ref: CommitRef, *, description: str = "", error: str = "", force: bool = False) -> None:
        """Marks a commit as finishing. It is finished a moment later, by ``finish_next``."""
        with self._db.transaction():
            commit = self.commit(ref)
            if commit.finishing is not None:
                raise PachError(f"commit {commit} has already finished")
            if not force and self.is_pipeline(commit.repo) and self._db.row(_HAS_PROVENANCE, commit.pk):
                raise PachError(f"cannot finish a pipeline output or meta commit, use 'stop job' instead: {commit}")
            self._db.execute(
                "UPDATE commit_ SET finishing = ?, error = ?, description = CASE WHEN ? = '' THEN description ELSE ? END WHERE pk = ?",
                time.time(), error, description, description, commit.pk,
            )  # fmt: skip

    def finish_next(self, *, alive: Callable[[], bool]) -> bool:
        """Waits for a finishing commit and finishes it; False once ``alive`` is false."""
        row = self._db.wait_until(
            lambda: self._db.row("SELECT pk FROM commit_ WHERE finishing IS NOT NULL AND finished IS NULL ORDER BY pk LIMIT 1"), alive=alive
        )
        if row is None:
            return False
        with suppress(NotFound), self.store.gate.writing():
            self._finish(self.commit_by_pk(row["pk"]))
        return True

    def _finish(self, commit: Commit) -> None:
        error = commit.error
        try:
            root = self._apply_layers(commit)
        except TreeError as problem:
            error, root = str(problem), None
        self.complete(commit.pk, root, error)

    def complete(self, pk: int, root: str | None, error: str) -> None:
        """A commit gets its files and is finished."""
        now = time.time()
        found = self.store.trees.root(root)
        with self._db.transaction():
            self._db.execute(
                "UPDATE commit_ SET finishing = coalesce(finishing, ?), finished = ?, error = ?, root = ?, size = ? WHERE pk = ?",
                now, now, error, root, found.size if found else 0, pk,
            )  # fmt: skip
            self._db.execute("DELETE FROM fileset WHERE id IN (SELECT fileset FROM layer WHERE commit_ = ?)", pk)
            self._db.execute("DELETE FROM layer WHERE commit_ = ?", pk)
        with self._open_lock:
            self._open_roots.pop(pk, None)

    def wait(self, commit: Commit, state: Wait, *, alive: Callable[[], bool]) -> Commit:
        """The commit once it is in that state.

        Raises:
            NotFound: it was dropped meanwhile.
        """

        def look() -> Commit | None:
            now = self.commit_by_pk(commit.pk)
            return now if self._reached(now, state) else None

        return self._db.wait_until(look, alive=alive) or self.commit_by_pk(commit.pk)

    def _reached(self, commit: Commit, state: Wait) -> bool:
        if state <= Wait.STARTED or commit.finished is not None:
            return True
        if state == Wait.READY:
            return all(upstream.finished is not None for upstream in self.provenance(commit.pk))
        return state == Wait.FINISHING and commit.finishing is not None

    def list_commits(
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
        """Newest first: all of a repo (from a time on backwards, or forwards if ``reverse``), or ``to`` and its ancestors up to ``after``.

        ``after`` itself is left out.
        """
        pk = self.repo_pk(repo)
        stop = self.commit(after).pk if after is not None else None
        if to is None and after is not None:
            raise PachError("cannot use `from` commit without `to` commit")
        if to is not None and reverse:
            raise PachError("cannot use 'Reverse' while also using 'From' or 'To'")
        if to is None:
            found = [_commit(row) for row in self._db.rows(f"{_SELECT_COMMIT} WHERE c.repo = ? ORDER BY c.pk DESC", pk)]
            if started:
                # Times travel in microseconds.
                found = [one for one in found if (round(one.started, 6) > started if reverse else round(one.started, 6) < started)]
        else:
            found = []
            commit: Commit | None = self.commit(to)
            while commit is not None and commit.pk != stop:
                found.append(commit)
                commit = self.commit_by_pk(commit.parent) if commit.parent is not None else None
        if kind:
            found = [commit for commit in found if commit.kind == kind]
        if reverse:
            found.reverse()
        return found[:number] if number else found

    def children(self, pk: int) -> list[Commit]:
        return [_commit(row) for row in self._db.rows(f"{_SELECT_COMMIT} WHERE c.parent = ? ORDER BY c.pk", pk)]

    def provenance(self, pk: int) -> list[Commit]:
        """The commits that this one is made from directly."""
        rows = self._db.rows(f"{_SELECT_COMMIT} JOIN commit_provenance cp ON cp.upstream = c.pk WHERE cp.downstream = ? ORDER BY c.pk", pk)
        return [_commit(row) for row in rows]

    def subvenance(self, pk: int) -> list[Commit]:
        rows = self._db.rows(f"{_SELECT_COMMIT} JOIN commit_provenance cp ON cp.downstream = c.pk WHERE cp.upstream = ? ORDER BY c.pk", pk)
        return [_commit(row) for row in rows]

    def subscribe(
        self, repo: RepoKey, branch: str, *, after: CommitRef | None, state: Wait, kind: int, alive: Callable[[], bool]
    ) -> Iterator[Commit]:
        """Existing commits, oldest first, then new ones, each once it is in that state. It ends when ``alive`` is false."""
        pk = self.repo_pk(repo)
        last = self.commit(after).pk if after is not None else 0

        def look() -> Commit | None:
            row = self._db.row(
                f"{_SELECT_COMMIT} WHERE c.repo = ? AND c.pk > ? AND (? = '' OR c.branch = ?) AND (? = 0 OR c.kind = ?) "
                "ORDER BY c.pk LIMIT 1",
                pk, last, branch, branch, kind, kind,
            )  # fmt: skip
            return None if row is None else _commit(row)

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

    # Commit sets

    def commit_set(self, set_id: str) -> list[Commit]:
        """The commits of a set and what they are made from, in topological order.

        Raises:
            NotFound: there is no commit with that id.
        """
        rows = self._db.rows(
            "WITH RECURSIVE found(pk) AS (SELECT pk FROM commit_ WHERE id = ? UNION "  # noqa: S608
            "SELECT upstream FROM commit_provenance JOIN found ON downstream = found.pk) "
            f"{_SELECT_COMMIT} WHERE c.pk IN (SELECT pk FROM found) ORDER BY c.pk",
            set_id,
        )  # fmt: skip
        if not rows:
            raise NotFound(f"no commits found for commitset {set_id}")
        return [_commit(row) for row in rows]

    def commit_sets(self) -> list[str]:
        return [row["id"] for row in self._db.rows("SELECT id, max(pk) AS newest FROM commit_ GROUP BY id ORDER BY newest DESC")]

    def drop_commit_set(self, set_id: str) -> None:
        """Forgets the newest set of its repos: commits, files and jobs. Branches go back to the parents."""
        with self._db.transaction():
            self._forget(self._whole_set(set_id), drop=True)

    def squash_commit_set(self, set_id: str) -> None:
        """Forgets a set whose commits have children; what it changed stays in those."""
        with self._db.transaction():
            self._forget(self._whole_set(set_id), drop=False)

    def drop_commit(self, ref: CommitRef, *, recursive: bool) -> None:
        """As for a set, with one commit and, if ``recursive``, with all that are made from it."""
        with self._db.transaction():
            self._forget(self._with_subvenance(ref, "drop", recursive=recursive), drop=True)

    def squash_commit(self, ref: CommitRef, *, recursive: bool) -> None:
        with self._db.transaction():
            self._forget(self._with_subvenance(ref, "squash", recursive=recursive), drop=False)

    def _whole_set(self, set_id: str) -> list[Commit]:
        commits = [commit for commit in self.commit_set(set_id) if commit.id == set_id]
        later = {after.id for commit in commits for after in self.subvenance(commit.pk)} - {set_id}
        if later:
            raise PachError(f'commit set "{set_id}" cannot be dropped because it has subvenant commit sets: {", ".join(sorted(later))}')
        return commits

    def _with_subvenance(self, ref: CommitRef, what: str, *, recursive: bool) -> list[Commit]:
        found = {(commit := self.commit(ref)).pk: commit}
        waiting = [commit]
        while waiting:
            later = [one for one in self.subvenance(waiting.pop().pk) if one.pk not in found]
            found |= {one.pk: one for one in later}
            waiting += later
        if len(found) > 1 and not recursive:
            raise PachError(f"cannot {what} commit ({commit}) with subvenance without recursive")
        return list(found.values())

    def _forget(self, commits: list[Commit], *, drop: bool) -> None:
        for commit in commits:
            children = self.children(commit.pk)
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
        for commit in commits:
            # Another of them may have been the parent.
            parent = self.commit_by_pk(commit.pk).parent
            for row in self._db.rows("SELECT name FROM branch WHERE head = ?", commit.pk):
                key = BranchKey(commit.repo, row["name"])
                self._set_head(key, self._insert_commit(key, new_id(), None, Kind.AUTO, "", finished=True) if parent is None else parent)
            self._db.execute("UPDATE commit_ SET parent = ? WHERE parent = ?", parent, commit.pk)
            self._db.execute("DELETE FROM fileset WHERE id IN (SELECT fileset FROM layer WHERE commit_ = ?)", commit.pk)
            self._db.execute("DELETE FROM commit_ WHERE pk = ?", commit.pk)
            with self._open_lock:
                self._open_roots.pop(commit.pk, None)
        self.store.gate.garbage.set()

    def _insert_commit(
        self, branch: BranchKey, set_id: str, parent: int | None, kind: Kind, description: str, *, finished: bool = False
    ) -> int:
        now = time.time()
        done = now if finished else None
        return self._db.execute(
            "INSERT INTO commit_ (repo, id, branch, parent, kind, description, started, finishing, finished) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            self.repo_pk(branch.repo), set_id, branch.name, parent, int(kind), description, now, done, done,
        )  # fmt: skip

    def propagate(self, set_id: str, branches: Iterable[BranchKey]) -> None:
        """Makes the open commits of a set in these branches and everything downstream of them."""
        with self._db.transaction():
            self._propagate(set_id, [self.branch(key).pk for key in branches], include=True)

    def _propagate(self, set_id: str, changed: list[int], *, include: bool = False) -> None:
        made = []
        for row in self._db.rows(_DOWNSTREAM_IN_ORDER.format(roots=",".join(map(str, changed)))):
            if row["pk"] in changed and not include:
                continue
            key = BranchKey(RepoKey(row["project"], row["repo_name"], row["type"]), row["name"])
            if self._db.row("SELECT 1 FROM commit_ WHERE repo = ? AND id = ?", row["repo"], set_id):
                continue
            pk = self._insert_commit(key, set_id, row["head"], Kind.AUTO, "")
            self._set_head(key, pk)
            self._db.execute(
                "INSERT OR IGNORE INTO commit_provenance SELECT ?, b.head FROM branch_provenance bp "
                "JOIN branch b ON b.pk = bp.upstream WHERE bp.downstream = ?",
                pk, row["pk"],
            )  # fmt: skip
            made.append(self.commit_by_pk(pk))
        if made:
            self.on_propagated(made)

    # Files

    def writable(self, ref: CommitRef) -> tuple[Commit | None, BranchKey | None]:
        """Where a write to that reference goes: into an open commit, or into a commit to be made on a branch."""
        is_branch = not ref.id or not _COMMIT_ID.match(ref.id)
        name = ref.branch if not ref.id else ref.id
        if is_branch and not re.search(r"[~^.]", name):
            branch = BranchKey(ref.repo, name)
            found = self._find_branch(branch)
            if found is None:
                return None, branch
            head = self.commit_by_pk(found.head)
            if head.finishing is not None:
                if self.upstream(found):
                    raise PachError(f"cannot start a commit on an output branch: {branch}")
                return None, branch
            commit = head
        else:
            commit = self.commit(ref)
        if commit.finishing is not None:
            raise PachError(f"commit {commit} has already finished")
        return commit, None

    def add_fileset(self, ref: CommitRef, fileset: str, *, owned: bool = False) -> None:
        """The file set becomes part of the open commit, or a commit of its own where the reference is a branch without one.

        An ``owned`` file set is used up; any other can be added again.
        """
        with self._db.transaction():
            self.store.filesets.check(fileset)
            fileset = fileset if owned else self.store.filesets.compose([fileset], None)
            commit, branch = self.writable(ref)
            if commit is None:
                assert branch is not None
                commit = self.start_commit(branch)
                self._add_layer(commit.pk, fileset)
                self.finish_commit(CommitRef(ref.repo, commit.id))
            else:
                self._add_layer(commit.pk, fileset)

    def _add_layer(self, commit: int, fileset: str) -> None:
        self._db.execute("INSERT INTO layer SELECT ?, coalesce(max(seq), 0) + 1, ? FROM layer WHERE commit_ = ?", commit, fileset, commit)

    def clear(self, ref: CommitRef) -> None:
        with self._db.transaction():
            commit = self.commit(ref)
            if commit.finishing is not None:
                raise PachError("cannot clear finished commit")
            self.store.gate.garbage.set()
            self._db.execute("DELETE FROM fileset WHERE id IN (SELECT fileset FROM layer WHERE commit_ = ?)", commit.pk)
            self._db.execute("DELETE FROM layer WHERE commit_ = ?", commit.pk)
        with self._open_lock:
            self._open_roots.pop(commit.pk, None)

    def fileset_of(self, ref: CommitRef, ttl: float) -> str:
        """A file set with all the files of a commit."""
        writer = self.store.filesets.writer()
        commit = self.commit(ref)
        root = self.readable_root(commit, alive=lambda: True)
        with self.store.gate.writing():
            top = self.store.trees.find(root, "/")
            for found in self.store.trees.walk(top) if top else ():
                if isinstance(found.entry, FileEntry):
                    for tag, chunks in found.entry.parts:
                        writer.add_chunks(found.path, tag, chunks)
            return writer.close(ttl)

    def readable_root(self, commit: Commit, *, alive: Callable[[], bool]) -> str | None:
        """The tree of a commit: of an open one what it has so far, of a finishing one after it has finished."""
        commit = self.commit_by_pk(commit.pk)
        if commit.finished is None and commit.finishing is not None:
            commit = self.wait(commit, Wait.FINISHED, alive=alive)
        if commit.error and commit.root is None:
            return self.good_root(commit.parent)
        if commit.finished is not None:
            return commit.root
        layers = int(self._db.value("SELECT count(*) FROM layer WHERE commit_ = ?", commit.pk))
        with self._open_lock:
            cached = self._open_roots.get(commit.pk)
        if cached is not None and cached[0] == layers:
            return cached[1]
        if commit.parent is not None and (parent := self.commit_by_pk(commit.parent)).finishing is not None:
            self.wait(parent, Wait.FINISHED, alive=alive)
        with self.store.gate.writing():
            root = self._apply_layers(commit)
            with self._open_lock:
                self._open_roots[commit.pk] = (layers, root)
        return root

    def roots(self) -> list[str]:
        """The trees of all commits, those of open ones as far as somebody has read them."""
        with self._open_lock:
            opened = [root for _, root in self._open_roots.values() if root]
        return opened + [row["root"] for row in self._db.rows("SELECT DISTINCT root FROM commit_ WHERE root IS NOT NULL")]

    def good_root(self, pk: int | None) -> str | None:
        """The tree of the nearest commit without an error, beginning with this one."""
        while pk is not None:
            commit = self.commit_by_pk(pk)
            if commit.finished is not None and not commit.error:
                return commit.root
            pk = commit.parent
        return None

    def _apply_layers(self, commit: Commit) -> str | None:
        base = self.good_root(commit.parent)
        layers = [row["fileset"] for row in self._db.rows("SELECT fileset FROM layer WHERE commit_ = ? ORDER BY seq", commit.pk)]
        if not layers:
            return base
        editor = TreeEditor(self.store.trees, base)
        self.store.filesets.apply(editor, layers)
        written = editor.write()
        return written.node if written else None


# Branches below the given ones, each after all that it is made from: ordered by the longest way to it.
_DOWNSTREAM_IN_ORDER = """
WITH RECURSIVE way(pk, depth) AS (
    SELECT pk, 0 FROM branch WHERE pk IN ({roots})
    UNION SELECT bp.downstream, way.depth + 1 FROM branch_provenance bp JOIN way ON bp.upstream = way.pk
)
SELECT b.*, r.project, r.name AS repo_name, r.type, max(way.depth) AS depth FROM way
JOIN branch b ON b.pk = way.pk JOIN repo r ON r.pk = b.repo GROUP BY b.pk ORDER BY depth, b.pk
"""


def tag_of(datum: str) -> str:
    return datum or DEFAULT_TAG


def _commit(row: sqlite3.Row) -> Commit:
    return Commit(
        pk=row["pk"], repo=RepoKey(row["project"], row["repo_name"], row["repo_type"]), id=row["id"], branch=row["branch"],
        parent=row["parent"],
        parent_id=row["parent_id"] or "", kind=Kind(row["kind"]), description=row["description"], started=row["started"],
        finishing=row["finishing"], finished=row["finished"], error=row["error"], root=row["root"], size=row["size"],
    )  # fmt: skip
