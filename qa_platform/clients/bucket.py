"""The bucket: the uploads under ``incoming/``, and how their sources are moved away when they are done.

Every copy and deletion has a generation precondition. So each step can be repeated, and an object that was overwritten in the meantime
is neither deleted nor lost.
"""

import base64
import enum
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import IO

import google_crc32c
from google.cloud import storage
from google.cloud.storage.retry import DEFAULT_RETRY

from qa_platform.clients.credentials import service_account
from qa_platform.clients.refusals import bucket_errors
from qa_platform.clients.source import SOURCE_CHANGED_ERRORS, Source, SourceChanged
from qa_platform.contract import INCOMING, PROCESSED, REJECTED, FileVersion, file_id
from qa_platform.errors import InputError, TransientError
from qa_platform.settings import BucketSettings

# Only these fields are requested, so that a listing of 100,000 objects stays small.
_LISTED_FIELDS = "items(name,generation,size,crc32c,md5Hash),nextPageToken"
_TIMEOUT_SECONDS = 60
OBJECT_NAME_BYTES = 1024
_REPORT_SUFFIX = ".report.csv"
# Custom metadata of a copy whose place does not contain the file's name.
NAME_KEY = "qa-platform-name"
# Names that programs give to a file while they copy it. They are ignored whatever QA_SUFFIXES says.
TEMPORARY_PREFIXES = (".", "~")
TEMPORARY_SUFFIXES = (".part", ".partial", ".tmp", ".temp", ".crdownload", "~")
# Bytes that are sent with one request during an upload. The timeout limits the time in which all of them are sent, not only a pause: with
# 2 MiB, 300 kbit/s suffice.
_WRITE_CHUNK = 2 * 2**20


class Ignored(enum.StrEnum):
    """Why an object under ``incoming/`` is not an upload to be answered."""

    NUL = "NUL in the name"
    FOLDER = "folder marker"
    TEMPORARY = "temporary name"
    SUFFIX = "other suffix"


def open_bucket(settings: BucketSettings, client: storage.Client | None = None) -> storage.Bucket:
    """The bucket. Does not check whether it exists.

    Args:
        client: by default one with Google's default credentials.

    Raises:
        InputError: no name is configured, or there are no credentials.
    """
    if not settings.storage_bucket:
        raise InputError("no bucket is configured", advice="set STORAGE_BUCKET to its name")
    with bucket_errors("opening the bucket"):
        client = client or storage.Client(project=settings.google_cloud_project)
    return client.bucket(settings.storage_bucket, user_project=settings.billing_project or None)


def account_client(settings: BucketSettings) -> storage.Client:
    """A client with the service account of GCS_ACCESS, or with Google's default credentials if that is empty.

    Raises:
        InputError: GCS_ACCESS is not a service account, or there are no credentials.
    """
    if not settings.gcs_access.get_secret_value().strip():
        with bucket_errors("opening the bucket"):
            return storage.Client(project=settings.google_cloud_project)
    # From memory: no credential is written to a file.
    account = json.loads(service_account(settings.gcs_access))
    return storage.Client.from_service_account_info(account, project=settings.google_cloud_project)


def list_incoming(bucket: storage.Bucket, suffixes: tuple[str, ...], *, ignored: Counter[str] | None = None) -> Iterator[FileVersion]:
    """The uploads under ``incoming/`` that are to be answered. Pages are fetched as needed.

    Args:
        suffixes: name endings, in lower case; other objects are ignored.
        ignored: counts the ignored objects by `why_ignored`.

    Raises, while it is iterated:
        InputError, TransientError: the bucket refuses it, or is unavailable.
    """
    for blob in _listing(bucket):
        if why := why_ignored(blob.name, suffixes):
            if ignored is not None:
                ignored[why] += 1
        else:
            yield version_of(blob)


def _listing(bucket: storage.Bucket) -> Iterator[storage.Blob]:
    with bucket_errors(f"listing gs://{bucket.name}/{INCOMING}"):
        yield from bucket.list_blobs(prefix=INCOMING, fields=_LISTED_FIELDS, page_size=1000, timeout=_TIMEOUT_SECONDS)


def why_ignored(object_name: str, suffixes: tuple[str, ...]) -> str:
    """The reason, one of `Ignored`, why an object under ``incoming/`` is not an upload to be answered; "" if it is one."""
    name = object_name.rpartition("/")[2].lower()
    if "\0" in object_name:
        # PostgreSQL cannot store it.
        return Ignored.NUL
    if not name:
        return Ignored.FOLDER
    if name.startswith(TEMPORARY_PREFIXES) or name.endswith(TEMPORARY_SUFFIXES):
        return Ignored.TEMPORARY
    return "" if name.endswith(suffixes) else Ignored.SUFFIX


