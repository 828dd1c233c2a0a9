"""Where one record of a CSV ends, also where the ``csv`` module refuses it."""

import enum
import re


class State(enum.Enum):
    """What lies before the next byte."""

    CELL_START = enum.auto()
    PLAIN = enum.auto()
    QUOTED = enum.auto()
    QUOTE = enum.auto()  # a quote inside a quoted cell: it closes the cell, unless another one follows


# From outside quotes, all text and cells that are there as a whole. Possessive, so that nothing is tried twice.
_WHOLE_CELLS = re.compile(rb'(?:[^,\n]++|,(?=[^"])|,"(?:[^"]++|"")*+"(?=[^"]))*+')
_QUOTES = re.compile(rb'"*')


class RecordEnd:
    """Finds the line feed that ends a record, over as many pieces as it takes.

    The borders are those of ``csv.reader`` without ``strict`` over lines that end in LF: text after a closing quote goes on as an
    unquoted cell. Unlike there, a carriage return outside quotes is a character like any other, so that it breaks one row, not two.
    """

    def __init__(self) -> None:
        self.state = State.CELL_START

    @property
    def in_quotes(self) -> bool:
        return self.state is State.QUOTED

    def find(self, data: bytes, start: int = 0) -> int:
        """The position after the record's line feed in ``data``, searched from ``start``; -1 where the record goes on beyond it."""
        at = start
        while at < len(data):
            if self.state is State.QUOTED:
                quote = data.find(b'"', at)
                if quote < 0:
                    return -1
                at = _end_of(_QUOTES, data, quote)
                self.state = State.QUOTE if (at - quote) % 2 else State.QUOTED
            elif self.state is State.PLAIN:
                at = _end_of(_WHOLE_CELLS, data, at)
                if data[at : at + 1] == b"\n":
                    return at + 1
                if at < len(data):  # a comma, and then the piece ends or begins a quoted cell that it does not end
                    at += 1
                    self.state = State.CELL_START
            elif data[at : at + 1] == b'"':
                at += 1
                self.state = State.QUOTED
            else:
                self.state = State.PLAIN
        return -1


def _end_of(pattern: re.Pattern[bytes], data: bytes, start: int) -> int:
    """Where a match at ``start`` ends, of a pattern that matches everywhere."""
    found = pattern.match(data, start)
    assert found
    return found.end()


def whole_characters(data: bytes) -> int:
    """How many of the bytes surely hold whole UTF-8 characters: all but a last one that may be cut."""
    for back in range(1, min(4, len(data)) + 1):
        if data[-back] & 0xC0 != 0x80:
            return len(data) - back if data[-back] >= 0xC0 else len(data)
    return len(data)
