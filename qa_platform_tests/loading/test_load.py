"""The loader on a real PostgreSQL: exact rows, all or nothing, even if files arrive twice, late, together or damaged."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qa_platform.clients.postgres import WrongDatabase, connect
from qa_platform.contract import (
    ANSWER_COLUMNS,
    MANIFEST,
    RAW_LIMIT,
    SHARD_ANSWERS,
    SHARD_INFO,
    FileStatus,
    FileVersion,
    Manifest,
    ModelChoice,
    Rejection,
    RowReason,
    ShardInfo,
    file_id,
)
from qa_platform.datum_batching import fault_of
from qa_platform.errors import InputError, TransientError
from qa_platform.ingest import FileRejected, RowReader, TextLimits, csv_line
from qa_platform.ledger import FileRecord, Ledger, loads
from qa_platform.loading import migrate, worker
from qa_platform.loading.answered import MissingShards
from qa_platform.loading.load import load_file
from qa_platform.results.facts import count_rows
from qa_platform.settings import DatumSettings, IngestSettings, PostgresSettings
from qa_platform.tools.bench.loading import load_in_fresh_process, write_repeated
from qa_platform_tests.conftest import Database
from qa_platform_tests.loading_helpers import (
    ANSWERED_BY,
    CRC32C,
    SIZE,
    AnsweredRow,
    AnsweredUpload,
    answered_rows,
    empty_tables,
    ingested,
)

MIXED = AnsweredUpload(
    [
        AnsweredRow("Who?", "Ada wrote it."),
        AnsweredRow("When?", "Somebody, some day.", error="no_answer"),
        AnsweredRow("", "A context.", error="empty_question"),
        AnsweredRow('What\n"exactly"?', "Zoë, naïve\r\nand 🙂 \\N \\. quoted", error="low_score"),
        AnsweredRow("Where?", "Paris, France"),
    ],
    rejections={3: Rejection(3, 4, RowReason.EMPTY_QUESTION, "question", "the cell is empty", ",A context.")},
)
WRITTEN = "SELECT xmin::text, xmax::text, ctid::text, * FROM {} ORDER BY row_number"


@pytest.fixture
def ledger(postgres: PostgresSettings) -> Iterator[Ledger]:
    with Ledger(postgres) as ledger:
        yield ledger


def table(connection: psycopg.Connection, columns: str, name: str = "question_answer") -> list[tuple]:
    return connection.execute(f"SELECT {columns} FROM {name} ORDER BY source_file, row_number").fetchall()  # noqa: S608


def version(upload: AnsweredUpload) -> FileVersion:
    return FileVersion(upload.name, upload.generation)


def record(ledger: Ledger, upload: AnsweredUpload) -> FileRecord:
    return ledger.records([version(upload)])[upload.name, upload.generation]


# What is written


def begin(ledger: Ledger, upload: AnsweredUpload, *, run: str) -> None:
    """A run works on an upload, as far as the database knows."""
    ledger.claim([version(upload)], owner=run, lease_seconds=60)
    ledger.start(run, [version(upload)], run_id=run, batch_id="")


def test_answered_rows_land_in_the_table_with_their_origin(ledger: Ledger, connection: psycopg.Connection, tmp_path: Path) -> None:
    begin(ledger, MIXED, run="run-1")
    load_file(connection, MIXED.write(tmp_path / "file"))

    assert table(connection, "row_number, question, answer, context, score, answer_start, answer_end, flag") == [
        (1, "Who?", "Ada", "Ada wrote it.", 0.5, 0, 3, None),
        (4, 'What\n"exactly"?', "Zoë,", "Zoë, naïve\r\nand 🙂 \\N \\. quoted", 0.5, 0, 4, "low_score"),
        (5, "Where?", "Paris,", "Paris, France", 0.5, 0, 6, None),
    ]
    origin = "model, model_revision, model_precision, qa_timestamp::text, source_file, generation, load_id, run_id"
    assert set(table(connection, origin)) == {
        ("minilm-squad", "0a1b2c", "fp32", "2026-03-01 10:00:00", "history.csv", 1, 1, "run-1"),
    }


def test_rows_without_an_answer_land_among_the_rejects_with_reason_and_place(connection: psycopg.Connection, tmp_path: Path) -> None:
    load_file(connection, MIXED.write(tmp_path / "file"))

    assert table(connection, "row_number, reason, line, column_name, detail, raw, generation", "question_answer_reject") == [
        (2, "no_answer", None, None, None, 'When?,"Somebody, some day."', 1),
        (3, "empty_question", 4, "question", "the cell is empty", ",A context.", 1),
    ]


def test_a_load_says_and_records_what_it_did(ledger: Ledger, connection: psycopg.Connection, tmp_path: Path) -> None:
    result = load_file(connection, MIXED.write(tmp_path / "file"), job_id="job", commit_id="commit")

    assert replace(result, seconds=0.0) == replace(
        result, status=FileStatus.LOADED, rows=5, answered=3, no_answer=1, rejected=1, inserted=3, updated=0, deleted=0, seconds=0.0
    )
    found = record(ledger, MIXED)
    assert (found.status, found.rows, found.answered, found.no_answer, found.rejected) == (FileStatus.LOADED, 5, 3, 1, 1)
    assert (found.model, found.model_revision, found.model_precision, found.wanted_model) == ("minilm-squad", "0a1b2c", "fp32", "bundled")
    assert (found.pachyderm_job, found.pachyderm_commit, found.place) == ("job", "commit", "incoming/history.csv")
    assert found.loaded_at is not None
    assert found.answered_at is not None
    assert found.answered_at.isoformat() == "2026-03-01T10:00:00+00:00"


def test_columns_are_found_wherever_they_are_and_others_stay_out_of_the_table(connection: psycopg.Connection, tmp_path: Path) -> None:
    upload = AnsweredUpload(
        [AnsweredRow("a context it is", "Is it a question?", extra=("x", "old"))], columns=("Context", " QUESTION", "id", "answer")
    )
    load_file(connection, upload.write(tmp_path / "file"))
    assert table(connection, "question, context") == [("Is it a question?", "a context it is")]


def test_a_file_without_rows_loads_nothing(connection: psycopg.Connection, tmp_path: Path) -> None:
    result = load_file(connection, AnsweredUpload([]).write(tmp_path / "file"))
    assert (result.status, result.rows, result.inserted) == (FileStatus.LOADED, 0, 0)


def test_a_reject_keeps_no_more_than_the_limit_of_its_text(connection: psycopg.Connection, tmp_path: Path) -> None:
    long = AnsweredRow("Why?", "x" * (2 * RAW_LIMIT), error="no_answer")
    load_file(connection, AnsweredUpload([long]).write(tmp_path / "file"))
    assert table(connection, "length(raw)", "question_answer_reject") == [(RAW_LIMIT,)]


_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40)
_HOSTILE = st.sampled_from(
    ["\\N", "\\.", "\t", "'; DROP TABLE question_answer; --", "=1+1", '"', '""', "a\rb", "\n\\.\n", "%s", "NULL", "\\x00"]
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cells=st.lists(st.tuples(_TEXT | _HOSTILE, _TEXT | _HOSTILE), min_size=1, max_size=8), name=_TEXT, data=st.data())
def test_any_text_comes_back_from_the_tables_as_it_was(
    connection: psycopg.Connection, tmp_path: Path, cells: list[tuple[str, str]], name: str, data: st.DataObject
) -> None:
    rows = []
    for question, context in cells:
        end = data.draw(st.integers(0, len(context)))
        rows.append(AnsweredRow(question, context, end=end, error=data.draw(st.sampled_from(["", "low_score", "no_answer"]))))
    folder = tmp_path / "file"
    shutil.rmtree(folder, ignore_errors=True)
    load_file(connection, AnsweredUpload(rows, name=name).write(folder))
    try:
        assert table(connection, "question, context, answer, source_file") == [
            (row.question, row.context, row.answer, name) for row in rows if row.answered
        ]
        raws = [next(csv.reader(io.StringIO(raw, newline=""))) for (raw,) in table(connection, "raw", "question_answer_reject")]
        assert raws == [[row.question, row.context] for row in rows if not row.answered]
        assert count_rows(connection, FileVersion(name, 1)).wrong_spans == 0
    finally:
        empty_tables(connection)


_CELL = st.text(st.sampled_from('ab ",\n\r\u3000東'), max_size=12)
_CSV = st.lists(st.lists(_CELL, min_size=1, max_size=3).map(csv_line), max_size=9).map(b"".join)
_DAMAGE = st.lists(st.sampled_from([b"\0", b"\xed\xa0\x80", b'"', b"\r", b",,,", b"\n", b"\\N\n", b'q,"c"\n']), max_size=4).map(b"".join)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(head=_CSV, damage=_DAMAGE, tail=_CSV, shard_rows=st.integers(1, 4))
def test_every_row_of_any_csv_is_in_one_of_the_tables_once(
    connection: psycopg.Connection, tmp_path: Path, head: bytes, damage: bytes, tail: bytes, shard_rows: int
) -> None:
    data = b"question,context\n" + head + damage + tail
    limits = IngestSettings(question_limit=10, context_limit=10, shard_rows=shard_rows)
    folder = tmp_path / "file"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        rows = list(RowReader(io.BytesIO(data), limits=TextLimits.of(limits)))
    except FileRejected:
        with pytest.raises(FileRejected):
            ingested(data, folder, limits=limits)
        assert not (folder / MANIFEST).exists()
        return
    try:
        result = load_file(connection, ingested(data, folder, limits=limits))
        assert (result.rows, result.answered + result.rejected) == (len(rows), len(rows))
        answered = [(row.row, row.cells[0], row.cells[1]) for row in rows if not row.rejection]
        assert table(connection, "row_number, question, context") == answered
        rejected = [(found.row, found.line, found.reason, found.raw) for found in (row.rejection for row in rows) if found]
        assert table(connection, "row_number, line, reason, raw", "question_answer_reject") == rejected
    finally:
        empty_tables(connection)


@pytest.mark.slow
def test_the_memory_of_a_load_does_not_grow_with_the_file(postgres: PostgresSettings, tmp_path: Path) -> None:
    """Of one that is copied straight into the table, and of one that is settled in a stage."""
    peaks = []
    for rows, generation in ((2_000, 1), (60_000, 2), (60_000, 3)):
        if generation == 2:
            with connect(postgres) as connection:
                empty_tables(connection)
        written, _, peak = load_in_fresh_process(postgres, write_repeated(tmp_path / str(generation), rows, generation=generation))
        assert written == rows
        peaks.append(peak)
    # The rows alone are as many MB.
    assert max(peaks) < peaks[0] + 30


# Again, late, and together


def test_a_replay_writes_nothing_to_any_row(ledger: Ledger, connection: psycopg.Connection, tmp_path: Path) -> None:
    folder = MIXED.write(tmp_path / "file")
    load_file(connection, folder)
    before = [connection.execute(WRITTEN.format(name)).fetchall() for name in ("question_answer", "question_answer_reject")]
    loaded_at = record(ledger, MIXED).loaded_at

    result = load_file(connection, folder)

    assert (result.inserted, result.updated, result.deleted) == (0, 0, 0)
    assert record(ledger, MIXED).loaded_at == loaded_at
    assert [connection.execute(WRITTEN.format(name)).fetchall() for name in ("question_answer", "question_answer_reject")] == before


def test_a_second_answering_with_equal_answers_writes_nothing_and_is_recorded(
    ledger: Ledger, connection: psycopg.Connection, tmp_path: Path
) -> None:
    load_file(connection, MIXED.write(tmp_path / "first"))
    before = connection.execute(WRITTEN.format("question_answer")).fetchall()
    first = record(ledger, MIXED).loaded_at
    ledger.request_retries([MIXED.name])

    again = MIXED.again(load_id=2, answered_at="2026-03-02T10:00:00")
    result = load_file(connection, again.write(tmp_path / "second"))

    assert (result.status, result.inserted, result.updated, result.deleted) == (FileStatus.LOADED, 0, 0, 0)
    assert connection.execute(WRITTEN.format("question_answer")).fetchall() == before
    assert record(ledger, again).load_id == 2
    assert first is not None
    assert (record(ledger, again).loaded_at or first) > first, "the retry has happened"


@pytest.mark.parametrize(
    "change",
    [
        {"answered_by": ModelChoice("other", "0a1b2c", "fp32")},
        {"answered_by": ModelChoice("minilm-squad", "ffff", "fp32")},
        {"answered_by": ModelChoice("minilm-squad", "0a1b2c", "int8")},
        {"rows": [AnsweredRow("Who?", "Ada wrote it.", error="low_score")]},
        {"rows": [AnsweredRow("Who?", "Ada wrote it.", score="0.25")]},
        {"rows": [AnsweredRow("Who?", "Ada wrote it.", end=9)]},
        {"rows": [AnsweredRow("Who?", "Ada wrote that.")]},
        {"rows": [AnsweredRow("Who then?", "Ada wrote it.")]},
        {"generation": 2},
    ],
)
def test_a_row_that_differs_in_what_counts_is_written_again(
    ledger: Ledger, connection: psycopg.Connection, tmp_path: Path, change: dict[str, object]
) -> None:
    upload = AnsweredUpload([AnsweredRow("Who?", "Ada wrote it.")])
    load_file(connection, upload.write(tmp_path / "first"))
    changed = upload.again(load_id=2, **change)
    if changed.generation == upload.generation:
        ledger.request_retries([upload.name])
    begin(ledger, changed, run="run-2")

    result = load_file(connection, changed.write(tmp_path / "second"))

    assert (result.inserted, result.updated, result.deleted) == (0, 1, 0)
    row = changed.rows[0]
    columns = "question, context, answer, score, flag, model, model_revision, model_precision, generation, load_id, run_id"
    answer = (row.answer, float(row.score), row.error or None)
    by = (changed.answered_by.id, changed.answered_by.revision, changed.answered_by.precision)
    assert table(connection, columns) == [(row.question, row.context, *answer, *by, changed.generation, 2, "run-2")]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *[("question_answer", change) for change in ("answer_start = 1", "answer_end = 1", "model = 'x'", "generation = 7")],
        *[("question_answer_reject", change) for change in ("line = 99", "reason = 'bad_quoting'", "column_name = 'x'", "generation = 7")],
        *[("question_answer_reject", change) for change in ("detail = 'x'", "raw = 'x'")],
    ],
)
def test_what_differs_in_one_column_is_written_again(connection: psycopg.Connection, tmp_path: Path, name: str, change: str) -> None:
    folder = MIXED.write(tmp_path / "file")
    load_file(connection, folder)
    columns = f"row_number, generation, {change.split()[0]}"
    before = table(connection, columns, name)
    connection.execute(f"UPDATE {name} SET {change}")  # noqa: S608
    load_file(connection, folder)
    assert table(connection, columns, name) == before


def test_a_new_generation_replaces_the_rows_and_rejects_of_its_file_only(connection: psycopg.Connection, tmp_path: Path) -> None:
    other = AnsweredUpload([AnsweredRow("Other?", "Another file.")], name="other.csv")
    load_file(connection, other.write(tmp_path / "other"))
    load_file(connection, MIXED.write(tmp_path / "first"))
    rows = [
        AnsweredRow("Who?", "Ada wrote it.", error="no_answer"),
        AnsweredRow("When?", "1843 it was."),
        AnsweredRow("New?", "Yes it is."),
    ]
    newer = AnsweredUpload(rows, generation=2)

    result = load_file(connection, newer.write(tmp_path / "second"))

    assert (result.inserted, result.updated, result.deleted) == (2, 0, 3)
    assert table(connection, "source_file, row_number, generation, answer") == [
        ("history.csv", 2, 2, "1843"),
        ("history.csv", 3, 2, "Yes"),
        ("other.csv", 1, 1, "Another"),
    ]
    assert table(connection, "row_number, generation, reason", "question_answer_reject") == [(1, 2, "no_answer")]


def test_a_new_generation_replaces_the_rejects_of_a_file_of_which_every_row_was_rejected(
    connection: psycopg.Connection, tmp_path: Path
) -> None:
    rows = [AnsweredRow("", "nothing is asked", error=RowReason.EMPTY_QUESTION)]
    upload = AnsweredUpload(rows, rejections={1: Rejection(1, 2, RowReason.EMPTY_QUESTION)})
    load_file(connection, upload.write(tmp_path / "first"))
    load_file(connection, upload.again(generation=2).write(tmp_path / "second"))
    assert table(connection, "row_number, generation", "question_answer_reject") == [(1, 2)]


def test_an_older_generation_that_arrives_late_writes_nothing_and_is_superseded(
    ledger: Ledger, connection: psycopg.Connection, tmp_path: Path
) -> None:
    newer = AnsweredUpload(answered_rows(4), generation=20)
    older = AnsweredUpload(answered_rows(9), generation=10)
    load_file(connection, newer.write(tmp_path / "newer"))
    before = connection.execute(WRITTEN.format("question_answer")).fetchall()

    result = load_file(connection, older.write(tmp_path / "older"))

    assert (result.status, result.inserted) == (FileStatus.SUPERSEDED, 0)
    assert connection.execute(WRITTEN.format("question_answer")).fetchall() == before
    assert (record(ledger, older).status, record(ledger, newer).status) == (FileStatus.SUPERSEDED, FileStatus.LOADED)
    assert "20" in record(ledger, older).error


def test_a_newer_generation_that_waits_for_its_retry_still_supersedes(
    ledger: Ledger, connection: psycopg.Connection, tmp_path: Path
) -> None:
    load_file(connection, AnsweredUpload(answered_rows(4), generation=20).write(tmp_path / "newer"))
    ledger.request_retries(["history.csv"])
    result = load_file(connection, AnsweredUpload(answered_rows(9), generation=10).write(tmp_path / "older"))
    assert result.status is FileStatus.SUPERSEDED


def test_a_generation_that_was_finished_in_its_time_stays_so_when_it_is_replayed_late(
    ledger: Ledger, connection: psycopg.Connection, tmp_path: Path
) -> None:
    first = MIXED.write(tmp_path / "first")
    load_file(connection, first)
    ledger.record_archived(version(MIXED), place="processed/history.csv/1.csv")
    load_file(connection, MIXED.again(generation=2).write(tmp_path / "second"))

    assert load_file(connection, first).status is FileStatus.SUPERSEDED
    assert record(ledger, MIXED).status is FileStatus.FINISHED


def test_an_older_load_id_writes_nothing_and_leaves_the_request_waiting(
    ledger: Ledger, connection: psycopg.Connection, tmp_path: Path
) -> None:
    folder = MIXED.write(tmp_path / "file")
    load_file(connection, folder)
    ledger.request_retries([MIXED.name])

    result = load_file(connection, folder)

    assert result.status is FileStatus.SUPERSEDED
    found = record(ledger, MIXED)
    assert (found.status, found.load_id) == (FileStatus.PENDING, 2)


def test_answers_of_an_unchanged_upload_may_be_loaded_again_but_nothing_older_that_never_was(
    ledger: Ledger, connection: psycopg.Connection, tmp_path: Path
) -> None:
    loaded = MIXED.write(tmp_path / "loaded")
    load_file(connection, loaded)
    connection.execute("UPDATE question_file SET md5 = 'md5'")
    assert ledger.mark_unchanged(FileVersion(MIXED.name, 3, SIZE, CRC32C, "md5"))

    assert load_file(connection, loaded).status is FileStatus.LOADED
    between = AnsweredUpload(answered_rows(2), generation=2)
    assert load_file(connection, between.write(tmp_path / "between")).status is FileStatus.SUPERSEDED


def test_a_load_of_an_archived_file_is_finished_at_once(ledger: Ledger, connection: psycopg.Connection, tmp_path: Path) -> None:
    folder = MIXED.write(tmp_path / "file")
    load_file(connection, folder)
    ledger.record_archived(version(MIXED), place="processed/history.csv/1.csv")
    assert load_file(connection, folder).status is FileStatus.FINISHED


def test_loads_of_one_file_at_once_leave_it_once(postgres: PostgresSettings, tmp_path: Path) -> None:
    folder = AnsweredUpload(answered_rows(300), shard_rows=100).write(tmp_path / "file")

    def load(_: int) -> int:
        with connect(postgres) as connection:
            return load_file(connection, folder).inserted

    with ThreadPoolExecutor(4) as pool:
        inserted = list(pool.map(load, range(4)))

    assert sorted(inserted) == [0, 0, 0, 300]
    with connect(postgres) as connection:
        assert [n for (n,) in table(connection, "row_number")] == list(range(1, 301))


def test_generations_loaded_at_once_in_any_order_leave_the_newest(postgres: PostgresSettings, tmp_path: Path) -> None:
    folders = [
        AnsweredUpload(answered_rows(100 + generation), generation=generation, shard_rows=50).write(tmp_path / str(generation))
        for generation in (3, 1, 4, 2)
    ]

    def load(folder: Path) -> None:
        with connect(postgres) as connection:
            load_file(connection, folder)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(load, folders))

    with connect(postgres) as connection:
        assert table(connection, "row_number, generation") == [(n, 4) for n in range(1, 105)]
        assert count_rows(connection, FileVersion("history.csv", 4)).answered_rows == 104


def test_a_retry_requested_while_the_file_is_being_loaded_stays_requested(
    postgres: PostgresSettings, ledger: Ledger, connection: psycopg.Connection, tmp_path: Path
) -> None:
    ledger.claim([version(MIXED)], owner="run", lease_seconds=60)
    folder = MIXED.write(tmp_path / "file")
    with connect(postgres) as other, other.transaction():
        # Holds the load up after its gate, at the record.
        other.execute("SELECT FROM question_file FOR UPDATE")
        with ThreadPoolExecutor(1) as pool:
            load = pool.submit(load_file, connection, folder)
            _wait_until(lambda: _waiting_for_a_lock(other))
            other.execute("UPDATE question_file SET load_id = 2, status = 'pending'")
            other.execute("COMMIT")
            load.result(30)
        other.execute("BEGIN")
    found = record(ledger, MIXED)
    assert (found.status, found.load_id) == (FileStatus.PENDING, 2)


def _waiting_for_a_lock(connection: psycopg.Connection) -> bool:
    # A snapshot of the statistics lasts for the transaction otherwise.
    connection.execute("SELECT pg_stat_clear_snapshot()")
    found = connection.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    ).fetchone()
    return found is not None and found[0] > 0


def _wait_until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(600):
        if condition():
            return
        pause.wait(0.05)
    pytest.fail("the condition did not come true in 30 s")


# All or nothing


def _edit(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_bytes().decode()), encoding="utf-8", newline="")


def _edit_info(folder: Path, **changes: object) -> None:
    _edit(folder / "part-00001" / SHARD_INFO, lambda text: replace(ShardInfo.from_json(text), **changes).to_json())  # type: ignore[arg-type]


def _edit_manifest(folder: Path, **changes: object) -> None:
    _edit(folder / MANIFEST, lambda text: replace(Manifest.from_json(text), **changes).to_json())  # type: ignore[arg-type]


def _edit_answers(folder: Path, change: Callable[[str], str]) -> None:
    _edit(folder / "part-00001" / SHARD_ANSWERS, change)


def _move_second_shard(folder: Path) -> None:
    manifest = Manifest.from_json((folder / MANIFEST).read_text())
    shards = list(manifest.shards)
    shards[1] = replace(shards[1], first_row=40)
    _edit_manifest(folder, shards=tuple(shards))
    _edit_info(folder, first_row=40)


def test_a_file_whose_shards_are_of_two_revisions_is_recorded_with_both(
    ledger: Ledger, connection: psycopg.Connection, tmp_path: Path
) -> None:
    folder = MIXED.write(tmp_path / "file")
    _edit_info(folder, answered_by=replace(ANSWERED_BY, revision="ffff"))

    load_file(connection, folder)

    assert record(ledger, MIXED).model_revision == f"{ANSWERED_BY.revision}, ffff"
    assert table(connection, "row_number, model_revision") == [(1, ANSWERED_BY.revision), (4, "ffff"), (5, "ffff")]


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "manifest.json is missing"),
    "no JSON": (lambda folder: (folder / MANIFEST).write_text("{"), "not a Manifest document"),
    "manifest is a list": (lambda folder: (folder / MANIFEST).write_text("[]"), "not a Manifest document"),
    "unknown field": (lambda folder: (folder / MANIFEST).write_text(json.dumps({"a": 1})), "not a Manifest document"),
    "no question column": (lambda folder: _edit_manifest(folder, columns=("q", "context")), "'question'"),
    "shard missing": (lambda folder: shutil.rmtree(folder / "part-00001"), "part-00001 is missing"),
    "answers missing": (lambda folder: (folder / "part-00001" / SHARD_ANSWERS).unlink(), "part-00001: answers.csv is missing"),
    "other rows": (lambda folder: _edit_info(folder, rows=2, answered=2), "rows: 2 instead of 3"),
    "other questions": (lambda folder: _edit_info(folder, sha256="0" * 64), "sha256"),
    "other model": (lambda folder: _edit_info(folder, model=ModelChoice("another")), "wanted model"),
    "other precision": (
        lambda folder: _edit_info(folder, answered_by=replace(ANSWERED_BY, precision="bf16")),
        "part-00000 by minilm-squad in fp32, part-00001 by minilm-squad in bf16",
    ),
    "not answered": (lambda folder: _edit_info(folder, answered_by=None, answered_at=""), "has not been answered"),
    "no time": (lambda folder: _edit_info(folder, answered_at="yesterday"), "answered_at"),
    "sums do not add up": (lambda folder: _edit_info(folder, answered=1), "part-00001: 3 rows, but 1 answered"),
    "other rejections": (
        lambda folder: _edit_info(folder, rejections=(Rejection(4, 5, RowReason.EMPTY_QUESTION),)),
        "rows rejected when the file was read: 1 instead of 0",
    ),
    "file has more rows": (lambda folder: _edit_manifest(folder, rows=8), "the shards have 7 rows, the file 8"),
    "hole between shards": (_move_second_shard, "part-00001 begins with row 40 instead of 4"),
    "cut off": (lambda folder: _edit_answers(folder, lambda text: text[: text.rindex("\n", 0, -1) + 1]), "has 2 answered"),
    "cut off inside a row": (lambda folder: _edit_answers(folder, lambda text: text[:-10]), "cells instead of 8"),
    "empty": (lambda folder: _edit_answers(folder, lambda _: ""), "header"),
    "other header": (lambda folder: _edit_answers(folder, lambda text: text.replace("score", "points", 1)), "header"),
    "other outcome": (lambda folder: _edit_answers(folder, lambda text: text[:-2] + "no_answer\r\n"), "2 answered, 1 without an answer"),
    "unknown reason": (lambda folder: _edit_answers(folder, lambda text: text[:-2] + "tired\r\n"), "unknown reason 'tired'"),
    "score is a word": (lambda folder: _edit_answers(folder, lambda text: text.replace(",0.5,", ",high,", 1)), "row 4"),
    "unbalanced quote": (lambda folder: _edit_answers(folder, lambda text: text.replace("Who", '"Who', 1)), "row 4"),
    "not UTF-8": (lambda folder: (folder / "part-00001" / SHARD_ANSWERS).write_bytes(b"\xff\xfe"), "cannot be read"),
    "NUL": (lambda folder: _edit_answers(folder, lambda text: text.replace("Who", "\0Who", 1)), "0x00"),
    "too long for its column": (
        lambda folder: _edit_answers(folder, lambda text: text.replace("Who", "W" * 10_001, 1)),
        "line 1, column question",
    ),
    "offset beyond an integer": (lambda folder: _edit_answers(folder, lambda text: text.replace(",0.5,0,", f",0.5,{2**40},", 1)), "range"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_is_not_a_whole_answered_file_is_refused_by_name_and_nothing_is_written(
    connection: psycopg.Connection, tmp_path: Path, damage: str
) -> None:
    folder = AnsweredUpload(answered_rows(7)).write(tmp_path / "file")
    spoil, message = DAMAGES[damage]
    spoil(folder)

    with pytest.raises(InputError) as caught:
        load_file(connection, folder)

    assert message in str(caught.value)
    assert isinstance(caught.value, MissingShards) == (damage in ("no manifest", "shard missing")), "only then it is no file's fault"
    assert "'history.csv'" in str(caught.value) or str(folder) in str(caught.value)
    counts = (
        "SELECT (SELECT count(*) FROM question_answer), (SELECT count(*) FROM question_answer_reject), (SELECT count(*) FROM question_file)"
    )
    assert connection.execute(counts).fetchone() == (0, 0, 0)


def test_everything_that_is_missing_is_named_at_once(connection: psycopg.Connection, tmp_path: Path) -> None:
    folder = AnsweredUpload(answered_rows(30)).write(tmp_path / "file")
    for index in range(7):
        shutil.rmtree(folder / f"part-0000{index}")
    with pytest.raises(InputError, match=r"part-00000 is missing.*part-00004 is missing.*and 2 more"):
        load_file(connection, folder)


@pytest.mark.parametrize("lacking", ["INSERT ON question_answer", "SELECT ON question_file"])
def test_a_permission_that_is_missing_is_no_fault_of_the_file(connection: psycopg.Connection, tmp_path: Path, lacking: str) -> None:
    folder = MIXED.write(tmp_path / "file")
    tables = "question_answer, question_answer_reject, question_file"
    connection.execute("CREATE ROLE limited")
    try:
        connection.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {tables} TO limited")
        connection.execute(f"REVOKE {lacking} FROM limited")
        connection.execute("SET ROLE limited")
        with pytest.raises(WrongDatabase, match="PostgreSQL refuses: permission denied for table") as refused:
            load_file(connection, folder)
    finally:
        connection.execute("RESET ROLE; DROP OWNED BY limited; DROP ROLE limited")
    assert fault_of(refused.value).blameless
    load_file(connection, folder)
    assert len(table(connection, "row_number")) == 3


def test_a_column_that_the_owner_added_is_filled_by_its_default_in_every_load(database: Database, tmp_path: Path) -> None:
    postgres = database.settings
    migrate.upgrade(postgres)
    with connect(postgres) as connection:
        connection.execute("ALTER TABLE question_answer ADD id bigserial, ADD tenant text NOT NULL DEFAULT 'us'")
        load_file(connection, MIXED.write(tmp_path / "first"))
        longer = MIXED.again(generation=2, rows=[*MIXED.rows, AnsweredRow("Who?", "Bob.")])
        assert load_file(connection, longer.write(tmp_path / "second")).inserted == 1
        assert set(table(connection, "tenant, id > 0")) == {("us", True)}


@pytest.mark.parametrize(
    ("rule", "refusal", "blameless"),
    [
        ("ADD owner text NOT NULL", 'null value in column "owner"', True),
        ("ADD CONSTRAINT short CHECK (length(context) < 10)", 'violates check constraint "short"', False),
        ("ADD CONSTRAINT one_answer UNIQUE (answer)", 'violates unique constraint "one_answer"', False),
        ("ADD EXCLUDE USING btree (context WITH =)", "index row requires", False),
    ],
)
def test_a_rule_of_the_tables_owner_is_named_without_the_row_that_breaks_it(
    database: Database, tmp_path: Path, rule: str, refusal: str, blameless: bool
) -> None:
    secret = "Mrs Meier, born in 1950, " + os.urandom(20_000).hex()
    folder = AnsweredUpload([AnsweredRow("Who?", secret), AnsweredRow("Who then?", secret)]).write(tmp_path / "file")
    postgres = database.settings
    migrate.upgrade(postgres)
    with connect(postgres) as connection:
        connection.execute(f"ALTER TABLE question_answer {rule}")
        with pytest.raises(InputError, match=refusal) as refused:
            load_file(connection, folder)
        assert table(connection, "row_number") == []
    fault = fault_of(refused.value)
    assert fault.blameless is blameless
    assert "Meier" not in fault.to_json()


def test_loads_do_not_depend_on_defaults_of_the_role_or_the_database(database: Database, tmp_path: Path) -> None:
    postgres = database.settings
    migrate.upgrade(postgres)
    with database.connect(autocommit=True) as owner:
        for default in ("default_transaction_isolation = 'repeatable read'", "datestyle = 'German'", "statement_timeout = '100ms'"):
            owner.execute(f"ALTER DATABASE {database.dbname} SET {default}")
    uploads = [MIXED.again(generation=generation) for generation in (1, 2)]
    folders = [upload.write(tmp_path / str(upload.generation)) for upload in uploads]
    with connect(postgres) as other, connect(postgres) as connection, ThreadPoolExecutor(1) as pool:
        with other.transaction(), other.cursor() as cursor:
            cursor.execute("SET LOCAL statement_timeout = 0")
            loads.wait_for_load_lock(cursor, MIXED.name)
            load = pool.submit(load_file, connection, folders[1])
            _wait_until(lambda: _waiting_for_a_lock(other))
            cursor.execute("SELECT pg_sleep(0.2)")
            cursor.execute("INSERT INTO question_answer (source_file, row_number, generation) VALUES (%s, 1, 1)", [MIXED.name])
        assert load.result(30).updated == 1, "it sees what the lock's last owner wrote"
        assert load_file(other, folders[0]).status is FileStatus.SUPERSEDED
    with Ledger(postgres) as ledger:
        assert record(ledger, uploads[1]).loaded_at is not None


@pytest.mark.faults
def test_a_connection_that_is_cut_writes_nothing_and_may_be_tried_again(
    postgres: PostgresSettings, connection: psycopg.Connection, tmp_path: Path
) -> None:
    folder = MIXED.write(tmp_path / "file")
    with connect(postgres) as other, other.transaction():
        other.execute("LOCK TABLE question_answer_reject IN ACCESS EXCLUSIVE MODE")
        with ThreadPoolExecutor(1) as pool:
            load = pool.submit(load_file, connection, folder)
            _wait_until(lambda: _waiting_for_a_lock(other))
            other.execute("SELECT pg_terminate_backend(%s)", [connection.info.backend_pid])
            with pytest.raises(TransientError):
                load.result(30)
    with connect(postgres) as fresh:
        assert table(fresh, "row_number") == []
        assert load_file(fresh, folder).inserted == 3


def test_no_statement_is_prepared_on_the_server_as_a_shared_connection_would_lose_it(
    ledger: Ledger, connection: psycopg.Connection, tmp_path: Path
) -> None:
    folder = MIXED.write(tmp_path / "file")
    for _ in range(8):
        load_file(connection, folder)
        ledger.records([version(MIXED)])
    assert connection.execute("SELECT count(*) FROM pg_prepared_statements").fetchone() == (0,)


# Existing readers and writers

LEGACY_CREATE = (
    "CREATE TABLE IF NOT EXISTS question_answer (question varchar(10000),answer varchar(10000),"
    "context varchar(500000),model varchar(1000), qa_timestamp timestamp)"
)
LEGACY_INSERT = "INSERT INTO question_answer (question, answer, context, model, qa_timestamp) VALUES (%s, %s, %s, %s, %s)"
LEGACY_SELECT = "select * from question_answer where model=%s and qa_timestamp between %s and %s"
LEGACY_ROW = ("Old?", "Yes", "Yes, old.", "old-model", "2020-05-05 05:05:05")


def _legacy_round(connection: psycopg.Connection, stamp: str) -> None:
    connection.execute(LEGACY_CREATE)
    connection.execute(LEGACY_INSERT, (*LEGACY_ROW[:4], stamp))
    [row] = connection.execute(LEGACY_SELECT, ("old-model", stamp, stamp)).fetchall()
    assert (row[0], row[1], row[2], row[3], str(row[4])) == (*LEGACY_ROW[:4], stamp)
    assert set(row[5:]) <= {None}


def test_legacy_statements_work_before_and_after_a_load(connection: psycopg.Connection, tmp_path: Path) -> None:
    _legacy_round(connection, "2020-05-05 05:05:05")
    load_file(connection, MIXED.write(tmp_path / "file"))
    _legacy_round(connection, "2020-06-06 06:06:06")

    rows = connection.execute(LEGACY_SELECT, (ANSWERED_BY.id, "2026-03-01", "2026-03-02")).fetchall()
    assert [row[:2] for row in rows] == [("Who?", "Ada"), ('What\n"exactly"?', "Zoë,"), ("Where?", "Paris,")]


def test_legacy_statements_work_on_a_legacy_table_before_and_after_its_migration_and_a_load(database: Database, tmp_path: Path) -> None:
    postgres = database.settings
    with connect(postgres) as connection:
        _legacy_round(connection, "2020-05-05 05:05:05")
        migrate.upgrade(postgres)
        _legacy_round(connection, "2020-06-06 06:06:06")
        load_file(connection, MIXED.write(tmp_path / "file"))
        _legacy_round(connection, "2020-07-07 07:07:07")
        rows = connection.execute(LEGACY_SELECT, ("old-model", "2020-01-01", "2020-12-31")).fetchall()
        assert [str(row[4].date()) for row in rows] == ["2020-05-05", "2020-06-06", "2020-07-07"]


def test_two_equal_rows_of_a_legacy_writer_both_stay(connection: psycopg.Connection, tmp_path: Path) -> None:
    for _ in range(2):
        connection.execute(LEGACY_INSERT, LEGACY_ROW)
    load_file(connection, MIXED.write(tmp_path / "file"))
    load_file(connection, MIXED.again(generation=2).write(tmp_path / "newer"))
    assert connection.execute("SELECT count(*) FROM question_answer WHERE source_file IS NULL").fetchone() == (2,)


# The worker


def _run_worker(postgres: PostgresSettings, pfs: Path, folder: Path) -> "subprocess.CompletedProcess[str]":
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PG")},
        "PG_HOST": postgres.host,
        "PG_PORT": str(postgres.port),
        "PG_USER": postgres.user,
        "PG_DBNAME": postgres.dbname,
        "QA_PFS_ROOT": str(pfs),
        "question_answer": f"/pfs/question_answer/{folder.name}",
        "PACH_JOB_ID": "job-7",
    }
    command = [sys.executable, "-m", "qa_platform.loading.worker"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def pfs(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    (tmp_path / "question_answer").mkdir()
    return tmp_path


def test_the_worker_migrates_loads_and_writes_the_whole_answered_file(database: Database, pfs: Path) -> None:
    postgres = database.settings
    upload = MIXED.again(
        name="päth/x.csv", columns=("question", "context", "two\nlines"), rows=[replace(row, extra=("e",)) for row in MIXED.rows]
    )
    folder = upload.write(pfs / "question_answer" / file_id(upload.name))

    done = _run_worker(postgres, pfs, folder)

    assert done.returncode == 0, done.stderr
    assert "loaded 5 rows = 3 answered + 1 no_answer + 1 rejected" in done.stderr
    written = list(csv.reader(io.StringIO((pfs / "out" / f"{folder.name}.csv").read_bytes().decode(), newline="")))
    assert written[0] == ["question", "context", "two\nlines", *ANSWER_COLUMNS]
    assert written[1:] == [row.cells(ANSWERED_BY) for row in upload.rows]
    with Ledger(postgres) as ledger, connect(postgres) as connection:
        assert table(connection, "row_number") == [(1,), (4,), (5,)]
        assert record(ledger, upload).pachyderm_job == "job-7"


def test_the_worker_says_in_its_log_why_it_refuses_a_file(postgres: PostgresSettings, pfs: Path) -> None:
    folder = MIXED.write(pfs / "question_answer" / file_id(MIXED.name))
    shutil.rmtree(folder / "part-00001")

    done = _run_worker(postgres, pfs, folder)

    assert done.returncode == 1
    assert "'history.csv' (generation 1) is not loaded, because part-00001 is missing" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((pfs / "out").iterdir()) == []


def test_the_worker_waits_for_a_database_that_is_away_and_then_gives_up(
    database: Database, pfs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = MIXED.write(pfs / "question_answer" / file_id(MIXED.name))
    for name, value in {**database.environment, "PG_HOST": str(pfs), "QA_PFS_ROOT": str(pfs), "question_answer": str(folder)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(worker, "PATIENCE_SECONDS", 1.2)

    assert worker.main() == 1

    messages = [entry.getMessage() for entry in caplog.records]
    assert sum("trying again" in message for message in messages) == 1
    assert "cannot be reached" in messages[-1]


@pytest.mark.parametrize("seconds", [-3600, 86400], ids=["too old", "in the future"])
def test_the_worker_s_patience_ends_whatever_an_earlier_outage_left_behind(
    postgres: PostgresSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    worker._Outage(postgres).seconds_left()
    (remembered,) = tmp_path.iterdir()
    then = time.time() + seconds
    os.utime(remembered, (then, then))
    outage = worker._Outage(postgres)
    refused = [outage.seconds_left()]
    remembered.unlink()
    (tmp_path / remembered.name / "in the way").mkdir(parents=True)
    os.utime(remembered, (then, then))

    refused.append(outage.seconds_left())

    assert worker.PATIENCE_SECONDS >= refused[0] > refused[1] > 0, "the file is not needed within one process"
    assert worker.PATIENCE_SECONDS >= worker._Outage(postgres).seconds_left() > 0


def test_the_outage_of_another_user_is_neither_followed_nor_believed(
    postgres: PostgresSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    worker._Outage(postgres).seconds_left()
    (remembered,) = tmp_path.iterdir()
    target = tmp_path / "target"
    remembered.unlink()
    remembered.symlink_to(target)
    assert worker._Outage(postgres).seconds_left() > worker.PATIENCE_SECONDS - 1
    assert not target.exists()
    then = time.time() - 100
    target.touch()
    os.utime(target, (then, then))
    assert worker._Outage(postgres).seconds_left() > worker.PATIENCE_SECONDS - 1


def test_the_loader_takes_no_file_from_elsewhere(postgres: PostgresSettings, tmp_path: Path) -> None:
    folder = MIXED.write(tmp_path / "elsewhere")
    for datum in (str(folder), "/pfs/../elsewhere"):
        with pytest.raises(InputError, match="it does not lie in"):
            worker.Loader(tmp_path / "pfs", postgres).do(DatumSettings(question_answer=datum))


@pytest.mark.faults
def test_a_worker_whose_connection_is_cut_opens_another(
    postgres: PostgresSettings, connection: psycopg.Connection, pfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "PATIENCE_SECONDS", 5)
    folder = MIXED.write(pfs / "question_answer" / file_id(MIXED.name))
    loader = worker.Loader(pfs, postgres)
    for _ in range(2):
        loader.do(DatumSettings(question_answer=str(folder)))
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )


def test_an_outage_that_is_over_or_long_ago_takes_no_patience_from_the_next(
    database: Database, pfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(pfs))
    folder = MIXED.write(pfs / "question_answer" / file_id(MIXED.name))
    for name, value in {**database.environment, "QA_PFS_ROOT": str(pfs), "question_answer": str(folder)}.items():
        monkeypatch.setenv(name, value)

    def seconds_left() -> float:
        return worker._Outage(database.settings).seconds_left()

    def begun(seconds_ago: float) -> None:
        seconds_left()
        (remembered,) = pfs.glob("*-outage-*")
        os.utime(remembered, (time.time() - seconds_ago,) * 2)

    begun(100)
    assert seconds_left() < 21, "another program has waited already"
    assert worker.main() == 0
    assert seconds_left() > 119
    begun(601)
    assert seconds_left() > 119


def test_row_level_security_is_not_the_files_fault(database: Database, tmp_path: Path) -> None:
    migrate.upgrade(database.settings)
    with connect(database.settings) as connection:
        connection.execute("CREATE ROLE loader_role")
        connection.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO loader_role")
        connection.execute("ALTER TABLE question_answer ENABLE ROW LEVEL SECURITY")
        connection.execute("CREATE POLICY everything ON question_answer USING (true) WITH CHECK (true)")
        connection.execute("SET ROLE loader_role")
        try:
            with pytest.raises(WrongDatabase, match="row-level security"):
                load_file(connection, MIXED.write(tmp_path / "file"))
        finally:
            connection.execute("RESET ROLE")
            connection.execute("DROP OWNED BY loader_role")
            connection.execute("DROP ROLE loader_role")
