"""From questions and contexts to windows of tokens.

The windows are those of the transformers 4.57 question-answering pipeline: question first, then as much of the context as
fits, the next window beginning ``stride`` tokens before the end of the one before. They are cut here, not in the tokenizer:
so a context is tokenised once however many questions it has, and no length can make the tokenizer fail.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qa_platform.contract import RowReason

if TYPE_CHECKING:
    import tokenizers

# Characters of a text that is not tokenised beside others: every thread that tokenised such a one would keep its memory.
_LONG = 2**16


@dataclass(frozen=True)
class WindowSize:
    """``length``: tokens of a window, special ones included. ``stride``: context tokens that neighbouring windows share."""

    length: int
    stride: int

    @classmethod
    def of(cls, length: int, stride: int | None) -> "WindowSize":
        return cls(length, min(length // 2, 128) if stride is None else stride)


@dataclass(frozen=True)
class Layout:
    """Where the tokenizer puts its special tokens: ``before`` question ``between`` context ``after``."""

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    question_type: int
    context_type: int

    @property
    def special(self) -> int:
        return len(self.before) + len(self.between) + len(self.after)

    @classmethod
    def of(cls, tokenizer: "tokenizers.Tokenizer") -> "Layout":
        """Read off one encoded pair, so that it holds for every family."""
        pair = tokenizer.encode("a", "b")
        sequences = pair.sequence_ids
        question = [i for i, sequence in enumerate(sequences) if sequence == 0]
        context = [i for i, sequence in enumerate(sequences) if sequence == 1]
        ids, types = pair.ids, pair.type_ids
        return cls(
            tuple(ids[: question[0]]),
            tuple(ids[question[-1] + 1 : context[0]]),
            tuple(ids[context[-1] + 1 :]),
            types[question[0]],
            types[context[0]],
        )


@dataclass(frozen=True)
class Window:
    """One window of the row at index ``row``: its tokens, special ones included.

    ``ids[offset : offset + length]`` are the context's tokens ``first`` to ``first + length - 1``.
    """

    row: int
    ids: NDArray[np.int32]
    offset: int
    first: int
    length: int


@dataclass(frozen=True)
class Characters:
    """Where a context's tokens are: a tokenizer's own Encoding knows it too, and takes several times the memory.

    ``offsets``: first character, and the one after the last, of every token; shape (tokens, 2). ``words``: the number of every
    token's word, shape (tokens,); it never falls.
    """

    offsets: NDArray[np.int32]
    words: NDArray[np.int32]

    @classmethod
    def of(cls, encoding: "tokenizers.Encoding") -> "Characters":
        # Several times as fast as an array made from the tuples.
        flat = np.fromiter(itertools.chain.from_iterable(encoding.offsets), np.int32, 2 * len(encoding))
        return cls(flat.reshape(-1, 2), np.array(encoding.word_ids, np.int32))


@dataclass(frozen=True)
class Tokenized:
    """One row: its windows (none where ``reason`` says why) and where the context's tokens are."""

    windows: tuple[Window, ...]
    characters: Characters | None
    reason: RowReason | None = None


def tokenize(tokenizer: "tokenizers.Tokenizer", layout: Layout, pairs: Sequence[tuple[str, str]], size: WindowSize) -> list[Tokenized]:
    """Windows of every (question, context), in order. Equal questions and equal contexts are tokenised once.

    A row whose question leaves no room for context gets the reason QUESTION_EXCEEDS_WINDOW; one whose context has no tokens,
    EMPTY_CONTEXT. A stride that leaves no progress in the room after the question is lowered for that row to half the room.
    """
    texts = list(dict.fromkeys(itertools.chain.from_iterable(pairs)))
    encodings = {text: tokenizer.encode(text, add_special_tokens=False) for text in texts if len(text) > _LONG}
    short = [text for text in texts if len(text) <= _LONG]
    encodings.update(zip(short, tokenizer.encode_batch(short, add_special_tokens=False), strict=True))
    ids: dict[str, NDArray[np.int32]] = {text: np.array(encoding.ids, np.int32) for text, encoding in encodings.items()}
    characters = {context: Characters.of(encodings[context]) for context in dict.fromkeys(context for _, context in pairs)}
    return [_windows(row, ids[question], ids[context], characters[context], layout, size) for row, (question, context) in enumerate(pairs)]


def _windows(
    row: int,
    question: NDArray[np.int32],
    context: NDArray[np.int32],
    characters: Characters,
    layout: Layout,
    size: WindowSize,
) -> Tokenized:
    room = size.length - layout.special - len(question)
    if room < 1:
        return Tokenized((), None, RowReason.QUESTION_EXCEEDS_WINDOW)
    if not len(context):
        return Tokenized((), None, RowReason.EMPTY_CONTEXT)
    head = np.concatenate([np.array(layout.before, np.int32), question, np.array(layout.between, np.int32)])
    tail = np.array(layout.after, np.int32)
    windows = []
    for first, end in _cuts(len(context), room, size.stride):
        ids = np.concatenate([head, context[first:end], tail])
        windows.append(Window(row, ids, len(head), first, end - first))
    return Tokenized(tuple(windows), characters)


def _cuts(tokens: int, room: int, stride: int) -> list[tuple[int, int]]:
    step = room - stride if stride < room else max(1, room // 2)
    cuts = []
    for first in range(0, tokens, step):
        end = min(first + room, tokens)
        cuts.append((first, end))
        if end == tokens:
            break
    return cuts
