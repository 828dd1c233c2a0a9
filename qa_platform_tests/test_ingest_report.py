"""What the owner of a rejected file, or of rejected rows, is told: in the bucket, and by `rejected_report`."""

import csv
import io
import logging
from collections.abc import Iterable
from pathlib import Path

import psycopg
import pytest
from google.cloud import storage
from hypothesis import given
from hypothesis import strategies as st

from qa_platform import bookkeeping, bucket
from qa_platform.batch import Services, archive_file, set_aside, split_file
from qa_platform.contract import FileReason, FileStatus, FileVersion, Rejection, RowReason
from qa_platform.database import connect
from qa_platform.errors import InputError
from qa_platform.ingest import FILE_HINTS, REPORT_COLUMNS, ROW_HINTS, FileRejected, report_on_file, report_on_rows
from qa_platform.loading.load import load_file
from qa_platform.loading.rejected import rejected_report
from qa_platform.settings import IngestSettings, ModelSettings, PachydermSettings, PostgresSettings, WorkSettings
from qa_platform_tests.loading_helpers import AnsweredRow, AnsweredUpload, empty_tables, ingested, migrated_database

HEADER = b"question,context\n"
NAME = "history.csv"


@pytest.fixture(scope="module")
def migrated(postgres_socket: str) -> PostgresSettings:
    return migrated_database(postgres_socket)


@pytest.fixture
def postgres(migrated: PostgresSettings) -> PostgresSettings:
    """A migrated database with empty tables."""
    with connect(migrated) as connection:
        empty_tables(connection)
    return migrated


def parsed(report: bytes | Iterable[bytes]) -> list[dict[str, str]]:
    """The records of a report, whose header is the one that is promised."""
    text = (report if isinstance(report, bytes) else b"".join(report)).decode()
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    records = list(reader)
    assert tuple(reader.fieldnames or ()) == REPORT_COLUMNS
    return records


def places(connection: psycopg.Connection, name: str = NAME) -> list[tuple[str, str, str, str]]:
    return [(found["line"], found["row"], found["column"], found["reason"]) for found in parsed(rejected_report(connection, name))]


# The report by itself


@given(
    reason=st.sampled_from(FileReason),
    detail=st.text(),
    line=st.none() | st.integers(1, 10**9),
    offset=st.none() | st.integers(0, 10**13),
)
def test_the_message_that_is_recorded_has_all_of_a_rejection(reason: FileReason, detail: str, line: int | None, offset: int | None) -> None:
    error = FileRejected(reason, detail, line=line, offset=offset)
    again = FileRejected.of_message(str(error))
    assert again is not None
    assert (again.reason, again.detail, again.line, again.offset, str(again)) == (reason, detail, line, offset, str(error))


@pytest.mark.parametrize("message", ["", "ConnectionError: away", "at line 3"])
def test_the_message_of_something_else_is_reported_as_it_is(message: str) -> None:
    assert FileRejected.of_message(message) is None
    assert [(found["detail"], found["reason"]) for found in parsed(report_on_file(message))] == [(message, "")]


def test_a_report_on_a_file_says_where_why_and_what_to_do() -> None:
    error = FileRejected(FileReason.NOT_UTF8, "the bytes e9 are no UTF-8", line=2, offset=19)
    assert parsed(report_on_file(str(error))) == [
        {
            "line": "2",
            "row": "",
            "column": "",
            "reason": "not_utf8",
            "detail": "the bytes e9 are no UTF-8 (byte 19 of the file)",
            "what_to_do": FILE_HINTS[FileReason.NOT_UTF8],
        }
    ]


@given(st.lists(st.builds(Rejection, st.integers(1), st.integers(0), st.sampled_from(list(ROW_HINTS)), st.text(), st.text())))
def test_a_report_on_rows_has_a_record_for_each_whatever_columns_are_called(rejections: list[Rejection]) -> None:
    # Lone surrogates and NUL are rejected before they are in a report.
    rejections = [found for found in rejections if (found.column + found.detail).isprintable()]
    assert parsed(report_on_rows(rejections)) == [
        {
            "line": str(found.line or ""),
            "row": str(found.row),
            "column": found.column,
            "reason": str(found.reason),
            "detail": found.detail,
            "what_to_do": ROW_HINTS[found.reason],
        }
        for found in rejections
    ]


# Beside a rejected file


