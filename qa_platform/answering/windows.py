"""From questions and contexts to windows of tokens.

The windows are those of the question-answering pipeline of transformers 4.57: the question, then as much of the context as fits. Each
window begins ``stride`` tokens before the end of the previous one. They are cut here, not in the tokenizer, so a context is tokenised
once however many questions it has, and no length can make the tokenizer fail.

Unlike in the pipeline, whose windows advance by a single token after a long question, the work is linear in the context: windows advance
by at least half their room for the context, and a context of several windows needs a useful room. So the windows of a row hold at most
``length + 16 * t`` tokens for a context of ``t`` tokens, whatever the question.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qa_platform.answering.characters import Characters, loses_letters
from qa_platform.contract import RowReason

if TYPE_CHECKING:
    import tokenizers

# A text of more characters is tokenised alone: otherwise every thread would tokenise such texts, and keep the memory for them.
_LONG = 2**16
# A question must leave one part in this many of each window to a context of several windows: 48 of 384 tokens, two or three sentences.
# With less, a short answer and its surroundings do not fit, and most of the work would go into reading the question again.
_USEFUL_PART = 8


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
    """A tokenizer's special tokens, in the order ``before``, question, ``between``, context, ``after``; and its token types.

    ``loses_letters``: the tokenizer's offsets leave out letters, see `characters`.
    """

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    question_type: int
    context_type: int
    loses_letters: bool = False

    @property
    def special(self) -> int:
        return len(self.before) + len(self.between) + len(self.after)

    @classmethod
    def of(cls, tokenizer: "tokenizers.Tokenizer") -> "Layout":
        """The layout, read from one encoded pair. This works for every family of tokenizers."""
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
            loses_letters(tokenizer),
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
class Tokenized:
    """One tokenised row: its windows and the character ranges of its context's tokens; or the reason why it has none."""

    windows: tuple[Window, ...]
    characters: Characters | None
    reason: RowReason | None = None


def tokenize(tokenizer: "tokenizers.Tokenizer", layout: Layout, pairs: Sequence[tuple[str, str]], size: WindowSize) -> list[Tokenized]:
    """The windows of every (question, context), in order. Equal questions and equal contexts are tokenised once.

    A row without a token in its question or context gets EMPTY_QUESTION or EMPTY_CONTEXT. A row gets QUESTION_EXCEEDS_WINDOW if its
    question leaves less room than the context needs, and less than an eighth of the window. For each row, the stride is capped at half
    the room that the question leaves.
    """
    texts = list(dict.fromkeys(itertools.chain.from_iterable(pairs)))
    encodings = {text: tokenizer.encode(text, add_special_tokens=False) for text in texts if len(text) > _LONG}
    short = [text for text in texts if len(text) <= _LONG]
    encodings.update(zip(short, tokenizer.encode_batch(short, add_special_tokens=False), strict=True))
    ids: dict[str, NDArray[np.int32]] = {text: np.array(encoding.ids, np.int32) for text, encoding in encodings.items()}
    contexts = dict.fromkeys(context for _, context in pairs)
    characters = {text: Characters(encodings[text], text, loses_letters=layout.loses_letters) for text in contexts}
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
    if reason := _fault(len(question), len(context), room, size):
        return Tokenized((), None, reason)
    head = np.concatenate([np.array(layout.before, np.int32), question, np.array(layout.between, np.int32)])
    tail = np.array(layout.after, np.int32)
    windows = []
    for first, end in _cuts(len(context), room, size.stride):
        ids = np.concatenate([head, context[first:end], tail])
        windows.append(Window(row, ids, len(head), first, end - first))
    return Tokenized(tuple(windows), characters)


def _fault(question: int, context: int, room: int, size: WindowSize) -> RowReason | None:
    """Why a row with these numbers of tokens has no windows; None if it has some."""
    if not question:
        return RowReason.EMPTY_QUESTION
    if not context:
        return RowReason.EMPTY_CONTEXT
    return RowReason.QUESTION_EXCEEDS_WINDOW if room < min(context, -(-size.length // _USEFUL_PART)) else None


def _cuts(tokens: int, room: int, stride: int) -> list[tuple[int, int]]:
    step = max(room - stride, -(-room // 2))
    cuts = []
    for first in range(0, tokens, step):
        end = min(first + room, tokens)
        cuts.append((first, end))
        if end == tokens:
            break
    return cuts
