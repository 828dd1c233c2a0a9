"""Ingestion compared with ``csv.reader`` on random CSVs and random bytes, in random pieces: same records, nothing lost, no crash."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qa_platform.contract import RAW_LIMIT, FileReason, FileVersion, Manifest, ModelChoice, RowReason, ShardInfo
from qa_platform.ingest import FileRejected, Row, RowReader, TextLimits, csv_line, damage, header, reading, split, with_delimiter
from qa_platform.ingest.dialect import parse
from qa_platform.ingest.records import RecordEnd, whole_characters
from qa_platform.settings import IngestSettings

SETTINGS = IngestSettings(question_limit=4, context_limit=6)
HEADER = "id,question,context\n"
WIDTH = 3
_END = "\x01the end\n"


class Pieces:
    """A stream that gives its bytes in pieces of the sizes asked for, over and over, as a network does."""

    def __init__(self, data: bytes, sizes: list[int]) -> None:
        self._data = io.BytesIO(data)
        self._sizes = sizes
        self._reads = 0

    def read(self, size: int, /) -> bytes:
        self._reads += 1
        return self._data.read(min(size, self._sizes[self._reads % len(self._sizes)]))


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits so small that every border is met: the header alone is buffered first, and a row of 60 bytes is too large."""
    monkeypatch.setattr(header, "HEADER_LIMIT", len(HEADER) + 8)
    monkeypatch.setattr(damage, "_SAMPLE", 8)
    monkeypatch.setattr(damage, "_UTF16_SAMPLE", 8)
    monkeypatch.setattr(reading, "ROW_LIMIT", 60)
    csv.field_size_limit(2**31 - 1)


def rows_of(data: bytes, sizes: list[int]) -> tuple[RowReader, list[Row]]:
    reader = RowReader(Pieces(data, sizes), limits=TextLimits.of(SETTINGS))
    return reader, list(reader)


def outcome(data: bytes, sizes: list[int]) -> FileRejected | tuple[tuple[str, ...], list[Row]]:
    try:
        reader, rows = rows_of(data, sizes)
    except FileRejected as error:
        return error
    return reader.columns, rows


@dataclass(frozen=True)
class Expected:
    """What ``csv.reader`` makes of one record: its text, and its cells, or None where the strict dialect refuses it."""

    text: str
    line: int
    cells: list[str] | None


def expected_records(body: str) -> list[Expected] | None:
    """The records of a body without bare carriage returns; None where a quote is open at its end."""
    lines = io.StringIO(body if body.endswith("\n") or not body else body + "\n", newline="\n").readlines()
    reader = csv.reader([*lines, _END])
    records: list[Expected] = []
    last = 0
    for cells in reader:
        text = "".join(lines[last : reader.line_num])
        line, last = last + 2, reader.line_num
        if last > len(lines):
            return records if cells == [_END.strip("\n")] else None
        if any(cells) or len(text.encode()) > 60:
            records.append(Expected(text, line, strict_cells(text)))
    return None


def strict_cells(text: str) -> list[str] | None:
    try:
        [cells] = csv.reader(io.StringIO(text, newline="\n"), strict=True)
    except csv.Error:
        return None
    return cells


def expected_reason(record: Expected, size: int) -> RowReason | None:
    cells = record.cells
    if size > 60:
        return RowReason.ROW_TOO_LARGE
    if cells is None:
        return RowReason.BAD_QUOTING
    if len(cells) != WIDTH:
        return RowReason.TOO_FEW_CELLS if len(cells) < WIDTH else RowReason.TOO_MANY_CELLS
    if any("\0" in cell for cell in cells):
        return RowReason.NUL_CHARACTER
    for cell, empty in ((cells[1], RowReason.EMPTY_QUESTION), (cells[2], RowReason.EMPTY_CONTEXT)):
        if not cell.strip():
            return empty
    for cell, limit, long in ((cells[1], 4, RowReason.QUESTION_TOO_LONG), (cells[2], 6, RowReason.CONTEXT_TOO_LONG)):
        if len(cell) > limit:
            return long
    return None


