"""The bucket: what waits under ``incoming/``, its bytes, and where it goes when it is done.

Every write carries a generation precondition, so that each step may be repeated, and an object that was overwritten in the
meantime is neither deleted nor lost.
"""

import base64
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Self, cast

import google_crc32c
from google.api_core.exceptions import Forbidden, GoogleAPIError, NotFound, PreconditionFailed, Unauthorized
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, RefreshError
from google.cloud import storage
from google.cloud.storage.retry import DEFAULT_RETRY
from requests.exceptions import RequestException

from qa_platform.contract import INCOMING, PROCESSED, REJECTED, FileVersion, file_id
from qa_platform.errors import InputError, TransientError

# Asked for by name, so that a listing of 100,000 objects stays small.
_LISTED_FIELDS = "items(name,generation,size,crc32c),nextPageToken"
_TIMEOUT_SECONDS = 60
_OBJECT_NAME_BYTES = 1024
_REPORT_SUFFIX = ".report.csv"
# What programs that copy files call one that is not complete yet. A suffix that is asked for (QA_SUFFIXES) does not change that.
_TEMPORARY_PREFIXES = (".", "~")
_TEMPORARY_SUFFIXES = (".part", ".partial", ".tmp", ".temp", ".crdownload", "~")
# How much of an object is fetched at a time while it is read.
_READ_CHUNK = 8 * 2**20
# How much of a file is held in memory, and sent with one request, while it is uploaded: Google's client would take 100 MiB.
_WRITE_CHUNK = 16 * 2**20


class SourceChanged(InputError):
    """The generation that was to be read is gone: the object was overwritten or deleted. A newer one, if any, is found by itself."""


@contextmanager
def bucket_errors(doing: str) -> Iterator[None]:
    """Turn what Google's client raises into the platform's own errors; ``doing`` says what was being done, for the message."""
    try:
        yield
    except NotFound as error:
        raise InputError(f"{doing}: there is no such bucket or object; check STORAGE_BUCKET ({error.message})") from error
    except (Forbidden, Unauthorized, DefaultCredentialsError, RefreshError) as error:
        raise InputError(f"{doing}: the bucket does not let us in; check GOOGLE_APPLICATION_CREDENTIALS ({error})") from error
    except (GoogleAPIError, GoogleAuthError, RequestException) as error:
        raise TransientError(f"{doing}: the bucket cannot be reached: {error}") from error


def open_bucket(client: storage.Client, name: str) -> storage.Bucket:
    """The bucket by name, without asking whether it exists.

    Raises:
        InputError: no name is configured.
    """
    if not name:
        raise InputError("no bucket is configured: set STORAGE_BUCKET to its name")
    return client.bucket(name)


def list_incoming(bucket: storage.Bucket, suffixes: tuple[str, ...], *, ignored: Counter[str] | None = None) -> Iterator[FileVersion]:
    """The objects under ``incoming/`` that are files of questions, page by page; ``ignored`` counts the others by `why_ignored`."""
    blobs = bucket.list_blobs(prefix=INCOMING, fields=_LISTED_FIELDS, page_size=1000, timeout=_TIMEOUT_SECONDS)
    for blob in blobs:
        if why := why_ignored(blob.name, suffixes):
            if ignored is not None:
                ignored[why] += 1
        else:
            yield version_of(blob)


def why_ignored(object_name: str, suffixes: tuple[str, ...]) -> str:
    """Why an object under ``incoming/`` is no upload to be answered; "" if it is one."""
    name = object_name.rpartition("/")[2].lower()
    if "\0" in object_name:
        # PostgreSQL has no place for it.
        return "NUL in the name"
    if not name:
        return "folder marker"
    if name.startswith(_TEMPORARY_PREFIXES) or name.endswith(_TEMPORARY_SUFFIXES):
        return "temporary name"
    return "" if name.endswith(suffixes) else "other suffix"


