"""The answered CSVs in the bucket: one object per file, with its newest answers."""

import io
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

from google.api_core.exceptions import PreconditionFailed
from google.cloud import storage
from google.cloud.storage.retry import DEFAULT_RETRY

from qa_platform.clients.bucket import NAME_KEY, OBJECT_NAME_BYTES
from qa_platform.clients.refusals import bucket_errors
from qa_platform.contract import file_id
from qa_platform.errors import InputError, TransientError

# Custom metadata of an answered CSV, besides the file's name: which answers it holds.
_GENERATION_KEY = "qa-platform-generation"
_LOAD_KEY = "qa-platform-load-id"
_COMMIT_KEY = "qa-platform-commit"
_TIMEOUT_SECONDS = 60
# Bytes that are held in memory and sent with one request.
_CHUNK = 8 * 2**20


@dataclass(frozen=True)
class AnswersId:
    """Identifies the answers in an object: the file, its generation, the load id, and the Pachyderm commit that they come from."""

    name: str
    generation: int
    load_id: int
    commit: str

    @property
    def metadata(self) -> dict[str, str]:
        """The same as custom metadata of an object."""
        numbers = {_GENERATION_KEY: str(self.generation), _LOAD_KEY: str(self.load_id)}
        return {NAME_KEY: self.name, **numbers, _COMMIT_KEY: self.commit}

    @classmethod
    def of(cls, blob: storage.Blob) -> Self | None:
        """The answers in an object; None if it is not an answered CSV of this platform."""
        found = blob.metadata or {}
        try:
            return cls(found[NAME_KEY], int(found[_GENERATION_KEY]), int(found[_LOAD_KEY]), found.get(_COMMIT_KEY, ""))
        except (KeyError, ValueError):
            return None


def answered_name(prefix: str, name: str) -> str:
    """The name of a file's answered CSV in the bucket. The file id replaces the file's name if the result would be too long."""
    place = prefix + name
    return place if len(place.encode()) <= OBJECT_NAME_BYTES else f"{prefix}{file_id(name)}.csv"


def write_answered(
    bucket: storage.Bucket, prefix: str, answers: AnswersId, content: Callable[[], Iterator[bytes]], *, may_write: Callable[[], bool]
) -> bool:
    """Stream the answered CSV of a file into the bucket, replacing older answers. If ``content`` raises, nothing is written.

    It is compressed if the object's name ends in ``.gz``, like the upload.

    Args:
        content: makes the CSV, piece by piece. It is not called if the object has these answers already.
        may_write: whether these are still the newest answers. It is called after the object was read: if newer answers are written
            after that, the object's generation changes and this write fails.

    Returns:
        Whether the object has these answers now, or those of a newer generation; false if it must not be written.

    Raises:
        InputError: another object lies there, or the bucket refuses the write.
        TransientError: the bucket is unavailable, or the object changed meanwhile.
    """
    place = answered_name(prefix, answers.name)
    is_gzip = place.lower().endswith(".gz")
    with bucket_errors(f"writing {place}"):
        before = bucket.get_blob(place, timeout=_TIMEOUT_SECONDS)
        if before is not None:
            there = AnswersId.of(before)
            if there is None or there.name != answers.name:
                raise InputError("another object lies where the answered CSV goes", where=place, advice="move it away")
            if there == answers or there.generation > answers.generation:
                return True
        if not may_write():
            return False
        blob = bucket.blob(place, chunk_size=_CHUNK)
        blob.metadata = answers.metadata
        try:
            blob.upload_from_file(
                _Stream(_gzipped(content()) if is_gzip else content()),
                content_type="application/gzip" if is_gzip else "text/csv; charset=utf-8",
                if_generation_match=before.generation if before else 0,
                timeout=_TIMEOUT_SECONDS,
                retry=DEFAULT_RETRY,
            )
        except PreconditionFailed as error:
            now = bucket.get_blob(place, timeout=_TIMEOUT_SECONDS)
            if (now.generation if now else 0) == (before.generation if before else 0):
                # Not the precondition of this request: a constraint of the organisation or of the bucket forbids the write.
                raise
            raise TransientError("the answered CSV was replaced while it was written", where=place) from error
    return True


def _gzipped(pieces: Iterator[bytes]) -> Iterator[bytes]:
    packer = zlib.compressobj(wbits=16 + zlib.MAX_WBITS)
    for piece in pieces:
        yield packer.compress(piece)
    yield packer.flush()


class _Stream(io.RawIOBase):
    """Presents pieces as a file, with only what Google's client needs: reading chunks, and the position."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._left = bytearray()
        self._position = 0

    def read(self, size: int = -1) -> bytes:
        while size < 0 or len(self._left) < size:
            piece = next(self._pieces, None)
            if piece is None:
                break
            self._left += piece
        result = bytes(self._left if size < 0 else self._left[:size])
        del self._left[: len(result)]
        self._position += len(result)
        return result

    def tell(self) -> int:
        return self._position
