"""The input CSV: what is read, what is rejected, and why.

**The format.** UTF-8, with or without a byte order mark; cells separated by commas; lines ended by LF or CRLF; quoting as in RFC 4180: a
cell with a comma, a quote or a line break stands in double quotes, and a quote inside it is written twice. The reference is Python's
``csv.reader`` with ``strict=True`` over lines that end in LF: what it takes for one record with certain cells is that here. A quote in
the middle of an unquoted cell is therefore an ordinary character, and a space before an opening quote makes the cell an unquoted one.

**The header** is the first line that is not blank. It has ``question`` and ``context`` once each, in any order and any case, with spaces
around or not. Every other column passes through untouched, whatever its name; a name that clashes with a column of the answered CSV
(``answer``, ``score``, ``answer_start``, ``answer_end``, ``model``, ``error``) becomes ``input_<name>``. At most 1,000 columns and 1 MiB.

**Rows** are numbered from 1, the header not counted; ``line`` is the line of the file on which a row begins, the header being line 1.
Blank lines, at the end or elsewhere, are no rows. Cells pass unchanged: no trimming, no conversion, no interpretation of formulas.

**File or row?** A row is rejected where the damage is surely inside it, and the rows around it are still what their author meant. A file
is rejected where the damage puts every row in doubt; then nothing of it is kept, even if the damage lies gigabytes in. So:

- *Bytes that are no UTF-8* reject the file, with their byte offset: the file has another encoding, in which other rows may read as valid
  but wrong text, or was damaged on its way. The encoded half of a surrogate pair (which some programs write) is damage of its row only.
- *NUL* rejects its row. In the header, or together with bytes that are no UTF-8 near the file's beginning, it means that this is no text.
- *Text after a closing quote* (``"He said "hi""``) rejects its row. The row ends where a lenient reader ends it, at the next line feed
  outside quotes. *A quote that is still open at the end of the file* rejects the file: where it should have been closed, nobody knows. An
  open quote may also swallow rows until another quote closes it; the result is rejected as one row, whose lines the report counts.
- *A carriage return alone*, outside quotes, rejects its row; in the header, which is then the whole file, the file.
- *Too few or too many cells* reject the row.

**Limits.** Question 10,000 and context 500,000 characters (configurable downwards), a row 4 MiB. A larger row is rejected while it is
read, without being held in memory.

**What a rejected row keeps.** Its line in the answered CSV, with its number of cells right: cells that cannot be kept are empty (those
with NUL or half a surrogate pair, questions and contexts that are too long, all cells where quoting leaves their borders in doubt or the
row is too large); of too many cells the first are kept, missing ones are empty. Its beginning as it came, escaped, at most 64 KiB, is
recorded with the reason.

A file in which every row is rejected is still a file that was read: each of its rows is accounted for.

**The report** on a rejected file, which lies beside it in the bucket, and on rejected rows, which ``qa-platform answers --rejected``
prints, is a CSV: line, row, column, reason, detail, and what to do.
"""

from qa_platform.ingest.damage import FILE_HINTS, ROW_HINTS, FileRejected
from qa_platform.ingest.reading import ByteSource, Row, RowReader, csv_line, iter_rows
from qa_platform.ingest.report import REPORT_COLUMNS, report_on_file, report_on_rows
from qa_platform.ingest.sharding import Write, split

__all__ = [
    "FILE_HINTS",
    "REPORT_COLUMNS",
    "ROW_HINTS",
    "ByteSource",
    "FileRejected",
    "Row",
    "RowReader",
    "Write",
    "csv_line",
    "iter_rows",
    "report_on_file",
    "report_on_rows",
    "split",
]
