"""A stream of bytes in, rows out: each one good, or rejected with a reason. One pass, in bounded memory."""

import contextlib
import csv
import io
import itertools
import re
from bisect import bisect_left
from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple, Protocol

from qa_platform.contract import (
    COLUMN_LIMIT,
    HEADER_LIMIT,
    RAW_LIMIT,
    ROW_LIMIT,
    FileReason,
    Rejection,
    RowReason,
    find_columns,
    pass_through_columns,
)
from qa_platform.errors import TransientError
from qa_platform.ingest.damage import FileRejected, refuse_control_characters, refuse_other_formats
from qa_platform.ingest.records import RecordEnd, whole_characters
from qa_platform.settings import IngestSettings

_BLOCK = 2**20
_BOM = b"\xef\xbb\xbf"
_BLANK_LINES = re.compile(rb"(?:\r*\n)+")
# Records are capped by ROW_LIMIT before cells could be; this only lifts the csv module's own limit, which is below that of a context.
_NO_CELL_LIMIT = 2**31 - 1
_BARE_RETURN = re.compile(r"\r(?!\r*(?:\n|\Z))")
_SURROGATE = re.compile("[\ud800-\udfff]")
_OTHER_DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}


class ByteSource(Protocol):
    """What is read: ``read(n)`` gives at most ``n`` bytes, and none only at the end. It need not be seekable."""

    def read(self, size: int, /) -> bytes: ...


class Row(NamedTuple):
    """One data row. A tuple, because making a frozen dataclass per row costs as much as parsing it.

    ``row`` counts data rows from 1; ``line`` is the physical line on which it begins, from 1. ``cells`` are as many as there are
    columns; ``raw`` is the record as it goes into a shard, with its line end. In a rejected row both are without what cannot be kept.
    """

    row: int
    line: int
    cells: Sequence[str]
    raw: bytes
    rejection: Rejection | None


class _BlockEndError(Exception):
    """The lines of a block are used up: what the parser has begun goes on in the next block."""


