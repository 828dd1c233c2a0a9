"""Figures of the whole table, for monitoring. Each method reads in one transaction and gives up after a time limit."""

# Only constants of this package are put into SQL's text; values travel as parameters.
# ruff: noqa: S608

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import date, datetime

from psycopg.rows import class_row

from qa_platform.clients.postgres import limit_seconds, only_row
from qa_platform.contract import FileStatus
from qa_platform.ledger.conditions import LIVE, NOT_ARCHIVED, OPEN, PARKED
from qa_platform.ledger.records import FileRecord, Records, select


@dataclass(frozen=True)
class Totals:
    """Sums over all records, including those of older generations.

    Args:
        oldest_seconds: how long the oldest waiting file has waited, since it was first seen or last loaded; 0 if none waits.
        deferred: files that wait, uncharged, for a reason other than themselves.
        charged: failures charged to files that wait or are parked as ``failed``.
        held: live claims.
        expired: claims that their owner has not renewed and that no other owner has taken over.
        archive_errors: done files whose source could not be archived.
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


@dataclass(frozen=True)
class Loads:
    """The numbers of files and rows loaded in a period."""

    files: int
    answered: int
    no_answer: int
    rejected: int

    @property
    def rows(self) -> int:
        return self.answered + self.no_answer + self.rejected

    @property
    def answered_percent(self) -> float | None:
        """The share of the rows that have an answer, in percent; None without rows."""
        return 100 * self.answered / self.rows if self.rows else None


@dataclass(frozen=True)
class Day(Loads):
    """The numbers of files and rows loaded on one day, UTC."""

    date: date


def stage_seconds(record: FileRecord) -> dict[str, float]:
    """How long a loaded file took in each stage. Stages that did not happen in this order in one attempt are left out."""
    started, answered = record.started_at, record.answered_at
    # A retried file waits from the time of the request, which is not recorded.
    seen = record.created_at if record.load_id == 1 else None
    # Shards that Pachyderm answered for an earlier commit keep the time of that commit.
    if started is None or answered is None or answered < started:
        answered = None
    stages = {"waiting": (seen, started), "answering": (started, answered), "loading": (answered, record.loaded_at)}
    return {stage: (end - begin).total_seconds() for stage, (begin, end) in stages.items() if begin and end and end >= begin}


def quantile(values: Collection[float], share: float) -> float:
    """The smallest of the values that ``share`` of them do not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


class Overview(Records):
    """Reads figures. No method writes. ``seconds`` limits each statement.

    Raises, in every method:
        TransientError: PostgreSQL is unavailable, or a statement takes longer than ``seconds``.
    """

    def totals(self, *, seconds: float) -> tuple[Mapping[FileStatus, int], Totals]:
        """The number of files per status, and sums over all of them. Reads the whole table, once."""
        with self._transaction() as cursor:
            limit_seconds(cursor, seconds)
            found = {status: (count, Totals(*sums)) for status, count, *sums in cursor.execute(_TOTALS)}
        _, totals = found.pop(None)
        return dict.fromkeys(FileStatus, 0) | {FileStatus(status): count for status, (count, _) in found.items()}, totals

    def loaded_within(self, window: float, *, limit: int, seconds: float) -> list[FileRecord]:
        """Files that were loaded in the last ``window`` seconds, newest first, at most ``limit``."""
        rest = """
            FROM question_file f
            WHERE f.status IN ('loaded', 'finished') AND f.loaded_at > now() - make_interval(secs => %(window)s)
            ORDER BY f.created_at DESC, f.generation DESC LIMIT %(limit)s
        """
        with self._transaction() as cursor:
            limit_seconds(cursor, seconds)
            return select(cursor, rest, {"window": window, "limit": limit})

    def count_failed(self, *, seconds: float) -> int:
        """The number of files parked as ``failed``. A file that was uploaded again does not count, whatever the new upload's outcome."""
        with self._transaction() as cursor:
            limit_seconds(cursor, seconds)
            return int(only_row(cursor.execute(f"SELECT count(*) FROM question_file f WHERE {PARKED}"))[0])

    def count_rejected(self, window: float, *, seconds: float) -> int:
        """The number of files that were uploaded in the last ``window`` seconds and rejected."""
        with self._transaction() as cursor:
            limit_seconds(cursor, seconds)
            query = "SELECT count(*) FROM question_file WHERE status = 'rejected' AND created_at > now() - make_interval(secs => %s)"
            return int(only_row(cursor.execute(query, [window]))[0])

    def loads(self, window: float, *, seconds: float) -> Loads:
        """What was loaded in the last ``window`` seconds."""
        with self._transaction() as cursor:
            limit_seconds(cursor, seconds)
            with cursor.connection.cursor(row_factory=class_row(Loads)) as rows:
                since = "f.loaded_at > now() - make_interval(secs => %(window)s)"
                loads = rows.execute(f"SELECT {_LOADS} FROM question_file f WHERE {_LOADED} AND {since}", {"window": window}).fetchone()
        assert loads is not None
        return loads

    def days(self, number: int, *, seconds: float) -> list[Day]:
        """What was loaded today and on the days before, ``number`` days in all, today last. A file counts on the day of its last load."""
        with self._transaction() as cursor:
            limit_seconds(cursor, seconds)
            with cursor.connection.cursor(row_factory=class_row(Day)) as rows:
                return rows.execute(_DAYS, {"before": number - 1}).fetchall()


_LOADED = "f.status IN ('loaded', 'finished')"
_LOADS = """
    count(f.source_file) AS files, coalesce(sum(f.answered), 0)::bigint AS answered,
    coalesce(sum(f.no_answer), 0)::bigint AS no_answer, coalesce(sum(f.rejected), 0)::bigint AS rejected
"""
_DAYS = f"""
    SELECT day::date AS date, {_LOADS} FROM generate_series(date_trunc('day', now() AT TIME ZONE 'UTC') - make_interval(days => %(before)s),
        now() AT TIME ZONE 'UTC', '1 day') AS day
    LEFT JOIN (
        SELECT f.*, date_trunc('day', f.loaded_at AT TIME ZONE 'UTC') AS day FROM question_file f
        WHERE {_LOADED} AND f.loaded_at >= now() - make_interval(days => %(before)s + 1)
    ) f USING (day)
    GROUP BY day ORDER BY day
"""
# A row for each status, and one without a status for all, with the fields of `Totals` in their order. A file that is to be answered again
# may be old: its wait does not begin before its last load.
_TOTALS = f"""
    SELECT f.status, count(*), coalesce(sum(f.answered), 0)::bigint AS answered,
        coalesce(sum(f.no_answer), 0)::bigint AS no_answer,
        coalesce(sum(f.rejected), 0)::bigint AS rejected,
        coalesce(extract(epoch FROM now() - min(greatest(f.created_at, f.loaded_at)) FILTER (WHERE {OPEN})), 0)::float AS oldest_seconds,
        count(*) FILTER (WHERE {OPEN} AND f.put_off_since IS NOT NULL) AS deferred,
        coalesce(sum(f.attempts) FILTER (WHERE {OPEN} OR f.status = 'failed'), 0)::bigint AS charged,
        count(*) FILTER (WHERE {LIVE}) AS held,
        count(*) FILTER (WHERE {OPEN} AND f.claim_owner IS NOT NULL AND NOT {LIVE}) AS expired,
        count(*) FILTER (WHERE {NOT_ARCHIVED} AND f.archive_error <> '') AS archive_errors,
        max(f.loaded_at) AS last_load
    FROM question_file f GROUP BY GROUPING SETS ((f.status), ())
"""
