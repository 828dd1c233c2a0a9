"""Generations that are no longer live: past versions, and soft-deleted objects that can be restored."""

import dataclasses

from qa_platform.embedded.gcs.disk import Disk
from qa_platform.embedded.gcs.model import Bucket, StoredObject
from qa_platform.embedded.gcs.rows import LIVE_COLUMNS, row_of, stored_object
from qa_platform.embedded.gcs.times import in_seconds, now_text

_OF_GENERATION = "bucket = ? and name = ? and generation = ?"


class PastObjects:
    """The past generations of a state folder."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._index = disk.index

    def find(self, bucket: str, name: str, generation: int, *, soft_deleted: bool) -> StoredObject | None:
        """A past version, or a soft-deleted generation; None if it is gone."""
        self.purge(bucket)
        query = f"select {LIVE_COLUMNS} from past_object where {_OF_GENERATION} and soft_deleted = ?"  # noqa: S608
        row = self._index.execute(query, (bucket, name, generation, int(soft_deleted))).fetchone()
        return stored_object(row) if row else None

    def keep(self, owner: Bucket, stored: StoredObject, *, as_version: bool) -> None:
        """Keep a generation that is no longer live: as a past version, or as a soft-deleted object if the bucket has soft delete."""
        if not as_version and not owner.soft_delete_seconds:
            return
        stamp = {"replaced": now_text()} if as_version else {"softDeleted": now_text(), "softDeleteSeconds": owner.soft_delete_seconds}
        past = dataclasses.replace(stored, attributes={**stored.attributes, **stamp})
        statement = "replace into past_object values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
        self._index.execute(statement, (*row_of(past), int(not as_version)))

    def update(self, stored: StoredObject) -> bool:
        """Store the attributes of a past generation. Returns False if the generation is not kept here."""
        statement = f"update past_object set metageneration = ?, updated = ?, attributes = ? where {_OF_GENERATION}"  # noqa: S608
        values = (stored.metageneration, stored.updated, row_of(stored)[-1], *_key(stored))
        return bool(self._index.execute(statement, values).rowcount)

    def forget(self, stored: StoredObject) -> None:
        """Remove a generation from the index."""
        self._index.execute(f"delete from past_object where {_OF_GENERATION}", _key(stored))  # noqa: S608

    def remove_content(self, stored: StoredObject) -> None:
        """Remove the content of a generation that is no longer live, unless the generation is kept here."""
        query = f"select 1 from past_object where {_OF_GENERATION}"  # noqa: S608
        if not self._index.execute(query, _key(stored)).fetchone():
            self._disk.content(stored.generation).unlink(missing_ok=True)

    def purge(self, bucket: str) -> None:
        """Forget the expired soft-deleted generations of a bucket, and remove their content."""
        query = f"select {LIVE_COLUMNS} from past_object where bucket = ? and soft_deleted"  # noqa: S608
        for stored in map(stored_object, self._index.execute(query, (bucket,)).fetchall()):
            if hard_delete_time(stored) <= now_text():
                self.forget(stored)
                self.remove_content(stored)


def hard_delete_time(stored: StoredObject) -> str:
    """The time until which a soft-deleted object can be restored, in RFC 3339."""
    return in_seconds(stored.attributes["softDeleted"], stored.attributes["softDeleteSeconds"])


def _key(stored: StoredObject) -> tuple[str, str, int]:
    return stored.bucket, stored.name, stored.generation
