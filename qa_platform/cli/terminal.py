"""Text for a terminal or a pipe: lines that fit, colours for terminals only, and no control characters from names."""

import os
import re
import sys
from collections.abc import Collection, Sequence
from datetime import timedelta
from typing import BinaryIO

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from qa_platform.errors import InputError
from qa_platform.text import escaped

_GAP = "  "
# A name that is cut to this width can still be recognised.
_LEAST_WIDTH = 8
_ELLIPSIS = "…"
# The white space of a message. Not \s, which includes Unicode's line separators.
_WHITESPACE = re.compile("[ \t\r\n]+")


def console(*, stderr: bool = False) -> Console:
    """A console without markup. rich omits colours if there is no terminal, or if NO_COLOR is set."""
    # No markup: names and messages may contain square brackets.
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False)


def rows_out() -> BinaryIO:
    """Standard output, for rows.

    Raises:
        InputError: the caller closed it, so the rows would be lost.
    """
    if getattr(sys.stdout, "name", "") == os.devnull:
        raise InputError("standard output is closed", advice="redirect it, or name a file with -o")
    return sys.stdout.buffer


def one_line(text: str) -> str:
    """A message on one line, escaped by `text.escaped`."""
    return escaped(_WHITESPACE.sub(" ", text.strip()))


def cut(text: str, width: int) -> str:
    """A text of at most ``width`` cells. In a longer text, an ellipsis replaces the middle."""
    if cell_len(text) <= width:
        return text
    tail = (width - 1) // 2
    head = set_cell_size(text, width - 1 - tail).rstrip()
    return head + _ELLIPSIS + set_cell_size(text[::-1], tail)[::-1].lstrip()


def table(
    headers: Sequence[str], rows: Sequence[Sequence[str | Text]], *, width: int | None, flexible: int = 0, right: Collection[int] = ()
) -> list[Text]:
    """Lines of aligned columns, the headers first.

    Args:
        width: the longest line; None for no limit. Only the column ``flexible`` is cut, and never below a minimum width.
        right: the indexes of the right-aligned columns.
    """
    lines = [[Text(header.upper(), "bold") for header in headers]]
    lines += [[cell if isinstance(cell, Text) else Text(cell) for cell in row] for row in rows]
    widths = [max(cell.cell_len for cell in column) for column in zip(*lines, strict=True)]
    if width is not None:
        excess = sum(widths) + len(_GAP) * (len(widths) - 1) - width
        widths[flexible] = min(widths[flexible], max(widths[flexible] - excess, _LEAST_WIDTH))
    return [_line(line, widths, right) for line in lines]


def _line(cells: Sequence[Text], widths: Sequence[int], right: Collection[int]) -> Text:
    line = Text()
    for index, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        plain = cut(cell.plain, width)
        padding = " " * (width - cell_len(plain))
        line.append(_GAP if index else "")
        line.append(padding if index in right else "")
        line.append(plain, cell.style)
        line.append("" if index in right else padding)
    line.rstrip()
    return line


def compact(count: int) -> str:
    """A count in at most six characters, up to a billion: ``999999``, ``12.5M``."""
    return str(count) if count < 1_000_000 else f"{count / 1_000_000:.1f}M"


def age(passed: timedelta) -> str:
    """``8s``, ``3m``, ``2h``, ``5d``: in the largest unit that fits at least twice."""
    seconds = max(0, int(passed.total_seconds()))
    for unit, length in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"
