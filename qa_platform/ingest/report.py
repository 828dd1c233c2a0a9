"""The report to the owner of a rejected file, or of rejected rows: where, why, and what to do."""

from collections.abc import Iterable, Iterator

from qa_platform.contract import Rejection
from qa_platform.ingest.damage import ROW_HINTS, FileRejection
from qa_platform.ingest.dialect import csv_line
from qa_platform.text import escaped

REPORT_COLUMNS = ("line", "row", "column", "reason", "detail", "what_to_do")


def report_on_file(rejection: FileRejection | str) -> bytes:
    """A report on a file that cannot be read: a CSV with REPORT_COLUMNS and one record, whose ``row`` and ``column`` are empty.

    A plain text becomes the record's ``detail``.
    """
    if isinstance(rejection, str):
        return csv_line(REPORT_COLUMNS) + _record("", "", "", "", rejection, "")
    line = "" if rejection.line is None else str(rejection.line)
    at = "" if rejection.offset is None else f" (byte {rejection.offset} of the file)"
    return csv_line(REPORT_COLUMNS) + _record(line, "", "", rejection.reason, rejection.detail + at, rejection.hint)


def report_on_rows(rejections: Iterable[Rejection]) -> Iterator[bytes]:
    """A report on the rejected rows of a file that was read: a CSV with REPORT_COLUMNS, record by record.

    ``line`` counts the lines of the file from 1, ``row`` its data rows. ``line`` is empty for a row that was rejected after ingestion, when
    its line was no longer known (line 0). Cells are left out, because they may be large.
    """
    yield csv_line(REPORT_COLUMNS)
    for rejection in rejections:
        line = str(rejection.line) if rejection.line else ""
        hint = ROW_HINTS.get(rejection.reason, "")
        yield _record(line, str(rejection.row), rejection.column, rejection.reason, rejection.detail, hint)


def _record(*cells: str) -> bytes:
    # Column names and details come from the file.
    return csv_line([escaped(cell) for cell in cells])