# CSV's own characters, mostly, so that every state of a parser is met; a wide and an invisible one; a line break that is none.
characters = st.sampled_from(['"', '"', ",", ",", "\n", "\n", "\r\n", " ", "a", "b", "東", "\u2028", "\0", "😀"])
noise = st.lists(characters, max_size=80).map("".join)
cells = st.text(st.sampled_from('a",\n\r 東b'), max_size=8)
tables = st.lists(st.lists(cells, min_size=WIDTH, max_size=WIDTH), max_size=12)
written = tables.map(lambda table: b"".join(map(csv_line, table)).decode())
bodies = st.one_of(noise, written, st.tuples(written, noise, written).map("".join))
sizes = st.lists(st.integers(1, 70), min_size=1, max_size=4)


def has_bare_return(body: str) -> bool:
    """A carriage return outside quotes that ends no line: there ``csv.reader`` refuses to go on."""
    try:
        list(csv.reader([*io.StringIO(body, newline="\n").readlines(), _END]))
    except csv.Error:
        return True
    return False


@settings(max_examples=200, deadline=None)
@given(body=bodies, sizes=sizes)
def test_records_are_those_of_the_csv_module(body: str, sizes: list[int]) -> None:
    data = (HEADER + body).encode()
    if has_bare_return(body):
        check_accounts(data, sizes)
        return
    records = expected_records(body)
    if not records:
        with pytest.raises(FileRejected) as caught:
            rows_of(data, sizes)
        assert caught.value.rejection.reason == (FileReason.UNBALANCED_QUOTE if records is None else FileReason.HEADER_ONLY)
        return
    _, rows = rows_of(data, sizes)
    assert [(row.row, row.line) for row in rows] == [(number, record.line) for number, record in enumerate(records, 1)]
    for row, record in zip(rows, records, strict=True):
        size = len(record.text.encode()) - (record is records[-1] and not body.endswith("\n"))
        reason = expected_reason(record, size)
        assert (row.rejection and row.rejection.reason) == reason, (row, record)
        if reason is None:
            assert row.cells == record.cells
            assert row.raw.rstrip(b"\r\n") == record.text.encode().rstrip(b"\r\n")
        assert strict_cells(row.raw.decode()) == list(row.cells)


@settings(max_examples=200, deadline=None)
@given(table=tables, line_end=st.sampled_from([b"\n", b"\r\n"]), sizes=sizes)
def test_what_was_written_is_read_back(table: list[list[str]], line_end: bytes, sizes: list[int]) -> None:
    data = HEADER.encode() + b"".join(csv_line(cells).removesuffix(b"\n") + line_end for cells in table)
    table = [cells for cells in table if any(cells)]
    if not table:
        return
    _, rows = rows_of(data, sizes)
    assert len(rows) == len(table)
    for row, cells in zip(rows, table, strict=True):
        assert row.rejection or row.cells == cells
        assert row.rejection is None or row.rejection.reason not in (RowReason.BAD_QUOTING, RowReason.BARE_CARRIAGE_RETURN)