class RowReader:
    """Reads a CSV once. The header is read when the reader is made, the rows while it is iterated, which works once.

    ``columns`` are the header's names, renamed where they clash with ours; ``question`` and ``context`` are positions in it.
    ``size``, where known, is the number of bytes that must come: fewer are a broken download, not a damaged file.

    Raises:
        FileRejected: here and while iterating, as soon as the file turns out to be damaged.
        TransientError: the stream ended early.
    """

    def __init__(self, source: ByteSource, *, settings: IngestSettings, size: int = 0) -> None:
        self._source = source
        self._settings = settings
        self._size = size
        self._read = 0
        self._ended = False
        # What has been read and not yet handed out begins here, always at the beginning of a record.
        self._buffer = b""
        self._line = 1
        self._offset = 0
        self._row = 0
        self.columns: tuple[str, ...]
        self.question: int
        self.context: int
        csv.field_size_limit(_NO_CELL_LIMIT)
        self._read_header()

    def __iter__(self) -> Iterator[Row]:
        while True:
            self._fill()
            cut = len(self._buffer) if self._ended else self._buffer.rfind(b"\n") + 1
            lines, length = yield from self._parse(self._buffer[:cut])
            self._advance(length, lines)
            if len(self._buffer) > ROW_LIMIT and not self._ended:
                yield self._skip_record()
            if self._ended:
                break
        if not self._row:
            raise FileRejected(FileReason.HEADER_ONLY, "there is no row below the header")

    def _parse(self, block: bytes) -> Generator[Row, None, tuple[int, int]]:
        """The rows of a block of whole lines. Returns how many lines and bytes they are: a last row may be unfinished."""
        width, question_at, context_at = len(self.columns), self.question, self.context
        question_limit, context_limit = self._settings.question_limit, self._settings.context_limit
        lines = io.BytesIO(block).readlines()
        ends = list(itertools.accumulate(map(len, lines), initial=0))
        clean = b"\0" not in block and b"\r\r\n" not in block and block.endswith(b"\n")
        pending = iter(lines)
        texts = itertools.chain(map(bytes.decode, pending), () if self._ended else _block_end())
        done = 0
        while done < len(lines):
            reader = csv.reader(texts, strict=True)
            first = done
            try:
                for cells in reader:
                    end = first + reader.line_num
                    raw = block[ends[done] : ends[end]]
                    # The common case, in one condition: this runs for every row, and sets the speed for short ones.
                    if (
                        clean
                        and len(cells) == width
                        and 0 < len(cells[question_at]) <= question_limit
                        and 0 < len(cells[context_at]) <= context_limit
                        and not cells[question_at].isspace()
                        and not cells[context_at].isspace()
                        and len(raw) <= ROW_LIMIT
                    ):
                        self._row += 1
                        yield Row(self._row, self._line + done, cells, raw, None)
                    elif cells:  # else a blank line
                        yield self._judged(raw, self._line + done, cells)
                    done = end
            except _BlockEndError:
                break
            except (csv.Error, UnicodeDecodeError):
                length = self._damaged_length(block, ends[done], self._line + done)
                if not length:
                    break
                end = bisect_left(ends, ends[done] + length, done)
                yield self._damaged(block[ends[done] : ends[end]], self._line + done, self._offset + ends[done])
                done = end
                pending.__setstate__(end)  # type: ignore[attr-defined]
        return done, ends[done]

    # Rows that are not plainly good

    def _judged(self, raw: bytes, line: int, cells: list[str]) -> Row:
        """The row of a record that could be parsed: with the first reason to reject it, from its shape to its content, if any."""
        if len(raw) > ROW_LIMIT:
            return self._too_large(raw, line, size=len(raw), lines=raw.count(b"\n"))
        if damage := self._damage_of(cells):
            reason, column, detail = damage
            return self._rejected(raw, line, reason, cells=cells, column="" if column is None else self.columns[column], detail=detail)
        self._row += 1
        return Row(self._row, line, cells, _with_line_end(raw), None)

    def _too_large(self, raw: bytes, line: int, *, size: int, lines: int) -> Row:
        detail = f"{size:,} bytes on {max(1, lines):,} lines; {ROW_LIMIT:,} bytes are allowed"
        return self._rejected(raw, line, RowReason.ROW_TOO_LARGE, detail=detail)

    def _rejected(self, raw: bytes, line: int, reason: RowReason, *, cells: Sequence[str] = (), column: str = "", detail: str = "") -> Row:
        """A rejected row; ``cells`` are those whose borders are sure. Too many are cut, missing ones are empty."""
        self._row += 1
        kept = [self._kept(index, cell) for index, cell in enumerate(cells[: len(self.columns)])]
        kept += [""] * (len(self.columns) - len(kept))
        rejection = Rejection(self._row, line, reason, column=column, detail=detail, raw=_escaped(raw))
        return Row(self._row, line, kept, csv_line(kept), rejection)

    def _damage_of(self, cells: list[str]) -> tuple[RowReason, int | None, str] | None:
        """Reason, guilty column, and what exactly was found."""
        if len(cells) != len(self.columns):
            reason = RowReason.TOO_FEW_CELLS if len(cells) < len(self.columns) else RowReason.TOO_MANY_CELLS
            return reason, None, f"{len(cells)} cells; the header has {len(self.columns)}"
        for index, cell in enumerate(cells):
            if "\0" in cell:
                return RowReason.NUL_CHARACTER, index, f"character {cell.index(chr(0)) + 1} of the cell is NUL"
            if found := _SURROGATE.search(cell):
                return RowReason.LONE_SURROGATE, index, f"character {found.start() + 1} of the cell is U+{ord(found.group()):04X}"
        for index, reason in ((self.question, RowReason.EMPTY_QUESTION), (self.context, RowReason.EMPTY_CONTEXT)):
            if not cells[index].strip():
                return reason, index, "only whitespace" if cells[index] else "no text"
        for index, reason in ((self.question, RowReason.QUESTION_TOO_LONG), (self.context, RowReason.CONTEXT_TOO_LONG)):
            if len(cells[index]) > self._limit(index):
                return reason, index, f"{len(cells[index]):,} characters; {self._limit(index):,} are allowed"
        return None

    def _limit(self, index: int) -> int:
        if index == self.question:
            return self._settings.question_limit
        return self._settings.context_limit if index == self.context else ROW_LIMIT

    def _kept(self, index: int, cell: str) -> str:
        return "" if "\0" in cell or _SURROGATE.search(cell) or len(cell) > self._limit(index) else cell

    # Records that the parser refuses

    def _damaged_length(self, block: bytes, start: int, line: int) -> int:
        """The bytes of the record at ``start``, which the parser refused; 0 where it goes on beyond the block."""
        scan = RecordEnd()
        end = scan.find(block, start)
        if end >= 0:
            return end - start
        if not self._ended:
            return 0
        _decoded(block[start:], line=line, offset=self._offset + start)
        if scan.in_quotes:
            raise _unbalanced(line)
        return len(block) - start

    def _damaged(self, raw: bytes, line: int, offset: int) -> Row:
        text = _decoded(raw, line=line, offset=offset)
        if len(raw) > ROW_LIMIT:
            return self._too_large(raw, line, size=len(raw), lines=raw.count(b"\n"))
        try:
            return self._judged(raw, line, _parse_all(text)[0])
        except csv.Error as error:
            detail = str(error)
        try:
            _parse_all(_BARE_RETURN.sub("\n", text))
        except csv.Error:
            return self._rejected(raw, line, RowReason.BAD_QUOTING, detail=detail)
        return self._rejected(raw, line, RowReason.BARE_CARRIAGE_RETURN, detail="a carriage return outside quotes, without a line feed")

    def _skip_record(self) -> Row:
        """Read past the record at the beginning of the buffer, which is too large, and keep no more than its head."""
        head, line = self._buffer[:RAW_LIMIT], self._line
        scan = RecordEnd()
        size = 0
        rest = b""
        while True:
            end = scan.find(self._buffer)
            piece = self._buffer if end < 0 else self._buffer[:end]
            text = rest + piece
            whole = whole_characters(text) if end < 0 else len(text)
            _decoded(text[:whole], line=self._line, offset=self._offset - len(rest))
            rest = text[whole:]
            size += len(piece)
            self._advance(len(piece), piece.count(b"\n"))
            if end >= 0:
                break
            self._fill()
            if self._ended and not self._buffer:
                _decoded(rest, line=self._line, offset=self._offset - len(rest))
                if scan.in_quotes:
                    raise _unbalanced(line)
                break
        return self._too_large(head, line, size=size, lines=self._line - line)

    # Bytes

    def _fill(self) -> None:
        block = self._source.read(_BLOCK)
        self._buffer += block
        self._read += len(block)
        self._ended = not block
        if self._ended and self._read < self._size:
            raise TransientError(f"the file's stream ended after {self._read:,} of {self._size:,} bytes: read it again")

    def _advance(self, length: int, lines: int) -> None:
        self._buffer = self._buffer[length:]
        self._offset += length
        self._line += lines

    # Header

    def _read_header(self) -> None:
        self._fill_header()
        refuse_other_formats(self._buffer)
        if self._buffer.startswith(_BOM):
            self._advance(len(_BOM), 0)
        while blank := _BLANK_LINES.match(self._buffer):
            self._advance(blank.end(), blank.group().count(b"\n"))
            self._fill_header()
        if self._ended and not self._buffer.strip():
            raise FileRejected(FileReason.EMPTY_FILE, "there is only whitespace" if self._read else "there is nothing in the file")
        self._fill_header()
        raw = self._header_record()
        refuse_control_characters(raw, line=self._line, offset=self._offset)
        names = self._header_cells(raw)
        self.question, self.context = find_columns(names)
        self.columns = pass_through_columns(names)
        self._advance(len(raw), raw.count(b"\n"))

    def _fill_header(self) -> None:
        while len(self._buffer) <= HEADER_LIMIT and not self._ended:
            self._fill()

    def _header_record(self) -> bytes:
        head = self._buffer[: HEADER_LIMIT + 1]
        scan = RecordEnd()
        end = scan.find(head)
        whole_file = len(head) <= HEADER_LIMIT
        if 0 <= end <= HEADER_LIMIT:
            return head[:end]
        if whole_file and not scan.in_quotes:
            return head
        if b"\r" in head and not scan.in_quotes:
            raise _return_only(self._line)
        if whole_file:
            _decoded(head, line=self._line, offset=self._offset)
            raise _unbalanced(self._line)
        raise FileRejected(FileReason.HEADER_TOO_LARGE, f"the header has no end within {HEADER_LIMIT:,} bytes", line=self._line)

    def _header_cells(self, raw: bytes) -> list[str]:
        """The names of a header that ``find_columns`` accepts."""
        text = _decoded(raw, line=self._line, offset=self._offset, errors="strict")
        try:
            names = _parse_all(text)[0]
        except csv.Error as error:
            self._refuse_other_delimiters(text)
            if _BARE_RETURN.search(text):
                raise _return_only(self._line) from error
            raise FileRejected(FileReason.BAD_HEADER, f"the header cannot be parsed: {error}", line=self._line) from error
        if len(names) > COLUMN_LIMIT:
            raise FileRejected(FileReason.TOO_MANY_COLUMNS, f"the header has {len(names):,} columns", line=self._line)
        try:
            find_columns(names)
        except ValueError as error:
            self._refuse_other_delimiters(text)
            missing = not {"question", "context"} <= {name.strip().lower() for name in names}
            reason = FileReason.MISSING_COLUMN if missing else FileReason.DUPLICATE_COLUMN
            shown = ", ".join(repr(name[:50]) for name in names[:20])
            raise FileRejected(reason, f"{error}; it has {shown}", line=self._line) from error
        return names

    def _refuse_other_delimiters(self, header: str) -> None:
        for delimiter, plural in _OTHER_DELIMITERS.items():
            with contextlib.suppress(csv.Error, ValueError):
                find_columns(_parse_all(header, delimiter)[0])
                detail = f"the header has {plural} between its cells, where commas belong"
                raise FileRejected(FileReason.WRONG_DELIMITER, detail, line=self._line)


