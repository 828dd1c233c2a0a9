"""One answered file into PostgreSQL: its rows, its rejects and its bookkeeping in one transaction, or nothing.

The rows of a file that the tables do not have yet are copied straight into them. Those of any other are copied into a temporary
stage, and what is to be inserted, updated and deleted is settled there, in a few statements over whole sets. A file is loaded by one
at a time; others wait.
"""

import csv
import io
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import psycopg
from psycopg import sql

from qa_platform.contract import CONTEXT_LIMIT, INCOMING, RAW_LIMIT, FileStatus, Manifest, RowReason, file_id, partition_key
from qa_platform.database import only_row, transaction
from qa_platform.errors import InputError
from qa_platform.loading.answered import AnsweredFile, AnsweredShard, read_answered, read_rows

# First half of the advisory lock's key that a load holds; the second is a hash of the file's name. Two names with one hash only wait for
# each other.
LOAD_LOCK = 0x71616C64


@dataclass(frozen=True)
class LoadResult:
    """What a load did. ``status`` is ``superseded`` where nothing was written because something newer is, or is asked for.

    ``inserted``, ``updated`` and ``deleted`` count rows of ``question_answer``; a replay has zeros.
    """

    name: str
    generation: int
    load_id: int
    status: FileStatus
    rows: int
    answered: int
    no_answer: int
    rejected: int
    inserted: int = 0
    updated: int = 0
    deleted: int = 0
    seconds: float = 0.0


def load_file(connection: psycopg.Connection, folder: Path, *, job_id: str = "", commit_id: str = "") -> LoadResult:
    """Load one file's folder, as the answering pipeline leaves it.

    Answered rows go to ``question_answer``, those without an answer and rejected ones to ``question_answer_reject``; what an earlier
    load of the same file left there and this one does not have is deleted. A row that is there already, of the same generation, with
    equal question, answer, context, model, revision and offsets, is not written. Memory is bounded, whatever the file's size.

    Args:
        job_id: Pachyderm's job, kept in ``question_file``; empty keeps what is there.
        commit_id: likewise, Pachyderm's commit.

    Raises:
        InputError: the folder is not a complete answered file; the message names what is missing. Nothing was written.
        TransientError: PostgreSQL gave up. Nothing was written.
    """
    started = time.monotonic()
    file = read_answered(folder)
    manifest = file.manifest
    with transaction(connection, about=f"{manifest.name!r} is not loaded: ") as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(%s, hashtext(%s))", [LOAD_LOCK, manifest.name])
        if newer := _newer(cursor, manifest):
            _record_superseded(cursor, manifest, newer)
            status, written = FileStatus.SUPERSEDED, (0, 0, 0)
        else:
            written = _write(cursor, file)
            status = _record(cursor, file, job_id=job_id, commit_id=commit_id)
    inserted, updated, deleted = written
    return LoadResult(
        name=manifest.name,
        generation=manifest.generation,
        load_id=manifest.load_id,
        status=status,
        rows=manifest.rows,
        answered=file.answered,
        no_answer=file.no_answer,
        rejected=file.rejected,
        inserted=inserted,
        updated=updated,
        deleted=deleted,
        seconds=time.monotonic() - started,
    )


def _newer(cursor: psycopg.Cursor, manifest: Manifest) -> str:
    """What makes this load too late: a newer generation in the tables, or a newer request for this one. Empty if nothing does."""
    # An upload that was found unchanged has its answers in the rows of an earlier generation: only those may be loaded again.
    found = cursor.execute(
        """
        SELECT f.generation, f.load_id FROM question_file f
        LEFT JOIN question_file mine ON mine.source_file = f.source_file AND mine.generation = %(generation)s
        WHERE f.source_file = %(name)s AND (
            f.generation > %(generation)s AND (f.loaded_at IS NOT NULL OR f.status = 'unchanged' AND mine.loaded_at IS NULL)
            OR f.generation = %(generation)s AND f.load_id > %(load_id)s)
        ORDER BY f.generation DESC LIMIT 1
        """,
        {"name": manifest.name, "generation": manifest.generation, "load_id": manifest.load_id},
    ).fetchone()
    if not found:
        return ""
    if found[0] > manifest.generation:
        return f"the newer generation {found[0]} is loaded"
    return f"it is to be answered again (load id {found[1]} instead of {manifest.load_id})"


