"""A piece of a text with its surroundings, and cutting text to fit on one line."""

import re
from dataclasses import dataclass

# A longer run without a space is a name, or text in a script without spaces, and is cut anywhere.
_WORD_CHARACTERS = 30
# Line ends and control characters would end the row of a table; others change the direction of the text after them. Half a surrogate pair,
# which a gold set's JSON may contain, cannot be encoded.
_INVISIBLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200b\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]+")


@dataclass(frozen=True)
class Passage:
    """A piece of a text, with the text before and after it. If there is no room for all of it, the surroundings are cut first."""

    before: str
    piece: str
    after: str

    def shown(self, characters: int) -> str:
        """The passage on one line of at most ``characters`` characters, cut between words, with an ellipsis at each end that is cut."""
        before, piece, after = (one_line(text) for text in (self.before, self.piece, self.after))
        room = characters - len(piece)
        if len(whole := f"{before}{piece}{after}".strip()) <= characters:
            return whole
        if room < 2:
            return shortened(piece.strip(), characters)
        left = max(room // 2, room - len(after))
        start = shortened(before[::-1].rstrip(), left)[::-1]
        return f"{start}{piece}{shortened(after.rstrip(), room - len(start))}".strip()


def one_line(text: str) -> str:
    """The text on one line, with single spaces and without invisible characters."""
    return re.sub(r"\s+", " ", _INVISIBLE.sub(" ", text))


def shortened(text: str, characters: int) -> str:
    """The beginning of a text, at most ``characters`` characters, cut between words, with an ellipsis where it is cut."""
    if len(text) <= characters:
        return text
    kept, rest = text[: characters - 1], text[characters - 1 :]
    words, space, begun = kept.rpartition(" ")
    if space and rest[0] != " " and len(begun) + len(rest.partition(" ")[0]) <= _WORD_CHARACTERS:
        kept = words
    return f"{kept.rstrip(' .,;:')}…"
