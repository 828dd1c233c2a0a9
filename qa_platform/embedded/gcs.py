"""A Google Cloud Storage emulator: the part of the JSON API that Google's client uses for buckets, objects, uploads and listings.

``python -m qa_platform.embedded.gcs --state DIR --address-file FILE``, then ``STORAGE_EMULATOR_HOST=http://<address>``.

Why not a ready-made one: gcp-storage-emulator, the only one that comes from PyPI, knows neither preconditions nor pages, holds
whole objects in memory, writes its whole index anew at each change, serves one request at a time, and maps object names to
paths, so that ``a`` and ``a/b`` exclude each other and a name of 256 characters is impossible. What would have been put around
it is all that matters here: this module is HTTP (by starlette and uvicorn), `gcs_storage` the semantics.
"""

import asyncio
import email.message
import json
import re
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, unquote

import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from qa_platform.embedded.gcs_storage import (
    WRITABLE,
    Conditions,
    Content,
    Page,
    Storage,
    StorageError,
    StoredObject,
    Upload,
    invalid,
    not_found,
)
from qa_platform.embedded.process import Ending, server_arguments, write_atomically

_CHUNK = 2**20
# The headers and the JSON of a multipart upload; custom metadata is limited to 8 KiB.
_PART_HEAD_LIMIT = 2**18
_JSON_LIMIT = 2**20
_DEFAULT_TYPE = "application/octet-stream"
_BUCKET_NAME = re.compile(r"[a-z0-9][-_.a-z0-9]{1,220}[a-z0-9]")
_CONTENT_RANGE = re.compile(r"bytes (?:(?P<first>\d+)-(?P<last>\d+)|\*)/(?P<total>\d+|\*)")
_RANGE = re.compile(r"bytes=(?P<first>\d*)-(?P<last>\d*)")
_API_PREFIX = re.compile(r"(?:/(?P<kind>upload|download))?/storage/v1(?=/)")


@dataclass(frozen=True)
class Target:
    """What a path names: a bucket, perhaps an object in it, and what follows behind it."""

    kind: str
    bucket: str
    # None for the collection of objects, or where the path ends with the bucket.
    name: str | None
    rest: tuple[str, ...]
    has_objects: bool


