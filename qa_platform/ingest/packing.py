"""Writing files: in whole or not at all, and as gzip if the name asks for it."""

import gzip
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

# zlib's level: hardly larger output than at the best level, and several times faster.
_LEVEL = 6


def is_packed(name: str) -> bool:
    """Whether a file is gzip, by its name."""
    return name.lower().endswith(".gz")


def is_parquet(path: Path) -> bool:
    """Whether a file is Parquet, by its name."""
    return path.suffix.lower() in (".parquet", ".pq")


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


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """A stream whose content replaces the file at ``path`` at the end: as gzip if its name ends in ``.gz``. On an error, nothing changes.

    Until then it is in a file of its own in the same folder, whose name nothing else uses.
    """
    path = path.resolve()
    unfinished = path.with_name(f".{uuid.uuid4().hex}.unfinished")
    try:
        with unfinished.open("xb") as out, packed(out, path.name) as stream:
            yield stream
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
