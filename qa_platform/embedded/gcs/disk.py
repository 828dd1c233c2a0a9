"""The state folder of the emulator: an index in SQLite, one file per object generation, one file per upload in progress.

The files in ``contents`` are named by generation, those in ``uploads`` by random ids: an object's name is never part of a path. A file is
complete before the index refers to it, and is removed only after the index no longer does. So a process that is killed at any point leaves
a valid state. `Disk` removes the files that such a process left.

A folder of an earlier version may lack the tables for buckets' settings and past generations. They are added; the other tables have not
changed.
"""

import errno
import sqlite3
import uuid
from pathlib import Path

# A client that lost the response to its last request retries, so finished uploads are remembered for a while.
_REMEMBERED_UPLOADS = 1000

_SCHEMA = """
create table if not exists bucket (name text primary key, created text not null) strict;
create table if not exists object (
    bucket text not null, name text not null, generation integer not null, metageneration integer not null, size integer not null,
    crc32c text not null, md5 text not null, created text not null, updated text not null, attributes text not null,
    primary key (bucket, name)
) strict, without rowid;
create table if not exists past_object (
    bucket text not null, name text not null, generation integer not null, metageneration integer not null, size integer not null,
    crc32c text not null, md5 text not null, created text not null, updated text not null, attributes text not null,
    soft_deleted integer not null, primary key (bucket, name, generation)
) strict, without rowid;
create table if not exists bucket_details (name text primary key, details text not null) strict;
create table if not exists deleted_bucket (name text not null, generation integer not null, details text not null,
    primary key (name, generation)) strict;
create table if not exists upload (id text primary key, bucket text not null, name text not null, attributes text not null,
    conditions text not null, finished text) strict;
"""


class Disk:
    """An open state folder. ``index`` is in autocommit mode.

    Not thread-safe: all calls come from one thread, so that a check and the write that depends on it are atomic.
    """

    def __init__(self, folder: Path) -> None:
        self._contents = folder / "contents"
        self._uploads = folder / "uploads"
        for part in (self._contents, self._uploads):
            part.mkdir(parents=True, exist_ok=True)
        self.index = sqlite3.connect(folder / "index.sqlite", check_same_thread=False, isolation_level=None)
        self.index.execute("pragma journal_mode = wal")
        self.index.execute("pragma synchronous = normal")
        self.index.executescript(_SCHEMA)
        self._forget_uploads()
        self._remove_strays()

    def close(self) -> None:
        self.index.close()

    def content(self, generation: int) -> Path:
        """The file with the content of an object generation."""
        return self._contents / str(generation)

    def upload(self, upload_id: str) -> Path:
        """The file with the received part of an upload."""
        return self._uploads / upload_id

    def new_file(self) -> Path:
        """An unused path for incoming content."""
        return self.upload(uuid.uuid4().hex)

    def _forget_uploads(self) -> None:
        """Forget all finished uploads except the latest, and unfinished uploads whose file is gone."""
        self.index.execute(
            "delete from upload where finished is not null and rowid not in (select rowid from upload order by rowid desc limit ?)",
            (_REMEMBERED_UPLOADS,),
        )
        for (upload,) in self.index.execute("select id from upload where finished is null").fetchall():
            if not self.upload(upload).exists():
                self.index.execute("delete from upload where id = ?", (upload,))

    def _remove_strays(self) -> None:
        """Remove the files that the index does not refer to."""
        known_generations = "select generation from object union all select generation from past_object"
        generations = {str(generation) for (generation,) in self.index.execute(known_generations)}
        uploads = {upload for (upload,) in self.index.execute("select id from upload")}
        for folder, known in ((self._contents, generations), (self._uploads, uploads)):
            for path in folder.iterdir():
                if path.name not in known:
                    path.unlink()


def is_full(error: OSError | sqlite3.OperationalError) -> bool:
    """Whether an error says that there is no room on the disk."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return error.sqlite_errorcode == sqlite3.SQLITE_FULL
