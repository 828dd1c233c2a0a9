"""Rows of the table of answers, chosen by the values of their columns."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import psycopg
from psycopg import sql

from qa_platform.clients.postgres import transaction
from qa_platform.clients.schema import ANSWERS, KEY
from qa_platform.errors import InputError


def answer_rows(connection: psycopg.Connection, columns: Sequence[str], where: Mapping[str, str | None]) -> Iterator[tuple[Any, ...]]:
    """The rows of `clients.schema.ANSWERS`, in the order of file and row number, as a stream.

    Args:
        columns: the columns to read.
        where: a row is read if each of these columns has this value, which PostgreSQL reads as the column's type; None is NULL.

    Raises:
        InputError: there is no such column, or a value is none of its column's type.
    """
    for name in [*columns, *where]:
        if name not in ANSWERS.names:
            raise InputError(
                "there is no such column", where=f"{ANSWERS.name}.{name}", advice=f"the columns are {', '.join(ANSWERS.names)}"
            )
    query = sql.SQL("SELECT {} FROM {} WHERE {} ORDER BY {}").format(
        _names(columns), sql.Identifier(ANSWERS.name), sql.SQL(" AND ").join(_condition(*item) for item in where.items()), _names(KEY)
    )
    with transaction(connection, about="reading answers") as cursor:
        yield from cursor.stream(query, where)


def _names(columns: Sequence[str]) -> sql.Composable:
    return sql.SQL(", ").join(map(sql.Identifier, columns))


def _condition(column: str, value: str | None) -> sql.Composable:
    if value is None:
        return sql.SQL("{} IS NULL").format(sql.Identifier(column))
    # The type has no length, to which a cast would cut the value.
    of_type = sql.SQL(ANSWERS.base_types[column])
    return sql.SQL("{} = {}::{}").format(sql.Identifier(column), sql.Placeholder(column), of_type)
