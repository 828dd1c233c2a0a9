"""Renders responses: the JSON resources of the API, the headers of a download, and errors."""

from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qa_platform.embedded.gcs.model import Bucket, Page, StorageError, StoredObject
from qa_platform.embedded.gcs.past import hard_delete_time
from qa_platform.embedded.gcs.policies import retained_until
from qa_platform.embedded.gcs.requests import writable_attributes
from qa_platform.embedded.gcs.times import in_seconds

DEFAULT_TYPE = "application/octet-stream"
DEFAULT_CLASS = "STANDARD"
# Settings that the API serves as separate collections.
_UNSEEN = ("managedFolders",)


def bucket_resource(bucket: Bucket) -> dict[str, Any]:
    """A bucket."""
    regions = bucket.settings.get("customPlacementConfig")
    location_type = {"locationType": "dual-region" if regions else "multi-region"}
    resource = {
        "kind": "storage#bucket",
        "id": bucket.name,
        "name": bucket.name,
        "generation": str(bucket.generation),
        "timeCreated": bucket.created,
        "updated": bucket.updated,
        "metageneration": str(bucket.metageneration),
        "location": "US",
        "storageClass": DEFAULT_CLASS,
        "rpo": "DEFAULT",
        "etag": bucket_etag(bucket),
        **{key: value for key, value in bucket.settings.items() if key not in _UNSEEN},
        **location_type,
    }
    if bucket.soft_deleted:
        resource["softDeleteTime"] = bucket.soft_deleted
        resource["hardDeleteTime"] = in_seconds(bucket.soft_deleted, bucket.soft_delete_seconds)
    return resource


def bucket_etag(bucket: Bucket) -> str:
    """The entity tag of a bucket."""
    return f'"{bucket.generation}/{bucket.metageneration}"'


def object_resource(stored: StoredObject, bucket: Bucket, request: Request) -> dict[str, Any]:
    """An object. Its links start with the request's base URL."""
    path = f"storage/v1/b/{stored.bucket}/o/{quote(stored.name, safe='')}"
    return {
        "kind": "storage#object",
        "id": f"{stored.bucket}/{stored.name}/{stored.generation}",
        "selfLink": f"{request.base_url}{path}",
        "mediaLink": f"{request.base_url}download/{path}?generation={stored.generation}&alt=media",
        "name": stored.name,
        "bucket": stored.bucket,
        "generation": str(stored.generation),
        "metageneration": str(stored.metageneration),
        "storageClass": bucket.settings.get("storageClass", DEFAULT_CLASS),
        "size": str(stored.size),
        "crc32c": stored.crc32c,
        "etag": object_etag(stored),
        "timeCreated": stored.created,
        "updated": stored.updated,
        **writable_attributes(stored.attributes),
        **_added(stored, bucket),
    }


def _added(stored: StoredObject, bucket: Bucket) -> dict[str, Any]:
    """The service's own parts of an object's resource that only some objects have."""
    attributes, until = stored.attributes, retained_until(bucket, stored)
    parts = {
        "md5Hash": stored.md5,
        "componentCount": attributes.get("componentCount"),
        "retentionExpirationTime": until if bucket.retention_seconds and not attributes.get("eventBasedHold") else "",
        "timeDeleted": attributes.get("replaced"),
        "softDeleteTime": attributes.get("softDeleted"),
        "hardDeleteTime": hard_delete_time(stored) if "softDeleted" in attributes else "",
        "customerEncryption": {"encryptionAlgorithm": "AES256", "keySha256": attributes["keySha256"]} if "keySha256" in attributes else "",
    }
    return {key: value for key, value in parts.items() if value}


def page_resource(page: Page, bucket: Bucket, request: Request) -> dict[str, Any]:
    """A page of a listing."""
    items = [object_resource(stored, bucket, request) for stored in page.objects]
    resource: dict[str, Any] = {"kind": "storage#objects", "items": items}
    if page.prefixes:
        resource["prefixes"] = list(page.prefixes)
    if page.token:
        resource["nextPageToken"] = page.token
    return resource


def download_headers(stored: StoredObject, part: range, *, partial: bool) -> dict[str, str]:
    """The headers of a download.

    Args:
        part: the bytes that are sent.
        partial: the client asked for a range.
    """
    headers = {
        **_described(stored),
        "content-length": str(len(part)),
        "accept-ranges": "bytes",
    }
    if encoding := stored.attributes.get("contentEncoding"):
        headers["content-encoding"] = str(encoding)
    if len(part) == stored.size:
        headers["x-goog-hash"] = _hashes(stored)
    if partial:
        headers["content-range"] = f"bytes {part.start}-{part.stop - 1}/{stored.size}"
    return headers


def is_transcoded(stored: StoredObject) -> bool:
    """Whether an object is decompressed for clients that do not accept gzip ("decompressive transcoding")."""
    return stored.attributes.get("contentEncoding") == "gzip" and "no-transform" not in str(stored.attributes.get("cacheControl", ""))


def transcoded_headers(stored: StoredObject) -> dict[str, str]:
    """The headers of a download that is decompressed in transit. The size is unknown; the hashes are those of the stored bytes."""
    return {**_described(stored), "x-goog-hash": _hashes(stored), "warning": "214 UploadServer gunzipped"}


def _described(stored: StoredObject) -> dict[str, str]:
    return {
        "content-type": str(stored.attributes.get("contentType", DEFAULT_TYPE)),
        "etag": object_etag(stored),
        "x-goog-generation": str(stored.generation),
        "x-goog-metageneration": str(stored.metageneration),
        "x-goog-stored-content-encoding": str(stored.attributes.get("contentEncoding", "identity")),
        "x-goog-stored-content-length": str(stored.size),
        "x-goog-storage-class": str(stored.attributes.get("storageClass", DEFAULT_CLASS)),
    }


def _hashes(stored: StoredObject) -> str:
    return f"crc32c={stored.crc32c}" + (f",md5={stored.md5}" if stored.md5 else "")


def error_response(error: StorageError) -> Response:
    """A refusal as the API sends it."""
    if error.status == HTTPStatus.NOT_MODIFIED:
        return Response(status_code=error.status)
    detail = {"domain": "global", "reason": error.reason, "message": str(error)}
    return JSONResponse({"error": {"code": error.status, "message": str(error), "errors": [detail]}}, status_code=error.status)


def object_etag(stored: StoredObject) -> str:
    """The entity tag of an object."""
    return f'"{stored.generation}/{stored.metageneration}"'
