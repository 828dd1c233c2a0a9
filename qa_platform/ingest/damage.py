"""The damage that a file or a row can have, and what its owner should do about it."""

import json
import re
from dataclasses import asdict, dataclass
from typing import Self

from qa_platform.contract import (
    ANSWER_LIMIT,
    COLUMN_LIMIT,
    GZIP_FREE,
    GZIP_LIMIT,
    GZIP_RATIO,
    HEADER_LIMIT,
    ROW_LIMIT,
    FileReason,
    RowReason,
)
from qa_platform.errors import InputError
from qa_platform.ingest.records import whole_characters

FILE_HINTS = {
    FileReason.EMPTY_FILE: "Upload a CSV with a header and at least one row.",
    FileReason.HEADER_ONLY: "Add at least one row below the header.",
    FileReason.MISSING_COLUMN: "The first line must be a header with the columns 'question' and 'context', in any order and any case.",
    FileReason.DUPLICATE_COLUMN: "Remove or rename all but one of the columns of that name.",
    FileReason.WRONG_DELIMITER: "Save the file with commas between cells ('CSV UTF-8 (comma delimited)' in Excel).",
    FileReason.NOT_UTF8: "Save the file as UTF-8 ('CSV UTF-8' in Excel); if it was that, it was cut or damaged: upload it again.",
    FileReason.UTF16: "Save the file as UTF-8 ('CSV UTF-8' in Excel, not 'Unicode text').",
    FileReason.BINARY: "Export the data as CSV text and upload that.",
    FileReason.ARCHIVE: "Unpack it, or save the sheet as 'CSV UTF-8 (comma delimited)': renaming alone does not make it a CSV.",
    FileReason.DAMAGED_GZIP: "Compress the file again, check it with `gunzip -t`, and upload it as it is.",
    FileReason.GZIP_BOMB: f"Split the file, or upload it without gzip. It may unpack to {GZIP_LIMIT // 2**30} GiB, and beyond "
    f"{GZIP_FREE // 2**20} MiB to {GZIP_RATIO} times its size.",
    FileReason.UNBALANCED_QUOTE: "Close the quote that is opened there; a quote inside a quoted cell is written twice.",
    FileReason.TOO_MANY_COLUMNS: f"Keep at most {COLUMN_LIMIT:,} columns.",
    FileReason.BAD_HEADER: "Put a delimiter or the line's end after each closing quote of the header.",
    FileReason.HEADER_TOO_LARGE: f"Begin the file with a header of at most {HEADER_LIMIT:,} bytes, with its quotes closed and a line end.",
    FileReason.CR_LINE_ENDS: "Save the file with LF or CRLF line ends ('CSV UTF-8' in Excel, not 'CSV (Macintosh)').",
    FileReason.TOO_MANY_BAD_ROWS: "Look at the rows above the named line, and fix what most of them have in common.",
}

ROW_HINTS = {
    RowReason.EMPTY_QUESTION: "Fill in the question.",
    RowReason.EMPTY_CONTEXT: "Fill in the context, the text that holds the answer.",
    RowReason.QUESTION_TOO_LONG: "Shorten the question.",
    RowReason.CONTEXT_TOO_LONG: "Split the context over several rows.",
    RowReason.TOO_FEW_CELLS: "Give the row as many cells as the header has. A line break inside a cell needs quotes around the cell.",
    RowReason.TOO_MANY_CELLS: "Put straight quotes around cells that contain a comma, or the file's other delimiter.",
    RowReason.BAD_QUOTING: "Write a quote inside a quoted cell twice. Only a delimiter or the line's end may follow a closing quote.",
    RowReason.BARE_CARRIAGE_RETURN: "End lines with LF or CRLF. A carriage return inside a cell needs quotes around the cell.",
    RowReason.ROW_TOO_LARGE: f"Keep a row under {ROW_LIMIT:,} bytes. If it spans many lines, close the quote that is opened there.",
    RowReason.NUL_CHARACTER: "Remove the NUL character (byte 0).",
    RowReason.LONE_SURROGATE: "Remove or replace the broken character, half of a surrogate pair.",
    RowReason.QUESTION_EXCEEDS_WINDOW: "Shorten the question: it leaves too little of the model's window to the context.",
    RowReason.UNUSABLE_ANSWER: f"Put spaces into the context: the answer is a word of more than {ANSWER_LIMIT:,} characters.",
    RowReason.NOT_TEXT: "Put text into the question and the context: one of them is a number, a list or the like. Only in DataFrames.",
}


@dataclass(frozen=True)
class FileRejection:
    """Why a whole file is rejected.

    Args:
        reason: the kind of damage.
        detail: what exactly is wrong.
        line: the file's line, from 1, if known.
        offset: bytes from the file's beginning, from 0, if known.
    """

    reason: FileReason
    detail: str
    line: int | None = None
    offset: int | None = None

    @property
    def hint(self) -> str:
        """What the file's owner can do about it."""
        return FILE_HINTS[self.reason]

    @property
    def where(self) -> str:
        """Line and byte, for display; empty if neither is known."""
        places = [f"line {self.line}"] * (self.line is not None) + [f"byte {self.offset}"] * (self.offset is not None)
        return ", ".join(places)

    def __str__(self) -> str:
        at = f" at {self.where}" if self.where else ""
        return f"{self.reason}{at}: {self.detail}. {self.hint}"

    def to_json(self) -> str:
        """The fields as a JSON object; `from_json` reads it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The rejection that `to_json` wrote.

        Raises:
            InputError: the text is something else.
        """
        try:
            values = json.loads(text)
            return cls(**{**values, "reason": FileReason(values["reason"])})
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"not a {cls.__name__} document: {error}") from error


