"""The report on rejected rows and rejected files, from the tables."""

from pathlib import Path

import psycopg
import pytest

from qa_platform.clients.postgres import connect
from qa_platform.contract import FileReason, FileVersion, RowReason
from qa_platform.errors import InputError
from qa_platform.ingest import ROW_HINTS, FileRejection
from qa_platform.ledger import Ledger
from qa_platform.loading.load import load_file
from qa_platform.results.rejected_csv import rejected_report
from qa_platform.settings import PostgresSettings
from qa_platform_tests.loading_helpers import AnsweredRow, AnsweredUpload, ingested
from qa_platform_tests.reports import parsed

HEADER = b"question,context\n"
NAME = "history.csv"


def places(ledger: Ledger, connection: psycopg.Connection, name: str = NAME) -> list[tuple[str, str, str, str]]:
    return [(found["line"], found["row"], found["column"], found["reason"]) for found in parsed(rejected_report(ledger, connection, name))]


def test_rejected_rows_are_reported_with_their_lines_and_columns(postgres: PostgresSettings, tmp_path: Path) -> None:
    data = HEADER + b'"two\nlines",c\n ,c\nonly one\nq,c\nq,\n'
    with Ledger(postgres) as ledger, connect(postgres) as connection:
        load_file(connection, ingested(data, tmp_path / "file"))
        assert places(ledger, connection) == [
            ("4", "2", "question", "empty_question"),
            ("5", "3", "", "too_few_cells"),
            ("7", "5", "context", "empty_context"),
        ]
        assert parsed(rejected_report(ledger, connection, NAME))[1]["what_to_do"] == ROW_HINTS[RowReason.TOO_FEW_CELLS]


def test_the_report_is_found_below_any_number_of_identical_uploads(postgres: PostgresSettings, tmp_path: Path) -> None:
    with Ledger(postgres) as ledger, connect(postgres) as connection:
        load_file(connection, ingested(HEADER + b",c\n", tmp_path / "file"))
        connection.execute(
            """
            INSERT INTO question_file SELECT (jsonb_populate_record(f, jsonb_build_object(
                'generation', f.generation + n, 'status', 'unchanged', 'loaded_at', null))).*
            FROM question_file f, generate_series(1, 150) AS n
            """
        )
        assert places(ledger, connection) == [("2", "1", "question", "empty_question")]


def test_a_row_without_an_answer_is_not_reported_and_a_question_that_the_model_cannot_read_is(
    postgres: PostgresSettings, tmp_path: Path
) -> None:
    rows = [
        AnsweredRow("Who?", "Somebody.", error=RowReason.NO_ANSWER),
        AnsweredRow("Why? " * 500, "c", error=RowReason.QUESTION_EXCEEDS_WINDOW),
    ]
    with Ledger(postgres) as ledger, connect(postgres) as connection:
        load_file(connection, AnsweredUpload(rows, columns=("QUESTION", "context")).write(tmp_path / "file"))
        assert places(ledger, connection) == [("", "2", "QUESTION", "question_exceeds_window")]


def test_a_file_of_which_nothing_is_rejected_has_an_empty_report(postgres: PostgresSettings, tmp_path: Path) -> None:
    with Ledger(postgres) as ledger, connect(postgres) as connection:
        load_file(connection, ingested(HEADER + b"q,c\n", tmp_path / "file"))
        assert places(ledger, connection) == []


def test_a_newer_generation_that_is_rejected_is_what_is_reported(postgres: PostgresSettings, tmp_path: Path) -> None:
    with Ledger(postgres) as ledger, connect(postgres) as connection:
        load_file(connection, ingested(HEADER + b",c\n", tmp_path / "file"))
        ledger.reject_file(FileVersion(NAME, 2), FileRejection(FileReason.HEADER_ONLY, "there is no row below the header"))
        assert places(ledger, connection) == [("", "", "", "header_only")]


def test_a_file_that_was_rejected_before_rejections_had_fields_is_reported_with_its_text(postgres: PostgresSettings) -> None:
    with Ledger(postgres) as ledger, connect(postgres) as connection:
        ledger.reject_file(FileVersion(NAME, 1), FileRejection(FileReason.HEADER_ONLY, "there is no row below the header"))
        connection.execute("UPDATE question_file SET rejection = NULL")
        [told] = parsed(rejected_report(ledger, connection, NAME))
    assert (told["reason"], told["detail"].split(":")[0]) == ("", "header_only")


def test_an_unchanged_upload_has_the_report_of_the_rows_that_are_in_the_table(postgres: PostgresSettings, tmp_path: Path) -> None:
    with Ledger(postgres) as ledger, connect(postgres) as connection:
        data = HEADER + b",c\n"
        load_file(connection, ingested(data, tmp_path / "file"))
        connection.execute("UPDATE question_file SET md5 = 'md5'")
        assert ledger.mark_unchanged(FileVersion(NAME, 2, len(data), md5="md5"))
        assert places(ledger, connection) == [("2", "1", "question", "empty_question")]


def test_a_file_that_is_unknown_or_not_answered_yet_has_no_report(postgres: PostgresSettings) -> None:
    with Ledger(postgres) as ledger, connect(postgres) as connection:
        with pytest.raises(InputError, match="no such file was ever seen"):
            rejected_report(ledger, connection, NAME)
        ledger.claim([FileVersion(NAME, 1)], owner="run", lease_seconds=60)
        with pytest.raises(InputError, match="is pending, and its rows are not in the tables yet"):
            rejected_report(ledger, connection, NAME)
        connection.execute("UPDATE question_file SET status = 'forgotten'")
        with pytest.raises(InputError, match="is forgotten, and its rows are not in the tables; "):
            rejected_report(ledger, connection, NAME)
