"""The buckets of a state folder: their settings, their IAM policies, and deleted buckets that can be restored."""

import dataclasses
import json
import time
from collections.abc import Mapping
from datetime import datetime
from http import HTTPStatus
from typing import Any

from qa_platform.embedded.gcs.disk import Disk
from qa_platform.embedded.gcs.model import Bucket, Conditions, StorageError, invalid
from qa_platform.embedded.gcs.policies import check_iam_policy
from qa_platform.embedded.gcs.settings import changed_settings, locked_settings
from qa_platform.embedded.gcs.times import in_seconds, now_text
from qa_platform.provisioning.merge_patch import merge_patch


class Buckets:
    """The buckets of a state folder."""

    def __init__(self, disk: Disk) -> None:
        self._index = disk.index

    def create(self, name: str, settings: Mapping[str, Any] | None = None) -> Bucket:
        """Create a bucket.

        Raises:
            StorageError: 409 the bucket exists; 400 a setting is malformed.
        """
        if self._row(name):
            raise StorageError(HTTPStatus.CONFLICT, "conflict", f"The bucket {name} exists already.")
        now = now_text()
        bucket = Bucket(name, time.time_ns() // 1000, 1, now, now, changed_settings({}, settings or {}))
        self._insert(bucket)
        return bucket

    def list(self, prefix: str = "") -> list[Bucket]:
        """All buckets whose names begin with the prefix, by name."""
        names = [str(name) for (name,) in self._index.execute("select name from bucket order by name")]
        return [self.get(name) for name in names if name.startswith(prefix)]

    def get(self, name: str) -> Bucket:
        """A bucket.

        Raises:
            StorageError: 404 the bucket does not exist.
        """
        row = self._row(name)
        if not row:
            raise StorageError(HTTPStatus.NOT_FOUND, "notFound", "The specified bucket does not exist.")
        created, details = row
        # Buckets of an earlier version have no details.
        values = json.loads(details) if details else {"generation": _microsecond(created), "metageneration": 1, "updated": created}
        return Bucket(name=name, created=created, **values)

    def change(self, name: str, settings: Mapping[str, Any], *, replace: bool, conditions: Conditions) -> Bucket:
        """Change settings of a bucket: merge them into the current ones (null removes a setting), or replace all of them.

        Raises:
            StorageError: 404 the bucket does not exist; 412 a condition does not hold; 400 a setting is malformed; 403 the retention
                policy is locked.
        """
        bucket = self.get(name)
        conditions.check_metageneration(bucket.metageneration)
        wanted = settings if replace else merge_patch(bucket.settings, settings)
        return self._change(bucket, settings=changed_settings(bucket.settings, wanted))

    def lock_retention_policy(self, name: str, *, conditions: Conditions) -> Bucket:
        """Make a bucket's retention policy permanent.

        Raises:
            StorageError: 404 the bucket does not exist; 412 a condition does not hold; 400 there is no retention policy.
        """
        bucket = self.get(name)
        conditions.check_metageneration(bucket.metageneration)
        return self._change(bucket, settings=locked_settings(bucket.settings))

    def set_policy(self, name: str, policy: Mapping[str, Any]) -> Bucket:
        """Set a bucket's IAM policy.

        Raises:
            StorageError: 404 the bucket does not exist; 400 or 412 the policy is invalid.
        """
        bucket = self.get(name)
        check_iam_policy(policy, bucket)
        return self._change(bucket, policy={key: policy[key] for key in ("bindings", "version") if key in policy})

    def delete(self, name: str, *, conditions: Conditions) -> None:
        """Delete an empty bucket. With a soft-delete policy it can be restored.

        Raises:
            StorageError: 404 the bucket does not exist; 412 a condition does not hold; 409 it is not empty.
        """
        bucket = self.get(name)
        conditions.check_metageneration(bucket.metageneration)
        past = "select 1 from past_object where bucket = ? and not soft_deleted limit 1"
        if any(self._index.execute(query, (name,)).fetchone() for query in ("select 1 from object where bucket = ? limit 1", past)):
            raise StorageError(HTTPStatus.CONFLICT, "conflict", "The bucket you tried to delete is not empty.")
        if bucket.soft_delete_seconds:
            deleted = dataclasses.asdict(dataclasses.replace(bucket, soft_deleted=now_text()))
            self._index.execute("insert into deleted_bucket values (?, ?, ?)", (name, bucket.generation, json.dumps(deleted)))
        self._index.execute("delete from bucket where name = ?", (name,))
        self._index.execute("delete from bucket_details where name = ?", (name,))

    def soft_deleted(self, name: str, generation: int | None) -> Bucket:
        """A bucket that was soft-deleted and can be restored.

        Raises:
            StorageError: 400 the generation is missing; 404 there is no such bucket, or it has expired.
        """
        if generation is None:
            raise invalid("A soft-deleted bucket is found by its generation.")
        query = "select details from deleted_bucket where name = ? and generation = ?"
        row = self._index.execute(query, (name, generation)).fetchone()
        bucket = Bucket(**json.loads(row[0])) if row else None
        if bucket is None or in_seconds(bucket.soft_deleted, bucket.soft_delete_seconds) <= now_text():
            raise StorageError(HTTPStatus.NOT_FOUND, "notFound", "The specified bucket does not exist.")
        return bucket

    def restore(self, name: str, generation: int | None) -> Bucket:
        """Restore a soft-deleted bucket.

        Raises:
            StorageError: as `soft_deleted`; 409 a live bucket has that name.
        """
        bucket = dataclasses.replace(self.soft_deleted(name, generation), soft_deleted="")
        if self._row(name):
            raise StorageError(HTTPStatus.CONFLICT, "conflict", f"The bucket {name} exists already.")
        self._insert(bucket)
        self._index.execute("delete from deleted_bucket where name = ? and generation = ?", (name, bucket.generation))
        return bucket

    def _row(self, name: str) -> tuple[str, str | None] | None:
        query = "select created, details from bucket left join bucket_details using (name) where name = ?"
        row: tuple[str, str | None] | None = self._index.execute(query, (name,)).fetchone()
        return row

    def _change(self, bucket: Bucket, **changes: Any) -> Bucket:
        changed = dataclasses.replace(bucket, metageneration=bucket.metageneration + 1, updated=now_text(), **changes)
        self._write_details(changed)
        return changed

    def _insert(self, bucket: Bucket) -> None:
        self._write_details(bucket)
        self._index.execute("insert into bucket values (?, ?)", (bucket.name, bucket.created))

    def _write_details(self, bucket: Bucket) -> None:
        details = {key: value for key, value in dataclasses.asdict(bucket).items() if key not in ("name", "created")}
        self._index.execute("replace into bucket_details values (?, ?)", (bucket.name, json.dumps(details)))


def _microsecond(moment: str) -> int:
    return int(datetime.fromisoformat(moment).timestamp() * 1_000_000)
