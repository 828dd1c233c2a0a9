"""Buckets and objects on disk, with the semantics of Google Cloud Storage that callers rely on: generations and preconditions.

An index in SQLite, and one file per generation, called by its number: no object name is ever part of a path. A file is complete
before the index names it, and goes after the index has forgotten it, so that a process killed anywhere leaves a valid state.
Not thread-safe: one thread calls it, so that every check and the write that depends on it are one step. `Content.of` alone may
run elsewhere.
"""

import base64
import dataclasses
import hashlib
import json
import os
import shutil
import sqlite3
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any

import google_crc32c

NAME_LIMIT_BYTES = 1024
PAGE_LIMIT = 1000
_READ_CHUNK = 2**20

# What a client may set on an object, besides its content.
WRITABLE = ("contentType", "contentEncoding", "contentDisposition", "contentLanguage", "cacheControl", "customTime", "metadata")

_SCHEMA = """
create table if not exists bucket (name text primary key, created text not null) strict;
create table if not exists object (
    bucket text not null, name text not null, generation integer not null, metageneration integer not null, size integer not null,
    crc32c text not null, md5 text not null, created text not null, updated text not null, attributes text not null,
    primary key (bucket, name)
) strict, without rowid;
create table if not exists upload (id text primary key, bucket text not null, name text not null, attributes text not null,
    conditions text not null, finished text) strict;
"""


