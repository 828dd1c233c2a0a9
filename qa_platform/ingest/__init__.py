"""Reading the input CSV: what is accepted, what is rejected, and why.

**Gzip.** A file whose first two bytes are those of gzip is decompressed while it is read, whatever its name says. Damaged or cut-off data
rejects the file, and so does a bomb: more than 16 GiB, or, beyond 64 MiB, more than 200 times the bytes that were read. Lines and bytes in
reports are those of the decompressed text.

**The format.** UTF-8, with or without a byte order mark (or two); cells separated by a delimiter; lines ended by LF or CRLF; quoting as in
RFC 4180: a cell with a delimiter, a quote or a line break stands in double quotes, and a quote inside it is written twice. The reference is
Python's ``csv.reader`` with ``strict=True`` over lines that end in LF: records and cells are those that it reads. A quote in the middle of
an unquoted cell is therefore an ordinary character, and a cell with a space before its opening quote is unquoted.

**The delimiter** is that with which the header has its two columns: the first of comma, semicolon, tab and vertical bar. A first line
``sep=;``, as Excel knows it, names it; if the header has the columns with another one, or that is none of the four, the file is rejected.
Rows are read with the header's delimiter. Shards have commas; what is answered has the header's delimiter again.

**The header** is the first line that is not blank, after the line ``sep=``. It has ``question`` and ``context`` once each, in any order and
any case, with or without spaces around. Every other column passes through untouched, whatever its name. A name that clashes with a column
of the answered CSV (``answer``, ``score``, ``answer_start``, ``answer_end``, ``model``, ``error``) becomes ``input_<name>``, and may be
there once. At most 1,000 columns and 1 MiB.

**Rows** are numbered from 1, without the header; ``line`` is the line of the file on which a row begins, and the header is line 1. Blank
lines, at the end or elsewhere, are not rows, and neither are rows of nothing but empty cells, as Excel leaves them: both are skipped, and
counted as blank: `question_file.blank`. Cells pass unchanged: no trimming, no conversion, no
interpretation of formulas.

**File or row?** A row is rejected where the damage is certainly inside it, and the rows around it are intact. A file is rejected where the
damage puts every row in doubt; then nothing of it is kept, even if the damage lies gigabytes in. So:

- *Bytes that are not UTF-8* reject the file, with their byte offset: the file has another encoding, in which other rows may read as valid
  but wrong text, or was damaged on its way. The encoded half of a surrogate pair (which some programs write) is damage of its row only.
- *NUL* rejects its row. In the header, or together with bytes that are not UTF-8 near the file's beginning, it means that this is not text.
- *Text after a closing quote* (``"He said "hi""``) rejects its row. The row ends where a lenient reader ends it, at the next line feed
  outside quotes. *A quote that is still open at the end of the file* rejects the file: nothing shows where it should have been closed. An
  open quote may also swallow rows until another quote closes it. The result is rejected as one row, whose lines the report counts.
- *A carriage return alone*, outside quotes, rejects its row. In the header, which is then the whole file, it rejects the file.
- *Too few or too many cells* reject the row.

A row has one reason, the first in the order of `rules`, whichever way the row is asked.

**Limits.** A question has at most 10,000 and a context 500,000 characters (configurable downwards), a row 4 MiB. A larger row is rejected
while it is read, without being held in memory.

**What a rejected row keeps.** A rejected row keeps its line in the answered CSV, with the right number of cells. Cells that cannot be kept
are empty: those with NUL or half a surrogate pair, questions and contexts that are too long, and all cells where quoting leaves their
borders in doubt or the row is too large. Extra cells are dropped, missing ones are empty. The beginning of the row as it came, escaped, at
most 64 KiB, is recorded with the reason.

A file in which every row is rejected is still a file that was read: each of its rows has its reason. But where more than 100,000 rows are
rejected, and more than are good, the file is rejected with the reason that most of them have: it is no table, and its rejects would
take many times the place of the file.

**The report** is a CSV: line, row, column, reason, detail, and what to do. The report on a rejected file lies beside it in the bucket;
``qa-platform answers --rejected`` prints the one on rejected rows.
"""

from qa_platform.ingest.buffer import ByteSource
from qa_platform.ingest.damage import FILE_HINTS, ROW_HINTS, FileRejected, FileRejection
from qa_platform.ingest.dialect import csv_line, with_delimiter
from qa_platform.ingest.reading import Row, RowReader, iter_rows
from qa_platform.ingest.report import REPORT_COLUMNS, report_on_file, report_on_rows
from qa_platform.ingest.rules import TextLimits
from qa_platform.ingest.sharding import ToldForm, Write, split
from qa_platform.ingest.unpacking import Unpacked

__all__ = [
    "FILE_HINTS",
    "REPORT_COLUMNS",
    "ROW_HINTS",
    "ByteSource",
    "FileRejected",
    "FileRejection",
    "Row",
    "RowReader",
    "TextLimits",
    "ToldForm",
    "Unpacked",
    "Write",
    "csv_line",
    "iter_rows",
    "report_on_file",
    "report_on_rows",
    "split",
    "with_delimiter",
]
