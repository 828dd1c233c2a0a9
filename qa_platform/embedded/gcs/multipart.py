"""Bodies of type ``multipart/related``: a JSON object, then the content (RFC 2387)."""

import email.message
from dataclasses import dataclass
from typing import IO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser
from starlette.requests import Request

from qa_platform.embedded.gcs.model import invalid

# Custom metadata is limited to 8 KiB.
_METADATA_LIMIT_BYTES = 2**18


@dataclass(frozen=True)
class RelatedBody:
    """A received body, without the content.

    Attributes:
        metadata: the first part, a JSON object that describes the content.
        content_type: the content type that the second part declares; empty for none.
    """

    metadata: bytes
    content_type: str


async def receive_related(request: Request, content: IO[bytes]) -> RelatedBody:
    """Receive a body, and write its content, which is the second part, to a file.

    Raises:
        StorageError: 400 the body is malformed or ends early, or the metadata is too large.
    """
    parts = _Parts(content)
    try:
        parser = parts.parser(_boundary(request))
        async for chunk in request.stream():
            parser.write(chunk)
    except FormParserError as error:
        raise invalid(f"The multipart upload is malformed: {error}") from error
    return parts.body()


def _boundary(request: Request) -> str:
    header = email.message.Message()
    header["content-type"] = request.headers.get("content-type", "")
    boundary = header.get_boundary()
    if not boundary:
        raise invalid("A multipart upload needs a boundary.")
    return boundary


class _Parts:
    """The parser's callbacks: keep the first part, write the second to a file, and ignore the rest."""

    def __init__(self, content: IO[bytes]) -> None:
        self._content = content
        self._metadata = bytearray()
        self._content_type = bytearray()
        self._header = bytearray()
        self._ended = 0

    def parser(self, boundary: str) -> MultipartParser:
        """A parser that calls this object."""
        return MultipartParser(
            boundary,
            {
                "on_header_begin": self._header.clear,
                "on_header_field": self._add_to_name,
                "on_header_value": self._add_to_value,
                "on_part_data": self._add_to_part,
                "on_part_end": self._end_part,
            },
        )

    def body(self) -> RelatedBody:
        """The received body.

        Raises:
            StorageError: 400 a part is missing or incomplete.
        """
        if self._ended < 2:
            raise invalid("The multipart upload ends too early.")
        return RelatedBody(bytes(self._metadata), self._content_type.decode("latin-1").strip())

    def _add_to_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_to_value(self, data: bytes, start: int, end: int) -> None:
        if self._ended == 1 and self._header.lower() == b"content-type":
            self._content_type += data[start:end]

    def _add_to_part(self, data: bytes, start: int, end: int) -> None:
        if self._ended == 0:
            self._metadata += data[start:end]
            if len(self._metadata) > _METADATA_LIMIT_BYTES:
                raise invalid("The first part of the multipart upload is too large.")
        elif self._ended == 1:
            self._content.write(data[start:end])

    def _end_part(self) -> None:
        self._ended += 1
