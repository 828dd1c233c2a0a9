"""Markdown for Dagster's pages: tables of cells with any content, and bars as a small picture."""

import re
from collections.abc import Sequence

from qa_platform.results.passage import Passage, one_line, shortened

# Dagster's pages show Markdown inline if it has fewer UTF-16 code units than this, else behind a link.
INLINE_LIMIT = 1_000
# The maximum number of characters in a cell: the first of these for which the table is shorter than INLINE_LIMIT.
_CELL_CHARACTERS = (120, 80, 60, 45, 30, 20)
# Characters with a meaning in Markdown, HTML or formulas inside a table's cell.
_SPECIAL = re.compile(r"[\\`*_\[\]<>~&$]")
# Where Markdown makes a link without any mark-up. A zero-width space prevents it.
_AUTOLINKS = re.compile(r"(?<=:)(?=//)|(?<=www)(?=\.)|(?=@)", re.IGNORECASE)

_STEP, _HEIGHT, _BASE, _TOP = 16, 96, 78, 16
# Readable on white and on Dagster's dark background: an image does not know the theme of the page.
_TEXT_COLOUR, _BAR_COLOUR, _LOW_COLOUR = "#7d8590", "#4f7cd8", "#d9822b"


def cell(value: object, *, characters: int = _CELL_CHARACTERS[0]) -> str:
    """Any value as plain text in a table's cell: on one line, cut, with everything escaped that could be mark-up."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3f}"
    text = value.shown(characters) if isinstance(value, Passage) else shortened(one_line(str(value)).strip(), characters)
    text = _AUTOLINKS.sub("\u200b", text)
    return _SPECIAL.sub(r"\\\g<0>", text).replace("|", "&#124;")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table shorter than INLINE_LIMIT, with cells as `cell` renders them.

    If it would be longer, cells are cut further, and then the last rows are dropped and counted.
    """
    if not rows:
        return "none"
    for characters in _CELL_CHARACTERS:
        lines = [_line(row, characters) for row in rows]
        if _fits(text := _joined(header, lines)):
            return text
    while len(lines) > 1 and not _fits(text):
        lines.pop()
        text = f"{_joined(header, lines)}\n\nand {len(rows) - len(lines)} more"
    return text


def _joined(header: Sequence[str], lines: Sequence[str]) -> str:
    return "\n".join([_line(header, _CELL_CHARACTERS[0]), "|" + "---|" * len(header), *lines])


def _line(values: Sequence[object], characters: int) -> str:
    return f"| {' | '.join(cell(value, characters=characters) for value in values)} |"


def _fits(text: str) -> bool:
    return len(text.encode("utf-16-le")) // 2 < INLINE_LIMIT


def histogram(counts: Sequence[int], *, low: float) -> str:
    """The numbers of scores in equal intervals from 0 to 1, as an inline picture. Scores below ``low`` have another colour."""
    bars = [(0, count) if (number + 1) / len(counts) <= low + 1e-9 else (count, 0) for number, count in enumerate(counts)]
    return _picture(bars, "answers by score", ("0", "score", "1"))


def bar_chart(bars: Sequence[tuple[int, int]], what: str, first: str, last: str) -> str:
    """Two numbers per bar, the second on top of the first, as an inline picture.

    Args:
        what: what is counted, in words.
        first: the text below the first bar.
        last: the text below the last bar.
    """
    return _picture(bars, what, (first, "", last))


def _picture(bars: Sequence[tuple[int, int]], what: str, labels: tuple[str, str, str]) -> str:
    most, width = max(map(sum, bars), default=0) or 1, _STEP * len(bars) + 8

    def top(count: int) -> int:
        # A single answer among a million stays visible.
        return min(_BASE - 1, round(_BASE - (_BASE - _TOP) * count / most)) if count else _BASE

    lower = upper = ""
    for number, (below, above) in enumerate(bars):
        left, middle = 4 + number * _STEP, top(below)
        if below:
            lower += f"M{left} {_BASE}V{middle}h{_STEP - 1}V{_BASE}"
        if above:
            upper += f"M{left} {middle}V{min(top(below + above), middle - 1)}h{_STEP - 1}V{middle}"
    paths = "".join(f"<path d='{path}' fill='{colour}'/>" for path, colour in ((lower, _BAR_COLOUR), (upper, _LOW_COLOUR)) if path)
    places = ("x='4'", f"x='{width // 2}' text-anchor='middle'", f"x='{width - 4}' text-anchor='end'")
    words = "".join(f"<text {place} y='92'>{label}</text>" for place, label in zip(places, labels, strict=True) if label)
    svg = (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{_HEIGHT}'>{paths}"
        f"<g font-family='sans-serif' font-size='11' fill='{_TEXT_COLOUR}'><path d='M4 {_BASE}h{width - 8}v1H4'/>"
        f"<text x='4' y='10'>{most:,}</text>{words}</g></svg>"
    )
    # Not base64, which would be a third longer.
    encoded = re.sub("[<>#%]", lambda match: f"%{ord(match.group()):02X}", svg)
    return f"![{what}, at most {most:,}](<data:image/svg+xml,{encoded}>)"