def is_question_file(object_name: str, suffixes: tuple[str, ...]) -> bool:
    """Whether an object is an upload to be answered: below ``incoming/``, and not ignored."""
    return object_name.startswith(INCOMING) and not why_ignored(object_name, suffixes)


def version_of(blob: storage.Blob) -> FileVersion:
    """The version that an object under ``incoming/`` holds."""
    name = blob.name.removeprefix(INCOMING)
    return FileVersion(name, int(blob.generation), int(blob.size or 0), blob.crc32c or "", blob.md5_hash or "")


def find_incoming(bucket: storage.Bucket, name: str) -> FileVersion | None:
    """The live version of one upload, or None.

    Raises:
        InputError, TransientError: the bucket refuses it, or is unavailable.
    """
    blob = _blob(bucket, INCOMING + name)
    return version_of(blob) if blob else None


def is_there(bucket: storage.Bucket, version: FileVersion, place: str) -> bool:
    """Whether ``place`` still holds this generation. An archived copy has its own generation: it only has to exist.

    Raises:
        InputError, TransientError: the bucket refuses it, or is unavailable.
    """
    blob = _blob(bucket, place)
    return blob is not None and (place != INCOMING + version.name or int(blob.generation) == version.generation)


def _blob(bucket: storage.Bucket, place: str, *, generation: int | None = None) -> storage.Blob | None:
    with bucket_errors(f"looking for gs://{bucket.name}/{place}"):
        return bucket.get_blob(place, generation=generation, timeout=_TIMEOUT_SECONDS)


def open_version(bucket: storage.Bucket, version: FileVersion, place: str) -> Source:
    """Open one generation for streaming reads.

    Args:
        place: the name of the object that holds it now. An archived copy has its own generation.

    Raises:
        SourceChanged: that generation is gone.
        InputError, TransientError: the bucket refuses it, or is unavailable.
    """
    in_incoming = place == INCOMING + version.name
    blob = _blob(bucket, place, generation=version.generation if in_incoming else None)
    if blob is None:
        raise SourceChanged(f"generation {version.generation} is gone: it was overwritten or deleted while it waited", where=place)
    return Source(blob)


def upload(bucket: storage.Bucket, name: str, source: IO[bytes]) -> FileVersion:
    """Upload a file to ``incoming/``. Returns the version that it is now.

    Raises:
        InputError, TransientError: the bucket refuses it, or is unavailable.
    """
    blob = bucket.blob(INCOMING + name, chunk_size=_WRITE_CHUNK)
    with bucket_errors(f"uploading {INCOMING}{name}"):
        content_type = "application/gzip" if name.lower().endswith(".gz") else "text/csv"
        try:
            blob.upload_from_file(source, rewind=True, content_type=content_type, timeout=_TIMEOUT_SECONDS, retry=DEFAULT_RETRY)
        except ValueError as error:
            # Google's client does not send again what the bucket has not kept of a chunk.
            raise TransientError("the upload broke off", where=INCOMING + name, advice="try again") from error
    return version_of(blob)


def archived_name(version: FileVersion, *, rejected: bool) -> str:
    """The place of a done source: ``processed/<name>/<generation>.csv``, or the same under ``rejected/``.

    It ends in ``.csv.gz`` if the name ends in ``.gz``. The file id replaces the name if the result would be too long for an object's name.
    """
    ending = ".csv.gz" if version.name.lower().endswith(".gz") else ".csv"
    folder, file = REJECTED if rejected else PROCESSED, f"{version.generation}{ending}"
    place = f"{folder}{version.name}/{file}"
    # The report beside a rejected file has a longer ending.
    longest = _report_beside(place)
    return place if len(longest.encode()) <= OBJECT_NAME_BYTES else f"{folder}{file_id(version.name)}/{file}"


def _report_beside(place: str) -> str:
    return place.removesuffix(".gz").removesuffix(".csv") + _REPORT_SUFFIX


def report_name(version: FileVersion) -> str:
    """The place of the report on a rejected file."""
    return _report_beside(archived_name(version, rejected=True))


def place_when_done(version: FileVersion, *, mode: str, rejected: bool = False) -> str:
    """The place where `archive` leaves a source; "" if it deletes it."""
    if mode == "keep":
        return INCOMING + version.name
    return archived_name(version, rejected=rejected) if mode == "move" or rejected else ""