@settings(max_examples=200, deadline=None)
@given(table=tables, body=noise, delimiter=st.sampled_from(";|"), named=st.booleans(), sizes=sizes)
def test_another_delimiter_changes_nothing_but_the_text(
    table: list[list[str]], body: str, delimiter: str, named: bool, sizes: list[int]
) -> None:
    """A comma and the delimiter change places: then the same records are read, and written with commas."""
    swap = str.maketrans({",": delimiter, delimiter: ","})
    text = "".join(csv_line(cells).decode() for cells in table) + body
    text = ("sep=,\n" if named else "") + HEADER + text
    one, other = outcome(text.encode(), sizes), outcome(text.translate(swap).encode(), sizes)
    if isinstance(one, FileRejected) or isinstance(other, FileRejected):
        assert isinstance(one, FileRejected)
        assert isinstance(other, FileRejected)
        assert one.rejection.reason == other.rejection.reason
        return
    assert one[0] == other[0]
    for row, swapped in zip(one[1], other[1], strict=True):
        assert (row.row, row.line) == (swapped.row, swapped.line)
        assert list(row.cells) == [cell.translate(swap) for cell in swapped.cells]
        assert (row.rejection and row.rejection.reason) == (swapped.rejection and swapped.rejection.reason)
        assert strict_cells(swapped.raw.decode()) == list(swapped.cells)


@settings(max_examples=200, deadline=None)
@given(table=tables, delimiter=st.sampled_from(";\t|"), size=st.integers(1, 50))
def test_the_same_records_are_written_with_another_delimiter(table: list[list[str]], delimiter: str, size: int) -> None:
    data = b"".join(map(csv_line, table))
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    assert b"".join(with_delimiter(pieces, delimiter)) == b"".join(csv_line(cells, delimiter=delimiter) for cells in table)
    assert parse(b"".join(with_delimiter(pieces, delimiter)).decode(), delimiter=delimiter) == parse(data.decode())


def check_accounts(data: bytes, sizes: list[int]) -> None:
    """Either the file is rejected, or every row is good or rejected, in order, and can be stored and read back."""
    result = outcome(data, sizes)
    if isinstance(result, FileRejected):
        assert result.rejection.offset is None or 0 <= result.rejection.offset <= len(data)
        assert result.rejection.line is None or 1 <= result.rejection.line <= data.count(b"\n") + 1
        return
    columns, rows = result
    assert rows
    assert [row.row for row in rows] == list(range(1, len(rows) + 1))
    lines = [row.line for row in rows]
    assert lines == sorted(set(lines))
    for row in rows:
        text = row.raw.decode()
        assert strict_cells(text) == list(row.cells)
        assert len(row.cells) == len(columns)
        assert list(csv.reader(io.StringIO(text, newline=""))) == [list(row.cells)]
        assert "\0" not in text
        if row.rejection:
            row.rejection.raw.encode()
            assert "\0" not in row.rejection.raw
            assert len(row.rejection.raw) <= RAW_LIMIT


fragments = st.sampled_from([b'"', b",", b"\n", b"\r", b"\0", b"\xed\xa0\x80", b"\xff", b"a", "東".encode(), b"\xef\xbb\xbf"])
hostile = st.one_of(st.binary(max_size=300), st.lists(fragments, max_size=90).map(b"".join))
heads = st.sampled_from(
    [
        b"",
        b"\xef\xbb\xbf",
        HEADER.encode(),
        b"question,context\r\n",
        b'"Context","x\ny",QUESTION\n',
        b"question;context\n",
        b"sep=|\nquestion|context\n",
    ]
)


@settings(max_examples=200, deadline=None)
@given(head=heads, data=hostile, sizes=sizes)
def test_random_bytes_are_read_or_rejected_and_always_accounted_for(head: bytes, data: bytes, sizes: list[int]) -> None:
    check_accounts(head + data, sizes)


@settings(max_examples=200, deadline=None)
@given(head=heads, data=st.one_of(hostile, bodies.map(str.encode)), sizes=sizes)
def test_how_the_bytes_arrive_changes_nothing(head: bytes, data: bytes, sizes: list[int]) -> None:
    one, other = outcome(head + data, sizes), outcome(head + data, [1000])
    if isinstance(one, FileRejected) and isinstance(other, FileRejected):
        assert str(one) == str(other)
    else:
        assert one == other


