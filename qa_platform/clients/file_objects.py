"""All objects of one file in the bucket: uploads, archived sources, reports, answered CSVs. Includes versions that are not live."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from google.api_core.exceptions import BadRequest, NotFound
from google.cloud import storage
from google.cloud.storage.retry import DEFAULT_RETRY

from qa_platform.clients.answered_csvs import AnswersId, answered_name
from qa_platform.clients.refusals import bucket_errors
from qa_platform.contract import INCOMING, PROCESSED, REJECTED, FileVersion, file_id

# A source or a report in its file's folder, by the generation of the upload (see `bucket.archived_name`).
_NAME = re.compile(r"([1-9][0-9]{0,18})(?:\.csv|\.csv\.gz|\.report\.csv)")
_LISTED_FIELDS = "items(name,generation,metadata,softDeleteTime,hardDeleteTime),nextPageToken"
_TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class FileObject:
    """One version of an object of a file.

    Args:
        generation: the generation of the object itself.
        upload_generation: the generation of the upload that it is or comes from.
        kept_until: how long the bucket keeps a soft-deleted version, which cannot be deleted; "" for versions that can be deleted.
    """

    place: str
    generation: int
    upload_generation: int
    kept_until: str = ""


def list_file_objects(bucket: storage.Bucket, name: str, answered_prefix: str) -> Iterator[FileObject]:
    """The objects of a file under every prefix: live ones, noncurrent versions, soft-deleted ones.

    Args:
        answered_prefix: where answered CSVs lie, "" if none are written.

    Raises, while it is iterated:
        InputError, TransientError: the bucket refuses it, or is unavailable.
    """
    with bucket_errors(f"listing the objects of {name}"):
        for prefix, generation_of in _places(name, answered_prefix):
            listed = {"prefix": prefix, "fields": _LISTED_FIELDS, "timeout": _TIMEOUT_SECONDS}
            yield from _listed(bucket.list_blobs(**listed, versions=True), prefix, generation_of)
            # A bucket that keeps no soft-deleted versions may refuse to list them.
            with suppress(BadRequest):
                yield from _listed(bucket.list_blobs(**listed, soft_deleted=True), prefix, generation_of)


def _listed(blobs: Iterable[storage.Blob], prefix: str, generation_of: Callable[[storage.Blob, str], int]) -> Iterator[FileObject]:
    for blob in blobs:
        if upload_generation := generation_of(blob, prefix):
            kept_until = blob.hard_delete_time.isoformat(timespec="seconds") if blob.hard_delete_time else ""
            yield FileObject(blob.name, int(blob.generation), upload_generation, kept_until)


def _places(name: str, answered_prefix: str) -> Iterator[tuple[str, Callable[[storage.Blob, str], int]]]:
    """Every prefix under which objects of a file may lie, each with a function that gives the upload's generation, 0 for other files."""
    yield INCOMING + name, _of_upload
    for folder in (PROCESSED, REJECTED):
        # The file id replaces a name that is too long.
        yield f"{folder}{name}/", _of_archived
        yield f"{folder}{file_id(name)}/", _of_archived
    if answered_prefix:
        yield answered_name(answered_prefix, name), partial(_of_answered, name)


def _of_upload(blob: storage.Blob, prefix: str) -> int:
    return int(blob.generation) if blob.name == prefix else 0


def _of_archived(blob: storage.Blob, prefix: str) -> int:
    match = _NAME.fullmatch(blob.name.removeprefix(prefix))
    return int(match[1]) if match else 0


def _of_answered(name: str, blob: storage.Blob, prefix: str) -> int:
    answers = AnswersId.of(blob) if blob.name == prefix else None
    return answers.generation if answers and answers.name == name else 0


def delete_file_object(bucket: storage.Bucket, found: FileObject) -> None:
    """Delete one version of an object for good, if the bucket keeps no soft-deleted versions. Does nothing if it is gone.

    Raises:
        InputError: the bucket refuses it: a hold, a retention policy, a missing role.
        TransientError: the bucket is unavailable.
    """
    # With its generation: otherwise a versioned bucket would keep it as a noncurrent version.
    with bucket_errors(f"deleting {found.place}"), suppress(NotFound):
        bucket.delete_blob(found.place, generation=found.generation, timeout=_TIMEOUT_SECONDS, retry=DEFAULT_RETRY)


def delete_objects_of(bucket: storage.Bucket, version: FileVersion, answered_prefix: str) -> None:
    """Delete the objects of one upload under every prefix, except soft-deleted versions.

    Raises:
        InputError, TransientError: the bucket refuses it, or is unavailable.
    """
    for each in list_file_objects(bucket, version.name, answered_prefix):
        if each.upload_generation == version.generation and not each.kept_until:
            delete_file_object(bucket, each)