def _write(cursor: psycopg.Cursor, file: AnsweredFile) -> tuple[int, int, int]:
    """Make the file's rows in both tables those of the folder. Returns how many answers were inserted, updated, deleted."""
    name = file.manifest.name
    cursor.execute(
        """
        SELECT now(), EXISTS (SELECT FROM question_answer WHERE source_file = %(name)s)
            OR EXISTS (SELECT FROM question_answer_reject WHERE source_file = %(name)s)
        """,
        {"name": name},
    )
    now, known = only_row(cursor)
    if not known:
        _copy(cursor, file, now, answers="question_answer", rejects="question_answer_reject")
        return file.answered, 0, 0
    cursor.execute("CREATE TEMPORARY TABLE answer_stage (LIKE question_answer) ON COMMIT DROP")
    cursor.execute("CREATE TEMPORARY TABLE reject_stage (LIKE question_answer_reject INCLUDING DEFAULTS) ON COMMIT DROP")
    _copy(cursor, file, now, answers="answer_stage", rejects="reject_stage")
    cursor.execute("ANALYZE answer_stage (row_number), reject_stage (row_number)")
    # How many rows the tables have of one file is guessed from the average file: a nested loop chosen for a few would never end.
    cursor.execute("SET LOCAL enable_nestloop = off")
    _settle_rejects(cursor, name)
    return _settle_answers(cursor, name)


def _copy(cursor: psycopg.Cursor, file: AnsweredFile, now: datetime, *, answers: str, rejects: str) -> None:
    """COPY the rows into two tables, shard by shard, since one connection copies into one table at a time."""
    manifest = file.manifest
    identity = (manifest.name, manifest.generation, manifest.load_id)
    for shard in file.shards:
        by, at = shard.answered_by, shard.answered_at.replace(tzinfo=None)
        shared = (by.id, by.revision, by.precision, at, *identity, manifest.run_id, now)
        without_answer = []
        with _copy_into(cursor, answers, _ANSWER_COLUMNS) as copy:
            for row in _rows(file, shard):
                if isinstance(row, _Reject):
                    without_answer.append(row)
                else:
                    copy.write_row((*row, *shared))
        with _copy_into(cursor, rejects, _REJECT_COLUMNS) as copy:
            for reject in without_answer:
                copy.write_row((*reject, *identity))


# What differs from row to row comes first.
_ANSWER_COLUMNS = {
    "question": "varchar",
    "answer": "varchar",
    "context": "varchar",
    "score": "float8",
    "answer_start": "int4",
    "answer_end": "int4",
    "flag": "text",
    "row_number": "int8",
    "model": "varchar",
    "model_revision": "text",
    "model_precision": "text",
    "qa_timestamp": "timestamp",
    "source_file": "text",
    "generation": "int8",
    "load_id": "int4",
    "run_id": "text",
    "loaded_at": "timestamptz",
}
_REJECT_COLUMNS = {
    "row_number": "int8",
    "reason": "text",
    "line": "int8",
    "column_name": "text",
    "detail": "text",
    "raw": "text",
    "source_file": "text",
    "generation": "int8",
    "load_id": "int4",
}


class _Reject(NamedTuple):
    row_number: int
    reason: str
    line: int | None
    column_name: str | None
    detail: str | None
    raw: str


@contextmanager
def _copy_into(cursor: psycopg.Cursor, table: str, columns: Mapping[str, str]) -> Iterator[psycopg.Copy]:
    statement = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT BINARY)")
    with cursor.copy(statement.format(sql.Identifier(table), sql.SQL(", ").join(map(sql.Identifier, columns)))) as copy:
        copy.set_types(list(columns.values()))
        yield copy


