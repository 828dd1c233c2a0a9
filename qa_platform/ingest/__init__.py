"""Reading the input CSV: what is accepted, what is rejected, and why.

**Gzip.** A file whose first two bytes are those of gzip is decompressed while it is read, whatever its name. Damaged or truncated data
rejects the file, and so does a bomb: more than 16 GiB or, beyond 64 MiB, more than 200 times the bytes that were read. Lines and bytes in
reports are those of the decompressed text.

**The format.** UTF-8, with or without a byte order mark (or two); cells separated by a delimiter; lines ended by LF or CRLF; quoting as in
RFC 4180: a cell with a delimiter, a quote or a line break is in double quotes, and a quote inside it is written twice. The reference is
Python's ``csv.reader`` with ``strict=True`` over lines that end in LF: records and cells are those that it reads. A quote in the middle of
an unquoted cell is therefore an ordinary character, and a cell with a space before its opening quote is unquoted.

**The delimiter** is the first of comma, semicolon, tab and vertical bar with which the header has its two columns. A first line such as
``sep=;``, which Excel knows too, names the delimiter. The file is rejected if the header has its columns with another one, or if the named
one is not among the four. Rows are read with the header's delimiter. Shards have commas; answered CSVs have the header's delimiter again.

**The header** is the first line that is not blank, after the line ``sep=`` if there is one. It has ``question`` and ``context`` once each,
in any order and any case, with or without surrounding spaces. Every other column passes through untouched, whatever its name. A name that
clashes with a column of the answered CSV (``answer``, ``score``, ``answer_start``, ``answer_end``, ``model``, ``error``) becomes
``input_<name>``, and may occur only once. A header has at most 1,000 columns and 1 MiB.

**Rows** are numbered from 1, without the header; ``line`` is the line of the file on which a row begins, counted from 1. Blank lines, at
the end or elsewhere, are not rows, and neither are rows of empty cells alone, such as Excel leaves. Both are skipped, and counted in
`question_file.blank`. Cells pass unchanged: no trimming, no conversion, no interpretation of formulas.

**File or row?** A row is rejected if the damage is certainly inside it and the rows around it are intact. A file is rejected if the damage
puts every row in doubt. Nothing of it is kept then, even if the damage is gigabytes in. So:

- *Bytes that are not UTF-8* reject the file, with their byte offset: the file has another encoding, in which other rows may decode to valid
  but wrong text, or was damaged in transit. An encoded half of a surrogate pair, which some programs write, damages only its row.
- *NUL* rejects its row. In the header, or together with bytes that are not UTF-8 near the file's beginning, it means that this is not text.
- *Text after a closing quote* (``"He said "hi""``) rejects its row. The row ends where a lenient reader ends it, at the next line feed
  outside quotes. *A quote that is still open at the end of the file* rejects the file: nothing shows where it should have been closed. An
  open quote may also swallow rows until another quote closes it. The result is rejected as one row.
- *A carriage return alone*, outside quotes, rejects its row. In the header, which is then the whole file, it rejects the file.
- *Too few or too many cells* reject the row.

A row has one reason: the first in the order of `rules`, in whatever way the row is asked.

**Limits.** A question may have 10,000 characters, a context 500,000 (settings can lower both), and a row 4 MiB. A larger row is rejected
while it is read, without being held in memory.

**What a rejected row keeps.** A rejected row keeps its line in the answered CSV, with the right number of cells. Cells that cannot be kept
are empty: those with NUL or half a surrogate pair, questions and contexts that are too long, and all cells of a row that is too large or
whose quoting leaves their borders in doubt. Extra cells are dropped; missing ones are empty. The beginning of the original row, escaped and
at most 65,536 characters long, is recorded with the reason.

A file in which every row is rejected was still read: each of its rows has its reason. But as soon as more than 100,000 rows are rejected,
and more than were good up to there, the whole file is rejected, and the detail names the most common reason: the file is not a table, and
its rejects would take many times its space.

**The report** is a CSV: line, row, column, reason, detail, and what to do. The report on a rejected file is beside it in the bucket;
``qa-platform answers --rejected`` prints the one on rejected rows.
"""

from qa_platform.ingest.buffer import ByteSource
from qa_platform.ingest.damage import FILE_HINTS, ROW_HINTS, FileRejected, FileRejection
from qa_platform.ingest.dialect import csv_line, with_delimiter
from qa_platform.ingest.reading import Row, RowReader
from qa_platform.ingest.report import REPORT_COLUMNS, report_on_file, report_on_rows
from qa_platform.ingest.rules import TextLimits
from qa_platform.ingest.sharding import OnRead, Write, split
from qa_platform.ingest.unpacking import Unpacked

__all__ = [
    "FILE_HINTS",
    "REPORT_COLUMNS",
    "ROW_HINTS",
    "ByteSource",
    "FileRejected",
    "FileRejection",
    "OnRead",
    "Row",
    "RowReader",
    "TextLimits",
    "Unpacked",
    "Write",
    "csv_line",
    "report_on_file",
    "report_on_rows",
    "split",
    "with_delimiter",
]
