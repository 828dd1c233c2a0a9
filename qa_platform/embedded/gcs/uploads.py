"""Serves uploads: a whole object in one request (``media``, ``multipart``), or in several (``resumable``)."""

import asyncio
import re
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qa_platform.embedded.gcs.disk import Disk
from qa_platform.embedded.gcs.model import Content, StorageError, StoredObject, UploadSession, invalid
from qa_platform.embedded.gcs.multipart import receive_related
from qa_platform.embedded.gcs.requests import (
    Target,
    conditions,
    customer_key,
    json_body,
    not_implemented,
    parse_object,
    writable_attributes,
)
from qa_platform.embedded.gcs.resources import DEFAULT_TYPE, object_resource
from qa_platform.embedded.gcs.sessions import UploadSessions
from qa_platform.embedded.gcs.storage import Storage

_CONTENT_RANGE = re.compile(r"bytes (?:(?P<first>\d+)-(?P<last>\d+)|\*)/(?P<total>\d+|\*)")
# The status with which Google Cloud Storage confirms that an upload is cancelled.
_CANCELLED = 499


class Uploads:
    """Serves the requests under ``/upload``."""

    def __init__(self, disk: Disk, storage: Storage, sessions: UploadSessions) -> None:
        self._disk = disk
        self._storage = storage
        self._sessions = sessions

    async def handle(self, request: Request, target: Target) -> Response:
        """Serve a request under ``/upload``."""
        query = request.query_params
        if upload_id := query.get("upload_id"):
            return await self._continue(request, self._sessions.get(upload_id))
        match request.method, query.get("uploadType"):
            case "POST", "resumable":
                return await self._begin(request, target)
            case "POST", "multipart":
                return await self._receive(request, target, multipart=True)
            case "POST", "media":
                return await self._receive(request, target, multipart=False)
        raise not_implemented(request)

    async def _receive(self, request: Request, target: Target, *, multipart: bool) -> Response:
        """Receive a whole object."""
        path = self._disk.new_file()
        try:
            described = await (_receive_multipart if multipart else _receive_media)(request, path)
            content = await asyncio.to_thread(Content.of, path)
            _check_sums(content, described)
            stored = self._storage.put(
                target.bucket,
                _object_name(request, target, described),
                content,
                attributes=writable_attributes(described) | customer_key(request),
                conditions=conditions(request, "if"),
            )
        finally:
            path.unlink(missing_ok=True)
        return self._shown(stored, request)

    async def _begin(self, request: Request, target: Target) -> Response:
        """Begin a resumable upload. The response contains the URL to send the content to."""
        described = await json_body(request)
        described.setdefault("contentType", request.headers.get("x-upload-content-type", DEFAULT_TYPE))
        name = _object_name(request, target, described)
        # Checksums announced now are checked at the end.
        sums = {key: described[key] for key in ("crc32c", "md5Hash") if key in described}
        session = self._sessions.begin(
            target.bucket,
            name,
            attributes=writable_attributes(described) | sums | customer_key(request),
            conditions=conditions(request, "if"),
        )
        location = f"{request.base_url}upload/storage/v1/b/{target.bucket}/o?uploadType=resumable&upload_id={session.id}"
        return Response(headers={"location": location, "x-guploader-uploadid": session.id})

    async def _continue(self, request: Request, session: UploadSession) -> Response:
        """Receive more of a resumable upload, report how much has arrived, or cancel it."""
        if request.method == "DELETE":
            self._sessions.cancel(session)
            return Response(status_code=_CANCELLED)
        if session.finished:
            return self._shown(session.finished, request)
        path = self._sessions.path(session)
        total = await _append_chunk(request, path)
        size = path.stat().st_size
        if total is None or size < total:
            headers = {"range": f"bytes=0-{size - 1}"} if size else {}
            return Response(status_code=HTTPStatus.PERMANENT_REDIRECT, headers=headers)
        content = await asyncio.to_thread(Content.of, path)
        # The checksums announced at the beginning count, not those sent with the last chunk.
        try:
            _check_sums(content, session.attributes)
            _check_sums(content, _sums_in_header(request))
        except StorageError:
            self._sessions.cancel(session)
            raise
        return self._shown(self._sessions.finish(session, content), request)

    def _shown(self, stored: StoredObject, request: Request) -> Response:
        return JSONResponse(object_resource(stored, self._storage.buckets.get(stored.bucket), request))


async def _receive_media(request: Request, path: Path) -> dict[str, Any]:
    """Write the body to a file, and return the object's attributes."""
    with path.open("wb") as file:
        async for chunk in request.stream():
            file.write(chunk)
    return {"contentType": request.headers.get("content-type", DEFAULT_TYPE)}


async def _receive_multipart(request: Request, path: Path) -> dict[str, Any]:
    """Write the content to a file, and return the object's attributes, which precede it in the body."""
    with path.open("wb") as file:
        body = await receive_related(request, file)
    described = parse_object(body.metadata)
    described.setdefault("contentType", body.content_type or DEFAULT_TYPE)
    return described


async def _append_chunk(request: Request, path: Path) -> int | None:
    """Append the part of a chunk that has not arrived before.

    Returns:
        The size of the whole object; None until the client has sent it.

    Raises:
        StorageError: 400 the Content-Range is malformed.
    """
    header = request.headers.get("content-range", "")
    match = _CONTENT_RANGE.fullmatch(header)
    if header and not match:
        raise invalid(f"Invalid Content-Range: {header!r}")
    position = int(match["first"]) if match and match["first"] else 0
    with path.open("ab", buffering=0) as file:
        async for chunk in request.stream():
            # The size now: a request that the client has given up may still write.
            size = path.stat().st_size
            new = chunk[max(0, size - position) :]
            # A chunk after a gap is not written. The response tells the client where to continue.
            if new and position <= size:
                file.write(new)
            position += len(chunk)
    if not match:
        return position
    return None if match["total"] == "*" else int(match["total"])


def _object_name(request: Request, target: Target, described: Mapping[str, Any]) -> str:
    name = request.query_params.get("name") or described.get("name") or target.name
    if not isinstance(name, str):
        raise invalid("The upload has no object name.")
    return name


def _check_sums(content: Content, expected: Mapping[str, Any]) -> None:
    for key, actual in (("crc32c", content.crc32c), ("md5Hash", content.md5)):
        if expected.get(key) not in (None, actual):
            raise invalid(f"Provided {key} {expected[key]!r} doesn't match calculated {key} {actual!r}.")


def _sums_in_header(request: Request) -> dict[str, str]:
    pairs = (part.strip().partition("=") for part in request.headers.get("x-goog-hash", "").split(",") if part)
    return {{"md5": "md5Hash"}.get(key, key): value for key, _, value in pairs}
