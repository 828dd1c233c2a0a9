"""What can be wrong with a file or a row, and what its owner should do about it."""

import re
from typing import Self

from qa_platform.contract import COLUMN_LIMIT, HEADER_LIMIT, ROW_LIMIT, FileReason, RowReason
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
    FileReason.UNBALANCED_QUOTE: "Close the quote that is opened there; a quote inside a quoted cell is written twice.",
    FileReason.TOO_MANY_COLUMNS: f"Keep at most {COLUMN_LIMIT:,} columns.",
    FileReason.BAD_HEADER: "Put a comma or the line's end after each closing quote of the header.",
    FileReason.HEADER_TOO_LARGE: f"Begin the file with a header of at most {HEADER_LIMIT:,} bytes, with its quotes closed and a line end.",
    FileReason.CR_LINE_ENDS: "Save the file with LF or CRLF line ends ('CSV UTF-8' in Excel, not 'CSV (Macintosh)').",
}

ROW_HINTS = {
    RowReason.EMPTY_QUESTION: "Fill in the question.",
    RowReason.EMPTY_CONTEXT: "Fill in the context, the text that holds the answer.",
    RowReason.QUESTION_TOO_LONG: "Shorten the question.",
    RowReason.CONTEXT_TOO_LONG: "Split the context over several rows.",
    RowReason.TOO_FEW_CELLS: "Give the row as many cells as the header has; a line break inside a cell needs quotes around the cell.",
    RowReason.TOO_MANY_CELLS: "Put quotes around cells that contain a comma.",
    RowReason.BAD_QUOTING: "Write a quote inside a quoted cell twice; nothing but a comma or the line's end may follow a closing quote.",
    RowReason.BARE_CARRIAGE_RETURN: "End lines with LF or CRLF; a carriage return inside a cell needs quotes around the cell.",
    RowReason.ROW_TOO_LARGE: f"Keep a row under {ROW_LIMIT:,} bytes. If it spans many lines, close the quote that is opened there.",
    RowReason.NUL_CHARACTER: "Remove the NUL character (byte 0).",
    RowReason.LONE_SURROGATE: "Remove or replace the broken character: half of a surrogate pair, which is no text.",
    RowReason.QUESTION_EXCEEDS_WINDOW: "Shorten the question: the model cannot read it whole.",
}


# What the message of a `FileRejected` is made of.
_MESSAGE = re.compile(r"(?P<reason>\w+)(?: at (?:line (?P<line>\d+))?(?:, )?(?:byte (?P<offset>\d+))?)?: (?P<detail>.*)", re.DOTALL)


class FileRejected(InputError):
    """A file that cannot be read as a whole; nothing of it is kept.

    ``line`` (from 1) and ``offset`` (bytes from the file's beginning, from 0) say where, as far as that is known; ``hint`` says what to do.
    The message has all of it, and is what is recorded of the file; `of_message` is the way back.
    """

    def __init__(self, reason: FileReason, detail: str, *, line: int | None = None, offset: int | None = None) -> None:
        self.reason = reason
        self.detail = detail
        self.line = line
        self.offset = offset
        self.hint = FILE_HINTS[reason]
        places = [f"line {line}"] * (line is not None) + [f"byte {offset}"] * (offset is not None)
        where = f" at {', '.join(places)}" if places else ""
        super().__init__(f"{reason}{where}: {detail}. {self.hint}")

    @classmethod
    def of_message(cls, message: str) -> Self | None:
        """The rejection whose message this is; None where it is the message of something else."""
        found = _MESSAGE.fullmatch(message)
        if not found or found["reason"] not in set(FileReason):
            return None
        reason = FileReason(found["reason"])
        line, offset = (int(found[name]) if found[name] else None for name in ("line", "offset"))
        return cls(reason, found["detail"].removesuffix(f". {FILE_HINTS[reason]}"), line=line, offset=offset)


_MAGIC = (
    (b"PK\x03\x04", FileReason.ARCHIVE, "a zip file"),
    (b"PK\x05\x06", FileReason.ARCHIVE, "an empty zip file"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", FileReason.ARCHIVE, "an old Excel workbook (.xls)"),
    (b"\x1f\x8b", FileReason.ARCHIVE, "a gzip file"),
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
# Bytes of the file's beginning that are looked at for NUL, and for the pattern of UTF-16.
_SAMPLE = 8192
_UTF16_SAMPLE = 64


def refuse_other_formats(head: bytes) -> None:
    """Raise FileRejected where the file's first bytes are those of another format than text in UTF-8."""
    for magic, reason, what in _MAGIC:
        if head.startswith(magic):
            workbook = what == "a zip file" and (b"xl/" in head or b"[Content_Types].xml" in head)
            raise FileRejected(reason, f"this is {'an Excel workbook (.xlsx)' if workbook else what}, not a CSV", offset=0)
    if _BZIP2.match(head):
        raise FileRejected(FileReason.ARCHIVE, "this is a bzip2 file, not a CSV", offset=0)
    even, odd = head[0:_UTF16_SAMPLE:2], head[1:_UTF16_SAMPLE:2]
    for zeros, letters in ((even, odd), (odd, even)):
        if len(head) >= 8 and not any(zeros) and all(letters):
            raise FileRejected(FileReason.UTF16, "this is UTF-16 text without a byte order mark", offset=0)
    # A NUL alone may be one damaged row; together with bytes that are no text it is no CSV at all.
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
    """Raise FileRejected where a header contains control characters, as no name of a column does."""
    if found := _CONTROL.search(header):
        detail = f"the header contains the control character {found.group()[0]:#04x}, so this is no CSV"
        raise FileRejected(FileReason.BINARY, detail, line=line, offset=offset + found.start())
