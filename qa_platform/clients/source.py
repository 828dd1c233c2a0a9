"""The bytes of one generation of an object, as a stream."""

import base64
from typing import IO, Self, cast

import google_crc32c
from google.api_core.exceptions import NotFound, PreconditionFailed
from google.cloud import storage

from qa_platform.clients.refusals import BUCKET_ERRORS, platform_error
from qa_platform.errors import InputError, TransientError

_TIMEOUT_SECONDS = 60
# Bytes that are fetched at a time while an object is read.
_READ_CHUNK = 8 * 2**20


class SourceChanged(InputError):
    """The generation to be read is gone: the object was overwritten or deleted. A listing shows the newer one, if there is one."""


# The exceptions of Google's client when the generation that is being read vanishes.
SOURCE_CHANGED_ERRORS = (NotFound, PreconditionFailed)


class Source:
    """A stream of one generation's bytes as they are stored, verified against the checksum at the end. A context manager.

    An object with ``Content-Encoding: gzip`` is not decompressed: the bucket's size and checksum are those of the compressed bytes.
    """

    def __init__(self, blob: storage.Blob) -> None:
        self._name = blob.name
        self._left = int(blob.size)
        self._wanted = blob.crc32c
        self._checksum = google_crc32c.Checksum()
        options = {"timeout": _TIMEOUT_SECONDS, "if_generation_match": blob.generation, "raw_download": True}
        # A new blob: one whose attributes are loaded is read from its `mediaLink`, which may name another host than the client's endpoint.
        content = blob.bucket.blob(blob.name, generation=blob.generation)
        self._reader = cast("IO[bytes]", content.open("rb", chunk_size=_READ_CHUNK, **options))

    def read(self, size: int) -> bytes:
        """The next bytes; empty at the end.

        Raises:
            SourceChanged: the generation is gone.
            InputError: the bucket refuses it.
            TransientError: the bucket was unavailable or the connection broken for longer than Google's client retries (two minutes), or
                the bytes are not those that were uploaded.
        """
        try:
            content = self._reader.read(size)
        except SOURCE_CHANGED_ERRORS as error:
            raise SourceChanged("its generation is gone: it was overwritten or deleted while it was read", where=self._name) from error
        except (*BUCKET_ERRORS, OSError) as error:
            raise platform_error(error, self._name, trouble="it could not be read to its end") from error
        self._left -= len(content)
        # After a broken connection, Google's client may report the end too early.
        if self._left < 0 or (self._left and size and not content):
            difference = f"{abs(self._left)} bytes {'missing' if self._left > 0 else 'too many'}"
            raise TransientError(f"the download of {self._name} does not match its size ({difference})")
        self._checksum.update(content)
        if not self._left and self._wanted and base64.b64encode(self._checksum.digest()).decode() != self._wanted:
            raise TransientError(f"the download of {self._name} does not match the bucket's checksum")
        return content

    def read_to_the_end(self) -> None:
        """Read the rest, for the checksum. Raises what `read` does."""
        while self.read(_READ_CHUNK):
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()