@pytest.mark.parametrize(
    "name", ["my file.csv", '../../it\'s "100%".csv', "😀.csv", "x" * 1011 + ".csv"], ids=["plain", "hostile", "emoji", "long"]
)
def test_beside_a_rejected_file_lies_a_report_on_it(bucket_: storage.Bucket, postgres: PostgresSettings, name: str) -> None:
    services = Services(bucket_, PachydermSettings(), postgres, ModelSettings().pinned, IngestSettings(), WorkSettings())
    version = bucket.upload(bucket_, name, io.BytesIO(HEADER + b"q,c\nq,caf\xe9\n"))
    log = logging.getLogger("test")

    def record() -> bookkeeping.FileRecord:
        with connect(postgres) as connection:
            return bookkeeping.records(connection, [version])[version.name, version.generation]

    with connect(postgres) as connection:
        bookkeeping.claim(connection, [version], owner="run", lease_seconds=60)
    with pytest.raises(FileRejected) as caught:
        split_file(services, record(), lambda path, chunks: None, run_id="run")
    set_aside(services, record(), caught.value, log)
    archive_file(services, record(), log=log)

    assert record().status is FileStatus.REJECTED
    assert record().error == str(caught.value)
    place = record().place
    assert sorted(blob.name for blob in bucket_.list_blobs()) == sorted([place, place.removesuffix(".csv") + ".report.csv"])
    [told] = parsed(bucket_.blob(place.removesuffix(".csv") + ".report.csv").download_as_bytes())
    assert (told["line"], told["reason"], told["what_to_do"]) == ("3", "not_utf8", FILE_HINTS[FileReason.NOT_UTF8])
    with connect(postgres) as connection:
        assert parsed(rejected_report(connection, name)) == [told]


@pytest.fixture
def bucket_(bucket: storage.Bucket) -> storage.Bucket:
    """The shared fixture, by a name that is not that of the module."""
    return bucket


# From the tables


def test_rejected_rows_are_reported_with_their_lines_and_columns(postgres: PostgresSettings, tmp_path: Path) -> None:
    data = HEADER + b'"two\nlines",c\n ,c\nonly one\nq,c\nq,\n'
    with connect(postgres) as connection:
        load_file(connection, ingested(data, tmp_path / "file"))
        assert places(connection) == [
            ("4", "2", "question", "empty_question"),
            ("5", "3", "", "too_few_cells"),
            ("7", "5", "context", "empty_context"),
        ]
        assert parsed(rejected_report(connection, NAME))[1]["what_to_do"] == ROW_HINTS[RowReason.TOO_FEW_CELLS]


def test_a_row_without_an_answer_is_not_reported_and_a_question_that_the_model_cannot_read_is(
    postgres: PostgresSettings, tmp_path: Path
) -> None:
    rows = [
        AnsweredRow("Who?", "Somebody.", error=RowReason.NO_ANSWER),
        AnsweredRow("Why? " * 500, "c", error=RowReason.QUESTION_EXCEEDS_WINDOW),
    ]
    with connect(postgres) as connection:
        load_file(connection, AnsweredUpload(rows, columns=("QUESTION", "context")).write(tmp_path / "file"))
        assert places(connection) == [("", "2", "QUESTION", "question_exceeds_window")]


def test_a_file_of_which_nothing_is_rejected_has_an_empty_report(postgres: PostgresSettings, tmp_path: Path) -> None:
    with connect(postgres) as connection:
        load_file(connection, ingested(HEADER + b"q,c\n", tmp_path / "file"))
        assert places(connection) == []


def test_a_newer_generation_that_is_rejected_is_what_is_reported(postgres: PostgresSettings, tmp_path: Path) -> None:
    with connect(postgres) as connection:
        load_file(connection, ingested(HEADER + b",c\n", tmp_path / "file"))
        error = FileRejected(FileReason.HEADER_ONLY, "there is no row below the header")
        bookkeeping.reject_file(connection, FileVersion(NAME, 2), error=str(error))
        assert places(connection) == [("", "", "", "header_only")]


def test_an_unchanged_upload_has_the_report_of_the_rows_that_are_in_the_table(postgres: PostgresSettings, tmp_path: Path) -> None:
    with connect(postgres) as connection:
        data = HEADER + b",c\n"
        load_file(connection, ingested(data, tmp_path / "file"))
        assert bookkeeping.mark_unchanged(connection, FileVersion(NAME, 2, len(data)))
        assert places(connection) == [("2", "1", "question", "empty_question")]


def test_a_file_that_is_unknown_or_not_answered_yet_has_no_report(postgres: PostgresSettings) -> None:
    with connect(postgres) as connection:
        with pytest.raises(InputError, match="no such file was ever seen"):
            rejected_report(connection, NAME)
        bookkeeping.claim(connection, [FileVersion(NAME, 1)], owner="run", lease_seconds=60)
        with pytest.raises(InputError, match="is pending, and its rows are not in the tables yet"):
            rejected_report(connection, NAME)