def _rows(file: AnsweredFile, shard: AnsweredShard) -> Iterator[tuple | _Reject]:
    """The rows of a shard: what differs from row to row of `_ANSWER_COLUMNS`, or a reject."""
    question, context, pass_through = file.question_column, file.context_column, len(file.manifest.columns)
    rejections = shard.rejections()
    for number, row in read_rows(file, shard):
        answer, score, start, end, _model, error = row[pass_through:]
        if error == "" or error == RowReason.LOW_SCORE:
            try:
                numbers = (float(score) if score else None, _offset(start), _offset(end))
            except ValueError as damage:
                raise InputError(
                    f"{file.manifest.name!r}, row {number}: score or offsets are not what they should be: {damage}"
                ) from damage
            yield (row[question], answer, row[context], *numbers, error or None, number)
        elif found := rejections.get(number):
            yield _Reject(number, error, found.line, found.column or None, found.detail or None, found.raw)
        else:
            guilty = file.header[question] if error == RowReason.QUESTION_EXCEEDS_WINDOW else None
            yield _Reject(number, error, None, guilty, None, _raw(row[:pass_through]))


def _offset(cell: str) -> int | None:
    if not cell:
        return None
    offset = int(cell)
    # In binary, an integer beyond its column's range would be cut to another one without a word.
    if not 0 <= offset <= CONTEXT_LIMIT:
        raise ValueError(f"the offset {offset} is out of range")
    return offset


