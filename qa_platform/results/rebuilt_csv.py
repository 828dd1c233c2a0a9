"""An answered CSV from the tables alone, for a file whose commit Pachyderm no longer has."""

from collections.abc import Iterator

import psycopg

from qa_platform.clients.postgres import long_transaction
from qa_platform.contract import ANSWER_COLUMNS
from qa_platform.errors import InputError
from qa_platform.ingest import csv_line
from qa_platform.ledger.records import FileRecord

# The column for the raw text of a rejected row, which the tables do not hold as cells.
RAW_COLUMN = "raw"

_ROWS = """
    SELECT row_number, question, context, coalesce(answer, ''), score, answer_start, answer_end, model, coalesce(flag, ''), ''
    FROM question_answer WHERE source_file = %(name)s AND generation = %(generation)s
    UNION ALL
    SELECT row_number, '', '', '', NULL, NULL, NULL, %(model)s, reason, coalesce(raw, '')
    FROM question_answer_reject WHERE source_file = %(name)s AND generation = %(generation)s
    ORDER BY row_number
"""


def rebuilt_csv(connection: psycopg.Connection, record: FileRecord) -> Iterator[bytes]:
    """The answered CSV of a loaded file, line by line, with the rows in their order.

    The columns are ``question``, ``context``, `contract.ANSWER_COLUMNS` and ``raw``. The tables do not hold the other columns of the
    upload. For a row without an answer they hold only the raw text, escaped and cut at 64 KiB. It is in ``raw``; question, context and
    score are empty.

    Raises:
        InputError: the tables do not hold all rows of this generation, perhaps because a newer one replaced them. Raised after the last
            line.
    """
    yield csv_line(["question", "context", *ANSWER_COLUMNS, RAW_COLUMN])
    rows = 0
    values = {"name": record.version.name, "generation": record.version.generation, "model": record.model}
    # Streamed: a file may have any number of rows.
    with long_transaction(connection) as cursor:
        for _, question, context, answer, score, start, end, model, error, raw in cursor.stream(_ROWS, values):
            numbers = ["" if score is None else f"{score:.6f}", *("" if offset is None else str(offset) for offset in (start, end))]
            yield csv_line([question or "", context or "", answer, *numbers, model or "", error, raw])
            rows += 1
    if rows != record.rows:
        raise InputError(
            f"the tables hold {rows} of the {record.rows} rows of generation {record.version.generation}, so this is incomplete",
            where=record.version.name,
            advice="`qa-platform retry` answers it again",
        )