class Emulator:
    """The ASGI application."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        try:
            response = await self._answer(request)
        except StorageError as error:
            response = _error(error)
        except ClientDisconnect:
            return
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        path = scope_path(request.scope)
        if path == "/":
            return Response("OK")
        if _API_PREFIX.sub("", path).rstrip("/") == "/b":
            return await self._buckets(request)
        target = parse_path(path)
        if not target.has_objects:
            return self._bucket(request, target)
        if target.kind == "upload":
            return await self._upload(request, target)
        if target.name is None:
            return self._list(request, target)
        if target.rest:
            return await self._copy(request, target)
        return await self._object(request, target)

    # Buckets

    async def _buckets(self, request: Request) -> Response:
        if request.method == "GET":
            resources = [_bucket_resource(name, created) for name, created in self._storage.buckets().items()]
            return JSONResponse({"kind": "storage#buckets", "items": resources})
        if request.method != "POST":
            raise _not_implemented(request)
        name = (await _json_body(request)).get("name")
        if not isinstance(name, str) or not _BUCKET_NAME.fullmatch(name):
            raise invalid(f"Invalid bucket name: {name!r}")
        return JSONResponse(_bucket_resource(name, self._storage.create_bucket(name)))

    def _bucket(self, request: Request, target: Target) -> Response:
        match request.method:
            case "GET" if target.rest:
                self._storage.bucket_created(target.bucket)
                # Whoever reaches the emulator may do everything.
                granted = request.query_params.getlist("permissions")
                return JSONResponse({"kind": "storage#testIamPermissionsResponse", "permissions": granted})
            case "GET":
                return JSONResponse(_bucket_resource(target.bucket, self._storage.bucket_created(target.bucket)))
            case "DELETE":
                self._storage.delete_bucket(target.bucket)
                return Response(status_code=HTTPStatus.NO_CONTENT)
        raise _not_implemented(request)

    # Objects

    async def _object(self, request: Request, target: Target) -> Response:
        assert target.name is not None
        generation = _integer(request, "generation")
        stored = self._storage.get(target.bucket, target.name, generation=generation, conditions=_conditions(request, "if"))
        match request.method:
            case "GET" if request.query_params.get("alt") == "media" or target.kind == "download":
                return self._download(request, stored)
            case "GET":
                return JSONResponse(_resource(stored, request))
            case "DELETE":
                self._storage.delete(stored)
                return Response(status_code=HTTPStatus.NO_CONTENT)
            case "PATCH" | "PUT":
                return JSONResponse(_resource(self._storage.patch(stored, _attributes(await _json_body(request))), request))
        raise _not_implemented(request)

    def _download(self, request: Request, stored: StoredObject) -> Response:
        part = _range(request.headers.get("range"), stored.size)
        headers = {
            "content-type": str(stored.attributes.get("contentType", _DEFAULT_TYPE)),
            "content-length": str(len(part)),
            "accept-ranges": "bytes",
            "etag": _etag(stored),
            "x-goog-generation": str(stored.generation),
            "x-goog-metageneration": str(stored.metageneration),
            "x-goog-stored-content-encoding": str(stored.attributes.get("contentEncoding", "identity")),
            "x-goog-stored-content-length": str(stored.size),
        }
        if encoding := stored.attributes.get("contentEncoding"):
            headers["content-encoding"] = str(encoding)
        status = HTTPStatus.OK
        if len(part) == stored.size:
            headers["x-goog-hash"] = f"crc32c={stored.crc32c},md5={stored.md5}"
        if request.headers.get("range"):
            status = HTTPStatus.PARTIAL_CONTENT
            headers["content-range"] = f"bytes {part.start}-{part.stop - 1}/{stored.size}"
        # Opened now: it can be read to its end even if this generation is replaced meanwhile.
        file = self._storage.content_path(stored).open("rb")
        return StreamingResponse(_read(file, part), status_code=status, headers=headers)

    def _list(self, request: Request, target: Target) -> Response:
        if request.method != "GET":
            raise _not_implemented(request)
        query = request.query_params
        page = self._storage.page(
            target.bucket,
            prefix=query.get("prefix", ""),
            delimiter=query.get("delimiter", ""),
            start=query.get("startOffset", ""),
            end=query.get("endOffset", ""),
            limit=_integer(request, "maxResults") or 0,
            token=query.get("pageToken", ""),
        )
        return JSONResponse(_page_resource(page, request))

    async def _copy(self, request: Request, target: Target) -> Response:
        match target.rest:
            case ("copyTo" | "rewriteTo" as verb, "b", bucket, "o", name) if request.method == "POST":
                pass
            case _:
                raise _not_implemented(request)
        assert target.name is not None
        body = await _json_body(request)
        source = self._storage.find(target.bucket, target.name)
        wanted = _integer(request, "sourceGeneration")
        if source is None or wanted not in (None, source.generation):
            raise not_found(f"{target.bucket}/{target.name}")
        _conditions(request, "ifSource").check(source)
        attributes = _attributes(body) or None
        copy = self._storage.copy(source, bucket, name, attributes=attributes, conditions=_conditions(request, "if"))
        resource = _resource(copy, request)
        if verb == "copyTo":
            return JSONResponse(resource)
        size = str(copy.size)
        return JSONResponse(
            {"kind": "storage#rewriteResponse", "totalBytesRewritten": size, "objectSize": size, "done": True, "resource": resource}
        )

    # Uploads

    async def _upload(self, request: Request, target: Target) -> Response:
        query = request.query_params
        if upload_id := query.get("upload_id"):
            return await self._continue_upload(request, self._storage.upload(upload_id))
        match request.method, query.get("uploadType"):
            case "POST", "resumable":
                return await self._begin_upload(request, target)
            case "POST", "multipart":
                return await self._receive(request, target, multipart=True)
            case "POST", "media":
                return await self._receive(request, target, multipart=False)
        raise _not_implemented(request)

    async def _receive(self, request: Request, target: Target, *, multipart: bool) -> Response:
        """A whole object in one request."""
        described: dict[str, Any] = {}
        path = self._storage.new_file()
        try:
            if multipart:
                described = await _receive_multipart(request, path)
            else:
                described["contentType"] = request.headers.get("content-type", _DEFAULT_TYPE)
                with path.open("wb") as file:
                    async for chunk in request.stream():
                        file.write(chunk)
            content = await asyncio.to_thread(Content.of, path)
            _check_sums(content, described)
            stored = self._storage.put(
                target.bucket,
                _upload_name(request, target, described),
                content,
                attributes=_attributes(described),
                conditions=_conditions(request, "if"),
            )
        finally:
            path.unlink(missing_ok=True)
        return JSONResponse(_resource(stored, request))

    async def _begin_upload(self, request: Request, target: Target) -> Response:
        described = await _json_body(request)
        described.setdefault("contentType", request.headers.get("x-upload-content-type", _DEFAULT_TYPE))
        name = _upload_name(request, target, described)
        # Sums that are announced now are checked at the end.
        sums = {key: described[key] for key in ("crc32c", "md5Hash") if key in described}
        upload = self._storage.begin_upload(
            target.bucket, name, attributes=_attributes(described) | sums, conditions=_conditions(request, "if")
        )
        location = f"{request.base_url}upload/storage/v1/b/{target.bucket}/o?uploadType=resumable&upload_id={upload.id}"
        return Response(headers={"location": location, "x-guploader-uploadid": upload.id})

    async def _continue_upload(self, request: Request, upload: Upload) -> Response:
        if request.method == "DELETE":
            self._storage.cancel_upload(upload)
            return Response(status_code=499)
        if upload.finished:
            return JSONResponse(_resource(upload.finished, request))
        path = self._storage.upload_path(upload)
        total = await _append_chunk(request, path)
        size = path.stat().st_size
        if total is None or size < total:
            headers = {"range": f"bytes=0-{size - 1}"} if size else {}
            return Response(status_code=HTTPStatus.PERMANENT_REDIRECT, headers=headers)
        content = await asyncio.to_thread(Content.of, path)
        _check_sums(content, upload.attributes | _sums_in_header(request))
        return JSONResponse(_resource(self._storage.finish_upload(upload, content), request))


def scope_path(scope: Scope) -> str:
    """The path as it was sent: a decoded one does not tell a slash in an object's name from one between segments."""
    return bytes(scope["raw_path"]).decode("ascii", errors="replace")


