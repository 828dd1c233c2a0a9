"""The reports for owners of rejected files or rejected rows: in the bucket, and from `rejected_report`."""

import io
import logging

import pytest
from google.cloud import storage
from hypothesis import given
from hypothesis import strategies as st

from qa_platform.batches.archive import archive_file
from qa_platform.batches.intake import set_aside, split_file
from qa_platform.clients import bucket
from qa_platform.clients.postgres import connect
from qa_platform.clients.services import Services
from qa_platform.contract import FileReason, FileStatus, FileVersion, Rejection, RowReason
from qa_platform.errors import InputError
from qa_platform.ingest import FILE_HINTS, ROW_HINTS, FileRejected, FileRejection, report_on_file, report_on_rows
from qa_platform.ledger import FileRecord, Ledger
from qa_platform.results.rejected_csv import rejected_report
from qa_platform.settings import IngestSettings, ModelSettings, PachydermSettings, PostgresSettings, WorkSettings
from qa_platform_tests.reports import parsed

HEADER = b"question,context\n"
NAME = "history.csv"


# The report by itself


@given(
    reason=st.sampled_from(FileReason),
    detail=st.text(),
    line=st.none() | st.integers(1, 10**9),
    offset=st.none() | st.integers(0, 10**13),
)
def test_the_document_that_is_recorded_has_all_of_a_rejection(
    reason: FileReason, detail: str, line: int | None, offset: int | None
) -> None:
    rejection = FileRejection(reason, detail, line=line, offset=offset)
    assert FileRejection.from_json(rejection.to_json()) == rejection
    assert str(FileRejected(reason, detail, line=line, offset=offset)) == str(rejection)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"reason": "empty"}', '{"reason": "not_utf8"}', '{"reason": "not_utf8", "detail": "d", "x": 1}']
)
def test_a_document_that_holds_no_rejection_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="not a FileRejection document"):
        FileRejection.from_json(text)


@pytest.mark.parametrize("message", ["", "not_utf8 at line 3: a file that was rejected before rejections had fields", "at line 3"])
def test_a_text_without_fields_is_reported_as_it_is(message: str) -> None:
    assert [(found["detail"], found["reason"]) for found in parsed(report_on_file(message))] == [(message, "")]


def test_a_report_on_a_file_says_where_why_and_what_to_do() -> None:
    rejection = FileRejection(FileReason.NOT_UTF8, "the bytes e9 are not UTF-8", line=2, offset=19)
    assert parsed(report_on_file(rejection)) == [
        {
            "line": "2",
            "row": "",
            "column": "",
            "reason": "not_utf8",
            "detail": "the bytes e9 are not UTF-8 (byte 19 of the file)",
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

    def record() -> FileRecord:
        with Ledger(postgres) as ledger:
            return ledger.records([version])[version.name, version.generation]

    with Ledger(postgres) as ledger:
        ledger.claim([version], owner="run", lease_seconds=60)
    with pytest.raises(FileRejected) as caught:
        split_file(services, record(), lambda path, chunks: None, log)
    with Ledger(postgres) as ledger:
        set_aside(services, ledger, record(), caught.value, log)
        archive_file(services, ledger, record(), log=log)

    assert record().status is FileStatus.REJECTED
    assert (record().error, record().rejection) == (str(caught.value), caught.value.rejection)
    place = record().place
    assert sorted(blob.name for blob in bucket_.list_blobs()) == sorted([place, place.removesuffix(".csv") + ".report.csv"])
    [told] = parsed(bucket_.blob(place.removesuffix(".csv") + ".report.csv").download_as_bytes())
    assert (told["line"], told["reason"], told["what_to_do"]) == ("3", "not_utf8", FILE_HINTS[FileReason.NOT_UTF8])
    with Ledger(postgres) as ledger, connect(postgres) as connection:
        assert parsed(rejected_report(ledger, connection, name)) == [told]


@pytest.mark.parametrize("letter", "xü")
def test_the_place_of_a_report_is_never_too_long_for_an_object(letter: str) -> None:
    lengths = [len(bucket.report_name(FileVersion(letter * number + ".csv", 10**15)).encode()) for number in range(450, 1020)]
    assert bucket.OBJECT_NAME_BYTES - len(letter.encode()) < max(lengths) <= bucket.OBJECT_NAME_BYTES


@pytest.fixture
def bucket_(bucket: storage.Bucket) -> storage.Bucket:
    """The shared fixture, by a name that is not that of the module."""
    return bucket


def test_what_a_report_quotes_of_a_file_is_escaped() -> None:
    name, shown = "a\u2028b\u202ec\x1b", r"a\u2028b\u202ec\x1b"
    (row,) = parsed(report_on_rows([Rejection(1, 2, RowReason.CONTEXT_TOO_LONG, column=name, detail=name)]))
    assert (row["column"], row["detail"]) == (shown, shown)
    for rejection in (FileRejection(FileReason.BAD_HEADER, name), name):
        (row,) = parsed(report_on_file(rejection))
        assert row["detail"] == shown