class StorageError(Exception):
    """What Google Cloud Storage answers with an HTTP status; ``reason`` is its word for it."""

    def __init__(self, status: HTTPStatus, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


def not_found(what: str) -> StorageError:
    return StorageError(HTTPStatus.NOT_FOUND, "notFound", f"No such object: {what}")


def invalid(message: str) -> StorageError:
    return StorageError(HTTPStatus.BAD_REQUEST, "invalid", message)


@dataclass(frozen=True)
class Conditions:
    """Preconditions; None is one that was not given. A missing object has generation 0."""

    generation_match: int | None = None
    generation_not_match: int | None = None
    metageneration_match: int | None = None
    metageneration_not_match: int | None = None

    def check(self, there: "StoredObject | None", *, reading: bool = False) -> None:
        """Raise what the real service answers where one does not hold.

        Raises:
            StorageError: 412; or 304 where something is read and only a `not match` fails.
        """
        generation = there.generation if there else 0
        metageneration = there.metageneration if there else 0
        matches = ((self.generation_match, generation), (self.metageneration_match, metageneration))
        if any(wanted is not None and wanted != actual for wanted, actual in matches):
            raise StorageError(
                HTTPStatus.PRECONDITION_FAILED, "conditionNotMet", "At least one of the pre-conditions you specified did not hold."
            )
        unwanted = ((self.generation_not_match, generation), (self.metageneration_not_match, metageneration))
        if any(wanted is not None and wanted == actual for wanted, actual in unwanted):
            status = HTTPStatus.NOT_MODIFIED if reading else HTTPStatus.PRECONDITION_FAILED
            raise StorageError(status, "conditionNotMet", "At least one of the pre-conditions you specified did not hold.")


@dataclass(frozen=True)
class Content:
    """A complete file that is to become an object's content, with its checksums in base64."""

    path: Path
    size: int
    crc32c: str
    md5: str

    @classmethod
    def of(cls, path: Path) -> "Content":
        """Read a file once for its size and checksums."""
        crc32c, md5, size = google_crc32c.Checksum(), hashlib.md5(usedforsecurity=False), 0
        with path.open("rb") as file:
            while chunk := file.read(_READ_CHUNK):
                crc32c.update(chunk)
                md5.update(chunk)
                size += len(chunk)
        return cls(path, size, base64.b64encode(crc32c.digest()).decode(), base64.b64encode(md5.digest()).decode())


@dataclass(frozen=True)
class StoredObject:
    """The live generation of an object. ``attributes`` are those of WRITABLE that were set."""

    bucket: str
    name: str
    generation: int
    metageneration: int
    size: int
    crc32c: str
    md5: str
    created: str
    updated: str
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Page:
    """One page of a listing; ``token`` continues it, None where it is the last."""

    objects: tuple[StoredObject, ...]
    prefixes: tuple[str, ...]
    token: str | None


@dataclass(frozen=True)
class Upload:
    """A resumable upload. ``finished`` is the object it made."""

    id: str
    bucket: str
    name: str
    attributes: dict[str, Any]
    conditions: Conditions
    finished: StoredObject | None


class Storage:
    """Everything that lies in one folder."""

    def __init__(self, folder: Path) -> None:
        self._contents = folder / "contents"
        self._uploads = folder / "uploads"
        for part in (self._contents, self._uploads):
            part.mkdir(parents=True, exist_ok=True)
        self._index = sqlite3.connect(folder / "index.sqlite", check_same_thread=False, isolation_level=None)
        self._index.execute("pragma journal_mode = wal")
        self._index.execute("pragma synchronous = normal")
        self._index.executescript(_SCHEMA)
        self._remove_strays()
        self._last_generation = self._index.execute("select coalesce(max(generation), 0) from object").fetchone()[0]

    def close(self) -> None:
        self._index.close()

    # Buckets

    def create_bucket(self, name: str) -> str:
        """Create a bucket; the time of its creation.

        Raises:
            StorageError: 409 if it exists.
        """
        try:
            self._index.execute("insert into bucket values (?, ?)", (name, created := _now()))
        except sqlite3.IntegrityError as error:
            raise StorageError(HTTPStatus.CONFLICT, "conflict", f"The bucket {name} exists already.") from error
        return created

    def buckets(self) -> dict[str, str]:
        """Every bucket's name and time of creation."""
        return dict(self._index.execute("select name, created from bucket order by name"))

    def bucket_created(self, name: str) -> str:
        """The time when a bucket was created.

        Raises:
            StorageError: 404 if there is none.
        """
        row = self._index.execute("select created from bucket where name = ?", (name,)).fetchone()
        if not row:
            raise StorageError(HTTPStatus.NOT_FOUND, "notFound", "The specified bucket does not exist.")
        return str(row[0])

    def delete_bucket(self, name: str) -> None:
        """Delete an empty bucket.

        Raises:
            StorageError: 404 if there is none, 409 if it is not empty.
        """
        self.bucket_created(name)
        if self._index.execute("select 1 from object where bucket = ? limit 1", (name,)).fetchone():
            raise StorageError(HTTPStatus.CONFLICT, "conflict", "The bucket you tried to delete is not empty.")
        self._index.execute("delete from bucket where name = ?", (name,))

    # Objects

    def find(self, bucket: str, name: str) -> StoredObject | None:
        """The live generation of an object, or None."""
        self.bucket_created(bucket)
        row = self._index.execute("select * from object where bucket = ? and name = ?", (bucket, name)).fetchone()
        return _object(row) if row else None

    def get(self, bucket: str, name: str, *, generation: int | None, conditions: Conditions) -> StoredObject:
        """The live generation of an object, if it is the wanted one.

        Raises:
            StorageError: 404 if there is none or the wanted one is no longer live; 412 or 304 where a condition does not hold.
        """
        there = self.find(bucket, name)
        if there is None or generation not in (None, there.generation):
            raise not_found(f"{bucket}/{name}")
        conditions.check(there, reading=True)
        return there

    def content_path(self, stored: StoredObject) -> Path:
        return self._contents / str(stored.generation)

    def put(self, bucket: str, name: str, content: Content, *, attributes: Mapping[str, Any], conditions: Conditions) -> StoredObject:
        """Make a file the content of an object, as a new generation. The file is taken over, also where it is refused.

        Raises:
            StorageError: 404 no such bucket; 400 impossible name; 412 a condition does not hold.
        """
        try:
            check_name(name)
            before = self.find(bucket, name)
            conditions.check(before)
            generation = self._next_generation()
            content.path.replace(self._contents / str(generation))
        finally:
            content.path.unlink(missing_ok=True)
        now = _now()
        stored = StoredObject(bucket, name, generation, 1, content.size, content.crc32c, content.md5, now, now, dict(attributes))
        self._write(stored)
        if before:
            self.content_path(before).unlink(missing_ok=True)
        return stored

    def copy(
        self, source: StoredObject, bucket: str, name: str, *, attributes: Mapping[str, Any] | None, conditions: Conditions
    ) -> StoredObject:
        """Copy an object; its attributes too, unless others are given.

        Raises:
            StorageError: as `put`.
        """
        path = self.new_file()
        try:
            # Contents never change, so a second name for the same bytes is a copy.
            os.link(self.content_path(source), path)
        except OSError:
            shutil.copyfile(self.content_path(source), path)
        content = Content(path, source.size, source.crc32c, source.md5)
        return self.put(bucket, name, content, attributes=source.attributes if attributes is None else attributes, conditions=conditions)

    def patch(self, stored: StoredObject, attributes: Mapping[str, Any]) -> StoredObject:
        """Change attributes; one that is None is removed."""
        merged = {key: value for key, value in {**stored.attributes, **attributes}.items() if value is not None}
        changed = dataclasses.replace(stored, attributes=merged, metageneration=stored.metageneration + 1, updated=_now())
        self._write(changed)
        return changed

    def delete(self, stored: StoredObject) -> None:
        self._index.execute("delete from object where bucket = ? and name = ?", (stored.bucket, stored.name))
        self.content_path(stored).unlink(missing_ok=True)

    def page(self, bucket: str, *, prefix: str = "", delimiter: str = "", start: str = "", end: str = "", limit: int, token: str) -> Page:
        """A page of a listing in the order of the names' UTF-8 bytes; names with ``delimiter`` behind the prefix become prefixes.

        Raises:
            StorageError: 404 no such bucket; 400 a token that is none of ours.
        """
        self.bucket_created(bucket)
        limit = min(limit, PAGE_LIMIT) if limit > 0 else PAGE_LIMIT
        after, group = _parse_token(token)
        objects: list[StoredObject] = []
        prefixes: list[str] = []
        last = _token(after, group)
        for stored in self._names_from(bucket, max(prefix, start, after or group)):
            if not stored.name.startswith(prefix) or (end and stored.name.encode() >= end.encode()):
                break
            if stored.name == after or (group and stored.name.startswith(group)):
                continue
            if len(objects) + len(prefixes) == limit:
                return Page(tuple(objects), tuple(prefixes), last)
            head, found, _ = stored.name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            if found:
                group = prefix + head + delimiter
                prefixes.append(group)
                last = _token("", group)
            else:
                objects.append(stored)
                last = _token(stored.name, "")
        return Page(tuple(objects), tuple(prefixes), None)

    # Uploads

    def new_file(self) -> Path:
        """A path for content that is on its way."""
        return self._uploads / uuid.uuid4().hex

    def begin_upload(self, bucket: str, name: str, *, attributes: Mapping[str, Any], conditions: Conditions) -> Upload:
        """Begin a resumable upload.

        Raises:
            StorageError: as `put`.
        """
        check_name(name)
        conditions.check(self.find(bucket, name))
        upload = Upload(uuid.uuid4().hex, bucket, name, dict(attributes), conditions, None)
        self.upload_path(upload).touch()
        values = (upload.id, bucket, name, json.dumps(upload.attributes), json.dumps(dataclasses.asdict(conditions)))
        self._index.execute("insert into upload values (?, ?, ?, ?, ?, null)", values)
        return upload

    def upload(self, upload_id: str) -> Upload:
        """A resumable upload.

        Raises:
            StorageError: 404 if there is none.
        """
        row = self._index.execute("select * from upload where id = ?", (upload_id,)).fetchone()
        if not row:
            raise StorageError(HTTPStatus.NOT_FOUND, "notFound", "No such upload.")
        _, bucket, name, attributes, conditions, finished = row
        made = StoredObject(**json.loads(finished)) if finished else None
        return Upload(upload_id, bucket, name, json.loads(attributes), Conditions(**json.loads(conditions)), made)

    def upload_path(self, upload: Upload) -> Path:
        """The file that holds what has come so far."""
        return self._uploads / upload.id

    def finish_upload(self, upload: Upload, content: Content) -> StoredObject:
        """Make what has come the object's content. A client that asks again gets the same object.

        Raises:
            StorageError: as `put`.
        """
        attributes = {key: value for key, value in upload.attributes.items() if key in WRITABLE}
        try:
            made = self.put(upload.bucket, upload.name, content, attributes=attributes, conditions=upload.conditions)
        except StorageError:
            self.cancel_upload(upload)
            raise
        self._index.execute("update upload set finished = ? where id = ?", (json.dumps(dataclasses.asdict(made)), upload.id))
        return made

    def cancel_upload(self, upload: Upload) -> None:
        self._index.execute("delete from upload where id = ?", (upload.id,))
        self.upload_path(upload).unlink(missing_ok=True)

    def _names_from(self, bucket: str, first: str) -> Iterator[StoredObject]:
        for row in self._index.execute("select * from object where bucket = ? and name >= ? order by name", (bucket, first)):
            yield _object(row)

    def _write(self, stored: StoredObject) -> None:
        values = dataclasses.astuple(dataclasses.replace(stored, attributes={}))[:-1]
        self._index.execute("replace into object values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (*values, json.dumps(stored.attributes)))

    def _next_generation(self) -> int:
        """Like the real ones: the microsecond of the write, and never twice, also where the clock goes back."""
        self._last_generation = max(time.time_ns() // 1000, self._last_generation + 1)
        return self._last_generation

    def _remove_strays(self) -> None:
        """Remove contents that the index does not name, uploads whose bytes are gone, and the memory of all but the last finished ones."""
        self._index.execute(
            "delete from upload where finished is not null and rowid not in (select rowid from upload order by rowid desc limit 1000)"
        )
        for (upload,) in self._index.execute("select id from upload where finished is null").fetchall():
            if not (self._uploads / upload).exists():
                self._index.execute("delete from upload where id = ?", (upload,))
        known = {str(generation) for (generation,) in self._index.execute("select generation from object")}
        uploads = {upload for (upload,) in self._index.execute("select id from upload")}
        for folder, wanted in ((self._contents, known), (self._uploads, uploads)):
            for path in folder.iterdir():
                if path.name not in wanted:
                    path.unlink()


def check_name(name: str) -> None:
    """Refuse the object names that Google Cloud Storage refuses.

    Raises:
        StorageError: 400.
    """
    size = len(name.encode())
    if not 1 <= size <= NAME_LIMIT_BYTES:
        raise invalid(f"The object's name has {size} bytes; it must have between 1 and {NAME_LIMIT_BYTES}.")
    if name in (".", "..") or any(character in name for character in "\r\n\0") or name.startswith(".well-known/acme-challenge/"):
        raise invalid("Invalid object name.")


def _object(row: tuple[Any, ...]) -> StoredObject:
    values = dict(zip((column.name for column in dataclasses.fields(StoredObject)), row, strict=True))
    return StoredObject(**{**values, "attributes": json.loads(values["attributes"])})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _token(name: str, group: str) -> str:
    return base64.urlsafe_b64encode(json.dumps([name, group]).encode()).decode()


def _parse_token(token: str) -> tuple[str, str]:
    """The name after which a listing goes on, and the prefix that it has already given."""
    if not token:
        return "", ""
    try:
        name, group = json.loads(base64.urlsafe_b64decode(token))
    except ValueError as error:
        raise invalid("Invalid page token.") from error
    return name, group
