"""Retries requested by people. A retry is accepted only if the source exists, so an accepted retry takes place."""

from collections.abc import Sequence

from google.cloud import storage

from qa_platform.batches.locate import find_source, why_gone
from qa_platform.errors import InputError, TransientError
from qa_platform.ledger import FileRecord, Ledger
from qa_platform.ledger.retries import never_seen

# Attempts, in case the records change while the sources are located.
_TRIES = 5


def request_retries(
    gcs_bucket: storage.Bucket, ledger: Ledger, names: Sequence[str], *, owner: str = "", lease_seconds: int = 0
) -> list[FileRecord]:
    """Request that the newest generations of files are answered again: all of them or none.

    Args:
        owner: claims the files in the same step, before a sensor sees them waiting; "" for no claim. A file held by another owner stays
            with that owner.

    Returns:
        Their records, in the order of ``names``.

    Raises:
        InputError: some names were never seen, or their sources are gone; the message names them all, with the reasons.
        TransientError: the bucket or PostgreSQL is unavailable, or the files change all the time.
    """
    for _ in range(_TRIES):
        newest = ledger.newest(names)
        places = {name: find_source(gcs_bucket, record) for name, record in newest.items()}
        if faults := _faults(gcs_bucket, names, newest, places):
            raise InputError("; ".join(faults))
        moved = [record for name, record in newest.items() if places[name] != record.place]
        for record in moved:
            ledger.relocate(record, place=places[record.version.name])
        if not moved and (records := ledger.request_retries(names, as_read=newest, owner=owner, lease_seconds=lease_seconds)):
            return records
    raise TransientError("the files keep changing", where=", ".join(names), advice="try again")


def _faults(gcs_bucket: storage.Bucket, names: Sequence[str], newest: dict[str, FileRecord], places: dict[str, str]) -> list[str]:
    return never_seen(names, newest) + [why_gone(gcs_bucket, newest[name]) for name, place in places.items() if not place]
