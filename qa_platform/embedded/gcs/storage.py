"""Objects, with the semantics of Google Cloud Storage that callers rely on: generations, preconditions, holds, past versions.

Not thread-safe (see `Disk`). Only `Content.of` may run on another thread.
"""

import dataclasses
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qa_platform.embedded.gcs.buckets import Buckets
from qa_platform.embedded.gcs.disk import Disk
from qa_platform.embedded.gcs.listing import Wanted, page
from qa_platform.embedded.gcs.model import (
    NOT_COPIED,
    WRITABLE,
    Bucket,
    Conditions,
    Content,
    Page,
    StoredObject,
    invalid,
    not_found,
)
from qa_platform.embedded.gcs.past import PastObjects
from qa_platform.embedded.gcs.policies import check_acl, check_unprotected, checked_retention, require
from qa_platform.embedded.gcs.rows import LIVE_COLUMNS, row_of, stored_object
from qa_platform.embedded.gcs.times import now_text
from qa_platform.provisioning.merge_patch import merge_patch

NAME_LIMIT_BYTES = 1024
_COMPOSE_LIMIT = 32
_CHUNK_BYTES = 2**20
_CREATE, _DELETE = "storage.objects.create", "storage.objects.delete"
_GET, _UPDATE, _RESTORE = "storage.objects.get", "storage.objects.update", "storage.objects.restore"


