"""Reading a file's header, and telling whether the file is a CSV of questions at all."""

import contextlib
import re
from dataclasses import dataclass

from qa_platform.contract import ANSWER_COLUMNS, COLUMN_LIMIT, HEADER_LIMIT, FileReason, find_columns, pass_through_columns
from qa_platform.ingest.buffer import Buffer
from qa_platform.ingest.damage import (
    FileRejected,
    decoded,
    only_carriage_returns,
    refuse_control_characters,
    refuse_other_formats,
    unbalanced_quote,
)
from qa_platform.ingest.dialect import BARE_RETURN, DELIMITERS, CsvError, parse
from qa_platform.ingest.records import RecordEnd
from qa_platform.ingest.rules import about_quotes

# There are two if a program adds a mark to a text that already has one.
_BYTE_ORDER_MARKS = re.compile(rb"(?:\xef\xbb\xbf){1,2}")
# The line that tells Excel the delimiter. Programs quote it, or pad it to the number of columns.
_SEPARATOR_LINE = re.compile(rb'"?sep="?([^\r\n"]{1,8}?)[",;\t| ]*+\r*+\n', re.IGNORECASE)
_BLANK_LINES = re.compile(rb"(?:\r*\n)+")


@dataclass(frozen=True)
class Header:
    """The columns of a file, renamed where they clash with ours. ``question`` and ``context`` are positions in them.

    ``delimiter`` separates the cells of the header and of all rows.
    """

    columns: tuple[str, ...]
    question: int
    context: int
    delimiter: str


def read_header(buffer: Buffer) -> Header:
    """Read the header, and leave the buffer at the beginning of the line below it.

    Raises:
        FileRejected: the file is empty, has another format, or has no valid header.
        TransientError: the stream ended early.
    """
    named = _skip_to_header(buffer)
    buffer.fill_beyond(HEADER_LIMIT)
    delimiter = _delimiter(buffer, named)
    raw = _record(buffer, delimiter)
    refuse_control_characters(raw, line=buffer.line, offset=buffer.offset)
    names = _names(decoded(raw, line=buffer.line, offset=buffer.offset, errors="strict"), buffer.line, delimiter)
    buffer.advance(len(raw), raw.count(b"\n"))
    question, context = find_columns(names)
    return Header(pass_through_columns(names), question, context, delimiter)


def _skip_to_header(buffer: Buffer) -> str:
    """Skip byte order marks, blank lines, and a line that names the delimiter. Returns that delimiter, "" if there is no such line."""
    delimiter = ""
    buffer.fill_beyond(HEADER_LIMIT)
    refuse_other_formats(buffer.data)
    if marks := _BYTE_ORDER_MARKS.match(buffer.data):
        buffer.advance(marks.end(), 0)
    if named := _SEPARATOR_LINE.match(buffer.data):
        delimiter = named.group(1).decode(errors="replace")
        buffer.advance(named.end(), 1)
    while blank := _BLANK_LINES.match(buffer.data):
        buffer.advance(blank.end(), blank.group().count(b"\n"))
        buffer.fill_beyond(HEADER_LIMIT)
    if buffer.ended and not buffer.data.strip():
        raise FileRejected(FileReason.EMPTY_FILE, "there is only whitespace" if buffer.read else "there is nothing in the file")
    return delimiter


def _delimiter(buffer: Buffer, named: str) -> str:
    """The delimiter with which the header has the columns question and context. If there is none, ``named`` or the comma.

    Args:
        named: the delimiter that the first line names, or "".

    Raises:
        FileRejected: the header has the columns with another delimiter than ``named``, or ``named`` is not supported.
    """
    fitting = [delimiter for delimiter in DELIMITERS if _fits(buffer, delimiter)]
    if not named:
        return fitting[0] if fitting else ","
    if named in fitting or (named in DELIMITERS and not fitting):
        return named
    actual = f"the header has {DELIMITERS[fitting[0]]}" if fitting else f"only {', '.join(DELIMITERS.values())} can be read"
    raise FileRejected(FileReason.WRONG_DELIMITER, f"the line 'sep=' names {named!r} as the delimiter, but {actual}", line=1)


def _fits(buffer: Buffer, delimiter: str) -> bool:
    """Whether the header has the columns question and context, if this is the delimiter."""
    head = buffer.data[:HEADER_LIMIT]
    end = RecordEnd(delimiter).find(head)
    with contextlib.suppress(CsvError, ValueError):
        find_columns(parse((head[:end] if end >= 0 else head).decode(), delimiter=delimiter)[0])
        return True
    return False


def _record(buffer: Buffer, delimiter: str) -> bytes:
    """The bytes of the header, with its line end where it has one."""
    head = buffer.data[: HEADER_LIMIT + 1]
    scan = RecordEnd(delimiter)
    end = scan.find(head)
    whole_file = len(head) <= HEADER_LIMIT
    if 0 <= end <= HEADER_LIMIT:
        return head[:end]
    if whole_file and not scan.in_quotes:
        return head
    if b"\r" in head and not scan.in_quotes:
        raise only_carriage_returns(buffer.line)
    if whole_file:
        decoded(head, line=buffer.line, offset=buffer.offset)
        raise unbalanced_quote(buffer.line)
    raise FileRejected(FileReason.HEADER_TOO_LARGE, f"the header has no end within {HEADER_LIMIT:,} bytes", line=buffer.line)


def _names(text: str, line: int, delimiter: str) -> list[str]:
    """The column names of a header. Those that `find_columns` refuses reject the file."""
    names = _cells(text, line, delimiter)
    if len(names) > COLUMN_LIMIT:
        raise FileRejected(FileReason.TOO_MANY_COLUMNS, f"the header has {len(names):,} columns", line=line)
    try:
        find_columns(names)
    except ValueError as error:
        missing = not {"question", "context"} <= {name.strip().lower() for name in names}
        reason = FileReason.MISSING_COLUMN if missing else FileReason.DUPLICATE_COLUMN
        shown = ", ".join(repr(name[:50]) for name in names[:20])
        raise FileRejected(reason, f"{error}; it has {shown}{about_quotes(names)}", line=line) from error
    _refuse_repeated(names, line)
    return names


def _refuse_repeated(names: list[str], line: int) -> None:
    """Refuse repeated names of answer columns: each repetition would be renamed to a longer name than the last."""
    folded = [name.strip().lower() for name in names]
    for ours in ANSWER_COLUMNS:
        if (count := folded.count(ours)) > 1:
            detail = f"the header has {count} columns called {ours!r}, a column of the answered CSV: only one is allowed"
            raise FileRejected(FileReason.DUPLICATE_COLUMN, detail, line=line)


def _cells(text: str, line: int, delimiter: str) -> list[str]:
    try:
        return parse(text, delimiter=delimiter)[0]
    except CsvError as error:
        if BARE_RETURN.search(text):
            raise only_carriage_returns(line) from error
        raise FileRejected(FileReason.BAD_HEADER, f"the header cannot be parsed: {error}", line=line) from error
