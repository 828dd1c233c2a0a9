"""Serves requests about objects, except uploads: attributes, contents, listings and copies."""

import zlib
from collections.abc import Iterable, Iterator
from http import HTTPStatus
from typing import IO, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from qa_platform.embedded.gcs.disk import Disk
from qa_platform.embedded.gcs.listing import Wanted
from qa_platform.embedded.gcs.model import Conditions, StoredObject, invalid
from qa_platform.embedded.gcs.policies import check_acl
from qa_platform.embedded.gcs.requests import (
    Target,
    accepts_gzip,
    byte_range,
    check_customer_key,
    check_etag,
    conditions,
    customer_key,
    flag,
    integer,
    json_body,
    not_implemented,
    sent_conditions,
    writable_attributes,
)
from qa_platform.embedded.gcs.resources import (
    download_headers,
    is_transcoded,
    object_etag,
    object_resource,
    page_resource,
    transcoded_headers,
)
from qa_platform.embedded.gcs.storage import Storage

_CHUNK_BYTES = 2**20


class ObjectRequests:
    """Serves requests about objects, except uploads."""

    def __init__(self, disk: Disk, storage: Storage) -> None:
        self._disk = disk
        self._storage = storage

    async def one(self, request: Request, target: Target, name: str) -> Response:
        """Requests to one object."""
        generation, holds = integer(request, "generation"), conditions(request, "if")
        if request.method == "DELETE":
            self._storage.delete(target.bucket, name, generation=generation, conditions=holds)
            return Response(status_code=HTTPStatus.NO_CONTENT)
        stored = self._storage.get(target.bucket, name, generation=generation, conditions=holds, soft_deleted=flag(request, "softDeleted"))
        match request.method:
            case "GET":
                check_etag(request, object_etag(stored))
                is_content = request.query_params.get("alt") == "media" or target.kind == "download"
                return self._download(request, stored) if is_content else self._shown(request, stored)
            case "PATCH" | "PUT" as method:
                attributes, override = writable_attributes(await json_body(request)), flag(request, "overrideUnlockedRetention")
                changed = self._storage.patch(stored, attributes, replace=method == "PUT", override=override)
                return self._shown(request, changed)
        raise not_implemented(request)

    def list(self, request: Request, target: Target) -> Response:
        """Requests to the collection of objects."""
        if request.method != "GET":
            raise not_implemented(request)
        query, bucket = request.query_params, self._storage.buckets.get(target.bucket)
        folders = tuple(bucket.settings.get("managedFolders", ())) if flag(request, "includeFoldersAsPrefixes") else ()
        wanted = Wanted(
            prefix=query.get("prefix", ""),
            delimiter=query.get("delimiter", ""),
            start=query.get("startOffset", ""),
            end=query.get("endOffset", ""),
            glob=query.get("matchGlob", ""),
            versions=flag(request, "versions"),
            soft_deleted=flag(request, "softDeleted"),
            trailing_delimiter=flag(request, "includeTrailingDelimiter"),
            folders=folders,
            limit=integer(request, "maxResults") or 0,
            token=query.get("pageToken", ""),
        )
        return JSONResponse(page_resource(self._storage.page(target.bucket, wanted), bucket, request))

    async def part(self, request: Request, target: Target, name: str) -> Response:
        """Requests to a part of an object, or for an operation on it."""
        holds = conditions(request, "if")
        match request.method, target.rest:
            case "POST", ("copyTo" | "rewriteTo" as verb, "b", bucket, "o", copy_name):
                return await self._copied(request, self._source(request, target, name), bucket, copy_name, verb=verb)
            case "POST", ("moveTo", "o", new_name):
                moved = self._storage.move(self._source(request, target, name), new_name, conditions=holds)
                return self._shown(request, moved)
            case "POST", ("compose",):
                return await self._composed(request, target.bucket, name)
            case "POST", ("restore",):
                restored = self._storage.restore(target.bucket, name, integer(request, "generation"), conditions=holds)
                return self._shown(request, restored)
            case "GET", ("acl",):
                check_acl(self._storage.buckets.get(target.bucket))
                stored = self._storage.get(target.bucket, name, generation=integer(request, "generation"), conditions=holds)
                return JSONResponse({"kind": "storage#objectAccessControls", "items": stored.attributes.get("acl", [])})
        raise not_implemented(request)

    def _source(self, request: Request, target: Target, name: str) -> StoredObject:
        """The object that a request copies or moves."""
        generation, holds = integer(request, "sourceGeneration"), conditions(request, "ifSource")
        source = self._storage.get(target.bucket, name, generation=generation, conditions=Conditions())
        holds.check(source)
        check_customer_key(request, source.attributes, source=True)
        return source

    async def _copied(self, request: Request, source: StoredObject, bucket: str, name: str, *, verb: str) -> Response:
        sent = writable_attributes(await json_body(request))
        attributes: dict[str, Any] | None = sent | customer_key(request) if sent else None
        if attributes is None and (key := customer_key(request)):
            attributes = writable_attributes(source.attributes) | key
        copied = self._storage.copy(source, bucket, name, attributes=attributes, conditions=conditions(request, "if"))
        if verb == "copyTo":
            return self._shown(request, copied)
        size, resource = str(copied.size), self._resource(request, copied)
        return JSONResponse(
            {"kind": "storage#rewriteResponse", "totalBytesRewritten": size, "objectSize": size, "done": True, "resource": resource}
        )

    async def _composed(self, request: Request, bucket: str, name: str) -> Response:
        body = await json_body(request)
        sources = []
        for part in body.get("sourceObjects", ()):
            if not isinstance(part, dict) or not isinstance(part.get("name"), str):
                raise invalid("A source of a composition has a name.")
            generation = int(part["generation"]) if part.get("generation") else None
            source = self._storage.get(bucket, part["name"], generation=generation, conditions=Conditions())
            sent_conditions(part.get("objectPreconditions", {})).check(source)
            sources.append(source)
        attributes = writable_attributes(body.get("destination", {})) | customer_key(request)
        composed = self._storage.compose(bucket, name, sources, attributes=attributes, conditions=conditions(request, "if"))
        return self._shown(request, composed)

    def _shown(self, request: Request, stored: StoredObject) -> Response:
        return JSONResponse(self._resource(request, stored))

    def _resource(self, request: Request, stored: StoredObject) -> dict[str, Any]:
        return object_resource(stored, self._storage.buckets.get(stored.bucket), request)

    def _download(self, request: Request, stored: StoredObject) -> Response:
        check_customer_key(request, stored.attributes)
        if is_transcoded(stored) and not accepts_gzip(request):
            # The service ignores the range of content that it decompresses.
            content = _chunks(self._disk.content(stored.generation).open("rb"), range(stored.size))
            return StreamingResponse(_decompressed(content), headers=transcoded_headers(stored))
        header = request.headers.get("range")
        part = byte_range(header, stored.size)
        headers = download_headers(stored, part, partial=bool(header))
        # Opened now, so that it can be read to the end even if this generation is replaced meanwhile.
        file = self._disk.content(stored.generation).open("rb")
        status = HTTPStatus.PARTIAL_CONTENT if header else HTTPStatus.OK
        return StreamingResponse(_chunks(file, part), status_code=status, headers=headers)


def _chunks(file: IO[bytes], part: range) -> Iterator[bytes]:
    """Yield a part of a file, then close the file."""
    with file:
        file.seek(part.start)
        left = len(part)
        while left and (chunk := file.read(min(_CHUNK_BYTES, left))):
            left -= len(chunk)
            yield chunk


def _decompressed(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Decompress the content of an object that is stored as one gzip member."""
    member = zlib.decompressobj(16 + zlib.MAX_WBITS)
    for chunk in chunks:
        while chunk:
            yield member.decompress(chunk, _CHUNK_BYTES)
            chunk = member.unconsumed_tail
    yield member.flush()
