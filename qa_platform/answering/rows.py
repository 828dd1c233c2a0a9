"""Rows of a CSV and their answers: answering row by row in bounded memory, the added cells, and the counts."""

import collections
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from qa_platform.answering.engine import Answer, Answerer, AnswerOptions
from qa_platform.contract import RowReason

# More digits would exceed the precision of a score.
_SCORE_DIGITS = 6
# The column for all answers but the best, if several per row are requested.
ALTERNATIVES = "alternatives"


@dataclass
class Counts:
    """How many rows were answered, have no answer, or are rejected. ``rows`` is their sum."""

    answered: int = 0
    no_answer: int = 0
    rejected: int = 0

    @property
    def rows(self) -> int:
        return self.answered + self.no_answer + self.rejected

    def add(self, answer: Answer) -> None:
        if answer.is_rejected:
            self.rejected += 1
        elif answer.error is RowReason.NO_ANSWER:
            self.no_answer += 1
        else:
            self.answered += 1


@dataclass(frozen=True)
class AskedRow:
    """A row's cells, question and context. ``reason`` is set if the row has already been rejected; it is then not asked."""

    cells: Sequence[str]
    question: str
    context: str
    reason: RowReason | None = None
    # Bytes of input, for showing progress.
    size: int = 0


def answered_rows(answerer: Answerer, rows: Iterable[AskedRow], options: AnswerOptions) -> Iterator[tuple[AskedRow, Answer]]:
    """Every row with its answer, in order. A row with a reason is not asked, and its answer has that reason."""
    # Rows that the engine has read but not answered. It reads ahead, in another thread, by a bounded number of rows and bytes.
    waiting: collections.deque[AskedRow] = collections.deque()

    def pairs() -> Iterator[tuple[str, str]]:
        for row in rows:
            waiting.append(row)
            yield ("", "") if row.reason else (row.question, row.context)

    def kept() -> int:
        return sum(map(sys.getsizeof, waiting[-1].cells))

    for answer in answerer.answer(pairs(), options, kept=kept):
        row = waiting.popleft()
        yield row, replace(answer, error=row.reason) if row.reason else answer


def answer_cells(answer: Answer, model: str) -> list[str]:
    """The cells of ANSWER_COLUMNS. A rejected row has only model and error; a row without an answer has its score too."""
    error = answer.error.value if answer.error else ""
    if answer.error in (None, RowReason.LOW_SCORE):
        return [answer.answer, f"{answer.score:.{_SCORE_DIGITS}f}", str(answer.start), str(answer.end), model, error]
    score = f"{answer.score:.{_SCORE_DIGITS}f}" if answer.error is RowReason.NO_ANSWER else ""
    return ["", score, "", "", model, error]


def alternatives_cell(answer: Answer) -> str:
    """The cell of ALTERNATIVES: a JSON list of the next best spans, each with text, score, start and end."""
    return json.dumps([asdict(span) for span in answer.alternatives], ensure_ascii=False)
