"""Facts about loaded files, counted by PostgreSQL: figures, a few rows, and the scores of earlier files.

Results stay small, however large a file is. A file costs a few index scans of its rows. The scores of earlier files come from an even
sample of their rows, read once per batch.
"""

# Only constants of this file are put into SQL's text.
# ruff: noqa: S608

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import psycopg

from qa_platform.clients.postgres import long_transaction, only_row
from qa_platform.contract import FileStatus, FileVersion, ModelChoice
from qa_platform.ledger import FileRecord, Ledger
from qa_platform.results.passage import Passage
from qa_platform.settings import CheckSettings

LOADED_STATUSES = frozenset({FileStatus.LOADED, FileStatus.FINISHED})

# Equal parts of 0 to 1 in a score distribution.
BUCKETS = 20
# The number of rows shown of each kind: the first, those with the lowest scores, and the wrong ones.
SHOWN_ROWS = 5
# Characters of a cell, and of the context on either side of an answer, that PostgreSQL sends. Fewer are shown.
_SENT_CHARACTERS = 200
# `substr` refuses a negative length.
_WRONG_SPAN = "substr(context, answer_start + 1, greatest(answer_end - answer_start, 0)) IS DISTINCT FROM answer"
# The score distribution in SQL. `BUCKET` is null for a score outside 0 to 1.
BUCKET = f"CASE WHEN score BETWEEN 0 AND 1 THEN least(width_bucket(score, 0, 1, {BUCKETS}), {BUCKETS}) END"
LOW = "(score < %(low)s OR flag = 'low_score')"
# The rows of an earlier file from which its mean score is estimated.
_SAMPLE = 500


@dataclass(frozen=True)
class AnsweredRow:
    """One row of the table, with long texts cut.

    Args:
        passage: the text between the answer's offsets in the context, and the text around it.
    """

    number: int
    question: str
    answer: str
    score: float | None
    passage: Passage


@dataclass(frozen=True)
class Scores:
    """The distribution of a file's scores.

    Args:
        counts: answers by score, in `BUCKETS` equal parts of 0 to 1. Answers without such a score are left out, also of the mean and the
            variance.
        low: answers with a score below QA_LOW_SCORE, or flagged as such.
    """

    counts: tuple[int, ...]
    mean: float
    variance: float
    low: int

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
class RowCounts:
    """Counts of the rows that the tables hold of one generation of a file.

    Args:
        answered_rows: rows of ``question_answer``.
        reject_rows: rows of ``question_answer_reject``.
        without_answer: answered rows whose answer is empty.
        wrong_spans: answered rows whose answer is not the text of the context between its offsets.
    """

    answered_rows: int
    reject_rows: int
    without_answer: int
    wrong_spans: int


@dataclass(frozen=True)
class FileFacts:
    """Everything that is reported about one loaded file.

    Args:
        reasons: rows without an answer, by reason.
        other_generation: rows of the file in the tables that are not of the recorded generation.
        other_model: rows of the recorded generation that are not of the recorded model and revision.
        wrong_rows: the first rows whose answer is not the text between its offsets.
    """

    record: FileRecord
    counted: RowCounts
    scores: Scores
    reasons: Mapping[str, int]
    other_generation: int
    other_model: int
    first: tuple[AnsweredRow, ...]
    lowest: tuple[AnsweredRow, ...]
    wrong_rows: tuple[AnsweredRow, ...]
    history: tuple[PastFile, ...]


def gather(ledger: Ledger, connection: psycopg.Connection, records: Sequence[FileRecord], settings: CheckSettings) -> Iterator[FileFacts]:
    """The facts of each loaded file, in order.

    Scores are compared only with those of files outside ``records``, since the scores of all ``records`` may have changed at once.
    """
    histories: dict[ModelChoice, tuple[PastFile, ...]] = {}
    names = [record.version.name for record in records]
    for record in records:
        model = ModelChoice(record.model, record.model_revision, record.model_precision)
        if model not in histories:
            past = ledger.recent_loads(model, without=names, limit=settings.drift_files)
            histories[model] = past_files(connection, past)
        yield _facts(connection, record, histories[model], low_score=settings.low_score)


def past_files(connection: psycopg.Connection, records: Sequence[FileRecord]) -> tuple[PastFile, ...]:
    """The mean scores of loaded files, in order. Files without a score are left out."""
    # The innermost query forces a nested loop over the sample: a plain join could become a scan of every row of every file.
    query = """
        SELECT f.name, f.answered, s.mean
        FROM unnest(%(names)s::text[], %(generations)s::bigint[], %(rows)s::bigint[], %(answered)s::bigint[])
            WITH ORDINALITY AS f (name, generation, rows, answered, position)
        CROSS JOIN LATERAL (
            SELECT avg(q.score) AS mean
            FROM generate_series(1, f.rows, greatest(f.rows / %(sample)s, 1)) AS n
            CROSS JOIN LATERAL (
                SELECT q.score FROM question_answer q
                WHERE q.source_file = f.name AND q.row_number = n AND q.generation = f.generation AND q.score BETWEEN 0 AND 1
                LIMIT 1
            ) q
        ) s
        WHERE s.mean IS NOT NULL
        ORDER BY f.position
    """
    values = {
        "names": [record.version.name for record in records],
        "generations": [record.version.generation for record in records],
        "rows": [record.rows for record in records],
        "answered": [record.answered for record in records],
    }
    with long_transaction(connection) as cursor:
        cursor.execute(query, {**values, "sample": _SAMPLE})
        return tuple(PastFile(name, answered, mean) for name, answered, mean in cursor)


