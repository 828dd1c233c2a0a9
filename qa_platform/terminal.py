"""What the commands put on a terminal, or into a pipe: lines that fit, colours only where they are seen, nothing that a name forges."""

from collections.abc import Collection, Sequence
from datetime import timedelta

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

_GAP = "  "
# A cut name is still one, and its tail tells it from its neighbours.
_LEAST_WIDTH = 8
_ELLIPSIS = "…"


def console(*, stderr: bool = False) -> Console:
    """Where people read. rich leaves colours out where no terminal is, and where NO_COLOR is set."""
    # Markup off: names and messages may hold square brackets.
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False)


def shown(text: str) -> str:
    """A text on one line, with everything that a terminal would obey written as an escape."""
    line = " ".join(text.split())
    return line if line.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def escaped(text: str) -> str:
    """A text as it is, spaces and tabs too, but with everything else that a terminal would obey written as an escape."""
    return "".join(c if c.isprintable() or c == "\t" else ascii(c)[1:-1] for c in text)


def cut(text: str, width: int) -> str:
    """A text of at most ``width`` cells, without its middle where it is longer."""
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
        width: of a line, at most, as far as cutting the column ``flexible`` achieves that; None cuts nothing.
        right: columns that are aligned to the right.
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
    """A count in at most six characters up to a thousand million: ``999999``, ``12.5M``."""
    return str(count) if count < 1_000_000 else f"{count / 1_000_000:.1f}M"


def age(passed: timedelta) -> str:
    """``8s``, ``3m``, ``2h``, ``5d``: the largest unit of which there are two."""
    seconds = max(0, int(passed.total_seconds()))
    for unit, length in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"