def archive(
    bucket: storage.Bucket,
    version: FileVersion,
    *,
    mode: str,
    rejected: bool = False,
    may_delete: Callable[[], bool] = lambda: True,
) -> str | None:
    """Take one generation out of ``incoming/``, or keep it there.

    It is copied, then deleted, each with a generation precondition. So a repeated call does only what is left, and a newer upload of the
    same name stays.

    Args:
        mode: ``move``, ``delete`` or ``keep``.
        rejected: the file was rejected. Its source is moved even if others are deleted.
        may_delete: called once the copy exists. If it returns false, the source stays.

    Returns:
        The source's place now; "" if it was deleted, or overwritten while it was worked on; None if it must not be deleted.

    Raises:
        InputError: another object lies where the copy goes, or the bucket refuses the copy or the deletion. The source stays.
        TransientError: the bucket is unavailable, or refuses the copy for no visible reason. The source stays.
    """
    source = bucket.blob(INCOMING + version.name)
    place = place_when_done(version, mode=mode, rejected=rejected)
    if place == source.name:
        return place
    with bucket_errors(f"archiving {source.name}"):
        if place and not _copied(bucket, source, place, version):
            return ""
        if not may_delete():
            return None
        try:
            source.delete(if_generation_match=version.generation, timeout=_TIMEOUT_SECONDS, retry=DEFAULT_RETRY)
        except SOURCE_CHANGED_ERRORS:
            # It was deleted or overwritten before. If it is still there, a precondition of the bucket's own has refused the deletion.
            if is_there(bucket, version, source.name):
                raise
    return place


def _copied(bucket: storage.Bucket, source: storage.Blob, place: str, version: FileVersion) -> bool:
    """Copy a generation, unless it was copied before. Returns whether the copy exists."""
    target = bucket.blob(place)
    token: str | None = None
    try:
        if version.name not in place:
            _name_copy(source, target, version)
        while True:
            token, _, _ = target.rewrite(
                source, token=token, if_generation_match=0, if_source_generation_match=version.generation, timeout=_TIMEOUT_SECONDS
            )
            if token is None:
                return True
    except SOURCE_CHANGED_ERRORS as error:
        # Either it was copied before, or it was overwritten and its bytes are gone. Find out which, since the caller deletes the source
        # next. Look in this order, since another process may be archiving it right now.
        there = is_there(bucket, version, source.name)
        copy = _blob(bucket, place)
        if copy is not None and is_copy(copy, version):
            return True
        if there:
            what = f"{source.name} cannot be copied to {place}"
            if copy is None:
                raise TransientError(f"{what}, although it is there and nothing is in the way: {error}") from error
            raise InputError(f"{what}, where another object lies", advice=f"move gs://{bucket.name}/{place} away") from error
        return False


def is_copy(blob: storage.Blob, version: FileVersion) -> bool:
    """Whether an object has the content of a version, by size and checksums as far as both are known."""
    sums = ((version.crc32c, blob.crc32c), (version.md5, blob.md5_hash), (version.size, blob.size))
    return all(wanted == actual for wanted, actual in sums if wanted and actual is not None)


def _name_copy(source: storage.Blob, target: storage.Blob, version: FileVersion) -> None:
    """Give a copy the file's name as metadata. Attributes in the request replace all of the source's, so those are sent too."""
    # A separate blob. Once its attributes are loaded, a blob's delete() names the generation, and a versioned bucket deletes that for good.
    source = source.bucket.blob(source.name)
    source.reload(if_generation_match=version.generation, timeout=_TIMEOUT_SECONDS)
    target.content_type, target.content_encoding = source.content_type, source.content_encoding
    target.metadata = {**(source.metadata or {}), NAME_KEY: version.name}


def write_report(bucket: storage.Bucket, version: FileVersion, report: bytes) -> str:
    """Write the report for a rejected file's owner to where the file is moved, unless it exists. Returns the report's name.

    Raises:
        InputError, TransientError: the bucket refuses it, or is unavailable.
    """
    place = report_name(version)
    with bucket_errors(f"writing {place}"):
        before = _blob(bucket, place)
        # An equal report is not written again: a retention policy would refuse that.
        if before is None or before.crc32c != base64.b64encode(google_crc32c.Checksum(report).digest()).decode():
            content_type = "text/csv; charset=utf-8"
            bucket.blob(place).upload_from_string(report, content_type=content_type, timeout=_TIMEOUT_SECONDS, retry=DEFAULT_RETRY)
    return place
