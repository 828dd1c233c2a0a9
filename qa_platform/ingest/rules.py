"""Why a row cannot be asked: one ordered list of rules for every way into the platform.

The first rule that a row breaks gives its reason. So the same row has the same reason in the pipeline, in ``qa-platform answer`` and
in `answering.Answerer`, whatever the order of its columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import regex

from qa_platform.contract import CONTEXT_LIMIT, QUESTION_LIMIT, RowReason
from qa_platform.settings import IngestSettings

_SURROGATE = regex.compile("[\ud800-\udfff]")
# Visible characters: no white space, control or format characters, or marks without a letter. Models have no tokens for those. U+2800 is
# the blank of Braille, a symbol to Unicode.
_VISIBLE = regex.compile(r"[^\p{Z}\p{M}\p{Cc}\p{Cf}\p{Default_Ignorable_Code_Point}\u2800]")
# Typographic quotes, which do not quote a cell of a CSV.
_TYPOGRAPHIC = regex.compile("\\s*([“”„‟«»])")


@dataclass(frozen=True)
class TextLimits:
    """The maximum characters of a question and of a context."""

    question: int = QUESTION_LIMIT
    context: int = CONTEXT_LIMIT

    @classmethod
    def of(cls, settings: IngestSettings) -> "TextLimits":
        """The configured limits."""
        return cls(settings.question_limit, settings.context_limit)


# The limits of the tables, which settings can only lower.
TABLE_LIMITS = TextLimits()


class Fault(NamedTuple):
    """Why a row cannot be asked. ``cell`` is the position of the faulty cell, None for the whole row; ``detail`` is for people."""

    reason: RowReason
    cell: int | None
    detail: str


def storable(cell: str) -> bool:
    """Whether a text can be stored: UTF-8 has no half surrogate pairs, and PostgreSQL no NUL."""
    return "\0" not in cell and not _SURROGATE.search(cell)


def is_blank(cell: str) -> bool:
    """Whether a text shows nothing: it is empty, or all white space, invisible characters and marks."""
    return not _VISIBLE.search(cell)


def fault_of_row(cells: Sequence[str], *, width: int, question: int, context: int, limits: TextLimits) -> Fault | None:
    """The first fault of a row: in its shape, then in its cells. None if it can be asked.

    Args:
        width: the number of cells that the row must have.
        question: the position of the question.
        context: the position of the context.
    """
    if len(cells) != width:
        reason = RowReason.TOO_FEW_CELLS if len(cells) < width else RowReason.TOO_MANY_CELLS
        return Fault(reason, None, f"{len(cells)} cells; the header has {width}{about_quotes(cells)}")
    return _nul(cells) or _surrogate(cells) or _empty(cells, question, context) or _too_long(cells, question, context, limits)


def about_quotes(cells: Sequence[str]) -> str:
    """A hint for the detail of a fault, if a cell begins with a typographic quote; "" if none does."""
    quote = next((found.group(1) for cell in cells if (found := _TYPOGRAPHIC.match(cell))), "")
    return f"; cells must be quoted with straight quotes, not {quote}" if quote else ""


def fault_of_pair(question: str, context: str) -> Fault | None:
    """The first fault of a question and its context; None if they can be asked."""
    return fault_of_row((question, context), width=2, question=0, context=1, limits=TABLE_LIMITS)


def _nul(cells: Sequence[str]) -> Fault | None:
    for position, cell in enumerate(cells):
        if "\0" in cell:
            return Fault(RowReason.NUL_CHARACTER, position, f"character {cell.index(chr(0)) + 1} of the cell is NUL")
    return None


def _surrogate(cells: Sequence[str]) -> Fault | None:
    for position, cell in enumerate(cells):
        if half := _SURROGATE.search(cell):
            return Fault(RowReason.LONE_SURROGATE, position, f"character {half.start() + 1} of the cell is U+{ord(half.group()):04X}")
    return None


def _empty(cells: Sequence[str], question: int, context: int) -> Fault | None:
    for position, reason in ((question, RowReason.EMPTY_QUESTION), (context, RowReason.EMPTY_CONTEXT)):
        if is_blank(cells[position]):
            return Fault(reason, position, "nothing that can be seen" if cells[position] else "no text")
    return None


def _too_long(cells: Sequence[str], question: int, context: int, limits: TextLimits) -> Fault | None:
    for position, reason, limit in (
        (question, RowReason.QUESTION_TOO_LONG, limits.question),
        (context, RowReason.CONTEXT_TOO_LONG, limits.context),
    ):
        if len(cells[position]) > limit:
            return Fault(reason, position, f"{len(cells[position]):,} characters; {limit:,} are allowed")
    return None