def parse_path(path: str) -> Target:
    """What ``[/upload|/download]/storage/v1/b/<bucket>[/o[/<object>[/…]]]``, or a bucket's ``/iam/testPermissions``, names.

    Raises:
        StorageError: 404 for any other path; 400 where a name is not UTF-8.
    """
    prefix = _API_PREFIX.match(path)
    segments = path[prefix.end() if prefix else 0 :].split("/")[1:]
    try:
        decoded = [unquote(segment, errors="strict") for segment in segments]
    except UnicodeDecodeError as error:
        raise invalid("A name is not valid UTF-8.") from error
    kind = (prefix["kind"] if prefix else None) or ""
    match decoded:
        case ["b", bucket]:
            return Target(kind, bucket, None, (), has_objects=False)
        case ["b", bucket, "iam", "testPermissions" as verb]:
            return Target(kind, bucket, None, (verb,), has_objects=False)
        case ["b", bucket, "o"] | ["b", bucket, "o", ""]:
            return Target(kind, bucket, None, (), has_objects=True)
        case ["b", bucket, "o", name, *rest]:
            return Target(kind, bucket, name, tuple(rest), has_objects=True)
    raise StorageError(HTTPStatus.NOT_FOUND, "notFound", f"Nothing is served at {path!r}")


async def _append_chunk(request: Request, path: Path) -> int | None:
    """Append what is new in a chunk; the object's whole size where the client has told it."""
    header = request.headers.get("content-range", "")
    found = _CONTENT_RANGE.fullmatch(header)
    if header and not found:
        raise invalid(f"Invalid Content-Range: {header!r}")
    first = int(found["first"]) if found and found["first"] else 0
    size = path.stat().st_size
    # What came before is not written again; a gap is not written at all, and the answer says from where to go on.
    position, gap = first, first > size
    with path.open("ab") as file:
        async for chunk in request.stream():
            new = chunk[max(0, size - position) :]
            position += len(chunk)
            if new and not gap:
                file.write(new)
    if not found:
        return position
    return None if found["total"] == "*" else int(found["total"])


