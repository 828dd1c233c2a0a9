"""What is told to the owner of a rejected file, or of rejected rows: where, why, and what to do."""

from collections.abc import Iterable, Iterator

from qa_platform.contract import Rejection
from qa_platform.ingest.damage import ROW_HINTS, FileRejected
from qa_platform.ingest.reading import csv_line

REPORT_COLUMNS = ("line", "row", "column", "reason", "detail", "what_to_do")


def report_on_file(message: str) -> bytes:
    """A report on a file that cannot be read: a CSV with REPORT_COLUMNS and one record, whose ``row`` and ``column`` are empty.

    ``message`` is that of its `FileRejected`; any other is the record's ``detail``.
    """
    error = FileRejected.of_message(message)
    if error is None:
        return csv_line(REPORT_COLUMNS) + csv_line(("", "", "", "", message, ""))
    detail = error.detail if error.offset is None else f"{error.detail} (byte {error.offset} of the file)"
    return csv_line(REPORT_COLUMNS) + csv_line(("" if error.line is None else str(error.line), "", "", error.reason, detail, error.hint))


def report_on_rows(rejections: Iterable[Rejection]) -> Iterator[bytes]:
    """A report on the rejected rows of a file that was read: a CSV with REPORT_COLUMNS, record by record.

    ``line`` and ``row`` count from 1, the header being line 1 and the row below it row 1; a line 0, of a row that was rejected when
    the lines were not known any more, is left empty. Cells are not repeated: they may be large.
    """
    yield csv_line(REPORT_COLUMNS)
    for found in rejections:
        line = str(found.line) if found.line else ""
        yield csv_line((line, str(found.row), found.column, found.reason, found.detail, ROW_HINTS.get(found.reason, "")))
