"""The interface that every runtime implements."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qa_platform.answering.chunks import ChunkSize, padded
from qa_platform.answering.spans import SpanOptions, WindowSpans
from qa_platform.answering.windows import Layout, Window


@dataclass(frozen=True)
class WindowBatch:
    """Windows padded on the right. ``ids`` and ``types`` have shape (windows, tokens); ``lengths`` has shape (windows,)."""

    ids: NDArray[np.int32]
    types: NDArray[np.int32]
    lengths: NDArray[np.int32]


class Runtime(Protocol):
    """A loaded model. ``requests`` threads may use it at once, with batches of at most ``tokens`` tokens; ``tokens`` may decrease.

    ``name`` is the library that runs the model, with its version. ``chunk`` is how much to read ahead, for batches of that size.
    """

    name: str
    requests: int
    tokens: int
    chunk: ChunkSize

    def run(self, batch: WindowBatch) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Start and end logits, each of shape (windows, tokens)."""
        ...

    def best_spans(self, batch: WindowBatch, windows: Sequence[Window], options: SpanOptions) -> list[WindowSpans]:
        """The spans that `spans.best_spans` finds in the logits of each of ``windows``. ``batch`` is made of these windows."""
        ...


def widened(batch: WindowBatch, longest: int) -> WindowBatch:
    """The batch with as many columns as `chunks.padded` says, but at most ``longest``: the tokens of the model's longest window."""
    columns = min(padded(batch.ids.shape[1]), longest) - batch.ids.shape[1]
    right = ((0, 0), (0, columns))
    return WindowBatch(np.pad(batch.ids, right), np.pad(batch.types, right), batch.lengths)


def pad(windows: Sequence[Window], layout: Layout) -> WindowBatch:
    """A batch of windows, padded with token 0, which is masked."""
    lengths = np.array([len(window.ids) for window in windows], np.int32)
    ids = np.zeros((len(windows), int(lengths.max())), np.int32)
    types = np.full(ids.shape, layout.question_type, np.int32)
    for row, window in enumerate(windows):
        ids[row, : len(window.ids)] = window.ids
        types[row, window.offset :] = layout.context_type
    return WindowBatch(ids, types, lengths)
