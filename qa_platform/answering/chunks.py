"""Bounded portions: chunks of pairs for reading ahead and tokenising, and batches of windows for the model."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from qa_platform.answering.windows import Window

# Windows are padded to a multiple of this many tokens. A runtime compiles kernels for each shape of a batch, and keeps them: with this, the
# shapes are few, and memory does not grow with the number of rows. A thousand rows take no longer, although more of what is computed is
# padding.
_STEP = 8
# The rows of the first chunk, which is small so that the first answers come at once.
_FIRST_ROWS = 32
# The maximum bytes that a caller holds for the pairs of one chunk.
_CHUNK_KEPT = 2**24


@dataclass(frozen=True)
class ChunkSize:
    """The maximum rows and characters that are tokenised together.

    Chunks are large enough to sort windows by length, and small enough to show progress and to bound memory: a character that is a
    token of its own takes hundreds of bytes while it is tokenised.
    """

    rows: int = 256
    characters: int = 2**18


def chunked(
    pairs: Iterable[tuple[str, str]], kept: Callable[[], int] = lambda: 0, size: ChunkSize = ChunkSize()
) -> Iterator[list[tuple[str, str]]]:
    """Consecutive pairs in lists that are bounded in rows, characters and ``kept`` bytes. A pair beyond a bound gets a list of its own.

    The first list is small. An exception from ``pairs`` is raised after the pairs that came before.

    Args:
        kept: returns the bytes that the caller holds for the last pair from ``pairs``.
    """
    chunk: list[tuple[str, str]] = []
    rows, characters, held = _FIRST_ROWS, 0, 0
    try:
        for pair in pairs:
            more, more_held = len(pair[0]) + len(pair[1]), kept()
            if chunk and (characters + more > size.characters or held + more_held > _CHUNK_KEPT):
                yield chunk
                chunk, rows, characters, held = [], size.rows, 0, 0
            chunk.append(pair)
            characters, held = characters + more, held + more_held
            if len(chunk) >= rows:
                yield chunk
                chunk, rows, characters, held = [], size.rows, 0, 0
    except Exception:
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk


def padded(length: int) -> int:
    """The tokens that a window of this length takes in a batch, unless the model's windows end before."""
    return -(-length // _STEP) * _STEP


def batches(windows: Sequence[Window], tokens: int, threads: int) -> Iterator[list[Window]]:
    """Batches of windows of similar length, the longest first, of at most ``tokens`` tokens each, padding included.

    A small number of windows is spread over all threads. A batch may then exceed its share a little, so that no window is left over for an
    extra batch.
    """
    lengths = [padded(len(window.ids)) for window in windows]
    limit = min(tokens, -(-sum(lengths) // threads) + min(lengths, default=1) - 1)
    batch: list[Window] = []
    for window in sorted(windows, key=lambda window: -len(window.ids)):
        if batch and (len(batch) + 1) * padded(len(batch[0].ids)) > limit:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch
