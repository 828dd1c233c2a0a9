"""Gzip is decompressed as it is read, in bounded memory. Damaged and truncated files and bombs are rejected by name."""

import gzip
import io
import itertools
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qa_platform.contract import GZIP_RATIO, FileReason
from qa_platform.errors import TransientError
from qa_platform.ingest import FileRejected, RowReader, Unpacked, unpacking
from qa_platform.ingest.buffer import Buffer
from qa_platform_tests.ingest.test_properties import Pieces

CSV = b"question,context\nWhere?,Here.\nWho?,Me.\n"
sizes = st.lists(st.integers(1, 40), min_size=1, max_size=4)


def everything(source: Unpacked, size: int = 100_000) -> bytes:
    out = b""
    while piece := source.read(size):
        assert len(piece) <= size
        out += piece
    return out


def rejected(data: bytes) -> FileReason:
    with pytest.raises(FileRejected) as caught:
        everything(Unpacked(io.BytesIO(data)))
    return caught.value.rejection.reason


@settings(max_examples=200, deadline=None)
@given(members=st.lists(st.binary(max_size=3000), min_size=1, max_size=4), sizes=sizes, size=st.integers(1, 50), padding=st.integers(0, 3))
def test_members_in_a_row_are_one_file_however_they_arrive(members: list[bytes], sizes: list[int], size: int, padding: int) -> None:
    data = b"".join(gzip.compress(member) for member in members) + bytes(padding)
    assert everything(Unpacked(Pieces(data, sizes), size=len(data)), size) == b"".join(members)


@given(data=st.binary(max_size=200).filter(lambda data: not data.startswith(b"\x1f\x8b")), sizes=sizes, size=st.integers(1, 50))
def test_what_is_not_gzip_passes_as_it_is(data: bytes, sizes: list[int], size: int) -> None:
    assert everything(Unpacked(Pieces(data, sizes), size=len(data)), size) == data


@given(head=st.binary(max_size=300), sizes=sizes)
def test_whatever_follows_the_first_two_bytes_is_decompressed_or_rejected(head: bytes, sizes: list[int]) -> None:
    data = b"\x1f\x8b" + head
    try:
        unpacked = everything(Unpacked(Pieces(data, sizes)))
    except FileRejected:
        with pytest.raises((EOFError, OSError, zlib.error)):
            gzip.decompress(data)
    else:
        assert unpacked == gzip.decompress(data)


def test_the_rows_and_lines_are_those_of_the_file_without_gzip() -> None:
    assert list(RowReader(io.BytesIO(gzip.compress(CSV)))) == list(RowReader(io.BytesIO(CSV)))


def test_a_file_that_is_cut_off_is_damaged_and_a_download_that_is_cut_off_is_read_again() -> None:
    data = gzip.compress(CSV)
    for length in range(2, len(data)):
        assert rejected(data[:length]) is FileReason.DAMAGED_GZIP
        with pytest.raises(TransientError, match=f"{length} of {len(data)} bytes"):
            everything(Unpacked(io.BytesIO(data[:length]), size=len(data)))


@pytest.mark.parametrize("at", [2, 12, -5, -1], ids=["method", "data", "checksum", "length"])
def test_a_changed_byte_is_found(at: int) -> None:
    data = bytearray(gzip.compress(CSV))
    data[at] ^= 0xFF
    assert rejected(bytes(data)) is FileReason.DAMAGED_GZIP


def test_what_follows_the_last_member_must_be_gzip_or_zeros() -> None:
    assert rejected(gzip.compress(CSV) + b"question,context\n") is FileReason.DAMAGED_GZIP
    assert everything(Unpacked(io.BytesIO(gzip.compress(CSV) + bytes(512)))) == CSV


def test_a_bomb_is_rejected_as_soon_as_it_shows_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    free = 4 * 2**20
    monkeypatch.setattr(unpacking, "GZIP_FREE", free)
    assert everything(Unpacked(io.BytesIO(gzip.compress(bytes(free))))) == bytes(free)
    bomb = io.BytesIO(gzip.compress(bytes(100 * 2**20)))
    source = Unpacked(bomb)
    came = list(itertools.islice(iter(lambda: source.read(2**20), None), free // 2**20 - 1))
    with pytest.raises(FileRejected) as caught:
        source.read(2 * 2**20)
    assert caught.value.rejection.reason is FileReason.GZIP_BOMB
    assert GZIP_RATIO * bomb.tell() < free, "of the rest nothing was read"
    assert len(came) == 3


def test_a_file_that_unpacks_to_too_much_is_rejected_however_little_it_is_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "GZIP_LIMIT", len(CSV))
    assert everything(Unpacked(io.BytesIO(gzip.compress(CSV, 0)))) == CSV
    assert rejected(gzip.compress(CSV + b"x", 0)) is FileReason.GZIP_BOMB


def test_a_long_record_of_tiny_members_is_looked_at_once_a_block() -> None:
    # 20,000 members of one byte, in a record that begins behind the first block.
    rows = 50_000
    data = gzip.compress(b"question,context\n" + b"Where is it?,It is here.\n" * rows + b'Who?,"')
    data += gzip.compress(b"\n") * 20_000 + gzip.compress(b'"\n')
    buffer, fills = Buffer(Unpacked(io.BytesIO(data))), 0
    while not buffer.ended:
        buffer.fill()
        fills += 1
    assert buffer.read == len(gzip.decompress(data))
    assert fills <= buffer.read // 2**20 + 2
    last = list(RowReader(io.BytesIO(data)))[-1]
    assert (last.row, last.cells[0], len(last.cells[1])) == (rows + 1, "Who?", 20_000)
