"""The rows of a file in the tables, counted by PostgreSQL."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest

from qa_platform.clients.postgres import connect, only_row
from qa_platform.contract import FileVersion
from qa_platform.loading.load import load_file
from qa_platform.results.facts import RowCounts, count_rows
from qa_platform.settings import PostgresSettings
from qa_platform_tests.flow import wait_until
from qa_platform_tests.loading_helpers import AnsweredRow, AnsweredUpload, answered_rows

A1, A2 = FileVersion("a.csv", 1), FileVersion("a.csv", 2)


def test_the_check_counts_what_the_tables_hold(connection: psycopg.Connection, tmp_path: Path) -> None:
    rows = [*answered_rows(4, context="Zoë 🙂 answered."), AnsweredRow("?", "Nothing here.", error="no_answer")]
    load_file(connection, AnsweredUpload(rows, name="a.csv").write(tmp_path / "file"))
    assert count_rows(connection, A1) == RowCounts(4, 1, 0, 0)
    assert count_rows(connection, A2) == RowCounts(0, 0, 0, 0)


@pytest.mark.parametrize(
    ("damage", "without_answer", "wrong_spans"),
    [
        ("answer = NULL", 1, 1),
        ("answer = '', answer_end = answer_start", 1, 0),
        ("answer = 'Something else'", 0, 1),
        ("answer_start = answer_start + 1", 0, 1),
        ("answer_end = answer_start - 3", 0, 1),
        ("answer_start = NULL", 0, 1),
        ("context = NULL", 0, 1),
    ],
)
def test_the_check_sees_an_answer_that_is_missing_or_not_where_it_should_be(
    connection: psycopg.Connection, tmp_path: Path, damage: str, without_answer: int, wrong_spans: int
) -> None:
    load_file(connection, AnsweredUpload(answered_rows(2), name="a.csv").write(tmp_path / "file"))
    connection.execute(f"UPDATE question_answer SET {damage} WHERE row_number = 2")  # noqa: S608
    counted = count_rows(connection, A1)
    assert (counted.answered_rows, counted.without_answer, counted.wrong_spans) == (2, without_answer, wrong_spans)


def test_a_limit_on_the_time_of_a_statement_does_not_end_what_reads_whole_files(
    connection: psycopg.Connection, postgres: PostgresSettings, tmp_path: Path
) -> None:
    load_file(connection, AnsweredUpload(answered_rows(4), name="a.csv").write(tmp_path / "file"))
    with connect(postgres) as other, connect(postgres) as reader, ThreadPoolExecutor(1) as pool:
        reader.execute("SET statement_timeout = '100ms'")
        with other.transaction(), other.cursor() as cursor:
            cursor.execute("LOCK TABLE question_answer")
            check = pool.submit(count_rows, reader, A1)
            wait_until(lambda: only_row(cursor.execute("SELECT count(*) FROM pg_locks WHERE NOT granted"))[0], "it waits")
            cursor.execute("SELECT pg_sleep(0.3)")
        assert check.result(30).answered_rows == 4
