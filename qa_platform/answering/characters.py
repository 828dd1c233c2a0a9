"""The character ranges of a context's tokens in its text, on borders at which an answer may begin and end.

Tokenizers give the ranges of tokens in code points. Some leave out the marks of a letter (an accent, a vowel sign), and some split an
emoji. Pre-tokenizers that add a space to each word and then trim it lose the word's first letter. Here the ranges are widened to the
lost letters and to whole grapheme clusters, which a reader sees as one character.
"""

import itertools
from array import array
from bisect import bisect_left, bisect_right
from functools import cached_property
from typing import TYPE_CHECKING

import regex

if TYPE_CHECKING:
    import tokenizers

_CLUSTER = regex.compile(r"\X")
# Regional indicators form flags in pairs, counted from the start of their run. \X recounts the run at every indicator, which is
# quadratic. So flags are replaced by a letter with a mark: it has the same borders, and \X does not look back at it.
_FLAG = regex.compile(r"[\U0001F1E6-\U0001F1FF]{2}")
_LIKE_A_FLAG = "a\u0301"
# Finds characters that can be part of a longer cluster. A place with no such character on either side is a border.
_CAN_JOIN = regex.compile(r"[^\p{GCB=Other}\p{GCB=Control}\p{GCB=CR}\p{GCB=LF}]|\r\n")
_PROBE = "Ada Blum built a bridge, in 1872."


class Characters:
    """The character ranges of a context's tokens. Each is looked up when it is needed: few are, and a list of all would take longer.

    Args:
        encoding: the tokenizer's encoding of the context ``text``.
        loses_letters: the result of `loses_letters` for the tokenizer.
    """

    def __init__(self, encoding: "tokenizers.Encoding", text: str, *, loses_letters: bool = False) -> None:
        self._encoding = encoding
        self._text = text
        self._loses_letters = loses_letters
        # In such a text every cluster is one character.
        self._single = text.isascii() and "\r\n" not in text

    def char_range(self, first: int, last: int) -> tuple[int, int]:
        """The character range of the tokens from ``first`` to ``last`` in the text: their first character, and the one after their last."""
        start, end = self._offset(first)[0], self._offset(last)[1]
        if self._loses_letters:
            start = self._with_lost_letters(first, start)
        if self._single:
            return start, end
        if _CAN_JOIN.search(self._text, max(start - 1, 0), start + 1):
            start = self._borders[bisect_right(self._borders, start) - 1]
        if _CAN_JOIN.search(self._text, max(end - 1, 0), end + 1):
            end = self._borders[bisect_left(self._borders, end)]
        return start, end

    def word(self, token: int, first: int, last: int) -> tuple[int, int]:
        """The first and the last token of the word that contains ``token``, within ``first`` to ``last``."""
        word_of = self._encoding.token_to_word
        word, low, high = word_of(token), token, token
        while low > first and word_of(low - 1) == word:
            low -= 1
        while high < last and word_of(high + 1) == word:
            high += 1
        return low, high

    @cached_property
    def _borders(self) -> "array[int]":
        """Where the text's grapheme clusters begin, and its length."""
        text = _FLAG.sub(_LIKE_A_FLAG, self._text)
        return array("i", itertools.chain((match.start() for match in _CLUSTER.finditer(text)), [len(text)]))

    def _offset(self, token: int) -> tuple[int, int]:
        offset = self._encoding.token_to_chars(token)
        assert offset is not None
        return offset

    def _with_lost_letters(self, token: int, start: int) -> int:
        """The start of a token with its lost letters: it begins right after the white space or the token before it."""
        gap = self._text[self._offset(token - 1)[1] if token else 0 : start]
        return start - len(gap.split()[-1]) if gap and not gap[-1].isspace() else start


def loses_letters(tokenizer: "tokenizers.Tokenizer") -> bool:
    """Whether the tokenizer's offsets leave out letters, as RobBERT's do."""
    covered = {position for start, end in tokenizer.encode(_PROBE, add_special_tokens=False).offsets for position in range(start, end)}
    return any(not character.isspace() and position not in covered for position, character in enumerate(_PROBE))