async def _receive_multipart(request: Request, path: Path) -> dict[str, Any]:
    """Write the second part of a ``multipart/related`` body to a file, and return the first, a JSON object."""
    header = email.message.Message()
    header["content-type"] = request.headers.get("content-type", "")
    boundary = header.get_boundary()
    if not boundary:
        raise invalid("A multipart upload needs a boundary.")
    delimiter = b"\r\n--" + boundary.encode()
    chunks = request.stream().__aiter__()
    # The first delimiter has no line end before it.
    buffer = await _until(b"\r\n", b"\r\n", chunks, delimiter)
    buffer = await _until(b"\r\n\r\n", buffer, chunks)
    described, buffer = await _cut(delimiter, buffer, chunks)
    buffer = await _until(b"\r\n", buffer, chunks)
    heading, buffer = await _cut(b"\r\n\r\n", b"\r\n" + buffer, chunks)
    resource = _parse_object(described)
    resource.setdefault("contentType", _header_value(heading, b"content-type") or _DEFAULT_TYPE)
    with path.open("wb") as file:
        while (end := buffer.find(delimiter)) < 0:
            # The delimiter may be cut in two by the chunks.
            keep = max(0, len(buffer) - len(delimiter) + 1)
            file.write(buffer[:keep])
            buffer = buffer[keep:] + await _next(chunks)
        file.write(buffer[:end])
    async for _ in chunks:
        pass
    return resource


async def _until(mark: bytes, buffer: bytes, chunks: AsyncIterator[bytes], before: bytes = b"") -> bytes:
    """What follows the first ``mark`` behind ``before``."""
    if before:
        _, buffer = await _cut(before, buffer, chunks)
    return (await _cut(mark, buffer, chunks))[1]


async def _cut(mark: bytes, buffer: bytes, chunks: AsyncIterator[bytes]) -> tuple[bytes, bytes]:
    """What comes before and after the first ``mark``."""
    while mark not in buffer:
        if len(buffer) > _PART_HEAD_LIMIT:
            raise invalid("The first part of the multipart upload is too large.")
        buffer += await _next(chunks)
    before, _, after = buffer.partition(mark)
    return before, after


async def _next(chunks: AsyncIterator[bytes]) -> bytes:
    try:
        return await anext(chunks)
    except StopAsyncIteration:
        raise invalid("The multipart upload ends too early.") from None


def _header_value(heading: bytes, name: bytes) -> str:
    for line in heading.split(b"\r\n"):
        key, _, value = line.partition(b":")
        if key.strip().lower() == name:
            return value.strip().decode("latin-1")
    return ""


async def _json_body(request: Request) -> dict[str, Any]:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _JSON_LIMIT:
            raise invalid("The JSON document is too large.")
    return _parse_object(body)


def _parse_object(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text) if text.strip() else {}
    except ValueError as error:
        raise invalid(f"Not a JSON document: {error}") from error
    if not isinstance(value, dict):
        raise invalid("Not a JSON object.")
    return value


def _upload_name(request: Request, target: Target, described: Mapping[str, Any]) -> str:
    name = request.query_params.get("name") or described.get("name") or target.name
    if not isinstance(name, str):
        raise invalid("The upload has no object name.")
    return name


def _attributes(resource: Mapping[str, Any]) -> dict[str, Any]:
    return {key: resource[key] for key in WRITABLE if key in resource}


def _check_sums(content: Content, expected: Mapping[str, Any]) -> None:
    for key, actual in (("crc32c", content.crc32c), ("md5Hash", content.md5)):
        if expected.get(key) not in (None, actual):
            raise invalid(f"Provided {key} {expected[key]!r} doesn't match calculated {key} {actual!r}.")


def _sums_in_header(request: Request) -> dict[str, str]:
    pairs = (part.strip().partition("=") for part in request.headers.get("x-goog-hash", "").split(",") if part)
    return {{"md5": "md5Hash"}.get(key, key): value for key, _, value in pairs}


def _conditions(request: Request, prefix: str) -> Conditions:
    return Conditions(
        _integer(request, f"{prefix}GenerationMatch"),
        _integer(request, f"{prefix}GenerationNotMatch"),
        _integer(request, f"{prefix}MetagenerationMatch"),
        _integer(request, f"{prefix}MetagenerationNotMatch"),
    )


