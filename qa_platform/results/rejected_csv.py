"""The report for a file's owner, from the tables: why the file was rejected, or which of its rows were."""

from collections.abc import Iterator

import psycopg

from qa_platform.clients.postgres import long_transaction
from qa_platform.contract import FileStatus, Rejection, RowReason
from qa_platform.errors import InputError
from qa_platform.ingest import report_on_file, report_on_rows
from qa_platform.ledger import Ledger
from qa_platform.text import as_argument


def rejected_report(ledger: Ledger, connection: psycopg.Connection, name: str) -> Iterator[bytes]:
    """The report on a file, line by line: why its newest generation was rejected, or the rejected rows in the tables, in their order.

    While a newer generation is not loaded yet, those are an older generation's rows.

    The columns are `ingest.REPORT_COLUMNS`. Rows without an answer are not rejected, so they are not in the report.

    Raises:
        InputError: the file was never seen, or is neither rejected nor answered yet. Raised before the first line.
    """
    newest = ledger.newest([name]).get(name)
    if newest is None:
        raise InputError("no such file was ever seen", where=name, advice="`qa-platform status` lists those that were")
    if newest.status is FileStatus.REJECTED:
        return iter([report_on_file(newest.rejection or newest.error)])
    if ledger.in_the_table(name) is None:
        yet = " yet" if newest.status in (FileStatus.PENDING, FileStatus.RUNNING) else ""
        raise InputError(
            f"it is {newest.status}, and its rows are not in the tables{yet}",
            where=name,
            advice=f"`qa-platform status {as_argument(name)}` says more",
        )
    return report_on_rows(_rejections(connection, name))


def _rejections(connection: psycopg.Connection, name: str) -> Iterator[Rejection]:
    query = """
        SELECT row_number, coalesce(line, 0), reason, coalesce(column_name, ''), coalesce(detail, '') FROM question_answer_reject
        WHERE source_file = %s AND reason <> %s ORDER BY row_number
    """
    # Streamed: a file may have any number of rows.
    with long_transaction(connection) as cursor:
        for row, line, reason, column, detail in cursor.stream(query, [name, RowReason.NO_ANSWER]):
            yield Rejection(row, line, RowReason(reason), column, detail)
