"""What PostgreSQL says of the files that were loaded: figures, samples, and the scores of the files before them.

Nothing here is as large as a file. One file costs two scans of its rows by the index, and a look at a few of them; the history of
scores is read from an even sample of a few earlier files, once per batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import psycopg

from qa_platform import bookkeeping
from qa_platform.bookkeeping import FileCheck, FileRecord
from qa_platform.contract import FileStatus, ModelChoice
from qa_platform.database import transaction
from qa_platform.markdown import Passage
from qa_platform.settings import CheckSettings

IN_THE_TABLE = frozenset({FileStatus.LOADED, FileStatus.FINISHED})

# Equal parts of 0 to 1 in a score distribution.
BUCKETS = 20
# Rows that are shown, of the beginning, of the lowest scores, and of what is wrong.
SHOWN_ROWS = 5
# Characters of a cell, and of the context on either side of an answer, that leave PostgreSQL; what is shown is shorter.
_SENT_CHARACTERS = 200
# Rows of an earlier file whose mean score stands for all of them.
_SAMPLE = 500
# Files among which those of the same model are looked for, so that the look is bounded after the model has changed.
_HISTORY_REACH = 1_000


@dataclass(frozen=True)
class AnsweredRow:
    """One row of the table, cut. ``place`` is what lies between the answer's offsets in the context, and around it."""

    number: int
    question: str
    answer: str
    score: float | None
    place: Passage


@dataclass(frozen=True)
class Scores:
    """How the scores of a file are distributed: counts in `BUCKETS` equal parts of 0 to 1, their mean and variance.

    ``low`` counts answers below QA_LOW_SCORE or flagged as such. Answers without a score between 0 and 1 are in ``unscored`` alone.
    """

    counts: tuple[int, ...]
    mean: float
    variance: float
    low: int
    unscored: int

    @property
    def scored(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True)
class PastFile:
    """An earlier file of the same model, and the mean score of an even sample of its rows."""

    name: str
    answered: int
    mean: float


@dataclass(frozen=True)
class FileFacts:
    """All that is reported of one loaded file.

    ``reasons`` counts its rows without an answer by reason. ``other_generation`` and ``other_model`` count rows of the table that
    are not of the generation or the model that ``question_file`` names; ``wrong_rows`` are the first whose answer is not in its place.
    """

    record: FileRecord
    counted: FileCheck
    scores: Scores
    reasons: Mapping[str, int]
    other_generation: int
    other_model: int
    first: tuple[AnsweredRow, ...]
    lowest: tuple[AnsweredRow, ...]
    wrong_rows: tuple[AnsweredRow, ...]
    history: tuple[PastFile, ...]


def gather(connection: psycopg.Connection, records: Sequence[FileRecord], settings: CheckSettings) -> Iterator[FileFacts]:
    """The facts of each loaded file, in order. Scores are compared with files outside ``records``, which may all have changed at once."""
    histories: dict[ModelChoice, tuple[PastFile, ...]] = {}
    names = [record.version.name for record in records]
    for record in records:
        model = ModelChoice(record.model, record.model_revision, record.model_precision)
        if model not in histories:
            histories[model] = past_files(connection, model, without=names, files=settings.drift_files)
        yield _facts(connection, record, histories[model], low_score=settings.low_score)


def past_files(connection: psycopg.Connection, model: ModelChoice, *, without: Sequence[str], files: int) -> tuple[PastFile, ...]:
    """The mean scores of the last files that this model answered and that are still in the table, newest first."""
    # The innermost query makes a nested loop of the sample: a plain join could become a scan of every row of every file.
    query = """
        SELECT f.source_file, f.answered, s.mean
        FROM (
            SELECT * FROM (
                SELECT * FROM question_file f WHERE f.source_file <> ALL(%(without)s::text[])
                ORDER BY f.created_at DESC, f.generation DESC LIMIT %(reach)s
            ) f
            WHERE f.status IN ('loaded', 'finished') AND f.answered > 0
            AND (f.model, f.model_revision, f.model_precision) = (%(model)s, %(revision)s, %(precision)s)
            AND NOT EXISTS (
                SELECT FROM question_file g
                WHERE g.source_file = f.source_file AND g.generation > f.generation AND g.loaded_at IS NOT NULL)
            ORDER BY f.created_at DESC, f.generation DESC LIMIT %(files)s
        ) f
        CROSS JOIN LATERAL (
            SELECT avg(q.score) AS mean
            FROM generate_series(1, f.rows, greatest(f.rows / %(sample)s, 1)) AS n
            CROSS JOIN LATERAL (
                SELECT q.score FROM question_answer q
                WHERE q.source_file = f.source_file AND q.row_number = n AND q.generation = f.generation AND q.score BETWEEN 0 AND 1
                LIMIT 1
            ) q
        ) s
        WHERE s.mean IS NOT NULL
        ORDER BY f.created_at DESC, f.generation DESC
    """
    values = {"model": model.id, "revision": model.revision, "precision": model.precision}
    with transaction(connection) as cursor:
        cursor.execute(query, {**values, "without": list(without), "reach": _HISTORY_REACH, "files": files, "sample": _SAMPLE})
        return tuple(PastFile(name, answered, mean) for name, answered, mean in cursor)