def count_rows(connection: psycopg.Connection, version: FileVersion) -> RowCounts:
    """Count and compare one generation's rows in the tables, inside PostgreSQL."""
    with long_transaction(connection) as cursor:
        cursor.execute(
            f"""
            SELECT count(*), count(*) FILTER (WHERE coalesce(answer, '') = ''), count(*) FILTER (WHERE {_WRONG_SPAN})
            FROM question_answer WHERE source_file = %(name)s AND generation = %(generation)s
            """,
            {"name": version.name, "generation": version.generation},
        )
        answered, without_answer, wrong_spans = only_row(cursor)
        cursor.execute(
            "SELECT count(*) FROM question_answer_reject WHERE source_file = %s AND generation = %s", [version.name, version.generation]
        )
        return RowCounts(answered, only_row(cursor)[0], without_answer, wrong_spans)


def _facts(connection: psycopg.Connection, record: FileRecord, history: tuple[PastFile, ...], *, low_score: float) -> FileFacts:
    counted = count_rows(connection, record.version)
    with long_transaction(connection) as cursor:
        scores, foreign_answers, other_model = _scores(cursor, record, low_score)
        reasons, foreign_rejects = _reasons(cursor, record)
        return FileFacts(
            record=record,
            counted=counted,
            scores=scores,
            reasons=reasons,
            other_generation=foreign_answers + foreign_rejects,
            other_model=other_model,
            first=_shown(cursor, record, order="row_number"),
            lowest=_shown(cursor, record, order="score, row_number", where="score IS NOT NULL"),
            wrong_rows=_shown(cursor, record, order="row_number", where=_WRONG_SPAN) if counted.wrong_spans else (),
            history=history,
        )


def _scores(cursor: psycopg.Cursor, record: FileRecord, low_score: float) -> tuple[Scores, int, int]:
    cursor.execute(
        f"""
        SELECT generation IS NOT DISTINCT FROM %(generation)s AS ours, {BUCKET} AS bucket, count(*), sum(score), sum(score * score),
            count(*) FILTER (WHERE {LOW}),
            count(*) FILTER (WHERE (model = %(model)s AND model_revision = ANY(%(revisions)s)) IS NOT TRUE)
        FROM question_answer WHERE source_file = %(name)s GROUP BY 1, 2
        """,
        {
            "name": record.version.name,
            "generation": record.version.generation,
            "low": low_score,
            "model": record.model,
            # Several, if shards were kept from an earlier upload; see `AnsweredFile.answered_by`.
            "revisions": record.model_revision.split(", "),
        },
    )
    counts = [0] * BUCKETS
    total = squares = 0.0
    low = other_generation = other_model = 0
    for ours, bucket, rows, sum_, sum_of_squares, low_rows, other in cursor:
        if not ours:
            other_generation += rows
            continue
        low += low_rows
        other_model += other
        if bucket is not None:
            counts[bucket - 1] = rows
            total += sum_
            squares += sum_of_squares
    number = sum(counts) or 1
    mean = total / number
    scores = Scores(tuple(counts), mean, max(0.0, squares / number - mean * mean), low)
    return scores, other_generation, other_model


def _reasons(cursor: psycopg.Cursor, record: FileRecord) -> tuple[dict[str, int], int]:
    """The numbers of rejected rows by reason, and of those of another generation."""
    cursor.execute(
        """
        SELECT generation = %s AS ours, reason, count(*) FROM question_answer_reject
        WHERE source_file = %s GROUP BY 1, 2 ORDER BY 3 DESC, 2
        """,
        [record.version.generation, record.version.name],
    )
    counted = cursor.fetchall()
    return {reason: rows for ours, reason, rows in counted if ours}, sum(rows for ours, _, rows in counted if not ours)


def _shown(cursor: psycopg.Cursor, record: FileRecord, *, order: str, where: str = "true") -> tuple[AnsweredRow, ...]:
    # The inner query selects the rows, so that texts are cut only for those that are shown.
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
    """
    values = {"name": record.version.name, "generation": record.version.generation, "sent": _SENT_CHARACTERS}
    cursor.execute(query, {**values, "shown": SHOWN_ROWS})
    return tuple(
        AnsweredRow(number, question, answer, score, Passage(before or "", piece or "", after or ""))
        for number, question, answer, score, before, piece, after in cursor
    )
