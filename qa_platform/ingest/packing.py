"""Writing gzip, if a file's name asks for it."""

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, cast

# zlib's level: hardly larger output than at the best level, and several times faster.
_LEVEL = 6


def is_packed(name: str) -> bool:
    """Whether a file is gzip, by its name."""
    return name.lower().endswith(".gz")


@contextmanager
def packed(target: IO[bytes], name: str) -> Iterator[IO[bytes]]:
    """A stream that writes into ``target``: as gzip if the file's name ends in ``.gz``, else unchanged.

    Equal bytes give equal gzip, since its header has neither a name nor a time.
    """
    if not is_packed(name):
        yield target
        return
    with gzip.GzipFile(filename="", mode="wb", compresslevel=_LEVEL, fileobj=target, mtime=0) as stream:
        yield cast(IO[bytes], stream)
