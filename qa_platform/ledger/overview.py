"""Figures of the whole table, for monitoring. Each method reads what it needs in one transaction, and gives up after a while."""

# Only constants of this package are put into SQL's text; values travel as parameters.
# ruff: noqa: S608

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from psycopg.rows import class_row

from qa_platform.clients.postgres import limit_seconds
from qa_platform.contract import FileStatus
from qa_platform.ledger.conditions import LIVE, NOT_ARCHIVED, OPEN
from qa_platform.ledger.records import FileRecord, Records, select


@dataclass(frozen=True)
class Totals:
    """Sums over all records, those of older generations included.

    Args:
        oldest_seconds: how long the oldest waiting file has waited, since it was first seen or last loaded; 0 if none waits.
        deferred: files that wait, uncharged, for something other than themselves.
        charged: failures that are charged to files that wait or are parked as ``failed``.
        held: live claims.
        expired: claims whose owner has not renewed them, and that nobody has taken over.
        archive_errors: files that are done, and whose source could not be archived.
        last_load: when a file was last loaded; None if none ever was.
    """

    answered: int
    no_answer: int
    rejected: int
    oldest_seconds: float
    deferred: int
    charged: int
    held: int
    expired: int
    archive_errors: int
    last_load: datetime | None


class Overview(Records):
    """Reading figures. No method writes, and none reads for longer than it is told.

    Raises, in every method:
        TransientError: PostgreSQL is unavailable, or the reading takes longer than ``seconds``.
    """

    def totals(self, *, seconds: float) -> tuple[Mapping[FileStatus, int], Totals]:
        """How many files there are of each status, and sums over all of them. Reads the whole table twice."""
        with self._transaction() as cursor:
            limit_seconds(cursor, seconds)
            cursor.execute("SELECT status, count(*) FROM question_file GROUP BY status")
            files = dict.fromkeys(FileStatus, 0) | {FileStatus(status): count for status, count in cursor}
            with cursor.connection.cursor(row_factory=class_row(Totals)) as rows:
                totals = rows.execute(_TOTALS).fetchone()
        assert totals is not None
        return files, totals

    def loaded_within(self, window: float, *, limit: int, seconds: float) -> list[FileRecord]:
        """Files that were loaded in the last ``window`` seconds, among the ``limit`` newest ones, newest first."""
        rest = """
            FROM (SELECT * FROM question_file ORDER BY created_at DESC, generation DESC LIMIT %(limit)s) f
            WHERE f.status IN ('loaded', 'finished') AND f.loaded_at > now() - make_interval(secs => %(window)s)
            ORDER BY f.created_at DESC, f.generation DESC
        """
        with self._transaction() as cursor:
            limit_seconds(cursor, seconds)
            return select(cursor, rest, {"window": window, "limit": limit})


# A file that is to be answered again may be old: it waits since its last load at most.
_TOTALS = f"""
    SELECT coalesce(sum(f.answered), 0)::bigint AS answered,
        coalesce(sum(f.no_answer), 0)::bigint AS no_answer,
        coalesce(sum(f.rejected), 0)::bigint AS rejected,
        coalesce(extract(epoch FROM now() - min(greatest(f.created_at, f.loaded_at)) FILTER (WHERE {OPEN})), 0)::float AS oldest_seconds,
        count(*) FILTER (WHERE {OPEN} AND f.put_off_since IS NOT NULL) AS deferred,
        coalesce(sum(f.attempts) FILTER (WHERE {OPEN} OR f.status = 'failed'), 0)::bigint AS charged,
        count(*) FILTER (WHERE {LIVE}) AS held,
        count(*) FILTER (WHERE f.claim_owner IS NOT NULL AND NOT {LIVE}) AS expired,
        count(*) FILTER (WHERE {NOT_ARCHIVED} AND f.archive_error <> '') AS archive_errors,
        max(f.loaded_at) AS last_load
    FROM question_file f
"""