@settings(max_examples=200, deadline=None)
@given(
    data=st.one_of(bodies.map(lambda body: (HEADER + body).encode()), st.tuples(heads, hostile).map(b"".join)),
    shard_rows=st.integers(1, 4),
    shard_bytes=st.integers(1, 100),
    sizes=sizes,
)
def test_shards_hold_the_rows_in_order_and_counts_add_up(data: bytes, shard_rows: int, shard_bytes: int, sizes: list[int]) -> None:
    files: dict[str, bytes] = {}
    limits = SETTINGS.model_copy(update={"shard_rows": shard_rows, "shard_bytes": shard_bytes})
    result = outcome(data, sizes)
    if isinstance(result, FileRejected):
        with pytest.raises(FileRejected, match=f"^{result.rejection.reason}"):
            split_into(files, data, sizes, limits)
        assert "part-00000/manifest.json" not in files
        return
    _, rows = result
    manifest = split_into(files, data, sizes, limits)
    assert Manifest.from_json(files["part-00000/manifest.json"]) == manifest
    assert manifest.rows == len(rows) == sum(entry.rows for entry in manifest.shards)
    assert manifest.rejected == sum(row.rejection is not None for row in rows) == sum(entry.rejected for entry in manifest.shards)
    read_back: list[list[str]] = []
    for entry in manifest.shards:
        info = ShardInfo.from_json(files[f"{entry.name}/shard.json"])
        assert (info.first_row, info.rows) == (entry.first_row, entry.rows) == (len(read_back) + 1, info.rows)
        assert 1 <= info.rows <= shard_rows
        header, *shard = csv.reader(io.StringIO(files[f"{entry.name}/questions.csv"].decode(), newline=""))
        assert tuple(header) == manifest.columns
        assert len(shard) == info.rows
        expected = [row.rejection for row in rows[len(read_back) : len(read_back) + info.rows] if row.rejection]
        assert list(info.rejections) == expected
        read_back += shard
    assert read_back == [list(row.cells) for row in rows]


def split_into(files: dict[str, bytes], data: bytes, sizes: list[int], limits: IngestSettings) -> Manifest:
    version = FileVersion("a.csv", 1, size=len(data))
    return split(
        Pieces(data, sizes),
        version=version,
        load_id=1,
        model=ModelChoice("bundled"),
        settings=limits,
        write=lambda path, chunks: files.update({path: b"".join(chunks)}),
    )


@settings(max_examples=200, deadline=None)
@given(body=bodies, sizes=sizes)
def test_the_end_of_a_record_is_found_across_pieces(body: str, sizes: list[int]) -> None:
    """Against ``csv.reader`` without ``strict``, to which a carriage return outside quotes would be an error."""
    text = body.replace("\r", "r") + "\n"
    lines = [*io.StringIO(text, newline="\n").readlines(), _END]
    reader = csv.reader(lines)
    next(reader)
    wanted = len("".join(lines[: reader.line_num]).encode())
    data = text.encode()
    scan, start = RecordEnd(), 0
    for piece in pieces_of(data, sizes):
        end = scan.find(piece)
        if end >= 0:
            assert start + end == wanted
            return
        start += len(piece)
    assert scan.in_quotes
    assert wanted > len(data)


def pieces_of(data: bytes, sizes: list[int]) -> Iterator[bytes]:
    source = Pieces(data, sizes)
    while piece := source.read(1000):
        yield piece


@given(text=st.text(max_size=5), cut=st.integers(0, 20))
def test_whole_characters_can_be_decoded_and_little_is_held_back(text: str, cut: int) -> None:
    data = text.encode()[:cut]
    whole = whole_characters(data)
    data[:whole].decode()
    assert len(data) - whole <= 4


def test_shard_documents_are_plain_json() -> None:
    files: dict[str, bytes] = {}
    split_into(files, HEADER.encode() + b"1,q,c\n2,q\0,c\n", [1000], SETTINGS)
    info = json.loads(files["part-00000/shard.json"])
    assert [(found["row"], found["reason"]) for found in info["rejections"]] == [(2, "nul_character")]
