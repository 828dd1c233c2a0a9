"""What of a file was rejected, from the tables, as the report that its owner gets."""

from collections.abc import Iterator

import psycopg

from qa_platform import bookkeeping
from qa_platform.contract import FileStatus, Rejection, RowReason
from qa_platform.database import transaction
from qa_platform.errors import InputError
from qa_platform.ingest import report_on_file, report_on_rows


def rejected_report(connection: psycopg.Connection, name: str) -> Iterator[bytes]:
    """The report on the newest generation of a file, record by record: why it was rejected, or which of its rows were, in their order.

    See `ingest.REPORT_COLUMNS`. Rows without an answer are not rejected, and not in it.

    Raises:
        InputError: no such file was ever seen, or it is neither rejected nor answered yet. Before the first record.
    """
    records = bookkeeping.history(connection, name=name)
    if not records:
        raise InputError(f"{name}: no such file was ever seen; `qa-platform status` lists those that were")
    if records[0].status is FileStatus.REJECTED:
        return iter([report_on_file(records[0].error)])
    if not any(record.loaded_at for record in records):
        raise InputError(f"{name}: is {records[0].status}, and its rows are not in the tables yet; `qa-platform status {name}` says more")
    return report_on_rows(_rejections(connection, name))


def _rejections(connection: psycopg.Connection, name: str) -> Iterator[Rejection]:
    query = """
        SELECT row_number, coalesce(line, 0), reason, coalesce(column_name, ''), coalesce(detail, '') FROM question_answer_reject
        WHERE source_file = %s AND reason <> %s ORDER BY row_number
    """
    # Row by row as they come: a file may have any number of them.
    with transaction(connection) as cursor:
        for row, line, reason, column, detail in cursor.stream(query, [name, RowReason.NO_ANSWER]):
            yield Rejection(row, line, RowReason(reason), column, detail)