def _facts(connection: psycopg.Connection, record: FileRecord, history: tuple[PastFile, ...], *, low_score: float) -> FileFacts:
    counted = bookkeeping.check_file(connection, record.version)
    with transaction(connection) as cursor:
        scores, other_generation, other_model = _scores(cursor, record, low_score)
        return FileFacts(
            record=record,
            counted=counted,
            scores=scores,
            reasons=_reasons(cursor, record),
            other_generation=other_generation,
            other_model=other_model,
            first=_shown(cursor, record, order="row_number"),
            lowest=_shown(cursor, record, order="score, row_number", where="score IS NOT NULL"),
            wrong_rows=_shown(cursor, record, order="row_number", where=_WRONG_SPAN) if counted.wrong_spans else (),
            history=history,
        )


_WRONG_SPAN = "substr(context, answer_start + 1, greatest(answer_end - answer_start, 0)) IS DISTINCT FROM answer"


def _scores(cursor: psycopg.Cursor, record: FileRecord, low_score: float) -> tuple[Scores, int, int]:
    cursor.execute(
        """
        SELECT generation IS NOT DISTINCT FROM %(generation)s AS ours,
            CASE WHEN score BETWEEN 0 AND 1 THEN least(width_bucket(score, 0, 1, %(buckets)s), %(buckets)s) END AS bucket,
            count(*), sum(score), sum(score * score),
            count(*) FILTER (WHERE score < %(low)s OR flag = 'low_score'),
            count(*) FILTER (WHERE (model, model_revision) IS DISTINCT FROM (%(model)s, %(revision)s))
        FROM question_answer WHERE source_file = %(name)s GROUP BY 1, 2
        """,
        {
            "name": record.version.name,
            "generation": record.version.generation,
            "buckets": BUCKETS,
            "low": low_score,
            "model": record.model,
            "revision": record.model_revision,
        },
    )
    counts = [0] * BUCKETS
    total = squares = 0.0
    low = unscored = other_generation = other_model = 0
    for ours, bucket, rows, sum_, sum_of_squares, low_rows, other in cursor:
        if not ours:
            other_generation += rows
            continue
        low += low_rows
        other_model += other
        if bucket is None:
            unscored += rows
            continue
        counts[bucket - 1] = rows
        total += sum_
        squares += sum_of_squares
    number = sum(counts) or 1
    mean = total / number
    scores = Scores(tuple(counts), mean, max(0.0, squares / number - mean * mean), low, unscored)
    return scores, other_generation, other_model


def _reasons(cursor: psycopg.Cursor, record: FileRecord) -> dict[str, int]:
    cursor.execute(
        "SELECT reason, count(*) FROM question_answer_reject WHERE source_file = %s AND generation = %s GROUP BY reason ORDER BY 2 DESC, 1",
        [record.version.name, record.version.generation],
    )
    return dict(cursor.fetchall())


def _shown(cursor: psycopg.Cursor, record: FileRecord, *, order: str, where: str = "true") -> tuple[AnsweredRow, ...]:
    # The rows are chosen by number and score alone, and only those that are shown are cut.
    query = f"""
        SELECT q.row_number, left(q.question, %(sent)s), left(q.answer, %(sent)s), q.score,
            substr(q.context, greatest(at.first + 1 - %(sent)s, 1), greatest(least(at.first, %(sent)s), 0)),
            substr(q.context, at.first + 1, greatest(least(at.last - at.first, %(sent)s), 0)),
            substr(q.context, at.last + 1, %(sent)s)
        FROM question_answer q
        CROSS JOIN LATERAL (SELECT coalesce(q.answer_start, 0) AS first, coalesce(q.answer_end, 0) AS last) at
        JOIN (
            SELECT row_number FROM question_answer
            WHERE source_file = %(name)s AND generation = %(generation)s AND {where} ORDER BY {order} LIMIT %(shown)s
        ) chosen USING (row_number)
        WHERE q.source_file = %(name)s ORDER BY {order}
    """  # noqa: S608  # both are constants of this file
    values = {"name": record.version.name, "generation": record.version.generation, "sent": _SENT_CHARACTERS}
    cursor.execute(query, {**values, "shown": SHOWN_ROWS})
    return tuple(
        AnsweredRow(number, question, answer, score, Passage(before or "", piece or "", after or ""))
        for number, question, answer, score, before, piece, after in cursor
    )
