"""The CSV dialect: how records are parsed and written, everywhere in the platform.

Commas between cells, double quotes around cells that need them, quotes inside a quoted cell written twice (RFC 4180). Reading is
strict: text after a closing quote and a quote left open are errors. Uploads may have another delimiter, and their answered CSVs have the
same one. In Pachyderm, files have commas.
"""

import codecs
import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

# The delimiters that an upload may have, with their names, in the order in which they are tried.
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}

# Raised while reading text that is not in this dialect.
CsvError = csv.Error

# The largest limit that the csv module accepts on every system; its default is below the length of a context. Records have their own
# limit, see `contract.ROW_LIMIT`.
_CELL_LIMIT = 2**31 - 1

# Carriage returns that do not end a line. Outside quotes they damage their row. A run is matched once, from its beginning, in linear time.
BARE_RETURN = re.compile(r"(?<!\r)\r++(?!\n|\Z)")


class RecordReader(Protocol):
    """An iterator over records. ``line_num`` counts the lines that it has read."""

    @property
    def line_num(self) -> int: ...

    def __iter__(self) -> Iterator[list[str]]: ...

    def __next__(self) -> list[str]: ...


def csv_reader(lines: Iterable[str], *, delimiter: str = ",") -> RecordReader:
    """The records of ``lines``, each a list of cells; a blank line gives an empty list.

    Raises:
        CsvError: while iterating, a record is damaged.
    """
    csv.field_size_limit(_CELL_LIMIT)
    return csv.reader(lines, strict=True, delimiter=delimiter)


def parse(text: str, *, delimiter: str = ",") -> list[list[str]]:
    """The records of a text whose lines end with LF; a carriage return ends none.

    Raises:
        CsvError: a record is damaged.
    """
    return list(csv_reader(io.StringIO(text, newline="\n"), delimiter=delimiter))


def csv_text(cells: Sequence[str], *, delimiter: str = ",") -> str:
    """One record, quoted where necessary, without a line end."""
    out = io.StringIO()
    # With "\n" here, Python before 3.13 leaves a cell with a carriage return unquoted, which then reads as two rows.
    csv.writer(out, lineterminator="\r\n", delimiter=delimiter).writerow(cells)
    return out.getvalue().removesuffix("\r\n")


def csv_line(cells: Sequence[str], *, delimiter: str = ",") -> bytes:
    """One record in UTF-8, with its line feed."""
    return csv_text(cells, delimiter=delimiter).encode() + b"\n"


def with_delimiter(pieces: Iterable[bytes], delimiter: str) -> Iterator[bytes]:
    """Convert a CSV with commas, given in pieces, to another delimiter, record by record."""
    for cells in csv_reader(_lines(pieces)):
        yield csv_line(cells, delimiter=delimiter)


def _lines(pieces: Iterable[bytes]) -> Iterator[str]:
    rest = ""
    for text in codecs.iterdecode(pieces, "utf-8"):
        *whole, rest = (rest + text).split("\n")
        yield from (f"{line}\n" for line in whole)
    if rest:
        yield rest


def with_line_end(record: bytes) -> bytes:
    """A record with a line end that every parser recognises; LF and CRLF stay as they are."""
    return record.rstrip(b"\r\n") + b"\n" if not record.endswith(b"\n") or record.endswith(b"\r\r\n") else record
