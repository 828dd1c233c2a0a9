"""The part of a stream that has been read but not yet used, and its position in the file."""

from typing import Protocol

_BLOCK = 2**20


class ByteSource(Protocol):
    """A stream of bytes, which need not be seekable. ``read(n)`` returns at most ``n`` bytes, and none only at the end."""

    def read(self, size: int, /) -> bytes: ...


class Buffer:
    """A stream's bytes from the beginning of a record on.

    ``data`` begins at ``line`` (from 1) and ``offset`` (bytes from the file's beginning, from 0). ``ended``: the stream is exhausted.
    ``read``: the number of bytes that were read.
    """

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self.read = 0
        self.ended = False
        self.data = b""
        self.line = 1
        self.offset = 0

    def fill(self) -> None:
        """Read one more block, a whole one unless the stream ends.

        A source may return less than requested. An unfinished record is parsed again after every block, so small blocks would make a long
        record take quadratic time.
        """
        pieces, missing = [], _BLOCK
        while missing and (piece := self._source.read(missing)):
            pieces.append(piece)
            missing -= len(piece)
        block = b"".join(pieces)
        self.data += block
        self.read += len(block)
        self.ended = not block

    def fill_beyond(self, length: int) -> None:
        """Read until there are more than ``length`` bytes, or the stream ends."""
        while len(self.data) <= length and not self.ended:
            self.fill()

    def advance(self, length: int, lines: int) -> None:
        """Drop ``length`` bytes, which hold ``lines`` line feeds."""
        self.data = self.data[length:]
        self.offset += length
        self.line += lines