def _integer(request: Request, name: str) -> int | None:
    text = request.query_params.get(name)
    if not text:
        return None
    try:
        return int(text)
    except ValueError as error:
        raise invalid(f"{name} is not a number: {text!r}") from error


def _range(header: str | None, size: int) -> range:
    """The bytes that a Range header asks for.

    Raises:
        StorageError: 416 where there are none.
    """
    found = _RANGE.fullmatch(header or "")
    if not found or found.group() == "bytes=-":
        return range(size)
    if not found["first"]:
        part = range(max(0, size - int(found["last"])), size)
    else:
        part = range(int(found["first"]), min(size, int(found["last"]) + 1) if found["last"] else size)
    if not part:
        raise StorageError(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "requestedRangeNotSatisfiable", "Request range not satisfiable")
    return part


def _read(file: IO[bytes], part: range) -> Iterator[bytes]:
    with file:
        file.seek(part.start)
        left = len(part)
        while left and (chunk := file.read(min(_CHUNK, left))):
            left -= len(chunk)
            yield chunk


def _etag(stored: StoredObject) -> str:
    return f'"{stored.generation}/{stored.metageneration}"'


def _resource(stored: StoredObject, request: Request) -> dict[str, Any]:
    place = f"storage/v1/b/{stored.bucket}/o/{quote(stored.name, safe='')}"
    return {
        "kind": "storage#object",
        "id": f"{stored.bucket}/{stored.name}/{stored.generation}",
        "selfLink": f"{request.base_url}{place}",
        "mediaLink": f"{request.base_url}download/{place}?generation={stored.generation}&alt=media",
        "name": stored.name,
        "bucket": stored.bucket,
        "generation": str(stored.generation),
        "metageneration": str(stored.metageneration),
        "storageClass": "STANDARD",
        "size": str(stored.size),
        "crc32c": stored.crc32c,
        "md5Hash": stored.md5,
        "etag": _etag(stored),
        "timeCreated": stored.created,
        "updated": stored.updated,
        **_attributes(stored.attributes),
    }


def _page_resource(page: Page, request: Request) -> dict[str, Any]:
    resource: dict[str, Any] = {"kind": "storage#objects", "items": [_resource(stored, request) for stored in page.objects]}
    if page.prefixes:
        resource["prefixes"] = list(page.prefixes)
    if page.token:
        resource["nextPageToken"] = page.token
    return resource


def _bucket_resource(name: str, created: str) -> dict[str, Any]:
    return {
        "kind": "storage#bucket",
        "id": name,
        "name": name,
        "timeCreated": created,
        "updated": created,
        "metageneration": "1",
        "location": "US",
        "locationType": "multi-region",
        "storageClass": "STANDARD",
        "etag": f'"{created}"',
    }


def _not_implemented(request: Request) -> StorageError:
    return StorageError(
        HTTPStatus.NOT_IMPLEMENTED, "notImplemented", f"The emulator does not serve {request.method} {scope_path(request.scope)}"
    )


def _error(error: StorageError) -> Response:
    if error.status == HTTPStatus.NOT_MODIFIED:
        return Response(status_code=error.status)
    detail = {"domain": "global", "reason": error.reason, "message": str(error)}
    return JSONResponse({"error": {"code": error.status, "message": str(error), "errors": [detail]}}, status_code=error.status)


def serve(state: Path, address_file: Path) -> None:
    """Serve what lies in ``state`` until told to end."""
    ending = Ending()
    storage = Storage(state)
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        Emulator(storage),
        log_config=None,
        access_log=False,
        lifespan="off",
        # Not shorter than the clients' patience: they use connections again, and do not repeat every request that finds one closed.
        timeout_keep_alive=3600,
        timeout_graceful_shutdown=3,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), name="gcs")
    thread.start()
    while thread.is_alive() and not server.started and not ending.wait(0.01):
        pass
    write_atomically(address_file, f"127.0.0.1:{listener.getsockname()[1]}")
    ending.wait(unless=lambda: not thread.is_alive())
    server.should_exit = True
    thread.join()
    storage.close()


if __name__ == "__main__":
    arguments = server_arguments("An embedded Google Cloud Storage.")
    serve(arguments.state, arguments.address_file)
