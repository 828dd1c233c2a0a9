"""The scores of recently loaded files, for monitoring."""

from collections.abc import Sequence
from dataclasses import dataclass

import psycopg

from qa_platform.clients.postgres import limit_seconds, transaction
from qa_platform.ledger import FileRecord
from qa_platform.results.facts import BUCKET, BUCKETS, LOW


@dataclass(frozen=True)
class RecentScores:
    """The scores of answers.

    Args:
        rows: answers that were read.
        low: answers that are flagged as low, or have a score below QA_LOW_SCORE.
        counts: answers by score, in `BUCKETS` equal parts of 0 to 1. Answers without such a score are left out.
        total: the sum of the counted scores.
    """

    rows: int
    low: int
    counts: tuple[int, ...]
    total: float

    @property
    def mean(self) -> float | None:
        """The mean of the counted scores; None if there are none."""
        return self.total / sum(self.counts) if any(self.counts) else None


def recent_scores(
    connection: psycopg.Connection, records: Sequence[FileRecord], *, low_score: float, limit: int, seconds: float
) -> RecentScores:
    """The scores of the answers of some files.

    Args:
        records: the files, in the order in which they are read.
        limit: the maximum number of rows to read.

    Raises:
        TransientError: it takes longer than ``seconds``, or PostgreSQL is unavailable.
    """
    # The limit in the innermost query forces a nested loop: a plain join could become a scan of every row of every file.
    query = f"""
        SELECT {BUCKET}, count(*), count(*) FILTER (WHERE {LOW}), sum(score)
        FROM (
            SELECT q.score, q.flag FROM unnest(%(names)s::text[], %(generations)s::bigint[]) AS f (name, generation)
            CROSS JOIN LATERAL (
                SELECT score, flag FROM question_answer
                WHERE source_file = f.name AND generation = f.generation LIMIT %(limit)s
            ) q LIMIT %(limit)s
        ) looked_at GROUP BY 1
    """  # noqa: S608  # both are constants of `facts`
    values = {
        "names": [record.version.name for record in records],
        "generations": [record.version.generation for record in records],
        "low": low_score,
        "limit": limit,
    }
    counts, rows, low, total = [0] * BUCKETS, 0, 0, 0.0
    with transaction(connection, about="reading recent scores") as cursor:
        limit_seconds(cursor, seconds)
        for bucket, number, low_rows, sum_ in cursor.execute(query, values):
            rows, low = rows + number, low + low_rows
            if bucket is not None:
                counts[bucket - 1] = number
                total += sum_
    return RecentScores(rows, low, tuple(counts), total)
