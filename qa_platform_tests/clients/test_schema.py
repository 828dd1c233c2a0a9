"""The program writes the columns that the migrations create."""

import pytest

from qa_platform.clients.postgres import connect
from qa_platform.clients.schema import ANSWERS, REJECTS, Table
from qa_platform_tests.loading_helpers import migrated_database

# Columns that PostgreSQL fills in.
_DEFAULTS = {"question_answer": set(), "question_answer_reject": {"rejected_at"}}


@pytest.mark.parametrize("table", [ANSWERS, REJECTS], ids=lambda table: table.name)
def test_the_columns_are_those_of_the_table(postgres_socket: str, table: Table) -> None:
    with connect(migrated_database(postgres_socket)) as connection:
        rows = connection.execute(
            """
            SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute
            WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped ORDER BY attnum
            """,
            [table.name],
        ).fetchall()
    columns = [row for row in rows if row[0] not in _DEFAULTS[table.name]]
    assert [(column.name, column.type) for column in table.columns] == columns
