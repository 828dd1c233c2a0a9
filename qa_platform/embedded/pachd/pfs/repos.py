"""Projects and repos."""

import sqlite3
import time
from collections.abc import Iterable

from qa_platform.embedded.pachd.errors import AlreadyExists, FailedPrecondition, NotFound
from qa_platform.embedded.pachd.pfs.model import Project, Repo, RepoKey
from qa_platform.embedded.pachd.pfs.names import check_name
from qa_platform.embedded.pachd.storage.database import Database


class Projects:
    """Creates, lists and deletes projects."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def create(self, name: str, description: str, *, update: bool) -> None:
        """Create a project, or with ``update`` change the description of an existing one.

        Raises:
            PachError: the name is invalid.
            AlreadyExists: the project exists, and ``update`` is false.
        """
        check_name(name)
        with self._db.transaction():
            if self._db.row("SELECT 1 FROM project WHERE name = ?", name):
                if not update:
                    raise AlreadyExists(f"project {name} already exists")
                self._db.execute("UPDATE project SET description = ? WHERE name = ?", description, name)
            else:
                self._db.execute("INSERT INTO project VALUES (?, ?, ?)", name, description, time.time())

    def all(self) -> list[Project]:
        """All projects, by name."""
        return [Project(*row) for row in self._db.rows("SELECT name, description, created FROM project ORDER BY name")]

    def get(self, name: str) -> Project:
        """A project.

        Raises:
            NotFound: the project does not exist.
        """
        row = self._db.row("SELECT name, description, created FROM project WHERE name = ?", name)
        if row is None:
            raise NotFound(f'project "{name}" not found')
        return Project(*row)

    def delete(self, name: str) -> None:
        """Delete an empty project.

        Raises:
            NotFound: the project does not exist.
            FailedPrecondition: the project has repos.
        """
        with self._db.transaction():
            self.get(name)
            if repos := Repos(self._db, self).all("", [name]):
                problems = "\n".join(f"repo {repo.key} still exists" for repo in repos)
                raise FailedPrecondition(f"cannot delete project {name}: {problems}")
            self._db.execute("DELETE FROM project WHERE name = ?", name)


class Repos:
    """Creates and lists repos."""

    def __init__(self, database: Database, projects: Projects) -> None:
        self._db = database
        self._projects = projects

    def create(self, key: RepoKey, description: str = "", *, update: bool = False) -> None:
        """Create a repo, or with ``update`` change the description of an existing one.

        Raises:
            PachError: the name is invalid.
            NotFound: the project does not exist.
            AlreadyExists: the repo exists, and ``update`` is false.
        """
        check_name(key.name)
        with self._db.transaction():
            self._projects.get(key.project)
            if self.exists(key):
                if not update:
                    raise AlreadyExists(f"repo {key} already exists")
                self._db.execute("UPDATE repo SET description = ? WHERE pk = ?", description, self.pk(key))
            else:
                self._db.execute(
                    "INSERT INTO repo (project, name, type, description, created) VALUES (?, ?, ?, ?, ?)",
                    key.project, key.name, key.type, description, time.time(),
                )  # fmt: skip

    def pk(self, key: RepoKey) -> int:
        """The primary key of a repo.

        Raises:
            NotFound: the repo does not exist.
        """
        pk = self._find(key)
        if pk is None:
            raise NotFound(f"repo {key} not found")
        return pk

    def exists(self, key: RepoKey) -> bool:
        """Whether a repo exists."""
        return self._find(key) is not None

    def get(self, key: RepoKey) -> Repo:
        """A repo.

        Raises:
            NotFound: the repo does not exist.
        """
        row = self._db.row("SELECT * FROM repo WHERE pk = ?", self.pk(key))
        assert row is not None
        return self._repo(row)

    def all(self, type_: str, projects: Iterable[str]) -> list[Repo]:
        """Repos, the newest first.

        Args:
            type_: only repos of this type; empty for all.
            projects: only repos of these projects; empty for all.
        """
        wanted = set(projects)
        rows = self._db.rows("SELECT * FROM repo ORDER BY created DESC, pk DESC")
        return [self._repo(row) for row in rows if (not type_ or row["type"] == type_) and (not wanted or row["project"] in wanted)]

    def _find(self, key: RepoKey) -> int | None:
        pk: int | None = self._db.value("SELECT pk FROM repo WHERE project = ? AND name = ? AND type = ?", key.project, key.name, key.type)
        return pk

    def _repo(self, row: sqlite3.Row) -> Repo:
        branches = self._db.rows(
            "SELECT b.name, c.size FROM branch b JOIN commit_ c ON c.pk = b.head WHERE b.repo = ? ORDER BY b.name", row["pk"]
        )
        size = next((branch["size"] for branch in branches if branch["name"] == "master"), 0)
        key = RepoKey(row["project"], row["name"], row["type"])
        return Repo(row["pk"], key, row["description"], row["created"], size, tuple(branch["name"] for branch in branches))
