"""What is told to the owner of a rejected file or of rejected rows: where, why, and what to do."""

import json
from collections.abc import Iterable
from typing import Any

from qa_platform.contract import Rejection
from qa_platform.ingest.damage import ROW_HINTS, FileRejected


def rejected_report(name: str, *, file: FileRejected | None = None, rows: Iterable[Rejection] = (), as_json: bool = False) -> str:
    """A report on a rejected file, or on rejected rows of a file that was read: text, or a JSON object.

    JSON: ``file``, then ``reason``, ``detail``, ``line``, ``offset``, ``hint`` (null where the file was read), and ``rows``, a list of
    ``row``, ``line``, ``column``, ``reason``, ``detail``, ``hint``. Cells are not repeated in it. A name cannot forge a line of the text.
    """
    facts: dict[str, Any] = {"file": name, "reason": None, "detail": None, "line": None, "offset": None, "hint": None}
    if file:
        facts |= {"reason": file.reason, "detail": file.detail, "line": file.line, "offset": file.offset, "hint": file.hint}
    if as_json:
        return json.dumps({**facts, "rows": [_row_facts(row) for row in rows]}, indent=1) + "\n"
    lines = [f"{_shown(name)}: rejected, {file}"] if file else [f"{_shown(name)}: rejected rows"]
    lines += [_row_line(row) for row in rows]
    return "\n".join(lines) + "\n"


def _row_facts(row: Rejection) -> dict[str, Any]:
    return {
        "row": row.row,
        "line": row.line,
        "column": row.column,
        "reason": row.reason,
        "detail": row.detail,
        "hint": ROW_HINTS.get(row.reason, ""),
    }


def _row_line(row: Rejection) -> str:
    column = f", column {_shown(row.column)}" if row.column else ""
    detail = f": {row.detail}" if row.detail else ""
    return f"  line {row.line} (row {row.row}{column}): {row.reason}{detail}. {ROW_HINTS.get(row.reason, '')}".rstrip()


def _shown(name: str) -> str:
    return name if name.isprintable() else ascii(name)
