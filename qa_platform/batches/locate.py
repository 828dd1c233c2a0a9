"""Locates the sources of files, and corrects records that name the wrong place."""

from google.cloud import storage

from qa_platform.clients import bucket
from qa_platform.clients.archived import find_archived
from qa_platform.clients.refusals import bucket_errors
from qa_platform.contract import INCOMING, FileStatus
from qa_platform.ledger import FileRecord, Ledger
from qa_platform.ledger.retries import source_is_gone


def find_source(gcs_bucket: storage.Bucket, record: FileRecord) -> str:
    """The object that holds a file's source now: the recorded one, else an archived copy, else the upload; "" if there is none."""
    version, upload = record.version, INCOMING + record.version.name
    if record.status is FileStatus.FORGOTTEN:
        # Its record has no checksum to recognise a copy by, and nothing left of it may be answered.
        return ""
    with bucket_errors(f"looking for {version.name}"):
        if record.place and bucket.is_there(gcs_bucket, version, record.place):
            return record.place
        if place := find_archived(gcs_bucket, version):
            return place
        # If the record names no object, the upload is about to be deleted.
        return upload if record.place not in ("", upload) and bucket.is_there(gcs_bucket, version, upload) else ""


def correct_missing_source(gcs_bucket: storage.Bucket, ledger: Ledger, record: FileRecord) -> bool:
    """Correct the record of a waiting or failed file whose source is not where the record says.

    The source lies elsewhere if the tables or the bucket were restored to an older state. If it is gone, the file is superseded.

    Returns:
        Whether the record was corrected: false if it has changed since it was read, or if the source is there after all.
    """
    place = find_source(gcs_bucket, record)
    if place == record.place != "":
        return False
    if place:
        return ledger.relocate(record, place=place)
    if record.status is FileStatus.FAILED:
        return ledger.drop_failed(record)
    return ledger.mark_superseded(record.version, as_read=record)


def why_gone(gcs_bucket: storage.Bucket, record: FileRecord) -> str:
    """Why a file's source is gone and what to do about it, for people."""
    name = record.version.name
    if record.status is FileStatus.FORGOTTEN:
        return source_is_gone(record)
    with bucket_errors(f"looking for {name}"):
        upload = bucket.find_incoming(gcs_bucket, name)
    if upload is not None and upload.generation > record.version.generation:
        return f"{name!r} was uploaded again: generation {upload.generation} is answered without being asked for"
    if upload is not None and upload.generation == record.version.generation:
        return f"the source of {name!r} is being archived right now, or that was interrupted; ask again in a minute"
    if record.place.startswith(INCOMING):
        return f"the source of {name!r} is gone: it was deleted from {INCOMING}; upload it again"
    if record.place:
        return f"the source of {name!r} is gone: it was deleted from {record.place}; upload it again"
    return source_is_gone(record)
