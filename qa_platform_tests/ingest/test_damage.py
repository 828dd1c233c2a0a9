"""Every kind of damage has a name: what rejects a file, what rejects a row, and what is no damage at all."""

import gzip
import io
import zipfile

import pytest

from qa_platform.contract import COLUMN_LIMIT, HEADER_LIMIT, RAW_LIMIT, ROW_LIMIT, FileReason, Rejection, RowReason
from qa_platform.errors import InputError, TransientError
from qa_platform.ingest import FILE_HINTS, ROW_HINTS, FileRejected, Row, RowReader, TextLimits
from qa_platform.ingest.dialect import csv_reader
from qa_platform.settings import IngestSettings

HEADER = b"question,context\n"


def read(data: bytes) -> list[Row]:
    return list(RowReader(io.BytesIO(data)))


def only_row(data: bytes) -> Row:
    rows = read(HEADER + data)
    assert [row.row for row in rows] == [1]
    return rows[0]


def rejected_file(data: bytes) -> FileRejected:
    with pytest.raises(FileRejected) as caught:
        read(data)
    return caught.value


def rejection_of(row: Row) -> Rejection:
    assert row.rejection is not None
    assert (row.rejection.row, row.rejection.line) == (row.row, row.line)
    return row.rejection


def archive(name: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(name, "question,context\nq,c\n")
    return out.getvalue()


WHOLE_FILES = [
    pytest.param(b"", FileReason.EMPTY_FILE, None, None, id="empty"),
    pytest.param(b"\xef\xbb\xbf", FileReason.EMPTY_FILE, None, None, id="only a byte order mark"),
    pytest.param(b"\r\n \n\n", FileReason.EMPTY_FILE, None, None, id="only blank lines"),
    pytest.param(b"question,context", FileReason.HEADER_ONLY, None, None, id="header only"),
    pytest.param(b"question,context\r\n\r\n\n", FileReason.HEADER_ONLY, None, None, id="header and blank lines"),
    pytest.param(b"question,text\nq,c\n", FileReason.MISSING_COLUMN, 1, None, id="missing column"),
    pytest.param(b"What?,Because.\n", FileReason.MISSING_COLUMN, 1, None, id="no header"),
    pytest.param(b'{"question": "q", "context": "c"}\n', FileReason.MISSING_COLUMN, 1, None, id="JSON"),
    pytest.param(b"question,context,Question \nq,c,q\n", FileReason.DUPLICATE_COLUMN, 1, None, id="duplicate column"),
    pytest.param(b"question,context,model,Model\nq,c,m,m\n", FileReason.DUPLICATE_COLUMN, 1, None, id="duplicate column of ours"),
    pytest.param(b"question,context\n,\n,,,\n", FileReason.HEADER_ONLY, None, None, id="header and rows of commas"),
    pytest.param(b"question;context\n", FileReason.HEADER_ONLY, None, None, id="semicolons, header only"),
    pytest.param(b"id;question;text\n", FileReason.MISSING_COLUMN, 1, None, id="semicolons and a missing column"),
    pytest.param(b"sep=;\nquestion,context\nq,c\n", FileReason.WRONG_DELIMITER, 1, None, id="a line that names another delimiter"),
    pytest.param(b"sep=#\n\nquestion#context\nq#c\n", FileReason.WRONG_DELIMITER, 1, None, id="a delimiter that is not read"),
    pytest.param("sep=§\nquestion§context\nq§c\n".encode(), FileReason.WRONG_DELIMITER, 1, None, id="a delimiter of two bytes"),
    pytest.param(b"sep=::\nquestion::context\nq::c\n", FileReason.WRONG_DELIMITER, 1, None, id="a delimiter of two characters"),
    pytest.param(b"sep=;\nquestion;text\nq;c\n", FileReason.MISSING_COLUMN, 2, None, id="a line that names it, and a missing column"),
    pytest.param(b'question;context\nq;"c\n', FileReason.UNBALANCED_QUOTE, 2, None, id="semicolons and an unbalanced quote"),
    pytest.param(HEADER + b"q,c\nq,caf\xe9 au lait\n", FileReason.NOT_UTF8, 3, 26, id="Latin-1"),
    pytest.param(b"\xef\xbb\xbf" + HEADER + b"q,\x80\n", FileReason.NOT_UTF8, 2, 22, id="not UTF-8 after a byte order mark"),
    pytest.param(HEADER + b'q,"a\nb\nc\xff"\n', FileReason.NOT_UTF8, 4, 25, id="not UTF-8 within a quoted cell"),
    pytest.param(HEADER + "q,東".encode()[:-1], FileReason.NOT_UTF8, 2, 19, id="cut in a character"),
    pytest.param("question,context,größe\n".encode("latin-1"), FileReason.NOT_UTF8, 1, 19, id="header in Latin-1"),
    pytest.param(b'question,"caf\xe9\nq,c\n', FileReason.NOT_UTF8, 1, 13, id="header in Latin-1 with an unbalanced quote"),
    pytest.param("question,context\nq,c\n".encode("utf-16"), FileReason.UTF16, None, 0, id="UTF-16"),
    pytest.param("\ufeffquestion,context\nq,c\n".encode("utf-16-be"), FileReason.UTF16, None, 0, id="UTF-16, big end first"),
    pytest.param("question,context\nq,c\n".encode("utf-16-le"), FileReason.UTF16, None, 0, id="UTF-16, no mark"),
    pytest.param("question,context\nq,c\n".encode("utf-16-be"), FileReason.UTF16, None, 0, id="UTF-16, big end first, no mark"),
    pytest.param("question,context\n谁?,艾达\n".encode("utf-16-le"), FileReason.UTF16, None, 0, id="UTF-16, no mark, not Latin"),
    pytest.param("question,context\n谁?,艾达\n".encode("utf-16-be"), FileReason.UTF16, None, 0, id="UTF-16, big end, no mark, not Latin"),
    pytest.param("question,context\nq,c\n".encode("utf-32"), FileReason.UTF16, None, 0, id="UTF-32"),
    pytest.param(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", FileReason.BINARY, None, 8, id="PNG"),
    pytest.param(b"\x7fELF\x02\x01,\n", FileReason.BINARY, 1, 0, id="control characters in the header"),
    pytest.param(b"question,con\0text\nq,c\n", FileReason.BINARY, 1, 12, id="NUL in the header"),
    pytest.param(b"%PDF-1.7\n%\xe2\xe3\n", FileReason.BINARY, None, 0, id="PDF"),
    pytest.param(archive("questions.csv"), FileReason.ARCHIVE, None, 0, id="zip"),
    pytest.param(archive("xl/workbook.xml"), FileReason.ARCHIVE, None, 0, id="xlsx"),
    pytest.param(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1\0\0", FileReason.ARCHIVE, None, 0, id="xls"),
    pytest.param(gzip.compress(gzip.compress(HEADER + b"q,c\n")), FileReason.ARCHIVE, None, 0, id="gzip within gzip"),
    pytest.param(gzip.compress(HEADER + b"q,c\n")[:-1], FileReason.DAMAGED_GZIP, None, None, id="gzip that is cut off"),
    pytest.param(gzip.compress(HEADER + b"q," + bytes(70 * 2**20), 1), FileReason.GZIP_BOMB, None, None, id="gzip bomb"),
    pytest.param(b"BZh91AY&SY\xff", FileReason.ARCHIVE, None, 0, id="bzip2"),
    pytest.param(HEADER + b'q,c\nq,"c\nq,c\n', FileReason.UNBALANCED_QUOTE, 3, None, id="unbalanced quote"),
    pytest.param(HEADER + b'q,"c""', FileReason.UNBALANCED_QUOTE, 2, None, id="unbalanced quote after an escaped one"),
    pytest.param(b'question,"context\nq,c\n', FileReason.UNBALANCED_QUOTE, 1, None, id="unbalanced quote in the header"),
    pytest.param(b'"question"s,context\nq,c\n', FileReason.BAD_HEADER, 1, None, id="text after a quote in the header"),
    pytest.param(b'"question"s,context\r', FileReason.BAD_HEADER, 1, None, id="the same with a carriage return at the end"),
    pytest.param(b"question,context\rq,c\rq,c\r", FileReason.CR_LINE_ENDS, 1, None, id="CR line ends"),
    pytest.param(b'"question","context"\r"q","c"\r', FileReason.CR_LINE_ENDS, 1, None, id="CR line ends, quoted"),
    pytest.param(b'question,context\rq,"c\nd"\r', FileReason.CR_LINE_ENDS, 1, None, id="CR line ends, LF in a cell"),
    pytest.param(b"question,context\r" + b"q,c\r" * 300_000, FileReason.CR_LINE_ENDS, 1, None, id="CR line ends, large"),
    pytest.param(b"question,context" + b",x" * (COLUMN_LIMIT - 1) + b"\n", FileReason.TOO_MANY_COLUMNS, 1, None, id="columns"),
    pytest.param(b"question,context" + b" " * 2_000_000 + b"\n", FileReason.HEADER_TOO_LARGE, 1, None, id="large header"),
    pytest.param(HEADER + b"q,c\n" + b"q\n" * 100_001, FileReason.TOO_MANY_BAD_ROWS, 100_003, None, id="hardly a good row"),
    pytest.param(b'"question' + b" \n" * 1_000_000, FileReason.HEADER_TOO_LARGE, 1, None, id="large quoted header"),
]


@pytest.mark.parametrize(("data", "reason", "line", "offset"), WHOLE_FILES)
def test_a_damaged_file_is_rejected_by_name_and_place(data: bytes, reason: FileReason, line: int | None, offset: int | None) -> None:
    error = rejected_file(data)
    assert (error.rejection.reason, error.rejection.line, error.rejection.offset) == (reason, line, offset)
    assert isinstance(error, InputError)
    assert error.rejection.hint in str(error)
    assert reason.value in str(error)


def test_every_reason_of_a_file_is_tested_and_says_what_to_do() -> None:
    tested = {case.values[1] for case in WHOLE_FILES}
    assert tested == set(FileReason) == set(FILE_HINTS)


def test_typographic_quotes_around_cells_are_named() -> None:
    told = "cells must be quoted with straight quotes, not “"
    assert told in rejected_file("“question”,“context”\nq,c\n".encode()).rejection.detail
    assert told in rejection_of(only_row("q, “one, two”\n".encode())).detail
    assert only_row("“q”,“c”\n".encode()).rejection is None, "they are text like any other"


def test_xlsx_and_zip_are_told_apart() -> None:
    assert ".xlsx" in rejected_file(archive("xl/workbook.xml")).rejection.detail
    assert ".xlsx" not in rejected_file(archive("questions.csv")).rejection.detail


@pytest.mark.parametrize("size", [100, ROW_LIMIT // 2, 2 * ROW_LIMIT + 12_345])
def test_a_quote_that_never_closes_rejects_the_file_however_far_its_end_is(size: int) -> None:
    good = HEADER + b'q,"c"\n' * 1000
    error = rejected_file(good + b'q,"c\n' + b"plain,text\n" * (size // 11))
    assert (error.rejection.reason, error.rejection.line) == (FileReason.UNBALANCED_QUOTE, 1002)


@pytest.mark.parametrize("size", [100, ROW_LIMIT + 3 * 2**20 + 1])
def test_not_utf8_is_found_at_its_byte_within_a_row_that_is_too_large(size: int) -> None:
    data = HEADER + b'q,"' + "東\n".encode() * (size // 4)
    error = rejected_file(data + b'\xff"\nq,c\n')
    assert (error.rejection.reason, error.rejection.offset, error.rejection.line) == (FileReason.NOT_UTF8, len(data), 2 + size // 4)


def test_a_cut_download_is_not_called_damage() -> None:
    data = HEADER + b'q,"c"\n'
    for length in range(len(data)):
        with pytest.raises(TransientError, match=f"{length} of {len(data)} bytes"):
            list(RowReader(io.BytesIO(data[:length]), size=len(data)))
    assert len(list(RowReader(io.BytesIO(data), size=len(data)))) == 1


ROWS = [
    pytest.param(b",c\n", RowReason.EMPTY_QUESTION, "question", ["", "c"], id="empty question"),
    pytest.param(b'" \t\n",c\n', RowReason.EMPTY_QUESTION, "question", [" \t\n", "c"], id="whitespace question"),
    pytest.param("q,\u3000\u00a0\n".encode(), RowReason.EMPTY_CONTEXT, "context", ["q", "\u3000\u00a0"], id="Unicode whitespace"),
    pytest.param("\u200b\ufeff\u0301,c\n".encode(), RowReason.EMPTY_QUESTION, "question", ["\u200b\ufeff\u0301", "c"], id="invisible"),
    pytest.param(b"q,\n", RowReason.EMPTY_CONTEXT, "context", ["q", ""], id="empty context"),
    pytest.param(b" , \n", RowReason.EMPTY_QUESTION, "question", [" ", " "], id="both empty"),
    pytest.param(b"q" * 10_001 + b",c\n", RowReason.QUESTION_TOO_LONG, "question", ["", "c"], id="long question"),
    pytest.param(b"q," + b"c" * 500_001 + b"\n", RowReason.CONTEXT_TOO_LONG, "context", ["q", ""], id="long context"),
    pytest.param(b"q\n", RowReason.TOO_FEW_CELLS, "", ["q", ""], id="too few cells"),
    pytest.param(b'" "\n', RowReason.TOO_FEW_CELLS, "", [" ", ""], id="one blank quoted cell"),
    pytest.param(b"q,c,d\n", RowReason.TOO_MANY_CELLS, "", ["q", "c"], id="too many cells"),
    pytest.param(b"q,c,\n", RowReason.TOO_MANY_CELLS, "", ["q", "c"], id="a comma at the end"),
    pytest.param(b'q,"c"d\n', RowReason.BAD_QUOTING, "", ["", ""], id="text after a quote"),
    pytest.param(b'q,"He said "hi" to me"\n', RowReason.BAD_QUOTING, "", ["", ""], id="quotes that are not doubled"),
    pytest.param(b'"q" ,c\n', RowReason.BAD_QUOTING, "", ["", ""], id="space after a quote"),
    pytest.param(b'"q"r,"c\nd"\n', RowReason.BAD_QUOTING, "", ["", ""], id="a later cell with a line break"),
    pytest.param(b"q,c\rd\n", RowReason.BARE_CARRIAGE_RETURN, "", ["", ""], id="carriage return"),
    pytest.param(b'"q","c"\r"q","c"\r\n', RowReason.BARE_CARRIAGE_RETURN, "", ["", ""], id="carriage return after a quote"),
    pytest.param(b"q\0,c\n", RowReason.NUL_CHARACTER, "question", ["", "c"], id="NUL"),
    pytest.param(b'q,"c\0"\n', RowReason.NUL_CHARACTER, "context", ["q", ""], id="NUL in quotes"),
    pytest.param(b"q,\xed\xa0\x80\n", RowReason.LONE_SURROGATE, "context", ["q", ""], id="lone surrogate"),
    pytest.param(b'"\xed\xb0\x80",c', RowReason.LONE_SURROGATE, "question", ["", "c"], id="lone surrogate at the end"),
    pytest.param(b"\xed\xa0\x80,c,d\n", RowReason.TOO_MANY_CELLS, "", ["", "c"], id="shape before content"),
    pytest.param(b"q," + b"c" * ROW_LIMIT + b"\n", RowReason.ROW_TOO_LARGE, "", ["", ""], id="large row"),
    pytest.param(b"q" + b"," * (ROW_LIMIT - 1) + b"\n", RowReason.ROW_TOO_LARGE, "", ["", ""], id="large row of commas"),
]


@pytest.mark.parametrize("after", [b"", b"good,row\n"], ids=["last", "followed"])
@pytest.mark.parametrize(("data", "reason", "column", "cells"), ROWS)
def test_a_damaged_row_is_rejected_by_name_and_the_others_are_read(
    data: bytes, reason: RowReason, column: str, cells: list[str], after: bytes
) -> None:
    if after and not data.endswith(b"\n"):
        data += b"\n"
    before, damaged, *rest = read(HEADER + b'"good\nrow",c\n' + data + after)
    assert before.rejection is None
    rejection = rejection_of(damaged)
    assert (rejection.reason, rejection.column, list(damaged.cells)) == (reason, column, cells)
    assert (damaged.row, damaged.line) == (2, 4)
    assert len(rejection.raw) <= RAW_LIMIT
    rejection.raw.encode()
    assert "\0" not in rejection.raw
    assert [row.cells for row in rest] == [["good", "row"]] * bool(after)
    assert all(row.rejection is None for row in rest)


def test_every_reason_that_ingestion_gives_a_row_is_tested_and_says_what_to_do() -> None:
    model = {RowReason.QUESTION_EXCEEDS_WINDOW, RowReason.UNUSABLE_ANSWER, RowReason.NO_ANSWER, RowReason.LOW_SCORE}
    later = {*model, RowReason.NOT_TEXT}
    assert {case.values[1] for case in ROWS} == set(RowReason) - later
    assert set(ROW_HINTS) >= set(RowReason) - later


def test_limits_count_characters_and_a_full_cell_passes() -> None:
    row = only_row(("😀" * 10_000 + ',"' + '""' * 500_000 + '"\n').encode())
    assert row.rejection is None
    assert [len(cell) for cell in row.cells] == [10_000, 500_000]


def test_limits_follow_the_settings() -> None:
    limits = TextLimits.of(IngestSettings(question_limit=3, context_limit=4))
    rows = list(RowReader(io.BytesIO(HEADER + b"abc,abcd\nabcd,abcd\nabc,abcde\n"), limits=limits))
    assert [row.rejection and row.rejection.reason for row in rows] == [None, RowReason.QUESTION_TOO_LONG, RowReason.CONTEXT_TOO_LONG]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"q," + b"x" * 50_000_000, id="unquoted"),
        pytest.param(b'q,"' + b"x y\n" * 5_000_000 + b'"', id="quoted lines"),
        pytest.param(b'q,"' + b'""' * 10_000_000 + b'"', id="escaped quotes"),
        pytest.param(b"," * 10_000_000, id="commas"),
        pytest.param(b'"",' * 5_000_000, id="empty quoted cells"),
    ],
)
def test_a_row_of_10_to_50_mb_is_rejected_alone_and_its_beginning_kept(data: bytes) -> None:
    large, good = read(HEADER + data + b"\nq,c\n")
    rejection = rejection_of(large)
    assert (rejection.reason, rejection.raw) == (RowReason.ROW_TOO_LARGE, data[:RAW_LIMIT].decode())
    assert f"{len(data) + 1:,} bytes on {data.count(10) + 1:,} lines" in rejection.detail
    assert (good.row, good.line, good.cells) == (2, data.count(10) + 3, ["q", "c"])


def test_a_row_may_be_too_large_by_any_of_its_cells() -> None:
    large, good = read(b"question,context,more\nq,c," + b"x" * ROW_LIMIT + b"\nq,c,\n")
    assert (rejection_of(large).reason, good.rejection) == (RowReason.ROW_TOO_LARGE, None)
    large, good = read(HEADER + b"," * ROW_LIMIT + b"\nq,c\n")
    assert (rejection_of(large).reason, good.rejection) == (RowReason.ROW_TOO_LARGE, None)


def test_raw_text_is_escaped_and_cut_between_characters() -> None:
    head = b"\0\xed\xa0\x80x"
    assert (RAW_LIMIT - len(head)) % len("東".encode()), "the limit is within a character"
    rejection = rejection_of(only_row(head + "東".encode() * RAW_LIMIT + b"\n"))
    assert rejection.raw.startswith("\\x00\\xed\\xa0\\x80x東")
    assert rejection.raw.endswith("東")


HARMLESS = [
    pytest.param(b"\xef\xbb\xbfquestion,context\nq,c\n", ["question", "context"], [["q", "c"]], id="byte order mark"),
    pytest.param(b'\xef\xbb\xbf"question","context"\nq,c\n', ["question", "context"], [["q", "c"]], id="byte order mark, quoted"),
    pytest.param(b"\xef\xbb\xbf" * 2 + b"question,context\nq,c\n", ["question", "context"], [["q", "c"]], id="two byte order marks"),
    pytest.param(b"\xef\xbb\xbfsep=,\r\nquestion,context\nq,c\n", ["question", "context"], [["q", "c"]], id="a line that names the comma"),
    pytest.param(b"sep=;\r\nquestion;context\nq;c,d\n", ["question", "context"], [["q", "c,d"]], id="a line that names the semicolon"),
    pytest.param(b"sep=;;;\r\nquestion;context\nq;c,d\n", ["question", "context"], [["q", "c,d"]], id="a line padded with cells"),
    pytest.param(b"sep=; \nquestion;context\nq;c,d\n", ["question", "context"], [["q", "c,d"]], id="a line padded with a blank"),
    pytest.param(b'sep=";"\nquestion;context\nq;c,d\n', ["question", "context"], [["q", "c,d"]], id="a quoted delimiter"),
    pytest.param(b'\xef\xbb\xbf"sep=\t"\r\nquestion\tcontext\nq\tc\n', ["question", "context"], [["q", "c"]], id="the tab, after a mark"),
    pytest.param(b'"id, no";"question";"context"\n1;"q";c', ["id, no", "question", "context"], [["1", "q", "c"]], id="semicolons, quoted"),
    pytest.param(b'question|"con\ntext"|context\n;|,|c\n', ["question", "con\ntext", "context"], [[";", ",", "c"]], id="vertical bars"),
    pytest.param(b"question\tcontext\nq\t a, b; c \r\r\n", ["question", "context"], [["q", " a, b; c "]], id="tabs, CR CR LF"),
    pytest.param(b"question,context\r\nq,c\r\n", ["question", "context"], [["q", "c"]], id="CRLF"),
    pytest.param(b"question,context\nq,c\n\n\r\n\n", ["question", "context"], [["q", "c"]], id="trailing blank lines"),
    pytest.param(b"question,context\nq,c\n\nr,d\n", ["question", "context"], [["q", "c"], ["r", "d"]], id="a blank line between"),
    pytest.param(b'question,context\n,\nq,c\n,,,\n""\n"",\nr,d\n,', ["question", "context"], [["q", "c"], ["r", "d"]], id="rows of commas"),
    pytest.param(b"\n\r\nquestion,context\nq,c", ["question", "context"], [["q", "c"]], id="leading blank lines, no last line end"),
    pytest.param(b"\n" * (HEADER_LIMIT + 2) + HEADER + b"q,c", ["question", "context"], [["q", "c"]], id="blank lines beyond the limit"),
    pytest.param(
        (HEADER[:-1] + b",").ljust(HEADER_LIMIT - 1, b"x") + b"\nq,c,\n",
        ["question", "context", "x" * (HEADER_LIMIT - 18)],
        [["q", "c", ""]],
        id="the longest header",
    ),
    pytest.param(b"question,context\nq,c\r", ["question", "context"], [["q", "c"]], id="a carriage return at the end"),
    pytest.param(b"question,context\nq,c\r\r\nr,d\n", ["question", "context"], [["q", "c"], ["r", "d"]], id="CR CR LF"),
    pytest.param(b"Context , ID,QUESTION\nc,1,q\n", ["Context ", " ID", "QUESTION"], [["c", "1", "q"]], id="any order and case"),
    pytest.param(b"answer,question,context\na,q,c\n", ["input_answer", "question", "context"], [["a", "q", "c"]], id="a column answer"),
    pytest.param(
        b"question,context,model,input_model\nq,c,m,n\n",
        ["question", "context", "input_input_model", "input_model"],
        [["q", "c", "m", "n"]],
        id="a renamed column that is taken too",
    ),
    pytest.param(
        b'question,context,"\'; DROP TABLE question_answer; --",=cmd|\'/c calc\'!A1,,,\nq,c,=1+1,+1,@x,-1,""\n',
        ["question", "context", "'; DROP TABLE question_answer; --", "=cmd|'/c calc'!A1", "", "", ""],
        [["q", "c", "=1+1", "+1", "@x", "-1", ""]],
        id="columns named like SQL and formulas",
    ),
    pytest.param(b'question,context\n5" pipe,a "b" c\n', ["question", "context"], [['5" pipe', 'a "b" c']], id="quotes within bare cells"),
    pytest.param(b'question,context\n"a\r\nb\rc","d""e"\n', ["question", "context"], [["a\r\nb\rc", 'd"e']], id="line breaks in quotes"),
]


@pytest.mark.parametrize(("data", "columns", "cells"), HARMLESS)
def test_what_looks_odd_but_is_allowed_passes_untouched(data: bytes, columns: list[str], cells: list[list[str]]) -> None:
    reader = RowReader(io.BytesIO(data))
    rows = list(reader)
    assert [row.rejection for row in rows] == [None] * len(cells)
    assert (list(reader.columns), [row.cells for row in rows]) == (columns, cells)
    # As a worker reads it out of a shard.
    assert list(csv_reader(io.StringIO(b"".join(row.raw for row in rows).decode(), newline=""))) == cells
    assert reader.columns[reader.question].strip().lower() == "question"
    assert reader.columns[reader.context].strip().lower() == "context"


def test_only_line_feeds_break_lines() -> None:
    row = only_row("a\u2028b\u0085c\x0bd,e\x1cf\x0cg\n".encode())
    assert (row.cells, row.rejection) == (["a\u2028b\u0085c\x0bd", "e\x1cf\x0cg"], None)


def test_lines_and_rows_are_counted_apart() -> None:
    rows = read(b'\n"question",context\n\n"a\nb\nc",d\n,\nx\n"e"f,"\n"\r\ng,h')
    assert [(row.row, row.line, row.rejection and row.rejection.reason) for row in rows] == [
        (1, 4, None),
        (2, 8, RowReason.TOO_FEW_CELLS),
        (3, 9, RowReason.BAD_QUOTING),
        (4, 11, None),
    ]


def test_a_rejected_row_names_its_column_in_a_few_characters_however_long_the_name_is() -> None:
    name = "ü" * 100_000
    rows = read(f"question,context,{name}\n".encode() + b"q,c,\0\n" * 100)
    assert {rejection_of(row).column for row in rows} == {name[:199] + "…"}