class Storage:
    """The objects of a state folder, and its ``buckets``.

    Raises, in every method:
        StorageError: 404 the bucket does not exist; 403 the caller lacks a permission.
    """

    def __init__(self, disk: Disk) -> None:
        self.buckets = Buckets(disk)
        self._past = PastObjects(disk)
        self._disk = disk
        self._index = disk.index
        query = "select coalesce(max(generation), 0) from (select generation from object union all select generation from past_object)"
        self._last_generation = self._index.execute(query).fetchone()[0]

    def get(self, bucket: str, name: str, *, generation: int | None, conditions: Conditions, soft_deleted: bool = False) -> StoredObject:
        """An object to be read.

        Args:
            generation: the generation; None for the live one.
            soft_deleted: look for a soft-deleted generation.

        Raises:
            StorageError: 404 the object does not exist, or the generation is gone; 412 or 304 a condition does not hold.
        """
        require(self.buckets.get(bucket), _GET)
        current = self._existing(bucket, name, generation, soft_deleted=soft_deleted)
        conditions.check(current, reading=True)
        return current

    def check_upload(self, bucket: str, name: str, conditions: Conditions) -> None:
        """Refuse an upload that `put` would refuse now.

        Raises:
            StorageError: as `put`.
        """
        check_name(name)
        self._check_replacing(self.buckets.get(bucket), name, conditions)

    def put(self, bucket: str, name: str, content: Content, *, attributes: Mapping[str, Any], conditions: Conditions) -> StoredObject:
        """Make a file the content of an object, as a new generation. The file is moved; if the request is refused, it is removed.

        Raises:
            StorageError: 400 the name is invalid; 412 a condition does not hold; 403 the object to replace is protected.
        """
        try:
            check_name(name)
            owner = self.buckets.get(bucket)
            before = self._check_replacing(owner, name, conditions)
            complete = _new_attributes(owner, attributes)
            generation = self._next_generation()
            content.path.replace(self._disk.content(generation))
        finally:
            content.path.unlink(missing_ok=True)
        now = now_text()
        stored = StoredObject(bucket, name, generation, 1, content.size, content.crc32c, content.md5, now, now, complete)
        with self._index:
            self._index.execute("begin")
            if before:
                self._past.keep(owner, before, as_version=owner.keeps_versions)
            self._write(stored)
        if before:
            self._past.remove_content(before)
        return stored

    def copy(
        self, source: StoredObject, bucket: str, name: str, *, attributes: Mapping[str, Any] | None, conditions: Conditions
    ) -> StoredObject:
        """Copy an object.

        Args:
            attributes: the attributes of the copy; None copies those of the source, except what protects it.
            conditions: on the object that the copy replaces.

        Raises:
            StorageError: as `put`.
        """
        kept = {key: value for key, value in source.attributes.items() if key not in WRITABLE and key not in _OF_ONE_GENERATION}
        if attributes is None:
            attributes = {key: value for key, value in source.attributes.items() if key in WRITABLE and key not in NOT_COPIED}
        copied = Content(self._linked(source), source.size, source.crc32c, source.md5)
        return self.put(bucket, name, copied, attributes={**kept, **attributes}, conditions=conditions)

    def compose(
        self, bucket: str, name: str, sources: Sequence[StoredObject], *, attributes: Mapping[str, Any], conditions: Conditions
    ) -> StoredObject:
        """Concatenate objects, in order, to a new one. It has no MD5.

        Raises:
            StorageError: as `put`; 400 there are too many sources, or none.
        """
        if not 1 <= len(sources) <= _COMPOSE_LIMIT:
            raise invalid(f"The number of source components must be between 1 and {_COMPOSE_LIMIT}.")
        path = self._disk.new_file()
        with path.open("wb") as target:
            for source in sources:
                with self._disk.content(source.generation).open("rb") as part:
                    shutil.copyfileobj(part, target, _CHUNK_BYTES)
        content = dataclasses.replace(Content.of(path), md5="")
        components = sum(int(source.attributes.get("componentCount", 1)) for source in sources)
        return self.put(bucket, name, content, attributes={**attributes, "componentCount": components}, conditions=conditions)

    def move(self, source: StoredObject, name: str, *, conditions: Conditions) -> StoredObject:
        """Rename an object within its bucket, atomically.

        Raises:
            StorageError: as `put`; 403 the object is protected.
        """
        owner = self.buckets.get(source.bucket)
        require(owner, _DELETE)
        check_unprotected(owner, source)
        moved = self.copy(source, source.bucket, name, attributes=None, conditions=conditions)
        if name != source.name:
            self._delete(owner, source, keeps_versions=False)
        return moved

    def patch(self, stored: StoredObject, attributes: Mapping[str, Any], *, replace: bool = False, override: bool = False) -> StoredObject:
        """Change attributes of an object. None removes an attribute.

        Args:
            replace: also remove the attributes that are not given.
            override: permit shortening or removing an unlocked retention.

        Raises:
            StorageError: 400 an attribute is malformed; 403 the object's retention forbids it; 412 public access is prevented.
        """
        owner = self.buckets.get(stored.bucket)
        require(owner, _UPDATE)
        before = {key: value for key, value in stored.attributes.items() if not replace or key not in WRITABLE}
        complete = merge_patch(before, attributes)
        if "acl" in attributes:
            check_acl(owner, attributes["acl"])
        if "retention" in attributes:
            retention = checked_retention(stored.attributes.get("retention", {}), attributes["retention"], override=override)
            complete = merge_patch(complete, {"retention": None}) | ({"retention": retention} if retention else {})
        if stored.attributes.get("eventBasedHold") and not complete.get("eventBasedHold"):
            complete["holdReleased"] = now_text()
        changed = dataclasses.replace(stored, attributes=complete, metageneration=stored.metageneration + 1, updated=now_text())
        self._write(changed)
        return changed

    def delete(self, bucket: str, name: str, *, generation: int | None, conditions: Conditions) -> None:
        """Delete an object. It becomes a past version if the bucket keeps versions and no generation is given.

        Raises:
            StorageError: 404 the object does not exist, or the generation is gone; 412 a condition does not hold; 403 it is protected.
        """
        owner = self.buckets.get(bucket)
        require(owner, _DELETE)
        stored = self._existing(bucket, name, generation)
        conditions.check(stored)
        check_unprotected(owner, stored)
        self._delete(owner, stored, keeps_versions=owner.keeps_versions and generation is None)

    def restore(self, bucket: str, name: str, generation: int | None, *, conditions: Conditions) -> StoredObject:
        """Restore a soft-deleted generation as a new live one.

        Raises:
            StorageError: as `put`; 404 there is no such soft-deleted object.
        """
        owner = self.buckets.get(bucket)
        require(owner, _RESTORE)
        source = self._existing(bucket, name, generation, soft_deleted=True)
        restored = self.copy(source, bucket, name, attributes=None, conditions=conditions)
        self._past.forget(source)
        self._past.remove_content(source)
        return restored

    def page(self, bucket: str, wanted: Wanted) -> Page:
        """One page of a listing.

        Raises:
            StorageError: 400 a parameter of the listing is malformed.
        """
        require(self.buckets.get(bucket), "storage.objects.list")
        if wanted.soft_deleted:
            self._past.purge(bucket)
        return page(self._index, bucket, wanted)

    def _existing(self, bucket: str, name: str, generation: int | None, *, soft_deleted: bool = False) -> StoredObject:
        stored = self._find(bucket, name) if not soft_deleted else None
        if generation is not None and (stored is None or stored.generation != generation):
            stored = self._past.find(bucket, name, generation, soft_deleted=soft_deleted)
        if stored is None:
            raise not_found(f"{bucket}/{name}")
        return stored

    def _find(self, bucket: str, name: str) -> StoredObject | None:
        query = f"select {LIVE_COLUMNS} from object where bucket = ? and name = ?"  # noqa: S608
        row = self._index.execute(query, (bucket, name)).fetchone()
        return stored_object(row) if row else None

    def _check_replacing(self, owner: Bucket, name: str, conditions: Conditions) -> StoredObject | None:
        """The object that a write replaces; None if there is none. Refuses a write that is not allowed."""
        require(owner, _CREATE)
        before = self._find(owner.name, name)
        conditions.check(before)
        if before:
            require(owner, _DELETE)
            check_unprotected(owner, before)
        return before

    def _delete(self, owner: Bucket, stored: StoredObject, *, keeps_versions: bool) -> None:
        with self._index:
            self._index.execute("begin")
            live = self._find(stored.bucket, stored.name)
            if live and live.generation == stored.generation:
                self._index.execute("delete from object where bucket = ? and name = ?", (stored.bucket, stored.name))
            self._past.forget(stored)
            self._past.keep(owner, stored, as_version=keeps_versions)
        self._past.remove_content(stored)

    def _linked(self, source: StoredObject) -> Path:
        path = self._disk.new_file()
        content = self._disk.content(source.generation)
        try:
            # Contents never change, so a hard link is as good as a copy.
            os.link(content, path)
        except OSError:
            shutil.copyfile(content, path)
        return path

    def _write(self, stored: StoredObject) -> None:
        """Store a generation where it belongs: among the past ones or among the live objects."""
        if not self._past.update(stored):
            self._index.execute("replace into object values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row_of(stored))

    def _next_generation(self) -> int:
        """The time of the write in microseconds, as in the real service. It always grows, even if the clock goes back."""
        self._last_generation = max(time.time_ns() // 1000, self._last_generation + 1)
        return self._last_generation


_OF_ONE_GENERATION = ("holdReleased", "replaced", "softDeleted", "softDeleteSeconds", "keySha256")


def check_name(name: str) -> None:
    """Refuse object names that Google Cloud Storage refuses.

    Raises:
        StorageError: 400.
    """
    size = len(name.encode())
    if not 1 <= size <= NAME_LIMIT_BYTES:
        raise invalid(f"The object's name has {size} bytes; it must have between 1 and {NAME_LIMIT_BYTES}.")
    if name in (".", "..") or any(character in name for character in "\r\n\0") or name.startswith(".well-known/acme-challenge/"):
        raise invalid("Invalid object name.")


def _new_attributes(owner: Bucket, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a new generation: what the client sent, and the bucket's default hold."""
    complete = {key: value for key, value in attributes.items() if value is not None}
    if complete.get("acl"):
        check_acl(owner, complete["acl"])
    if owner.settings.get("defaultEventBasedHold") and "eventBasedHold" not in complete:
        complete["eventBasedHold"] = True
    if "retention" in complete:
        retention = checked_retention({}, complete.pop("retention"), override=False)
        complete |= {"retention": retention} if retention else {}
    return complete