class FileRejected(InputError):
    """A whole file is rejected; nothing of it is kept. ``rejection`` has the fields; the arguments are those of `FileRejection`."""

    def __init__(self, reason: FileReason, detail: str, *, line: int | None = None, offset: int | None = None) -> None:
        self.rejection = FileRejection(reason, detail, line=line, offset=offset)
        super().__init__(f"{reason}: {detail}", where=self.rejection.where, advice=self.rejection.hint)

    def __str__(self) -> str:
        return str(self.rejection)

    def of_file(self, file: str) -> InputError:
        """The same error, for display: it names the file."""
        where = ", ".join(filter(None, (file, self.rejection.where)))
        return InputError(self.what, where=where, advice=self.advice)


_MAGIC = (
    (b"PK\x03\x04", FileReason.ARCHIVE, "a zip file"),
    (b"PK\x05\x06", FileReason.ARCHIVE, "an empty zip file"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", FileReason.ARCHIVE, "an old Excel workbook (.xls)"),
    (b"\x1f\x8b", FileReason.ARCHIVE, "a gzip file within a gzip file"),
    (b"\x28\xb5\x2f\xfd", FileReason.ARCHIVE, "a zstd file"),
    (b"\xfd7zXZ\x00", FileReason.ARCHIVE, "an xz file"),
    (b"7z\xbc\xaf\x27\x1c", FileReason.ARCHIVE, "a 7z file"),
    (b"Rar!\x1a\x07", FileReason.ARCHIVE, "a rar file"),
    (b"%PDF-", FileReason.BINARY, "a PDF"),
    (b"\xff\xfe", FileReason.UTF16, "UTF-16 or UTF-32 text, as its byte order mark says"),
    (b"\xfe\xff", FileReason.UTF16, "UTF-16 text, as its byte order mark says"),
    (b"\x00\x00\xfe\xff", FileReason.UTF16, "UTF-32 text, as its byte order mark says"),
)
_BZIP2 = re.compile(rb"BZh[1-9]1AY&SY")
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1f\x7f]")
# Bytes at the beginning of a file that are searched for NUL, and for the pattern of UTF-16.
_SAMPLE = 8192
# No more than the header's names: every second byte is 0 in Latin text only.
_UTF16_SAMPLE = 16


def refuse_other_formats(head: bytes) -> None:
    """Refuse a file whose first bytes are those of another format.

    Raises:
        FileRejected: it is an archive, binary data, or text in UTF-16 or UTF-32.
    """
    for magic, reason, kind in _MAGIC:
        if head.startswith(magic):
            workbook = kind == "a zip file" and (b"xl/" in head or b"[Content_Types].xml" in head)
            raise FileRejected(reason, f"this is {'an Excel workbook (.xlsx)' if workbook else kind}, not a CSV", offset=0)
    if _BZIP2.match(head):
        raise FileRejected(FileReason.ARCHIVE, "this is a bzip2 file, not a CSV", offset=0)
    even, odd = head[0:_UTF16_SAMPLE:2], head[1:_UTF16_SAMPLE:2]
    for zeros, letters in ((even, odd), (odd, even)):
        if len(head) >= 8 and not any(zeros) and all(letters):
            raise FileRejected(FileReason.UTF16, "this is UTF-16 text without a byte order mark", offset=0)
    # A NUL in a text may be one damaged row; together with bytes that are not UTF-8 it means binary data.
    sample = head[:_SAMPLE]
    if b"\0" in sample and not _is_text(sample):
        raise FileRejected(FileReason.BINARY, "this is binary data, not text", offset=sample.index(b"\0"))


def _is_text(sample: bytes) -> bool:
    try:
        sample[: whole_characters(sample)].decode(errors="surrogatepass")
    except UnicodeDecodeError:
        return False
    return True


def refuse_control_characters(header: bytes, *, line: int, offset: int) -> None:
    """Refuse a header with control characters, which column names do not have.

    Raises:
        FileRejected: the header has one.
    """
    if control := _CONTROL.search(header):
        detail = f"the header contains the control character {control.group()[0]:#04x}, so this is not a CSV"
        raise FileRejected(FileReason.BINARY, detail, line=line, offset=offset + control.start())


def decoded(raw: bytes, *, line: int, offset: int, errors: str = "surrogatepass") -> str:
    """Decode bytes that begin at ``line`` and ``offset``. By default halves of surrogate pairs pass, since they damage only their row.

    Raises:
        FileRejected: the bytes are not UTF-8.
    """
    try:
        return raw.decode(errors=errors)
    except UnicodeDecodeError as error:
        wrong = raw[error.start : error.start + 4].hex(" ")
        line += raw.count(b"\n", 0, error.start)
        raise FileRejected(FileReason.NOT_UTF8, f"the bytes {wrong} are not UTF-8", line=line, offset=offset + error.start) from error


def unbalanced_quote(line: int) -> FileRejected:
    """The rejection of a file whose record at ``line`` opens a quote that nothing closes."""
    detail = "a quote is opened in the row that begins here and not closed until the end of the file"
    return FileRejected(FileReason.UNBALANCED_QUOTE, detail, line=line)


def only_carriage_returns(line: int) -> FileRejected:
    """The rejection of a file whose lines end with a carriage return alone, as its header at ``line`` shows."""
    return FileRejected(FileReason.CR_LINE_ENDS, "the lines end with a carriage return alone", line=line)
