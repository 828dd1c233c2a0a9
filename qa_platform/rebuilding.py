"""An answered CSV from the tables alone, for a file whose commit Pachyderm has no more."""

from collections.abc import Iterator

import psycopg

from qa_platform.bookkeeping import FileRecord
from qa_platform.contract import ANSWER_COLUMNS
from qa_platform.database import transaction
from qa_platform.errors import InputError
from qa_platform.ingest import csv_line

# Where the tables have what a rejected row was, which is not cut into cells there.
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
    """The answered CSV of a loaded file, a line at a time: every row in its order, with the columns ``question``, ``context``, the
    answer's (`contract.ANSWER_COLUMNS`) and ``raw``.

    It is not all that the original was. The tables have no other column of the upload. Of a row without an answer they have the text
    as it came, escaped and cut at 64 KB: it stands in ``raw``, and question, context and score are empty.

    Raises:
        InputError: the tables do not hold all rows of this generation. A newer one may have taken their place.
    """
    yield csv_line(["question", "context", *ANSWER_COLUMNS, RAW_COLUMN])
    rows = 0
    values = {"name": record.version.name, "generation": record.version.generation, "model": record.model}
    # Row by row, as they come: a file may have any number of them.
    with transaction(connection) as cursor:
        for _, question, context, answer, score, start, end, model, error, raw in cursor.stream(_ROWS, values):
            numbers = ["" if score is None else f"{score:.6f}", *("" if offset is None else str(offset) for offset in (start, end))]
            yield csv_line([question or "", context or "", answer, *numbers, model or "", error, raw])
            rows += 1
    if rows != record.rows:
        raise InputError(
            f"{record.version.name}: the tables hold {rows} of the {record.rows} rows of generation {record.version.generation}, so this "
            "is not whole; `qa-platform retry` answers it again"
        )
