"""The values that the modules of PFS exchange. Times are seconds since the epoch."""

from dataclasses import dataclass
from enum import IntEnum


class Kind(IntEnum):
    """The origin of a commit: a client, or propagation."""

    USER = 1
    AUTO = 2


class Wait(IntEnum):
    """The state of a commit that a caller waits for. READY: all commits in its direct provenance are finished."""

    STARTED = 1
    READY = 2
    FINISHING = 3
    FINISHED = 4


@dataclass(frozen=True, order=True)
class RepoKey:
    """The name of a repo."""

    project: str
    name: str
    type: str = "user"

    def __str__(self) -> str:
        return f"{self.project}/{self.name}" + ("" if self.type == "user" else f".{self.type}")


@dataclass(frozen=True)
class BranchKey:
    """The name of a branch."""

    repo: RepoKey
    name: str

    def __str__(self) -> str:
        return f"{self.repo}@{self.name}"


@dataclass(frozen=True)
class CommitRef:
    """A reference to a commit: an id, a branch, or both. Id and branch may have an ancestry, such as ``master^2``."""

    repo: RepoKey
    id: str = ""
    branch: str = ""

    def __str__(self) -> str:
        return f"{self.repo}@{self.id or self.branch}"


@dataclass(frozen=True)
class Project:
    """A project."""

    name: str
    description: str
    created: float


@dataclass(frozen=True)
class Repo:
    """A repo.

    Attributes:
        size: the bytes in the head of ``master``.
        branches: the names of its branches.
    """

    pk: int
    key: RepoKey
    description: str
    created: float
    size: int
    branches: tuple[str, ...]


@dataclass(frozen=True)
class Branch:
    """A branch.

    Attributes:
        head: the primary key of its newest commit.
        head_id: the id of that commit.
    """

    pk: int
    key: BranchKey
    head: int
    head_id: str
    created: float
    updated: float


@dataclass(frozen=True)
class Commit:
    """A commit.

    Attributes:
        branch: the name of the branch that it was created on.
        parent: the primary key of its parent; None for the first commit.
        parent_id: the id of its parent; empty for the first commit.
        finishing: when a client finished it; None while it is open.
        finished: when its files were complete; None until then.
        error: why it failed; empty if it did not.
        root: the tree of a finished commit; None if it has no files.
        size: the bytes of a finished commit.
    """

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
