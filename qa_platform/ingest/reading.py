"""Reading rows from a stream of bytes, in one pass and bounded memory. Each row is good, or rejected with a reason."""

import collections
import io
import itertools
from bisect import bisect_left
from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

from qa_platform.contract import RAW_LIMIT, REJECT_LIMIT, ROW_LIMIT, FileReason, Rejection, RowReason, column_label
from qa_platform.ingest.buffer import Buffer, ByteSource
from qa_platform.ingest.damage import FileRejected, decoded, unbalanced_quote
from qa_platform.ingest.dialect import BARE_RETURN, CsvError, csv_line, csv_reader, parse, with_line_end
from qa_platform.ingest.header import read_header
from qa_platform.ingest.records import RecordEnd, whole_characters
from qa_platform.ingest.rules import TABLE_LIMITS, TextLimits, fault_of_row, is_blank, storable
from qa_platform.ingest.unpacking import Unpacked


class Row(NamedTuple):
    """One data row. It is a tuple, because making a frozen dataclass per row costs as much as parsing it.

    ``row`` counts data rows from 1. ``line`` is the line of the file on which the row begins, from 1. ``cells`` has one cell per column.
    ``raw`` is the record as it is written into a shard, with commas and its line end. In a rejected row, cells that cannot be kept are
    empty in both.
    """

    row: int
    line: int
    cells: Sequence[str]
    raw: bytes
    rejection: Rejection | None


class _BlockEndError(Exception):
    """The lines of a block are used up, but the current record continues in the next block."""


