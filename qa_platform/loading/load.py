"""Loading one answered file into PostgreSQL: its rows, its rejects and its record in one transaction, or nothing.

The rows of a new file are copied straight into the tables. Those of a known file are copied into temporary tables; a few statements
over whole sets then insert, update and delete what differs. One process at a time loads a file; others wait.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import psycopg
from psycopg import sql

from qa_platform.clients.postgres import long_transaction, notice_lost_client, only_row
from qa_platform.clients.schema import ANSWERS, KEY, REJECTS, Table
from qa_platform.contract import CONTEXT_LIMIT, RAW_LIMIT, FileStatus, RowReason, column_label
from qa_platform.errors import InputError
from qa_platform.ingest.dialect import csv_text
from qa_platform.ledger import loads
from qa_platform.ledger.loads import Loaded
from qa_platform.loading.answered import AnsweredFile, AnsweredShard, read_answered, read_rows


@dataclass(frozen=True)
class LoadResult:
    """The result of a load.

    Args:
        status: ``superseded`` if nothing was written: something newer is loaded or requested, or the file was forgotten.
        inserted: rows inserted into ``question_answer``; ``updated`` and ``deleted`` likewise. All are 0 when a load is repeated.
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
    """Load one file from the folder that the answering pipeline writes.

    Answered rows go to ``question_answer``, rejected rows and rows without an answer to ``question_answer_reject``. Rows of an earlier
    load of the same file that this one does not have are deleted. A row that is already there with equal generation, question, answer,
    context, score, offsets, flag, model, revision and precision is not written again. Memory is bounded, whatever the file's size.

    Args:
        job_id: the Pachyderm job; empty keeps what is recorded.
        commit_id: the Pachyderm commit; empty keeps what is recorded.

    Raises:
        InputError: the folder is not a complete answered file; the message names what is missing. Nothing was written.
        TransientError: PostgreSQL gave up. Nothing was written.
    """
    started = time.monotonic()
    file = read_answered(folder)
    manifest = file.manifest
    with long_transaction(connection, about=f"{manifest.name!r} is not loaded") as cursor:
        notice_lost_client(cursor)
        loads.wait_for_load_lock(cursor, manifest.name)
        if why := loads.why_too_late(cursor, manifest):
            loads.record_superseded(cursor, manifest, why)
            status, written = FileStatus.SUPERSEDED, (0, 0, 0)
        else:
            written = _write(cursor, file)
            status = loads.record_loaded(cursor, _loaded(file, job_id, commit_id))
    return _result(file, status, written, seconds=time.monotonic() - started)


def _loaded(file: AnsweredFile, job_id: str, commit_id: str) -> Loaded:
    return Loaded(
        file.manifest, file.answered, file.no_answer, file.rejected, file.answered_by, file.answered_at, job_id=job_id, commit_id=commit_id
    )


def _result(file: AnsweredFile, status: FileStatus, written: tuple[int, int, int], *, seconds: float) -> LoadResult:
    manifest, (inserted, updated, deleted) = file.manifest, written
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
        seconds=seconds,
    )


def _write(cursor: psycopg.Cursor, file: AnsweredFile) -> tuple[int, int, int]:
    """Make the file's rows in both tables equal to the folder's. Returns the numbers of answers inserted, updated and deleted."""
    name = file.manifest.name
    cursor.execute(
        """
        SELECT now(), EXISTS (SELECT FROM question_answer WHERE source_file = %(name)s)
            OR EXISTS (SELECT FROM question_answer_reject WHERE source_file = %(name)s)
        """,
        {"name": name},
    )
    now, known = only_row(cursor)
    run_id = loads.run_of(cursor, file.manifest)
    if not known:
        _copy(cursor, file, run_id, now, answers="question_answer", rejects="question_answer_reject")
        return file.answered, 0, 0
    _make_stage(cursor, "answer_stage", ANSWERS)
    _make_stage(cursor, "reject_stage", REJECTS)
    _copy(cursor, file, run_id, now, answers="answer_stage", rejects="reject_stage")
    cursor.execute("ANALYZE answer_stage (row_number), reject_stage (row_number)")
    # The planner takes every file for an average one, and a nested loop that it chooses for few rows would never end for a large file.
    cursor.execute("SET LOCAL enable_nestloop = off")
    _merge_rejects(cursor, name)
    return _merge_answers(cursor, name)


def _make_stage(cursor: psycopg.Cursor, name: str, table: Table) -> None:
    # Not LIKE: the owner's own columns may be NOT NULL, and LIKE leaves out the defaults that fill them.
    statement = sql.SQL("CREATE TEMPORARY TABLE {} ON COMMIT DROP AS SELECT {} FROM {} WITH NO DATA")
    cursor.execute(statement.format(sql.Identifier(name), _listed(table.names), sql.Identifier(table.name)))


# The columns in the order in which they are copied: first those whose values differ from row to row, then those that are the same
# throughout a shard or the file.
_ANSWER_OF_ROW = ("question", "answer", "context", "score", "answer_start", "answer_end", "flag", "row_number")
_ANSWER_SHARED = (
    *("model", "model_revision", "model_precision", "qa_timestamp", "source_file", "generation", "load_id", "run_id", "loaded_at"),
)
_REJECT_OF_ROW = ("row_number", "reason", "line", "column_name", "detail", "raw")
_REJECT_SHARED = ("source_file", "generation", "load_id")


