"""Markdown for Dagster's pages: tables out of cells that nobody has checked, and scores as a small picture.

Standard library only.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

# Dagster's pages show Markdown in place if it is shorter than this, in JavaScript's characters; else behind a link.
INLINE_LIMIT = 1_000
# Characters that a cell shows, in a table of short cells and in ones that would grow too long.
_CELL_CHARACTERS = (120, 80, 60, 45, 30, 20)
# What is longer without a space is no word, but a name, or a script that writes none: that is cut anywhere.
_WORD_CHARACTERS = 30

# Line ends and control characters would end a table's row; the others turn the direction of the text that follows.
_INVISIBLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200b\u202a-\u202e\u2066-\u2069\ufeff]+")
# Whatever Markdown, HTML or a formula could take for its own inside of a table's cell.
_SPECIAL = re.compile(r"[\\`*_\[\]<>~&$]")
# What is made a link without any mark-up. A zero-width space keeps it text.
_AUTOLINKS = re.compile(r"(?<=:)(?=//)|(?<=www)(?=\.)|(?=@)", re.IGNORECASE)

_STEP, _HEIGHT, _BASE, _TOP = 16, 96, 78, 16
# Readable on white and on Dagster's dark background: an image does not know the theme around it.
_TEXT_COLOUR, _BAR_COLOUR, _LOW_COLOUR = "#7d8590", "#4f7cd8", "#d9822b"


@dataclass(frozen=True)
class Passage:
    """A piece of a text between what stands before and after it. A cell without room for all of it is cut around the piece."""

    before: str
    piece: str
    after: str

    def shown(self, characters: int) -> str:
        """On one line, of at most so many characters, cut between words with an ellipsis at each end that is cut."""
        before, piece, after = (_spaced(text) for text in (self.before, self.piece, self.after))
        room = characters - len(piece)
        if len(whole := f"{before}{piece}{after}".strip()) <= characters:
            return whole
        if room < 2:
            return _shortened(piece.strip(), characters)
        left = max(room // 2, room - len(after))
        start = _shortened(before[::-1].rstrip(), left)[::-1]
        return f"{start}{piece}{_shortened(after.rstrip(), room - len(start))}".strip()


def cell(value: object, *, characters: int = _CELL_CHARACTERS[0]) -> str:
    """A value as plain text in a table's cell, cut, on one line, in which nothing is mark-up, whatever it is."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3f}"
    text = value.shown(characters) if isinstance(value, Passage) else _shortened(_spaced(str(value)).strip(), characters)
    text = _AUTOLINKS.sub("\u200b", text)
    return _SPECIAL.sub(r"\\\g<0>", text).replace("|", "&#124;")


def _spaced(text: str) -> str:
    """The text on one line, with single spaces."""
    return re.sub(r"\s+", " ", _INVISIBLE.sub(" ", text))


def _shortened(text: str, characters: int) -> str:
    """The beginning of a text, of at most so many characters, cut between words."""
    if len(text) <= characters:
        return text
    kept, rest = text[: characters - 1], text[characters - 1 :]
    words, space, begun = kept.rpartition(" ")
    if space and rest[0] != " " and len(begun) + len(rest.partition(" ")[0]) <= _WORD_CHARACTERS:
        kept = words
    return f"{kept.rstrip(' .,;:')}…"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table of cells as `cell` shows them, shorter than INLINE_LIMIT: cells are cut, and last rows counted, until it is."""
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
    """How many scores lie in each of as many equal parts of 0 to 1, as an inline picture; those below ``low`` in another colour."""
    most, width = max(counts, default=0) or 1, _STEP * len(counts) + 8
    bars = {_BAR_COLOUR: "", _LOW_COLOUR: ""}
    for number, count in enumerate(counts):
        if count:
            # A single answer among a million is still seen.
            top = min(_BASE - 1, round(_BASE - (_BASE - _TOP) * count / most))
            colour = _LOW_COLOUR if (number + 1) / len(counts) <= low + 1e-9 else _BAR_COLOUR
            bars[colour] += f"M{4 + number * _STEP} {_BASE}V{top}h{_STEP - 1}V{_BASE}"
    paths = "".join(f"<path d='{path}' fill='{colour}'/>" for colour, path in bars.items() if path)
    labels = f"<text x='4' y='92'>0</text><text x='{width // 2 - 14}' y='92'>score</text><text x='{width - 10}' y='92'>1</text>"
    svg = (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{_HEIGHT}'>{paths}"
        f"<g font-family='sans-serif' font-size='11' fill='{_TEXT_COLOUR}'><path d='M4 {_BASE}h{width - 8}v1H4'/>"
        f"<text x='4' y='10'>{most:,}</text>{labels}</g></svg>"
    )
    # In base64 it would be a third longer.
    encoded = re.sub("[<>#%]", lambda match: f"%{ord(match.group()):02X}", svg)
    return f"![answers by score, at most {most:,}](<data:image/svg+xml,{encoded}>)"
