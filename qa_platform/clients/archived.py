"""The archived sources under ``processed/``, and the uploads that they are copies of."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from google.cloud import storage

from qa_platform.clients.bucket import NAME_KEY, archived_name, is_copy, why_ignored
from qa_platform.contract import INCOMING, PROCESSED, FileVersion, file_id

_LISTED_FIELDS = "items(name,generation,size,crc32c,md5Hash,metadata),nextPageToken"
_TIMEOUT_SECONDS = 60
_GENERATION = re.compile(r"[1-9][0-9]{0,18}")
_GENERATION_LIMIT = 2**63


@dataclass(frozen=True)
class ArchivedObject:
    """An object under ``processed/``. ``version``: the upload that it is a copy of; None if `archive` does not make such names."""

    place: str
    version: FileVersion | None


def list_archived(bucket: storage.Bucket, suffixes: tuple[str, ...], *, names: Sequence[str] = ()) -> Iterator[ArchivedObject]:
    """The objects under ``processed/``, ordered by name. Pages are fetched as needed.

    Args:
        suffixes: the name endings of uploads, in lower case; other names were no uploads.
        names: list only the copies of these files; empty for all.

    Raises, while it is iterated:
        refusals.BUCKET_ERRORS: translate them with `bucket_errors`.
    """
    for prefix in [f"{PROCESSED}{each}/" for name in names for each in (name, file_id(name))] or [PROCESSED]:
        for blob in bucket.list_blobs(prefix=prefix, fields=_LISTED_FIELDS, page_size=1000, timeout=_TIMEOUT_SECONDS):
            version = _version_of(blob, suffixes)
            if not names or (version and version.name in names):
                yield ArchivedObject(blob.name, version)


def find_archived(bucket: storage.Bucket, version: FileVersion) -> str:
    """The object under ``processed/`` or ``rejected/`` that is a copy of this version, "" if there is none.

    Raises:
        refusals.BUCKET_ERRORS: translate them with `bucket_errors`.
    """
    for place in (archived_name(version, rejected=False), archived_name(version, rejected=True)):
        copy = bucket.get_blob(place, timeout=_TIMEOUT_SECONDS)
        if copy is not None and is_copy(copy, version):
            return place
    return ""


def _version_of(blob: storage.Blob, suffixes: tuple[str, ...]) -> FileVersion | None:
    folder, _, file = blob.name.removeprefix(PROCESSED).rpartition("/")
    generation = file.removesuffix(".gz").removesuffix(".csv")
    if not _GENERATION.fullmatch(generation) or int(generation) >= _GENERATION_LIMIT:
        return None
    # The folder is the file's name. If that is too long, the metadata has it. The owner of an upload may set metadata too, so check it.
    for name in (folder, (blob.metadata or {}).get(NAME_KEY, "")):
        version = FileVersion(name, int(generation), int(blob.size or 0), blob.crc32c or "", blob.md5_hash or "")
        if not why_ignored(INCOMING + name, suffixes) and archived_name(version, rejected=False) == blob.name:
            return version
    return None
