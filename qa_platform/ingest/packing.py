"""Writing gzip, where the name of a file asks for it."""

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, cast

# Of zlib: hardly larger than the best, and several times faster.
_LEVEL = 6


def is_packed(name: str) -> bool:
    """Whether a file is to be gzip, by its name."""
    return name.lower().endswith(".gz")


@contextmanager
def packed(target: IO[bytes], name: str) -> Iterator[IO[bytes]]:
    """A stream whose bytes go into ``target``: in gzip if the file's name ends in ``.gz``, else as they are.

    Equal bytes give equal gzip: it has neither a name nor a time.
    """
    if not is_packed(name):
        yield target
        return
    with gzip.GzipFile(filename="", mode="wb", compresslevel=_LEVEL, fileobj=target, mtime=0) as stream:
        yield cast(IO[bytes], stream)