def _raw(cells: list[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerow(cells)
    return text.getvalue().removesuffix("\r\n")[:RAW_LIMIT]


def _settle_answers(cursor: psycopg.Cursor, name: str) -> tuple[int, int, int]:
    deleted = cursor.execute(
        """
        DELETE FROM question_answer q WHERE q.source_file = %s
        AND NOT EXISTS (SELECT FROM answer_stage s WHERE s.row_number = q.row_number)
        """,
        [name],
    ).rowcount
    updated = cursor.execute(
        """
        UPDATE question_answer q SET
            question = s.question, answer = s.answer, context = s.context, model = s.model, qa_timestamp = s.qa_timestamp,
            score = s.score, answer_start = s.answer_start, answer_end = s.answer_end, model_revision = s.model_revision,
            model_precision = s.model_precision, generation = s.generation, load_id = s.load_id, run_id = s.run_id, flag = s.flag,
            loaded_at = s.loaded_at
        FROM answer_stage s
        WHERE q.source_file = %s AND q.row_number = s.row_number
        AND (q.generation, q.model, q.model_revision, q.answer_start, q.answer_end, q.answer, q.question, q.context)
            IS DISTINCT FROM
            (s.generation, s.model, s.model_revision, s.answer_start, s.answer_end, s.answer, s.question, s.context)
        """,
        [name],
    ).rowcount
    inserted = cursor.execute(
        """
        INSERT INTO question_answer (
            question, answer, context, model, qa_timestamp, score, answer_start, answer_end, model_revision, model_precision,
            source_file, generation, row_number, load_id, run_id, flag, loaded_at
        )
        SELECT
            question, answer, context, model, qa_timestamp, score, answer_start, answer_end, model_revision, model_precision,
            source_file, generation, row_number, load_id, run_id, flag, loaded_at
        FROM answer_stage s
        WHERE NOT EXISTS (SELECT FROM question_answer q WHERE q.source_file = %s AND q.row_number = s.row_number)
        """,
        [name],
    ).rowcount
    return inserted, updated, deleted


def _settle_rejects(cursor: psycopg.Cursor, name: str) -> None:
    cursor.execute(
        """
        DELETE FROM question_answer_reject r WHERE r.source_file = %s AND NOT EXISTS (
            SELECT FROM reject_stage s WHERE s.row_number = r.row_number
            AND (s.generation, s.line, s.reason, s.column_name, s.detail, s.raw)
                IS NOT DISTINCT FROM (r.generation, r.line, r.reason, r.column_name, r.detail, r.raw))
        """,
        [name],
    )
    cursor.execute(
        """
        INSERT INTO question_answer_reject (source_file, generation, row_number, line, reason, column_name, detail, raw, load_id)
        SELECT source_file, generation, row_number, line, reason, column_name, detail, raw, load_id FROM reject_stage
        ON CONFLICT (source_file, row_number) DO NOTHING
        """
    )


def _record_superseded(cursor: psycopg.Cursor, manifest: Manifest, why: str) -> None:
    # A generation that was loaded in its time stays so in the history, and one that is to be answered again stays waiting.
    cursor.execute(
        """
        INSERT INTO question_file (source_file, generation, size, crc32c, file_id, partition_key, place, load_id, status, error)
        VALUES (%(name)s, %(generation)s, %(size)s, %(crc32c)s, %(file_id)s, %(partition_key)s, %(place)s, %(load_id)s,
            'superseded', %(why)s)
        ON CONFLICT (source_file, generation) DO UPDATE SET status = 'superseded', error = excluded.error
        WHERE question_file.status IN ('pending', 'running') AND question_file.load_id <= excluded.load_id
        """,
        {**_identity(manifest), "why": why},
    )


def _record(cursor: psycopg.Cursor, file: AnsweredFile, *, job_id: str, commit_id: str) -> FileStatus:
    # A source that is archived already stays where it is: there is nothing more to do. Somebody may have asked for another answer
    # while this one was being loaded: that request stays.
    cursor.execute(
        """
        INSERT INTO question_file AS f (
            source_file, generation, size, crc32c, file_id, partition_key, place, load_id, status,
            rows, answered, no_answer, rejected, wanted_model, wanted_revision, wanted_precision,
            model, model_revision, model_precision, pachyderm_job, pachyderm_commit, answered_at, loaded_at
        )
        VALUES (
            %(name)s, %(generation)s, %(size)s, %(crc32c)s, %(file_id)s, %(partition_key)s, %(place)s, %(load_id)s, 'loaded',
            %(rows)s, %(answered)s, %(no_answer)s, %(rejected)s, %(wanted_model)s, %(wanted_revision)s, %(wanted_precision)s,
            %(model)s, %(model_revision)s, %(model_precision)s, %(job)s, %(commit)s, %(answered_at)s, now()
        )
        ON CONFLICT (source_file, generation) DO UPDATE SET
            status = CASE
                WHEN f.load_id > excluded.load_id THEN f.status WHEN f.archived_at IS NULL THEN 'loaded' ELSE 'finished'
            END,
            load_id = greatest(f.load_id, excluded.load_id),
            rows = excluded.rows, answered = excluded.answered, no_answer = excluded.no_answer,
            rejected = excluded.rejected, wanted_model = excluded.wanted_model, wanted_revision = excluded.wanted_revision,
            wanted_precision = excluded.wanted_precision, model = excluded.model, model_revision = excluded.model_revision,
            model_precision = excluded.model_precision, answered_at = excluded.answered_at,
            -- A replay loads nothing new: it must not look like the end of the work that loaded the file.
            loaded_at = CASE WHEN f.load_id = excluded.load_id THEN coalesce(f.loaded_at, excluded.loaded_at) ELSE excluded.loaded_at END,
            pachyderm_job = coalesce(nullif(excluded.pachyderm_job, ''), f.pachyderm_job),
            pachyderm_commit = coalesce(nullif(excluded.pachyderm_commit, ''), f.pachyderm_commit),
            retry_at = NULL, error = ''
        RETURNING status
        """,
        {
            **_identity(file.manifest),
            "rows": file.manifest.rows,
            "answered": file.answered,
            "no_answer": file.no_answer,
            "rejected": file.rejected,
            "wanted_model": file.manifest.model.id,
            "wanted_revision": file.manifest.model.revision,
            "wanted_precision": file.manifest.model.precision,
            "model": file.answered_by.id,
            "model_revision": file.answered_by.revision,
            "model_precision": file.answered_by.precision,
            "job": job_id,
            "commit": commit_id,
            "answered_at": file.answered_at,
        },
    )
    return FileStatus(only_row(cursor)[0])


def _identity(manifest: Manifest) -> dict[str, str | int]:
    return {
        "name": manifest.name,
        "generation": manifest.generation,
        "size": manifest.size,
        "crc32c": manifest.crc32c,
        "file_id": file_id(manifest.name),
        "partition_key": partition_key(manifest.name),
        "place": INCOMING + manifest.name,
        "load_id": manifest.load_id,
    }
