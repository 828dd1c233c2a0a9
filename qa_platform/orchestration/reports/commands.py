"""What a person types next about a file: the query for its answers, the command for its rejected rows."""

import dagster as dg

from qa_platform.text import as_argument


def answers_query(name: str) -> dg.MetadataValue:
    """The SQL that reads a file's answers."""
    columns = "row_number, question, answer, score, flag"
    where = f"source_file = {_literal(name)}"
    return dg.MetadataValue.text(f"SELECT {columns} FROM question_answer WHERE {where} ORDER BY row_number")  # noqa: S608  # for people


def rejects_command(name: str) -> dg.MetadataValue:
    """The command that says which rows were rejected, why, and what to do about them."""
    return dg.MetadataValue.text(f"qa-platform answers --rejected {as_argument(name)}")


def _literal(text: str) -> str:
    """A text as an SQL literal of printable characters, so that a page can show it."""
    quoted = text.replace("'", "''")
    if text.isprintable():
        return f"'{quoted}'"
    return "E'" + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in quoted.replace("\\", "\\\\")) + "'"
