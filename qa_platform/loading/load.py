"""One answered file into PostgreSQL: its rows, its rejects and its bookkeeping in one transaction, or nothing.

The rows of a file that the tables do not have yet are copied straight into them. Those of any other are copied into a temporary
stage, and what is to be inserted, updated and deleted is settled there, in a few statements over whole sets. A file is loaded by one
at a time; others wait.
"""

import csv
import io
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg import sql

from qa_platform.contract import INCOMING, RAW_LIMIT, FileStatus, Manifest, RowReason, file_id, partition_key
from qa_platform.database import transaction
from qa_platform.errors import InputError
from qa_platform.loading.answered import AnsweredFile, AnsweredShard, read_answered, read_rows

# First half of the advisory lock's key; the second is a hash of the file's name. Two names with one hash only wait for each other.
_LOCK = 0x71616C64
_BLOCK_CHARACTERS = 2**17


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
    with transaction(connection) as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(%s, hashtext(%s))", [_LOCK, manifest.name])
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
        SELECT EXISTS (SELECT FROM question_answer WHERE source_file = %(name)s)
            OR EXISTS (SELECT FROM question_answer_reject WHERE source_file = %(name)s)
        """,
        {"name": name},
    )
    if cursor.fetchone() == (False,):
        _copy(cursor, file, answers="question_answer", rejects="question_answer_reject")
        return file.answered, 0, 0
    cursor.execute("CREATE TEMPORARY TABLE answer_stage (LIKE question_answer) ON COMMIT DROP")
    cursor.execute("CREATE TEMPORARY TABLE reject_stage (LIKE question_answer_reject) ON COMMIT DROP")
    _copy(cursor, file, answers="answer_stage", rejects="reject_stage")
    cursor.execute("ANALYZE answer_stage (row_number), reject_stage (row_number)")
    _settle_rejects(cursor, name)
    return _settle_answers(cursor, name)


def _copy(cursor: psycopg.Cursor, file: AnsweredFile, *, answers: str, rejects: str) -> None:
    """COPY the rows into two tables. One connection copies into one table at a time, so the rejects wait in a file."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", newline="") as waiting:
        with _open_copy(cursor, answers, _ANSWER_COLUMNS) as copy:
            block = _Block(copy.write)
            for shard in file.shards:
                constants = _line(_shard_constants(file.manifest, shard))
                for answered, line in _lines(file, shard):
                    if answered:
                        block.add(f"{line}\t{constants}\n")
                    else:
                        waiting.write(f"{line}\n")
            block.flush()
        waiting.seek(0)
        constants = _line([file.manifest.name, str(file.manifest.generation), str(file.manifest.load_id)])
        with _open_copy(cursor, rejects, _REJECT_COLUMNS) as copy:
            block = _Block(copy.write)
            for line in waiting:
                block.add(f"{line[:-1]}\t{constants}\n")
            block.flush()


_ANSWER_COLUMNS = (
    *("question", "answer", "context", "score", "answer_start", "answer_end", "flag", "row_number"),
    *("model", "model_revision", "model_precision", "qa_timestamp", "source_file", "generation", "load_id", "run_id"),
)
_REJECT_COLUMNS = ("row_number", "reason", "line", "column_name", "detail", "raw", "source_file", "generation", "load_id")


def _open_copy(cursor: psycopg.Cursor, table: str, columns: Sequence[str]) -> AbstractContextManager[psycopg.Copy]:
    statement = sql.SQL("COPY {} ({}) FROM STDIN WITH (NULL '')")
    return cursor.copy(statement.format(sql.Identifier(table), sql.SQL(", ").join(map(sql.Identifier, columns))))


class _Block:
    """Gathers lines into blocks: a call per row costs more than the row."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._lines: list[str] = []
        self._size = 0

    def add(self, line: str) -> None:
        self._lines.append(line)
        self._size += len(line)
        if self._size > _BLOCK_CHARACTERS:
            self.flush()

    def flush(self) -> None:
        self._write("".join(self._lines))
        self._lines.clear()
        self._size = 0


def _lines(file: AnsweredFile, shard: AnsweredShard) -> Iterator[tuple[bool, str]]:
    """Each row of a shard as COPY's text, without what all rows share; whether it is an answer or a reject comes first."""
    question, context, pass_through = file.question_column, file.context_column, len(file.manifest.columns)
    rejections = shard.rejections()
    for number, row in read_rows(file, shard):
        answer, score, start, end, _model, error = row[pass_through:]
        if error == "" or error == RowReason.LOW_SCORE:
            yield True, _line([row[question], answer, row[context], score, start, end, error, str(number)])
        elif found := rejections.get(number):
            yield False, _line([str(number), error, str(found.line), found.column, found.detail, found.raw])
        else:
            yield False, _line([str(number), error, "", "", "", _raw(row[:pass_through])])


def _shard_constants(manifest: Manifest, shard: AnsweredShard) -> list[str]:
    by, at = shard.answered_by, shard.answered_at.replace(tzinfo=None).isoformat(" ")
    identity = (manifest.name, str(manifest.generation), str(manifest.load_id), manifest.run_id)
    return [by.id, by.revision, by.precision, at, *identity]


def _line(cells: Sequence[str]) -> str:
    """One line of COPY's text format; an empty cell is NULL."""
    line = "\t".join(cells)
    if "\\" in line or "\n" in line or "\r" in line or line.count("\t") >= len(cells):
        return "\t".join(cell.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r") for cell in cells)
    return line


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
            loaded_at = now()
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
            source_file, generation, row_number, load_id, run_id, flag
        )
        SELECT
            question, answer, context, model, qa_timestamp, score, answer_start, answer_end, model_revision, model_precision,
            source_file, generation, row_number, load_id, run_id, flag
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
    found = cursor.execute(
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
            status = CASE WHEN f.load_id > excluded.load_id THEN f.status WHEN f.archived_at IS NULL THEN 'loaded' ELSE 'finished' END,
            load_id = greatest(f.load_id, excluded.load_id), rows = excluded.rows, answered = excluded.answered, no_answer = excluded.no_answer,
            rejected = excluded.rejected, wanted_model = excluded.wanted_model, wanted_revision = excluded.wanted_revision,
            wanted_precision = excluded.wanted_precision, model = excluded.model, model_revision = excluded.model_revision,
            model_precision = excluded.model_precision, answered_at = excluded.answered_at, loaded_at = excluded.loaded_at,
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
    ).fetchone()
    if not found:
        raise InputError(f"{file.manifest.name!r}: PostgreSQL did not record the load")
    return FileStatus(found[0])


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
