"""The bytes of a CSV: those of its stream, decompressed if the stream is gzip."""

import zlib

from qa_platform.contract import GZIP_FREE, GZIP_LIMIT, GZIP_RATIO, FileReason
from qa_platform.errors import TransientError
from qa_platform.ingest.buffer import ByteSource
from qa_platform.ingest.damage import FileRejected

_MAGIC = b"\x1f\x8b"
# Tells zlib to expect a gzip header, and to check the checksum and the length after the data.
_GZIP = 16 + zlib.MAX_WBITS
# Compressed bytes per read. The rest of a block is copied after each member, so a large block of many small members would take long.
_BLOCK = 2**14


class Unpacked:
    """A stream's bytes, decompressed while they are read if the first two are those of gzip.

    The object's name and attributes are ignored, since tools compress and decompress in transit without renaming. Several members in a
    row are one file, and zeros may follow, as for ``gunzip``.

    Args:
        size: the number of bytes that ``source`` must give, 0 if unknown. Fewer mean a broken download, not a damaged file.
    """

    def __init__(self, source: ByteSource, *, size: int = 0) -> None:
        self._source = source
        self._size = size
        self._stored = 0
        self._unpacked = 0
        # Read from the source, but not used yet.
        self._came = b""
        self._is_gzip: bool | None = None
        self._member: zlib._Decompress | None = None

    def read(self, size: int, /) -> bytes:
        """The next bytes, at most ``size``; none at the end.

        Raises:
            FileRejected: the gzip data is damaged, cut off, or unpacks to too much.
            TransientError: the stream ended early.
        """
        if self._is_gzip is None:
            self._is_gzip = self._begins_as_gzip()
        if self._is_gzip:
            return self._unpack(size)
        if not self._came:
            return self._fetch(size)
        content, self._came = self._came[:size], self._came[size:]
        return content

    def _begins_as_gzip(self) -> bool:
        while len(self._came) < len(_MAGIC) and (block := self._fetch(_BLOCK)):
            self._came += block
        return self._came.startswith(_MAGIC)

    def _fetch(self, size: int) -> bytes:
        block = self._source.read(size)
        self._stored += len(block)
        if not block and self._stored < self._size:
            raise TransientError(f"the file's stream ended after {self._stored:,} of {self._size:,} bytes", advice="read it again")
        return block

    def _unpack(self, size: int) -> bytes:
        while True:
            self._came = self._came or self._fetch(_BLOCK)
            ended = not self._came
            if self._member is None:
                # Zeros pad the last block on a tape or a disk.
                self._came = self._came.lstrip(b"\0")
                if ended:
                    return b""
                if not self._came:
                    continue
                self._member = zlib.decompressobj(_GZIP)
            if content := self._inflate(self._member, size):
                return content
            if ended:
                raise FileRejected(FileReason.DAMAGED_GZIP, f"the gzip data is cut off after {self._stored:,} bytes")

    def _inflate(self, member: "zlib._Decompress", size: int) -> bytes:
        try:
            content = member.decompress(self._came, size)
        except zlib.error as error:
            raise FileRejected(FileReason.DAMAGED_GZIP, f"the gzip data cannot be decompressed: {error}") from error
        self._came = member.unused_data if member.eof else member.unconsumed_tail
        if member.eof:
            self._member = None
        self._unpacked += len(content)
        if self._unpacked > min(GZIP_LIMIT, max(GZIP_FREE, GZIP_RATIO * self._stored)):
            detail = f"its first {self._stored:,} bytes unpack to more than {self._unpacked - len(content):,}"
            raise FileRejected(FileReason.GZIP_BOMB, detail)
        return content
