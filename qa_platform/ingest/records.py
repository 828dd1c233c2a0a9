"""Finding the end of a CSV record, even of one that the ``csv`` module refuses."""

import enum
import re

from qa_platform.ingest.dialect import DELIMITERS


class State(enum.Enum):
    """The scanner's state before the next byte."""

    CELL_START = enum.auto()
    PLAIN = enum.auto()
    QUOTED = enum.auto()
    QUOTE = enum.auto()  # a quote inside a quoted cell: it closes the cell, unless another one follows


# By delimiter: matches all text and complete cells, from outside quotes. Possessive, so that it never backtracks.
_WHOLE_CELLS = {
    delimiter: re.compile(rb'(?:[^%s\n]++|%s(?=[^"])|%s"(?:[^"]++|"")*+"(?=[^"]))*+' % ((re.escape(delimiter.encode()),) * 3))
    for delimiter in DELIMITERS
}
_QUOTES = re.compile(rb'"*')


class RecordEnd:
    """Finds the line feed that ends a record, across any number of pieces.

    Records end where ``csv.reader`` without ``strict`` ends them, over lines that end in LF: text after a closing quote continues the cell,
    unquoted. Unlike in ``csv.reader``, a carriage return outside quotes is an ordinary character, so that it damages one row, not two.
    """

    def __init__(self, delimiter: str = ",") -> None:
        self.state = State.CELL_START
        self._whole_cells = _WHOLE_CELLS[delimiter]

    @property
    def in_quotes(self) -> bool:
        return self.state is State.QUOTED

    def find(self, data: bytes, start: int = 0) -> int:
        """The position after the record's line feed in ``data``, searched from ``start``; -1 if the record continues beyond ``data``."""
        at = start
        while at < len(data):
            if self.state is State.QUOTED:
                quote = data.find(b'"', at)
                if quote < 0:
                    return -1
                at = _end_of(_QUOTES, data, quote)
                self.state = State.QUOTE if (at - quote) % 2 else State.QUOTED
            elif self.state is State.PLAIN:
                at = _end_of(self._whole_cells, data, at)
                if data[at : at + 1] == b"\n":
                    return at + 1
                if at < len(data):  # a delimiter, followed by the piece's end or by a quoted cell that continues beyond it
                    at += 1
                    self.state = State.CELL_START
            elif data[at : at + 1] == b'"':
                at += 1
                self.state = State.QUOTED
            else:
                self.state = State.PLAIN
        return -1


def _end_of(pattern: re.Pattern[bytes], data: bytes, start: int) -> int:
    """The end of the match at ``start``, of a pattern that matches everywhere."""
    match = pattern.match(data, start)
    assert match
    return match.end()


def whole_characters(data: bytes) -> int:
    """The number of leading bytes that hold whole UTF-8 characters: all but those of a last character that may be incomplete."""
    for back in range(1, min(4, len(data)) + 1):
        if data[-back] & 0xC0 != 0x80:
            return len(data) - back if data[-back] >= 0xC0 else len(data)
    return len(data)
