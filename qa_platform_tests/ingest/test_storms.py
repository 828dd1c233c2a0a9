"""Small versions of files designed to be expensive: what they leave behind is bounded, and their owner gets one reason."""

import io
import logging
from collections.abc import Iterable

import pytest

from qa_platform.contract import HEADER_LIMIT, ROW_LIMIT, FileReason, FileVersion, Manifest, ModelChoice, RowReason
from qa_platform.ingest import FileRejected, RowReader, reading, split
from qa_platform.settings import IngestSettings

HEADER = b"question,context\n"
SIZE = 200_000
LIMIT = 100


def storm(piece: bytes, *, header: bytes = HEADER) -> bytes:
    return header + piece * (SIZE // len(piece))


def header_of(name: str, count: int) -> bytes:
    return b"question,context," + b",".join([name.encode()] * count) + b"\n"


class Sink:
    """Counts the bytes of what is written, and forgets them."""

    def __init__(self) -> None:
        self.size = 0

    def split(self, data: bytes) -> Manifest:
        version, model = FileVersion("a.csv", 1, len(data)), ModelChoice("bundled")
        return split(io.BytesIO(data), version=version, load_id=1, model=model, settings=IngestSettings(), write=self.write)

    def write(self, path: str, chunks: Iterable[bytes]) -> None:
        self.size += sum(map(len, chunks))


@pytest.fixture(autouse=True)
def few_rejects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "REJECT_LIMIT", LIMIT)


FILES = [
    pytest.param(storm(b'"\n'), FileReason.TOO_MANY_BAD_ROWS, id="quotes and line feeds"),
    pytest.param(storm(b'"""\n'), FileReason.TOO_MANY_BAD_ROWS, id="three quotes and line feeds"),
    pytest.param(storm(b'"a"b,c\n'), FileReason.TOO_MANY_BAD_ROWS, id="text after quotes"),
    pytest.param(storm(b"a\n"), FileReason.TOO_MANY_BAD_ROWS, id="short lines"),
    pytest.param(storm(b"a\n", header=header_of("x", 998)), FileReason.TOO_MANY_BAD_ROWS, id="short lines below a wide header"),
    pytest.param(storm(b"\0,c\n"), FileReason.TOO_MANY_BAD_ROWS, id="NUL"),
    pytest.param(storm(b"\xed\xa0\x80,c\n"), FileReason.TOO_MANY_BAD_ROWS, id="halves of surrogate pairs"),
    pytest.param(storm(b"," * 100 + b"x\n"), FileReason.TOO_MANY_BAD_ROWS, id="too many cells"),
    pytest.param(storm(b"\n"), FileReason.HEADER_ONLY, id="line feeds"),
    pytest.param(storm(b",\n"), FileReason.HEADER_ONLY, id="rows of commas"),
    pytest.param(storm(b'"') + b'"', FileReason.UNBALANCED_QUOTE, id="quotes, an odd number"),
    pytest.param(b"," * (HEADER_LIMIT - 1) + b"\n", FileReason.TOO_MANY_COLUMNS, id="a header of a million commas"),
    pytest.param(storm(b",", header=b"") * 10, FileReason.HEADER_TOO_LARGE, id="a file of commas"),
    pytest.param(header_of("answer", 998) + b"q,c" + b"," * 998 + b"\n", FileReason.DUPLICATE_COLUMN, id="998 columns called answer"),
    pytest.param(b'"a"x' + b"\r" * (HEADER_LIMIT - 9) + b"\n", FileReason.BAD_HEADER, id="carriage returns behind a damaged header"),
]


@pytest.mark.parametrize(("data", "reason"), FILES)
def test_a_storm_has_one_reason_and_its_traces_are_bounded(data: bytes, reason: FileReason) -> None:
    sink = Sink()
    with pytest.raises(FileRejected) as caught:
        sink.split(data)
    assert caught.value.rejection.reason is reason
    assert len(str(caught.value)) < 2000
    # What was written before is discarded by the caller: rows up to the limit, each at most as wide as its header.
    assert sink.size <= (LIMIT + 1) * 2000


ROWS = [
    pytest.param(b"\0" * SIZE + b"\n", RowReason.TOO_FEW_CELLS, id="NUL"),
    pytest.param(b"," * SIZE + b"x\n", RowReason.TOO_MANY_CELLS, id="commas"),
    pytest.param(b'q,"' + b"x y\n" * 2_000_000 + b'"\n', RowReason.ROW_TOO_LARGE, id="a giant cell"),
    pytest.param(b'q,"' + b'""\n' * 2_000_000 + b'"\n', RowReason.ROW_TOO_LARGE, id="a giant cell of quotes"),
    # The time for these was the square of their number: hours.
    pytest.param(b'"a"x,' + b"\r" * (ROW_LIMIT - 9) + b"\n", RowReason.BAD_QUOTING, id="carriage returns behind a damaged cell"),
]


@pytest.mark.parametrize(("data", "reason"), ROWS)
def test_a_storm_in_one_row_is_one_reject(data: bytes, reason: RowReason) -> None:
    sink = Sink()
    manifest = sink.split(HEADER + data + b"q,c\n")
    assert (manifest.rows, manifest.rejected) == (2, 1)
    assert sink.size < 500_000
    first, _ = RowReader(io.BytesIO(HEADER + data + b"q,c\n"))
    assert first.rejection is not None
    assert first.rejection.reason is reason


def test_the_reason_of_most_rows_is_named() -> None:
    with pytest.raises(FileRejected, match="101 of the first 102 rows are rejected, 91 of them as empty_context") as caught:
        Sink().split(HEADER + b"q,c\n" + b"a\n" * 10 + b"q,\n" * 1000)
    assert caught.value.rejection.line == 103


@pytest.mark.parametrize("good", [150, 1000])
def test_many_rejects_among_more_good_rows_are_kept(good: int) -> None:
    manifest = Sink().split(HEADER + b"q,c\n" * good + b"a\n" * 150)
    assert (manifest.rows, manifest.rejected) == (good + 150, 150)


def test_few_rejects_are_kept_even_if_no_row_is_good() -> None:
    assert Sink().split(HEADER + b"a\n" * LIMIT).rejected == LIMIT


def test_a_long_header_is_not_repeated_for_every_few_short_rows() -> None:
    header = b"question,context," + b"n" * 500_000 + b"\n"
    data = storm(b"a,b,\n", header=header)
    sink = Sink()
    manifest = sink.split(data)
    assert manifest.rows == SIZE // 5
    assert sink.size <= 20 * len(data)
    assert sink.size <= 8 * len(header) + 2 * SIZE


def test_blank_rows_are_counted_and_told(caplog: pytest.LogCaptureFixture) -> None:
    data = HEADER + b",\nq,c\n\n,,\n"
    rows = RowReader(io.BytesIO(data))
    assert len(list(rows)) == 1
    assert rows.blank == 3
    with caplog.at_level(logging.INFO):
        Sink().split(data)
    assert "1 rows, 0 rejected, 3 blank ones skipped" in caplog.text
