"""Where the tokens of a context lie in its text, on borders at which an answer may begin and end.

Tokenizers give the places of tokens in code points. Some leave out the marks of a letter (an accent, a vowel sign), and some split an
emoji. Pre-tokenizers that add a space to each word and then trim it lose the word's first letter. Here the places are widened to whole
grapheme clusters, which a reader takes for one character, and to the lost letters.
"""

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import regex
from numpy.typing import NDArray

if TYPE_CHECKING:
    import tokenizers

_CLUSTER = regex.compile(r"\X")
# Finds characters that can be a part of a longer cluster. Most texts have none, and are done.
_CAN_JOIN = regex.compile(r"[^\p{GCB=Other}\p{GCB=Control}\p{GCB=CR}\p{GCB=LF}]|\r\n")
_PROBE = "Ada Blum built a bridge, in 1872."


@dataclass(frozen=True)
class Characters:
    """The places of a context's tokens. The tokenizer's own Encoding has them too, and takes several times the memory.

    ``offsets``: the first character, and the one after the last, of every token; shape (tokens, 2). ``words``: the number of every
    token's word, in ascending order; shape (tokens,).
    """

    offsets: NDArray[np.int32]
    words: NDArray[np.int32]

    @classmethod
    def of(cls, encoding: "tokenizers.Encoding", text: str, *, loses_letters: bool = False) -> "Characters":
        """The places of the tokens of ``text``; ``loses_letters``: the result of `loses_letters` for the tokenizer."""
        offsets = _offsets(encoding)
        if loses_letters:
            offsets = _with_lost_letters(offsets, text)
        if not (text.isascii() and "\r\n" not in text) and _CAN_JOIN.search(text):
            offsets = _whole_clusters(offsets, text)
        return cls(offsets, np.array(encoding.word_ids, np.int32))


def loses_letters(tokenizer: "tokenizers.Tokenizer") -> bool:
    """Whether the tokenizer's offsets leave out letters, as RobBERT's do."""
    covered = {place for start, end in tokenizer.encode(_PROBE, add_special_tokens=False).offsets for place in range(start, end)}
    return any(not character.isspace() and place not in covered for place, character in enumerate(_PROBE))


def _offsets(encoding: "tokenizers.Encoding") -> NDArray[np.int32]:
    # Several times as fast as an array made from the tuples.
    flat = np.fromiter(itertools.chain.from_iterable(encoding.offsets), np.int32, 2 * len(encoding))
    return flat.reshape(-1, 2)


def _with_lost_letters(offsets: NDArray[np.int32], text: str) -> NDArray[np.int32]:
    """Each token begins after the white space, or the token, that comes before it."""
    result = offsets.copy()
    covered = 0
    for number, (start, end) in enumerate(offsets.tolist()):
        gap = text[covered:start]
        if gap and not gap[-1].isspace():
            result[number, 0] = start - len(gap.split()[-1])
        covered = max(covered, end)
    return result


def _whole_clusters(offsets: NDArray[np.int32], text: str) -> NDArray[np.int32]:
    """Each token begins where its first character's cluster does, and ends where its last one's does."""
    borders = np.fromiter(itertools.chain((match.start() for match in _CLUSTER.finditer(text)), [len(text)]), np.int32)
    starts = borders[np.searchsorted(borders, offsets[:, 0], "right") - 1]
    ends = borders[np.searchsorted(borders, offsets[:, 1], "left")]
    return np.stack([starts, ends], axis=1)
