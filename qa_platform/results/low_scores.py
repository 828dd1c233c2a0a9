"""How many answers of recently loaded files have a low score, for monitoring."""

from collections.abc import Sequence

import psycopg

from qa_platform.clients.postgres import limit_seconds, only_row, transaction
from qa_platform.ledger import FileRecord


def count_low_scores(
    connection: psycopg.Connection, records: Sequence[FileRecord], *, low_score: float, limit: int, seconds: float
) -> tuple[int, int]:
    """How many rows were looked at, and how many of these are flagged as low or have a score below ``low_score``.

    Args:
        records: the files, of which the first are looked at first.
        limit: rows that are looked at, at most.

    Raises:
        TransientError: it takes longer than ``seconds``, or PostgreSQL is unavailable.
    """
    # The limit in the innermost query makes a nested loop of it: a plain join could become a scan of every row of every file.
    query = """
        SELECT count(*), count(*) FILTER (WHERE score < %(low)s OR flag = 'low_score') FROM (
            SELECT q.score, q.flag FROM unnest(%(names)s::text[], %(generations)s::bigint[]) AS f (name, generation)
            CROSS JOIN LATERAL (
                SELECT score, flag FROM question_answer
                WHERE source_file = f.name AND generation = f.generation LIMIT %(limit)s
            ) q LIMIT %(limit)s
        ) looked_at
    """
    values = {
        "names": [record.version.name for record in records],
        "generations": [record.version.generation for record in records],
        "low": low_score,
        "limit": limit,
    }
    with transaction(connection, about="counting low scores") as cursor:
        limit_seconds(cursor, seconds)
        rows, low = only_row(cursor.execute(query, values))
    return rows, low
