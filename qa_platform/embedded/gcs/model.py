"""The values that the emulator's modules exchange, and the errors that they raise."""

import base64
import hashlib
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

import google_crc32c

_READ_CHUNK_BYTES = 2**20

# The attributes of an object that a client can set.
WRITABLE = (
    "contentType",
    "contentEncoding",
    "contentDisposition",
    "contentLanguage",
    "cacheControl",
    "customTime",
    "metadata",
    "storageClass",
    "temporaryHold",
    "eventBasedHold",
    "retention",
    "acl",
)
# Attributes that protect an object or grant access to it. They are not copied.
NOT_COPIED = ("temporaryHold", "eventBasedHold", "retention", "acl")


class StorageError(Exception):
    """A refusal by Google Cloud Storage.

    Args:
        status: the HTTP status.
        reason: the service's own code for the error, such as ``notFound``.
        message: the human-readable text.
    """

    def __init__(self, status: HTTPStatus, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


def not_found(name: str) -> StorageError:
    """The error for an object that does not exist: 404."""
    return StorageError(HTTPStatus.NOT_FOUND, "notFound", f"No such object: {name}")


def invalid(message: str) -> StorageError:
    """The error for a malformed request: 400."""
    return StorageError(HTTPStatus.BAD_REQUEST, "invalid", message)


def forbidden(message: str, reason: str = "forbidden") -> StorageError:
    """The error for a request that a role, a hold or a retention policy does not allow: 403."""
    return StorageError(HTTPStatus.FORBIDDEN, reason, message)


@dataclass(frozen=True)
class Bucket:
    """A bucket.

    Attributes:
        generation: distinguishes the buckets that had the same name one after the other.
        created: in RFC 3339.
        updated: when the settings last changed, in RFC 3339.
        settings: the parts of the bucket's resource that a client can set, and what the service adds to them.
        policy: the IAM policy; empty until a client sets one.
        soft_deleted: when the bucket was soft-deleted, in RFC 3339; empty for a live bucket.
    """

    name: str
    generation: int
    metageneration: int
    created: str
    updated: str
    settings: dict[str, Any] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)
    soft_deleted: str = ""

    @property
    def keeps_versions(self) -> bool:
        return bool(self.settings.get("versioning", {}).get("enabled"))

    @property
    def soft_delete_seconds(self) -> int:
        """How long deleted objects can be restored, in seconds; 0 without soft delete."""
        return int(self.settings.get("softDeletePolicy", {}).get("retentionDurationSeconds", 0))

    @property
    def retention_seconds(self) -> int:
        """How long objects are protected from deletion, in seconds; 0 without retention."""
        return int((self.settings.get("retentionPolicy") or {}).get("retentionPeriod", 0))


@dataclass(frozen=True)
class Content:
    """A complete file that becomes the content of an object.

    Attributes:
        path: the file.
        size: in bytes.
        crc32c: the checksum in base64.
        md5: the checksum in base64.
    """

    path: Path
    size: int
    crc32c: str
    md5: str

    @classmethod
    def of(cls, path: Path) -> "Content":
        """Read a file once, and compute its size and checksums."""
        crc32c, md5, size = google_crc32c.Checksum(), hashlib.md5(usedforsecurity=False), 0
        with path.open("rb") as file:
            while chunk := file.read(_READ_CHUNK_BYTES):
                crc32c.update(chunk)
                md5.update(chunk)
                size += len(chunk)
        return cls(path, size, base64.b64encode(crc32c.digest()).decode(), base64.b64encode(md5.digest()).decode())


@dataclass(frozen=True)
class StoredObject:
    """One generation of an object.

    Attributes:
        size: in bytes.
        crc32c: the content's checksum in base64.
        md5: the content's checksum in base64; empty for a composite object.
        created: when this generation was written, in RFC 3339.
        updated: when the content or the attributes last changed, in RFC 3339.
        attributes: those of WRITABLE that are set, and what the service adds: ``componentCount``, ``keySha256`` (the hash of the client's
            encryption key), ``holdReleased`` (when an event-based hold ended), ``replaced`` (when the generation stopped being live),
            ``softDeleted`` (when it was soft-deleted), ``softDeleteSeconds``.
    """

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
class Conditions:
    """The preconditions of a request; None for one that it does not have. A missing object has generation 0."""

    generation_match: int | None = None
    generation_not_match: int | None = None
    metageneration_match: int | None = None
    metageneration_not_match: int | None = None

    def check(self, current: StoredObject | None, *, reading: bool = False) -> None:
        """Refuse the request if a precondition does not hold.

        Args:
            current: the live generation; None if there is none.
            reading: the request only reads.

        Raises:
            StorageError: 412 a precondition does not hold; 304 if the request only reads and only a `not match` fails.
        """
        generation = current.generation if current else 0
        metageneration = current.metageneration if current else 0
        matches = ((self.generation_match, generation), (self.metageneration_match, metageneration))
        if any(wanted is not None and wanted != actual for wanted, actual in matches):
            raise _condition_failed(HTTPStatus.PRECONDITION_FAILED)
        unwanted = ((self.generation_not_match, generation), (self.metageneration_not_match, metageneration))
        if any(wanted is not None and wanted == actual for wanted, actual in unwanted):
            raise _condition_failed(HTTPStatus.NOT_MODIFIED if reading else HTTPStatus.PRECONDITION_FAILED)

    def check_metageneration(self, metageneration: int) -> None:
        """Refuse a change of a bucket if a precondition does not hold.

        Raises:
            StorageError: 412.
        """
        matches = self.metageneration_match in (None, metageneration)
        if not matches or self.metageneration_not_match == metageneration:
            raise _condition_failed(HTTPStatus.PRECONDITION_FAILED)


def _condition_failed(status: HTTPStatus) -> StorageError:
    return StorageError(status, "conditionNotMet", "At least one of the pre-conditions you specified did not hold.")


@dataclass(frozen=True)
class Page:
    """One page of a listing.

    Attributes:
        prefixes: the prefixes that names have been folded into, and managed folders.
        token: the token of the next page; None on the last page.
    """

    objects: tuple[StoredObject, ...]
    prefixes: tuple[str, ...]
    token: str | None


@dataclass(frozen=True)
class UploadSession:
    """A resumable upload.

    Attributes:
        attributes: the attributes of the object, and the checksums that the client has announced.
        conditions: checked when the upload begins and again when it ends.
        finished: the object that the upload has created; None until the content is complete.
    """

    id: str
    bucket: str
    name: str
    attributes: dict[str, Any]
    conditions: Conditions
    finished: StoredObject | None