def is_question_file(object_name: str, suffixes: tuple[str, ...]) -> bool:
    """Whether an object is an upload to be answered: below ``incoming/``, and not ignored."""
    return object_name.startswith(INCOMING) and not why_ignored(object_name, suffixes)


def version_of(blob: storage.Blob) -> FileVersion:
    return FileVersion(blob.name.removeprefix(INCOMING), int(blob.generation), int(blob.size or 0), blob.crc32c or "")


def find_incoming(bucket: storage.Bucket, name: str) -> FileVersion | None:
    """The live version of one upload, or None."""
    blob = bucket.get_blob(INCOMING + name, timeout=_TIMEOUT_SECONDS)
    return version_of(blob) if blob else None


def is_there(bucket: storage.Bucket, version: FileVersion, place: str) -> bool:
    """Whether ``place`` still holds this generation; an archived copy has a generation of its own."""
    blob = bucket.get_blob(place, timeout=_TIMEOUT_SECONDS)
    return blob is not None and (place != INCOMING + version.name or int(blob.generation) == version.generation)


# What Google's client raises when the generation that is being read vanishes.
SOURCE_CHANGED_ERRORS = (NotFound, PreconditionFailed)


class Source:
    """One generation, read as a stream and compared with its checksum at the end; a context manager."""

    def __init__(self, blob: storage.Blob) -> None:
        self._name = blob.name
        self._left = int(blob.size)
        self._wanted = blob.crc32c
        self._checksum = google_crc32c.Checksum()
        options = {"timeout": _TIMEOUT_SECONDS, "if_generation_match": blob.generation, "raw_download": True}
        self._reader = cast("IO[bytes]", blob.open("rb", chunk_size=_READ_CHUNK, **options))

    def read(self, size: int) -> bytes:
        """The next bytes; none at the end.

        Raises:
            SourceChanged: the generation has gone.
            TransientError: the bucket was away, or broke off, for longer than Google's client tries again (two minutes), or what was
                read is not what was uploaded.
        """
        try:
            content = self._reader.read(size)
        except SOURCE_CHANGED_ERRORS as error:
            raise SourceChanged(f"{self._name}: its generation is gone; it was overwritten or deleted while it was read") from error
        except (GoogleAPIError, OSError) as error:
            # What requests raises is an OSError.
            raise TransientError(f"{self._name} could not be read to its end: {error}") from error
        self._left -= len(content)
        # After a connection that broke off Google's client may take the middle for the end.
        if self._left < 0 or (self._left and size and not content):
            raise TransientError(f"{self._name} was not read as it is: {self._left} bytes are left at its end")
        self._checksum.update(content)
        if not self._left and self._wanted and base64.b64encode(self._checksum.digest()).decode() != self._wanted:
            raise TransientError(f"{self._name} was not read as it is: its bytes do not have the checksum that the bucket has")
        return content

    def read_to_the_end(self) -> None:
        """Read what is left, for its checksum; raises what `read` does."""
        while self.read(_READ_CHUNK):
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()


def open_version(bucket: storage.Bucket, version: FileVersion, place: str) -> Source:
    """Open one generation for streaming reads. ``place`` is the object that holds it now; an archived copy has a generation of its own.

    Raises:
        SourceChanged: that generation is no longer there.
    """
    in_incoming = place == INCOMING + version.name
    blob = bucket.get_blob(place, generation=version.generation if in_incoming else None, timeout=_TIMEOUT_SECONDS)
    if blob is None:
        raise SourceChanged(f"{place}: generation {version.generation} is gone; it was overwritten or deleted while it waited")
    return Source(blob)


def upload(bucket: storage.Bucket, name: str, source: IO[bytes]) -> FileVersion:
    """Put a file under ``incoming/`` and return what is there now."""
    blob = bucket.blob(INCOMING + name, chunk_size=_WRITE_CHUNK)
    blob.upload_from_file(source, rewind=True, content_type="text/csv", timeout=_TIMEOUT_SECONDS, retry=DEFAULT_RETRY)
    blob.reload(timeout=_TIMEOUT_SECONDS)
    return version_of(blob)


