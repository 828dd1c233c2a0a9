"""Hand-written code for the three most frequent messages, which is many times faster than the classes of ``pachyderm_sdk``.

The classes parse all other messages, and unusual forms of these.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pachyderm_sdk.api import pfs as pb

from qa_platform.embedded.pachd.pfs import Commit
from qa_platform.embedded.pachd.protocol import convert
from qa_platform.embedded.pachd.storage.trees import FileEntry, Found

_SEND_BYTES = 2 * 2**20


@dataclass(frozen=True, slots=True)
class RawAdd:
    """A ModifyFileRequest that adds raw bytes."""

    path: str
    datum: str
    data: memoryview


def modify_request(data: bytes) -> RawAdd | pb.ModifyFileRequest:
    """Parse a ModifyFileRequest."""
    try:
        raw_add = _raw_add(memoryview(data))
    except (IndexError, ValueError):
        raw_add = None
    if raw_add is not None:
        return raw_add
    message: pb.ModifyFileRequest = pb.ModifyFileRequest.FromString(data)
    return message


def _raw_add(view: memoryview) -> RawAdd | None:
    # Field 2 of the request is add_file; it must be the only one.
    if not view or view[0] != 0x12:
        return None
    length, at = _varint(view, 1)
    if at + length != len(view):
        return None
    path, datum, raw = "", "", None
    while at < len(view):
        tag = view[at]
        length, at = _varint(view, at + 1)
        part = view[at : at + length]
        at += length
        if tag == 0x0A:
            path = str(part, "utf-8")
        elif tag == 0x12:
            datum = str(part, "utf-8")
        elif tag == 0x1A:
            raw = _wrapped(part)
        else:
            return None
    return None if raw is None else RawAdd(path, datum, raw)


def _wrapped(view: memoryview) -> memoryview | None:
    """The value of a BytesValue."""
    if not view:
        return view
    length, at = _varint(view, 1)
    return view[at:] if view[0] == 0x0A and at + length == len(view) else None


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _number(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _part(tag: int, data: bytes) -> bytes:
    return bytes([tag]) + _number(len(data)) + data


def bytes_values(data: bytes) -> Iterator[bytes]:
    """Encode data as ``BytesValue`` messages, each small enough for every client."""
    for start in range(0, len(data), _SEND_BYTES):
        yield _part(0x0A, data[start : start + _SEND_BYTES])


class FileInfos:
    """Encodes the FileInfo messages of one commit, with the same result as ``convert.file_info``."""

    def __init__(self, owner: Commit) -> None:
        self._commit = _part(0x0A, bytes(convert.commit(owner.repo, owner.id)))
        # Encoded by the class, with the tag of field 3.
        self._committed = bytes(pb.FileInfo(committed=convert.when(owner.finished)))

    def encode(self, found: Found) -> bytes:
        file = self._commit + _part(0x12, found.path.encode())
        entry = found.entry
        if isinstance(entry, FileEntry):
            file += _part(0x1A, entry.parts[0][0].encode())
        kind = 1 if isinstance(entry, FileEntry) else 2
        size = b"\x20" + _number(entry.size) if entry.size else b""
        return _part(0x0A, file) + bytes([0x10, kind]) + self._committed + size + _part(0x2A, bytes.fromhex(entry.digest))
