"""Retries: records requests to answer files again."""

# Only constants of this package are put into SQL's text; values travel as parameters.
# ruff: noqa: S608

from collections.abc import Collection, Mapping, Sequence

import psycopg

from qa_platform.contract import FileStatus
from qa_platform.errors import InputError
from qa_platform.ledger.claims import acquire
from qa_platform.ledger.conditions import ASKED_AGAIN, IS_WANTED, WANTED, keys
from qa_platform.ledger.connection import LedgerConnection
from qa_platform.ledger.records import FileRecord, select


class Retries(LedgerConnection):
    """Records that files are to be answered again."""

    def newest(self, names: Sequence[str]) -> dict[str, FileRecord]:
        """The newest generation of each file that is not forgotten, by name. Unknown names are left out.

        If all generations of a file are forgotten, it is the newest of these.
        """
        with self._transaction() as cursor:
            return _newest(cursor, names)

    def request_retries(
        self, names: Sequence[str], *, as_read: Mapping[str, FileRecord] | None = None, owner: str = "", lease_seconds: int = 0
    ) -> list[FileRecord]:
        """Request that the newest generations of files are answered again, with a new load id, whatever their status. All or none.

        Args:
            as_read: the newest records by name, as the caller read them when it looked for the sources. If a newest generation or the
                place of its source has changed since, nothing is recorded. None for no comparison.
            owner: claims the files in the same transaction, except those that another owner holds; "" for no claim.

        Returns:
            Their records, in the order of ``names``; none if one has changed since it was read.

        Raises:
            InputError: some names were never seen, or their sources are gone; the message names them all.
        """
        # Claims are taken under the same lock: rows that are locked in different orders would deadlock.
        with self._exclusive() as cursor:
            newest = _newest(cursor, names, lock="FOR UPDATE OF f")
            if faults := _not_retryable(names, newest):
                raise InputError("; ".join(faults))
            if as_read is not None and any(_source(newest[name]) != _source(as_read[name]) for name in names):
                return []
            versions = [record.version for record in newest.values()]
            cursor.execute(
                f"""
                UPDATE question_file f SET {ASKED_AGAIN}, load_id = load_id + 1 FROM {WANTED} WHERE {IS_WANTED}
                """,
                keys(versions),
            )
            if owner:
                acquire(cursor, versions, owner=owner, holders=[owner], lease_seconds=lease_seconds, only_open=True)
            newest = _newest(cursor, names)
        return [newest[name] for name in names]


def _newest(cursor: psycopg.Cursor, names: Sequence[str], *, lock: str = "") -> dict[str, FileRecord]:
    rest = f"""
        FROM question_file f WHERE f.source_file = ANY(%(names)s::text[])
        AND NOT EXISTS (
            SELECT FROM question_file g WHERE g.source_file = f.source_file
            AND (g.status <> 'forgotten', g.generation) > (f.status <> 'forgotten', f.generation))
        ORDER BY f.source_file {lock}
    """
    return {record.version.name: record for record in select(cursor, rest, {"names": list(names)})}


def _source(record: FileRecord) -> tuple[int, str]:
    return record.version.generation, record.place


def _not_retryable(names: Sequence[str], newest: Mapping[str, FileRecord]) -> list[str]:
    return never_seen(names, newest) + [source_is_gone(record) for record in newest.values() if not record.place]


def never_seen(names: Sequence[str], known: Collection[str]) -> list[str]:
    """Why unknown names cannot be answered again, for people."""
    return [
        f"no file {name!r} was ever seen; `qa-platform status` lists those that were, and `qa-platform restore` finds those whose records "
        "were lost"
        for name in names
        if name not in known
    ]


def source_is_gone(record: FileRecord) -> str:
    """Why a file without a source cannot be answered again, for people."""
    name = record.version.name
    if record.status is FileStatus.FORGOTTEN:
        return f"{name!r} was forgotten; upload it again"
    return f"the source of {name!r} is gone: QA_ARCHIVE has it deleted, or it was overwritten before it was archived; upload it again"