def iter_rows(source: ByteSource, *, settings: IngestSettings | None = None, size: int = 0) -> RowReader:
    """The rows of a CSV, good and rejected, in order; see ``RowReader``. Settings come from the environment unless given."""
    return RowReader(source, settings=settings or IngestSettings(), size=size)


def csv_line(cells: Sequence[str]) -> bytes:
    """One record of cells, quoted where it must be, with its line feed."""
    out = io.StringIO()
    # With "\n" here, Python before 3.13 leaves a cell with a carriage return unquoted, which then reads as two rows.
    csv.writer(out, lineterminator="\r\n").writerow(cells)
    return out.getvalue().removesuffix("\r\n").encode() + b"\n"


def _block_end() -> Iterator[str]:
    raise _BlockEndError
    yield


def _parse_all(text: str, delimiter: str = ",") -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline="\n"), strict=True, delimiter=delimiter))


def _with_line_end(raw: bytes) -> bytes:
    """A record as it came, but with a line end that every parser takes for one."""
    return raw.rstrip(b"\r\n") + b"\n" if not raw.endswith(b"\n") or raw.endswith(b"\r\r\n") else raw


def _escaped(raw: bytes) -> str:
    """A record as text that can be stored: at most RAW_LIMIT long, with bytes that are no text, and NUL, as ``\\x..``."""
    if len(raw) > RAW_LIMIT:
        raw = raw[:RAW_LIMIT]
        raw = raw[: whole_characters(raw)]
    return raw.decode(errors="backslashreplace").replace("\0", "\\x00")[:RAW_LIMIT]


def _decoded(raw: bytes, *, line: int, offset: int, errors: str = "surrogatepass") -> str:
    """The text of bytes that begin at ``line`` and ``offset``. Half surrogate pairs pass, since they are damage of one row."""
    try:
        return raw.decode(errors=errors)
    except UnicodeDecodeError as error:
        found = raw[error.start : error.start + 4].hex(" ")
        line += raw.count(b"\n", 0, error.start)
        detail = f"the bytes {found} are no UTF-8"
        raise FileRejected(FileReason.NOT_UTF8, detail, line=line, offset=offset + error.start) from error


def _unbalanced(line: int) -> FileRejected:
    detail = "a quote is opened in the row that begins here and not closed until the end of the file"
    return FileRejected(FileReason.UNBALANCED_QUOTE, detail, line=line)


def _return_only(line: int) -> FileRejected:
    return FileRejected(FileReason.CR_LINE_ENDS, "the lines end with a carriage return alone", line=line)