class RowReader:
    """Reads a CSV once, decompressing gzip: the header when the reader is created, the rows while it is iterated.

    ``columns`` are the header's names, renamed where they clash with ours; ``question`` and ``context`` are positions in them. ``blank``
    counts the blank lines and the rows whose cells are all empty; both are skipped. ``reasons`` counts the rejected rows by reason.

    Args:
        limits: the limits on questions and contexts.
        size: the number of bytes that ``source`` must give, 0 if unknown. Fewer mean a broken download, not a damaged file.

    Raises:
        FileRejected: the file is damaged. Raised as soon as that is found, here or during iteration.
        TransientError: the stream ended early.
    """

    def __init__(self, source: ByteSource, *, limits: TextLimits = TABLE_LIMITS, size: int = 0) -> None:
        self._limits = limits
        # Always begins at the beginning of a record.
        self._buffer = Buffer(Unpacked(source, size=size))
        self._row = 0
        self.blank = 0
        self.reasons: collections.Counter[RowReason] = collections.Counter()
        header = read_header(self._buffer)
        self.columns = header.columns
        self.question = header.question
        self.context = header.context
        self.delimiter = header.delimiter

    def __iter__(self) -> Iterator[Row]:
        buffer = self._buffer
        while True:
            buffer.fill()
            cut = len(buffer.data) if buffer.ended else buffer.data.rfind(b"\n") + 1
            lines, length = yield from self._parse(buffer.data[:cut])
            buffer.advance(length, lines)
            if len(buffer.data) > ROW_LIMIT and not buffer.ended:
                yield self._skip_record()
            if buffer.ended:
                break
        if not self._row:
            blank = f", only {self.blank:,} blank ones" if self.blank else ""
            raise FileRejected(FileReason.HEADER_ONLY, f"there is no row below the header{blank}")

    def _parse(self, block: bytes) -> Generator[Row, None, tuple[int, int]]:
        """Yield the rows of a block of whole lines. Returns the numbers of lines and bytes used: the last row may be unfinished."""
        width, question, context = len(self.columns), self.question, self.context
        has_commas = self.delimiter == ","
        question_limit, context_limit = self._limits.question, self._limits.context
        first_line, lines = self._buffer.line, io.BytesIO(block).readlines()
        ends = list(itertools.accumulate(map(len, lines), initial=0))
        clean = b"\0" not in block and b"\r\r\n" not in block and block.endswith(b"\n")
        pending = iter(lines)
        texts = itertools.chain(map(bytes.decode, pending), () if self._buffer.ended else _block_end())
        done = 0
        while done < len(lines):
            reader = csv_reader(texts, delimiter=self.delimiter)
            first = done
            try:
                for cells in reader:
                    end = first + reader.line_num
                    raw = block[ends[done] : ends[end]]
                    # The common case in one condition, for speed: this runs for every row.
                    if (
                        clean
                        and len(cells) == width
                        and 0 < len(cells[question]) <= question_limit
                        and 0 < len(cells[context]) <= context_limit
                        and (cells[question][0].isalnum() or not is_blank(cells[question]))
                        and (cells[context][0].isalnum() or not is_blank(cells[context]))
                        and len(raw) <= ROW_LIMIT
                    ):
                        self._row += 1
                        yield Row(self._row, first_line + done, cells, raw if has_commas else csv_line(cells), None)
                    elif any(cells) or len(raw) > ROW_LIMIT:
                        yield self._judged(raw, first_line + done, cells)
                    else:
                        self.blank += 1
                    done = end
            except _BlockEndError:
                break
            except (CsvError, UnicodeDecodeError):
                length = self._damaged_length(block, ends[done], first_line + done)
                if not length:
                    break
                end = bisect_left(ends, ends[done] + length, done)
                yield self._damaged(block[ends[done] : ends[end]], first_line + done, self._buffer.offset + ends[done])
                done = end
                pending.__setstate__(end)  # type: ignore[attr-defined]
        return done, ends[done]

    # Rows that need a closer look

    def _judged(self, raw: bytes, line: int, cells: list[str]) -> Row:
        """The row of a record that could be parsed, rejected if it has a fault."""
        if len(raw) > ROW_LIMIT:
            return self._too_large(raw, line, size=len(raw), lines=raw.count(b"\n"))
        fault = fault_of_row(cells, width=len(self.columns), question=self.question, context=self.context, limits=self._limits)
        if fault:
            column = "" if fault.cell is None else column_label(self.columns[fault.cell])
            return self._rejected(raw, line, fault.reason, cells=cells, column=column, detail=fault.detail)
        self._row += 1
        return Row(self._row, line, cells, with_line_end(raw) if self.delimiter == "," else csv_line(cells), None)

    def _too_large(self, raw: bytes, line: int, *, size: int, lines: int) -> Row:
        detail = f"{size:,} bytes on {max(1, lines):,} lines; {ROW_LIMIT:,} bytes are allowed"
        return self._rejected(raw, line, RowReason.ROW_TOO_LARGE, detail=detail)

    def _rejected(self, raw: bytes, line: int, reason: RowReason, *, cells: Sequence[str] = (), column: str = "", detail: str = "") -> Row:
        """A rejected row. ``cells`` is empty if the cells' borders are in doubt. Extra cells are dropped, missing ones are empty."""
        self._row += 1
        self._count(reason, line)
        kept = [self._kept(index, cell) for index, cell in enumerate(cells[: len(self.columns)])]
        kept += [""] * (len(self.columns) - len(kept))
        rejection = Rejection(self._row, line, reason, column=column, detail=detail, raw=_escaped(raw))
        return Row(self._row, line, kept, csv_line(kept), rejection)

    def _count(self, reason: RowReason, line: int) -> None:
        self.reasons[reason] += 1
        rejected = self.reasons.total()
        if rejected > REJECT_LIMIT and 2 * rejected > self._row:
            common, times = self.reasons.most_common(1)[0]
            detail = f"{rejected:,} of the first {self._row:,} rows are rejected, {times:,} of them as {common}"
            raise FileRejected(FileReason.TOO_MANY_BAD_ROWS, detail, line=line)

    def _limit(self, position: int) -> int:
        limits = {self.question: self._limits.question, self.context: self._limits.context}
        return limits.get(position, ROW_LIMIT)

    def _kept(self, position: int, cell: str) -> str:
        return cell if storable(cell) and len(cell) <= self._limit(position) else ""

    # Records that the parser refuses

    def _damaged_length(self, block: bytes, start: int, line: int) -> int:
        """The length in bytes of the record at ``start``, which the parser refused; 0 if it continues beyond the block."""
        scan = RecordEnd(self.delimiter)
        end = scan.find(block, start)
        if end >= 0:
            return end - start
        if not self._buffer.ended:
            return 0
        decoded(block[start:], line=line, offset=self._buffer.offset + start)
        if scan.in_quotes:
            raise unbalanced_quote(line)
        return len(block) - start

    def _damaged(self, raw: bytes, line: int, offset: int) -> Row:
        text = decoded(raw, line=line, offset=offset)
        if len(raw) > ROW_LIMIT:
            return self._too_large(raw, line, size=len(raw), lines=raw.count(b"\n"))
        try:
            return self._judged(raw, line, parse(text, delimiter=self.delimiter)[0])
        except CsvError as error:
            detail = str(error)
        try:
            parse(BARE_RETURN.sub("\n", text), delimiter=self.delimiter)
        except CsvError:
            return self._rejected(raw, line, RowReason.BAD_QUOTING, detail=detail)
        return self._rejected(raw, line, RowReason.BARE_CARRIAGE_RETURN, detail="a carriage return outside quotes, without a line feed")

    def _skip_record(self) -> Row:
        """Read past the record at the beginning of the buffer, which is too large. Only its head is kept."""
        buffer = self._buffer
        head, first_line = buffer.data[:RAW_LIMIT], buffer.line
        scan = RecordEnd(self.delimiter)
        size, rest = 0, b""
        while True:
            end = scan.find(buffer.data)
            piece = buffer.data if end < 0 else buffer.data[:end]
            text = rest + piece
            whole = whole_characters(text) if end < 0 else len(text)
            decoded(text[:whole], line=buffer.line, offset=buffer.offset - len(rest))
            rest = text[whole:]
            size += len(piece)
            buffer.advance(len(piece), piece.count(b"\n"))
            if end >= 0:
                break
            buffer.fill()
            if buffer.ended and not buffer.data:
                decoded(rest, line=buffer.line, offset=buffer.offset - len(rest))
                if scan.in_quotes:
                    raise unbalanced_quote(first_line)
                break
        return self._too_large(head, first_line, size=size, lines=buffer.line - first_line)


def _block_end() -> Iterator[str]:
    raise _BlockEndError
    yield


def _escaped(raw: bytes) -> str:
    """A record as text that can be stored: at most RAW_LIMIT long, with NUL and bytes that are not UTF-8 as ``\\x..``."""
    if len(raw) > RAW_LIMIT:
        raw = raw[:RAW_LIMIT]
        raw = raw[: whole_characters(raw)]
    return raw.decode(errors="backslashreplace").replace("\0", "\\x00")[:RAW_LIMIT]
