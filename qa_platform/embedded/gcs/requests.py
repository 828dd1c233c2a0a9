"""Parses requests: the target that a path names, preconditions, byte ranges, JSON bodies."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

from starlette.requests import Request
from starlette.types import Scope

from qa_platform.embedded.gcs.model import WRITABLE, Conditions, StorageError, invalid

_JSON_LIMIT_BYTES = 2**20
_RANGE = re.compile(r"bytes=(?P<first>\d*)-(?P<last>\d*)")
_API_PREFIX = re.compile(r"(?:/(?P<kind>upload|download))?/storage/v1(?=/)")


@dataclass(frozen=True)
class Target:
    """The target that a path names: a bucket, its collection of objects, or one object.

    Attributes:
        kind: ``upload``, ``download`` or empty, from the prefix of the path.
        name: the object's name; None for the collection, or if the path ends with the bucket.
        rest: the segments after the target.
        has_objects: the path continues with the bucket's objects.
    """

    kind: str
    bucket: str
    name: str | None
    rest: tuple[str, ...]
    has_objects: bool


def raw_path(scope: Scope) -> str:
    """The path as sent. In a decoded path, a slash in an object's name looks like one between segments."""
    return bytes(scope["raw_path"]).decode("ascii", errors="replace")


def names_all_buckets(path: str) -> bool:
    """Whether a path names the collection of buckets."""
    return _API_PREFIX.sub("", path).rstrip("/") == "/b"


def parse_path(path: str) -> Target:
    """Parse ``[/upload|/download]/storage/v1/b/<bucket>[/o[/<object>[/…]]]`` or ``…/b/<bucket>/<verb>[/…]``.

    Raises:
        StorageError: 404 the path has another form; 400 a name is not UTF-8.
    """
    prefix = _API_PREFIX.match(path)
    segments = path[prefix.end() if prefix else 0 :].split("/")[1:]
    try:
        decoded = [unquote(segment, errors="strict") for segment in segments]
    except UnicodeDecodeError as error:
        raise invalid("A name is not valid UTF-8.") from error
    kind = (prefix["kind"] if prefix else None) or ""
    match decoded:
        case ["b", bucket, "o"] | ["b", bucket, "o", ""]:
            return Target(kind, bucket, None, (), has_objects=True)
        case ["b", bucket, "o", name, *rest]:
            return Target(kind, bucket, name, tuple(rest), has_objects=True)
        case ["b", bucket, *rest]:
            return Target(kind, bucket, None, tuple(rest), has_objects=False)
    raise StorageError(HTTPStatus.NOT_FOUND, "notFound", f"Nothing is served at {path!r}")


def not_implemented(request: Request) -> StorageError:
    """The error for a request that the emulator does not know: 501."""
    return StorageError(
        HTTPStatus.NOT_IMPLEMENTED, "notImplemented", f"The emulator does not serve {request.method} {raw_path(request.scope)}"
    )


async def json_body(request: Request) -> dict[str, Any]:
    """The body as a JSON object; an empty body is an empty object.

    Raises:
        StorageError: 400 the body is not a JSON object, or is too large.
    """
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _JSON_LIMIT_BYTES:
            raise invalid("The JSON document is too large.")
    return parse_object(body)


def parse_object(text: bytes) -> dict[str, Any]:
    """Parse a JSON object; an empty text is an empty object.

    Raises:
        StorageError: 400 the text is not a JSON object.
    """
    try:
        value = json.loads(text) if text.strip() else {}
    except ValueError as error:
        raise invalid(f"Not a JSON document: {error}") from error
    if not isinstance(value, dict):
        raise invalid("Not a JSON object.")
    return value


def writable_attributes(resource: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes in an object resource that a client can set."""
    return {key: resource[key] for key in WRITABLE if key in resource}


def conditions(request: Request, prefix: str) -> Conditions:
    """The preconditions in the query.

    Args:
        prefix: ``if``, or ``ifSource`` for those on the source of a copy.

    Raises:
        StorageError: 400 one is not a number.
    """
    return Conditions(
        integer(request, f"{prefix}GenerationMatch"),
        integer(request, f"{prefix}GenerationNotMatch"),
        integer(request, f"{prefix}MetagenerationMatch"),
        integer(request, f"{prefix}MetagenerationNotMatch"),
    )


def sent_conditions(preconditions: Mapping[str, Any]) -> Conditions:
    """The preconditions on one source of a composition, which are in the body."""
    wanted = preconditions.get("ifGenerationMatch")
    return Conditions(generation_match=int(wanted) if wanted is not None else None)


def check_etag(request: Request, etag: str) -> None:
    """Refuse the request if a precondition on the entity tag does not hold.

    Raises:
        StorageError: 412 or 304.
    """
    message = "At least one of the pre-conditions you specified did not hold."
    wanted, unwanted = request.headers.get("if-match"), request.headers.get("if-none-match")
    if wanted not in (None, "*", etag):
        raise StorageError(HTTPStatus.PRECONDITION_FAILED, "conditionNotMet", message)
    if unwanted == etag:
        raise StorageError(HTTPStatus.NOT_MODIFIED, "notModified", message)


def payer(request: Request) -> str | None:
    """The project that pays for a request, if it names one."""
    return request.query_params.get("userProject") or request.headers.get("x-goog-user-project")


def accepts_gzip(request: Request) -> bool:
    """Whether the client accepts compressed content."""
    return "gzip" in request.headers.get("accept-encoding", "").lower()


def flag(request: Request, name: str) -> bool:
    """A boolean in the query."""
    return request.query_params.get(name, "").lower() == "true"


_KEY_DIGEST = "encryption-key-sha256"


def customer_key(request: Request) -> dict[str, str]:
    """The attribute that records the client's encryption key; none without a key. The emulator encrypts nothing."""
    digest = request.headers.get(f"x-goog-{_KEY_DIGEST}")
    return {"keySha256": digest} if digest else {}


def check_customer_key(request: Request, attributes: Mapping[str, Any], *, source: bool = False) -> None:
    """Refuse to read an object that was encrypted with another key.

    Args:
        source: the object is the source of a copy.

    Raises:
        StorageError: 400.
    """
    sent = request.headers.get(f"x-goog-{'copy-source-' if source else ''}{_KEY_DIGEST}")
    if attributes.get("keySha256") not in (None, sent):
        message = "The target object is encrypted by a customer-supplied encryption key."
        raise StorageError(HTTPStatus.BAD_REQUEST, "resourceIsEncryptedWithCustomerEncryptionKey", message)


def integer(request: Request, name: str) -> int | None:
    """A number in the query; None if it is missing or empty.

    Raises:
        StorageError: 400 it is not a number.
    """
    text = request.query_params.get(name)
    if not text:
        return None
    try:
        return int(text)
    except ValueError as error:
        raise invalid(f"{name} is not a number: {text!r}") from error


def byte_range(header: str | None, size: int) -> range:
    """The bytes that a Range header requests; all bytes without a valid header.

    Raises:
        StorageError: 416 the range is empty.
    """
    match = _RANGE.fullmatch(header or "")
    if not match or match.group() == "bytes=-":
        return range(size)
    if not match["first"]:
        part = range(max(0, size - int(match["last"])), size)
    else:
        part = range(int(match["first"]), min(size, int(match["last"]) + 1) if match["last"] else size)
    if not part:
        raise StorageError(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "requestedRangeNotSatisfiable", "Request range not satisfiable")
    return part
