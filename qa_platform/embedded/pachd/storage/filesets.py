"""File sets: ordered lists of changes (append to a path, delete a path) that are added to a commit together."""

import json
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from qa_platform.embedded.pachd.errors import NotFound, PachError
from qa_platform.embedded.pachd.storage.chunks import Chunk, Chunker, ChunkStore
from qa_platform.embedded.pachd.storage.database import Database
from qa_platform.embedded.pachd.storage.tree_editor import TreeEditor

SCHEMA = """
CREATE TABLE IF NOT EXISTS fileset (id TEXT PRIMARY KEY, expires REAL);
CREATE TABLE IF NOT EXISTS fileset_change (
    fileset TEXT NOT NULL REFERENCES fileset(id) ON DELETE CASCADE, seq INTEGER NOT NULL, changes TEXT NOT NULL, PRIMARY KEY (fileset, seq)
) WITHOUT ROWID;
"""

_GROUP = 1000


@dataclass(frozen=True, slots=True)
class Change:
    """One change of a path. ``chunks`` are appended to the path's part with the tag; None deletes the part."""

    path: str
    tag: str
    chunks: tuple[Chunk, ...] | None


class FileSets:
    """The stored file sets. One without an expiry belongs to a commit."""

    def __init__(self, database: Database, chunks: ChunkStore) -> None:
        self._database = database
        self._chunks = chunks

    def writer(self) -> "FileSetWriter":
        """A writer of a new file set."""
        return FileSetWriter(self._database, self._chunks)

    def changes(self, fileset: str) -> Iterator[Change]:
        """The changes of a file set, in their order."""
        for row in self._database.rows("SELECT changes FROM fileset_change WHERE fileset = ? ORDER BY seq", fileset):
            for path, tag, chunks in json.loads(row["changes"]):
                yield Change(path, tag, None if chunks is None else tuple(Chunk(*chunk) for chunk in chunks))

    def apply(self, editor: TreeEditor, filesets: Iterable[str]) -> None:
        """Apply file sets to a tree, in their order.

        Raises:
            TreeError: the changes contradict each other.
        """
        for fileset in filesets:
            for change in self.changes(fileset):
                if change.chunks is None:
                    editor.delete(change.path, change.tag)
                else:
                    editor.add(change.path, change.tag, change.chunks)

    def check(self, fileset: str) -> None:
        """Check that a file set exists. An expired one exists until it is collected.

        Raises:
            PachError: the file set is unknown.
        """
        if not self._known(fileset):
            raise PachError("add file set: path does not exist")

    def renew(self, fileset: str, ttl: float) -> None:
        """Let a file set expire ``ttl`` seconds from now.

        Raises:
            NotFound: the file set is unknown, or has expired and was collected.
        """
        with self._database.transaction():
            if not self._known(fileset):
                raise NotFound(f"tracker does not contain item: (fileset/{fileset})")
            self._database.execute("UPDATE fileset SET expires = ? WHERE id = ? AND expires IS NOT NULL", time.time() + ttl, fileset)

    def _known(self, fileset: str) -> bool:
        return self._database.row("SELECT 1 FROM fileset WHERE id = ?", fileset) is not None

    def compose(self, filesets: Iterable[str], ttl: float | None) -> str:
        """Create a file set with the changes of others, in their order.

        Args:
            ttl: the seconds after which it expires; None for never.

        Returns:
            The id of the new file set.

        Raises:
            PachError: a file set is unknown.
        """
        made = uuid.uuid4().hex
        with self._database.transaction():
            self._database.execute("INSERT INTO fileset VALUES (?, ?)", made, None if ttl is None else time.time() + ttl)
            seq = 0
            for fileset in filesets:
                self.check(fileset)
                for row in self._database.rows("SELECT changes FROM fileset_change WHERE fileset = ? ORDER BY seq", fileset):
                    self._database.execute("INSERT INTO fileset_change VALUES (?, ?, ?)", made, seq, row["changes"])
                    seq += 1
        return made

    def all_chunks(self) -> set[str]:
        """The names of all chunks that file sets contain."""
        changes = (change for row in self._database.rows("SELECT changes FROM fileset_change") for change in json.loads(row["changes"]))
        return {name for _, _, chunks in changes for name, _ in chunks or ()}

    def forget_expired(self) -> bool:
        """Delete the expired file sets. Returns whether there were any."""
        with self._database.transaction():
            expired = self._database.row("SELECT 1 FROM fileset WHERE expires < ?", time.time()) is not None
            self._database.execute("DELETE FROM fileset WHERE expires < ?", time.time())
        return expired


class FileSetWriter:
    """Collects the changes of a new file set. The file set exists once ``close`` returns its id."""

    def __init__(self, database: Database, chunks: ChunkStore) -> None:
        self._database = database
        self._batch = chunks.batch()
        self._chunker = Chunker(self._batch)
        self._open: tuple[str, str] | None = None
        self._changes: list[tuple[str, str, list[tuple[str, int]] | None]] = []
        self._groups: list[str] = []

    def add(self, path: str, tag: str, data: bytes | memoryview) -> None:
        """Append data to a path's part with a tag."""
        if self._open != (path, tag):
            self._close_file()
            self._open = (path, tag)
        self._chunker.write(data)

    def add_chunks(self, path: str, tag: str, chunks: Iterable[Chunk]) -> None:
        """Append stored chunks to a path's part with a tag."""
        self._close_file()
        self._record(path, tag, tuple(chunks))

    def delete(self, path: str, tag: str) -> None:
        """Delete a path's part with a tag."""
        self._close_file()
        self._record(path, tag, None)

    def delete_written(self, folder: str, tag: str) -> None:
        """Delete what this writer has written below a folder, but not the files of the commit that the file set is added to."""
        self._close_file()
        written = [change for group in self._groups for change in json.loads(group)] + self._changes
        for path in {path for path, _, chunks in written if chunks is not None and path.startswith(folder)}:
            self._record(path, tag, None)

    def close(self, ttl: float | None) -> str:
        """Store the file set, and return its id. It expires after ``ttl`` seconds; None for never."""
        self._close_file()
        self._batch.flush()
        self._end_group()
        fileset = uuid.uuid4().hex
        with self._database.transaction():
            self._database.execute("INSERT INTO fileset VALUES (?, ?)", fileset, None if ttl is None else time.time() + ttl)
            self._database.execute_many(
                "INSERT INTO fileset_change VALUES (?, ?, ?)", [(fileset, seq, group) for seq, group in enumerate(self._groups)]
            )
        return fileset

    def _close_file(self) -> None:
        if self._open is not None:
            path, tag = self._open
            self._open = None
            self._record(path, tag, self._chunker.finish())

    def _record(self, path: str, tag: str, chunks: tuple[Chunk, ...] | None) -> None:
        self._changes.append((path, tag, None if chunks is None else [(chunk.hash, chunk.size) for chunk in chunks]))
        if len(self._changes) >= _GROUP:
            self._end_group()

    def _end_group(self) -> None:
        if self._changes:
            self._groups.append(json.dumps(self._changes, separators=(",", ":")))
            self._changes = []
