"""Rows of the answers table, selected by the values of columns."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import psycopg
from psycopg import sql

from qa_platform.clients.postgres import long_transaction
from qa_platform.clients.schema import ANSWERS, KEY
from qa_platform.errors import InputError


def stored_answers(connection: psycopg.Connection, columns: Sequence[str], where: Mapping[str, str | None]) -> Iterator[tuple[Any, ...]]:
    """Stream rows of `clients.schema.ANSWERS`, ordered by file and row number.

    Args:
        columns: the columns to read.
        where: the values that a row must have, by column. PostgreSQL casts them to the columns' types; None is NULL.

    Raises:
        InputError: there is no such column, or a value does not fit its column's type.
    """
    for name in [*columns, *where]:
        if name not in ANSWERS.names:
            raise InputError(
                "there is no such column", where=f"{ANSWERS.name}.{name}", advice=f"the columns are {', '.join(ANSWERS.names)}"
            )
    query = sql.SQL("SELECT {} FROM {} WHERE {} ORDER BY {}").format(
        _names(columns), sql.Identifier(ANSWERS.name), sql.SQL(" AND ").join(_condition(*item) for item in where.items()), _names(KEY)
    )
    with long_transaction(connection, about="reading answers") as cursor:
        yield from cursor.stream(query, where)


def _names(columns: Sequence[str]) -> sql.Composable:
    return sql.SQL(", ").join(map(sql.Identifier, columns))


def _condition(column: str, value: str | None) -> sql.Composable:
    if value is None:
        return sql.SQL("{} IS NULL").format(sql.Identifier(column))
    # The type without its length, to which a cast would cut the value.
    of_type = sql.SQL(ANSWERS.base_types[column])
    return sql.SQL("{} = {}::{}").format(sql.Identifier(column), sql.Placeholder(column), of_type)