def _copy(cursor: psycopg.Cursor, file: AnsweredFile, run_id: str, now: datetime, *, answers: str, rejects: str) -> None:
    """COPY the rows into two tables, shard by shard, since one connection copies into one table at a time."""
    manifest = file.manifest
    identity = (manifest.name, manifest.generation, manifest.load_id)
    for shard in file.shards:
        by, at = shard.answered_by, shard.answered_at.replace(tzinfo=None)
        shared = (by.id, by.revision, by.precision, at, *identity, run_id, now)
        without_answer = []
        with _copy_into(cursor, answers, ANSWERS, (*_ANSWER_OF_ROW, *_ANSWER_SHARED)) as copy:
            for row in _rows(file, shard):
                if isinstance(row, _Reject):
                    without_answer.append(row)
                else:
                    copy.write_row((*row, *shared))
        with _copy_into(cursor, rejects, REJECTS, (*_REJECT_OF_ROW, *_REJECT_SHARED)) as copy:
            for reject in without_answer:
                copy.write_row((*reject, *identity))


class _Reject(NamedTuple):
    """The values of `_REJECT_OF_ROW`."""

    row_number: int
    reason: str
    line: int | None
    column_name: str | None
    detail: str | None
    raw: str


@contextmanager
def _copy_into(cursor: psycopg.Cursor, target: str, table: Table, columns: Sequence[str]) -> Iterator[psycopg.Copy]:
    """COPY into ``target``, which has the columns of ``table``."""
    statement = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT BINARY)").format(sql.Identifier(target), _listed(columns))
    with cursor.copy(statement) as copy:
        copy.set_types([table.base_types[column] for column in columns])
        yield copy


def _listed(columns: Sequence[str], alias: str = "") -> sql.Composed:
    """Column names for a statement, qualified by ``alias`` if that is given."""
    return sql.SQL(", ").join(sql.Identifier(*filter(None, (alias, column))) for column in columns)


def _rows(file: AnsweredFile, shard: AnsweredShard) -> Iterator[tuple | _Reject]:
    """The rows of a shard: the values of `_ANSWER_OF_ROW`, or a reject."""
    question, context, pass_through = file.question_column, file.context_column, len(file.manifest.columns)
    rejections = shard.rejections()
    for number, row in read_rows(file, shard):
        answer, score, start, end, _model, error = row[pass_through:]
        if error == "" or error == RowReason.LOW_SCORE:
            try:
                numbers = (float(score) if score else None, _offset(start), _offset(end))
            except ValueError as damage:
                raise InputError(f"score or offsets are invalid: {damage}", where=f"{file.manifest.name!r}, row {number}") from damage
            yield (row[question], answer, row[context], *numbers, error or None, number)
        elif rejection := rejections.get(number):
            yield _Reject(number, error, rejection.line, rejection.column or None, rejection.detail or None, rejection.raw)
        else:
            faulty = {str(RowReason.QUESTION_EXCEEDS_WINDOW): question, str(RowReason.UNUSABLE_ANSWER): context}.get(error)
            column = None if faulty is None else column_label(file.header[faulty])
            yield _Reject(number, error, None, column, None, _raw(row[:pass_through]))


def _offset(cell: str) -> int | None:
    if not cell:
        return None
    offset = int(cell)
    # In a binary COPY, an integer beyond its column's range would be silently truncated to another one.
    if not 0 <= offset <= CONTEXT_LIMIT:
        raise ValueError(f"the offset {offset} is out of range")
    return offset


def _raw(cells: list[str]) -> str:
    return csv_text(cells)[:RAW_LIMIT]


# An answer that is equal in these columns is not written again.
_COMPARED = (
    *("generation", "model", "model_revision", "model_precision", "answer_start", "answer_end", "score", "flag"),
    *("answer", "question", "context"),
)


def _merge_answers(cursor: psycopg.Cursor, name: str) -> tuple[int, int, int]:
    deleted = cursor.execute(
        """
        DELETE FROM question_answer q WHERE q.source_file = %s
        AND NOT EXISTS (SELECT FROM answer_stage s WHERE s.row_number = q.row_number)
        """,
        [name],
    ).rowcount
    changed = [column for column in ANSWERS.names if column not in KEY]
    update = sql.SQL("""
        UPDATE question_answer q SET ({}) = ROW ({}) FROM answer_stage s
        WHERE q.source_file = %s AND q.row_number = s.row_number AND ({}) IS DISTINCT FROM ({})
    """)
    updated = cursor.execute(
        update.format(_listed(changed), _listed(changed, "s"), _listed(_COMPARED, "q"), _listed(_COMPARED, "s")), [name]
    ).rowcount
    insert = sql.SQL("""
        INSERT INTO question_answer ({}) SELECT {} FROM answer_stage s
        WHERE NOT EXISTS (SELECT FROM question_answer q WHERE q.source_file = %s AND q.row_number = s.row_number)
    """)
    inserted = cursor.execute(insert.format(_listed(ANSWERS.names), _listed(ANSWERS.names)), [name]).rowcount
    return inserted, updated, deleted


# A reject that is equal in these columns is not written again.
_COMPARED_REJECT = ("generation", "line", "reason", "column_name", "detail", "raw")


def _merge_rejects(cursor: psycopg.Cursor, name: str) -> None:
    delete = sql.SQL("""
        DELETE FROM question_answer_reject r WHERE r.source_file = %s AND NOT EXISTS (
            SELECT FROM reject_stage s WHERE s.row_number = r.row_number AND ({}) IS NOT DISTINCT FROM ({}))
    """)
    cursor.execute(delete.format(_listed(_COMPARED_REJECT, "s"), _listed(_COMPARED_REJECT, "r")), [name])
    insert = sql.SQL("INSERT INTO question_answer_reject ({}) SELECT {} FROM reject_stage ON CONFLICT (source_file, row_number) DO NOTHING")
    cursor.execute(insert.format(_listed(REJECTS.names), _listed(REJECTS.names)))