def archived_name(version: FileVersion, *, rejected: bool) -> str:
    """Where a source goes when it is done: ``processed/<name>/<generation>.csv``, or the same under ``rejected/``.

    With a name so long that this would be no object name any more, the file id stands for it.
    """
    folder, file = REJECTED if rejected else PROCESSED, f"{version.generation}.csv"
    place = f"{folder}{version.name}/{file}"
    # The report beside a rejected file has a longer ending.
    longest = place.removesuffix(".csv") + _REPORT_SUFFIX
    return place if len(longest.encode()) <= _OBJECT_NAME_BYTES else f"{folder}{file_id(version.name)}/{file}"


def place_when_done(version: FileVersion, *, mode: str, rejected: bool = False) -> str:
    """The place where `archive` leaves a source; "" if it is deleted."""
    if mode == "keep":
        return INCOMING + version.name
    return archived_name(version, rejected=rejected) if mode == "move" or rejected else ""


def archive(bucket: storage.Bucket, version: FileVersion, *, mode: str, rejected: bool = False) -> str:
    """Take one generation out of ``incoming/`` (``move`` or ``delete``), or ``keep`` it there.

    Returns:
        The place where it lies now; "" if nowhere, because it is deleted, or was overwritten while it was worked on.

    Copy, then delete, both bound to the generation: a repetition finds what is done and does the rest, and a newer upload
    under the same name stays.

    Raises:
        TransientError: another object lies where the copy goes, or the bucket refuses it for no reason that can be seen; nothing is
            deleted.
    """
    source = bucket.blob(INCOMING + version.name)
    place = place_when_done(version, mode=mode, rejected=rejected)
    if place == source.name:
        return place
    if place and not _copied(bucket, source, place, version):
        return ""
    with suppress(*SOURCE_CHANGED_ERRORS):
        # A refusal for no reason leaves the source: `reconcile.py` finds it.
        source.delete(if_generation_match=version.generation, timeout=_TIMEOUT_SECONDS, retry=DEFAULT_RETRY)
    return place


def _copied(bucket: storage.Bucket, source: storage.Blob, place: str, version: FileVersion) -> bool:
    """Copy a generation; whether its copy is there, now or since an earlier time."""
    target = bucket.blob(place)
    token: str | None = None
    try:
        while True:
            token, _, _ = target.rewrite(
                source, token=token, if_generation_match=0, if_source_generation_match=version.generation, timeout=_TIMEOUT_SECONDS
            )
            if token is None:
                return True
    except SOURCE_CHANGED_ERRORS as error:
        # Copied before, or the source was overwritten: then this generation's bytes are gone, and its answers are in the table. Looked
        # up, since what is deleted next would be the last copy.
        # In this order: somebody else may be archiving it just now.
        there = is_there(bucket, version, source.name)
        copy = bucket.get_blob(place, timeout=_TIMEOUT_SECONDS)
        if copy is not None and version.crc32c in ("", copy.crc32c):
            return True
        if there:
            why = "though it is there and nothing lies in the way" if copy is None else "where something else lies: move that away"
            raise TransientError(f"{source.name} cannot be copied to {place}, {why}") from error
        return False


def write_report(bucket: storage.Bucket, version: FileVersion, report: bytes) -> str:
    """Put a small CSV beside a rejected file, that tells its owner what is wrong; its name."""
    place = archived_name(version, rejected=True).removesuffix(".csv") + _REPORT_SUFFIX
    content_type = "text/csv; charset=utf-8"
    bucket.blob(place).upload_from_string(report, content_type=content_type, timeout=_TIMEOUT_SECONDS, retry=DEFAULT_RETRY)
    return place
