"""Resumable uploads: their state between requests and across restarts."""

import dataclasses
import json
import uuid
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

from qa_platform.embedded.gcs.disk import Disk
from qa_platform.embedded.gcs.model import WRITABLE, Conditions, Content, StorageError, StoredObject, UploadSession
from qa_platform.embedded.gcs.storage import Storage


class UploadSessions:
    """The resumable uploads of a state folder."""

    def __init__(self, disk: Disk, storage: Storage) -> None:
        self._disk = disk
        self._index = disk.index
        self._storage = storage

    def begin(self, bucket: str, name: str, *, attributes: Mapping[str, Any], conditions: Conditions) -> UploadSession:
        """Begin an upload.

        Raises:
            StorageError: as `Storage.put`.
        """
        self._storage.check_upload(bucket, name, conditions)
        session = UploadSession(uuid.uuid4().hex, bucket, name, dict(attributes), conditions, None)
        self.path(session).touch()
        values = (session.id, bucket, name, json.dumps(session.attributes), json.dumps(dataclasses.asdict(conditions)))
        self._index.execute("insert into upload values (?, ?, ?, ?, ?, null)", values)
        return session

    def get(self, upload_id: str) -> UploadSession:
        """An upload by its id.

        Raises:
            StorageError: 404 the upload does not exist.
        """
        row = self._index.execute("select * from upload where id = ?", (upload_id,)).fetchone()
        if not row:
            raise StorageError(HTTPStatus.NOT_FOUND, "notFound", "No such upload.")
        _, bucket, name, attributes, conditions, finished = row
        stored = StoredObject(**json.loads(finished)) if finished else None
        return UploadSession(upload_id, bucket, name, json.loads(attributes), Conditions(**json.loads(conditions)), stored)

    def path(self, session: UploadSession) -> Path:
        """The file with the part received so far."""
        return self._disk.upload(session.id)

    def finish(self, session: UploadSession, content: Content) -> StoredObject:
        """Make the content an object. The session remembers it, so that a client that retries gets the same object.

        Raises:
            StorageError: as `Storage.put`. The upload is cancelled.
        """
        attributes = {key: value for key, value in session.attributes.items() if key in (*WRITABLE, "keySha256")}
        try:
            stored = self._storage.put(session.bucket, session.name, content, attributes=attributes, conditions=session.conditions)
        except StorageError:
            self.cancel(session)
            raise
        self._index.execute("update upload set finished = ? where id = ?", (json.dumps(dataclasses.asdict(stored)), session.id))
        return stored

    def cancel(self, session: UploadSession) -> None:
        """Forget an upload, and remove what was received of it."""
        self._index.execute("delete from upload where id = ?", (session.id,))
        self.path(session).unlink(missing_ok=True)
