"""The quality of the answers, measured on gold sets: files of questions whose right answers are known.

A gold set is a file like any other, below `QA_GOLD_PREFIX`, with a column `answers` beside question and context. The platform answers
it like all files, and the answers in the table are compared with that column.
"""

import hashlib
import heapq
import tempfile
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import psycopg

from qa_platform.clients import bucket
from qa_platform.clients.postgres import connect, long_transaction
from qa_platform.clients.services import Services
from qa_platform.clients.source import SOURCE_CHANGED_ERRORS
from qa_platform.errors import InputError
from qa_platform.evaluation.gold import GoldQuestion, exact_match, f1, gold_questions
from qa_platform.ingest import Unpacked
from qa_platform.ledger import FileRecord, Ledger

# The maximum size of a gold set, whose answers are held in memory.
_BYTES_LIMIT = 64 * 2**20
_READ_BYTES = 2**20
_AGAIN = "the next run measures it again; if it says so again, materialise its partition of question_answer alone, which loads the answers"
SHOWN_MISTAKES = 10
GOLD_SETS = 20


@dataclass(frozen=True)
class Mistake:
    """A question whose answer is not one of the right ones."""

    question: str
    answer: str
    right: tuple[str, ...]
    f1: float


@dataclass(frozen=True)
class Quality:
    """Figures of one gold set: exact match and F1 in percent, as SQuAD defines them, and the worst mistakes."""

    questions: int
    exact_match: float
    f1: float
    mistakes: tuple[Mistake, ...]


def is_gold(name: str, prefix: str) -> bool:
    """Whether a file below ``incoming/`` is a gold set."""
    return name.startswith(prefix)


def gold_sets(ledger: Ledger, prefix: str) -> list[FileRecord]:
    """For each gold set, the generation whose answers are in the table. If there are more than `GOLD_SETS`, the last ones loaded."""
    # A newer upload may be waiting, or unchanged: the rows are still those of the last one that was loaded.
    return [record for name in ledger.loaded_below(prefix, limit=GOLD_SETS) if (record := ledger.in_the_table(name))]


def measure(services: Services, record: FileRecord) -> Quality:
    """Compare the answers of a loaded gold set with the right ones. A rejected question counts as not answered.

    Raises:
        InputError: the file has no column `answers`, or is too large; its source is gone; its answers have been replaced meanwhile.
    """
    with closing(_read(services, record)) as gold:
        # Read before the answers, so that a file that is no gold set is told at once.
        first = next(gold)
        with connect(services.postgres) as connection:
            answers = _answers(connection, record)
        return compare(chain([first], gold), answers)


def compare(gold: Iterable[GoldQuestion], answers: Mapping[bytes, str]) -> Quality:
    """The figures of a gold set, which has at least one question.

    Args:
        answers: the answers in the table, by `key`.
    """
    number, matches, f1_sum = 0, 0.0, 0.0

    def mistakes() -> Iterator[Mistake]:
        nonlocal number, matches, f1_sum
        for question in gold:
            answer = answers.get(key(question.question, question.context), "")
            right = tuple(known.text for known in question.answers)
            match, overlap = exact_match(answer, right), f1(answer, right)
            number, matches, f1_sum = number + 1, matches + match, f1_sum + overlap
            if not match:
                yield Mistake(question.question, answer, right, overlap)

    worst = tuple(heapq.nsmallest(SHOWN_MISTAKES, mistakes(), key=lambda mistake: mistake.f1))
    return Quality(number, round(100 * matches / number, 2), round(100 * f1_sum / number, 2), worst)


def combined(measured: Sequence[Quality]) -> Quality:
    """The figures over all questions of one or more gold sets."""
    number = sum(quality.questions for quality in measured)
    match = sum(quality.exact_match * quality.questions for quality in measured) / number
    mean_f1 = sum(quality.f1 * quality.questions for quality in measured) / number
    mistakes = sorted((mistake for quality in measured for mistake in quality.mistakes), key=lambda mistake: mistake.f1)
    return Quality(number, round(match, 2), round(mean_f1, 2), tuple(mistakes[:SHOWN_MISTAKES]))


def key(question: str, context: str) -> bytes:
    """Identifies a question by its text and context, ignoring differences in white space. Row numbers differ between readers."""
    return hashlib.sha256("\0".join(" ".join(text.split()) for text in (question, context)).encode()).digest()


def _read(services: Services, record: FileRecord) -> Generator[GoldQuestion, None, None]:
    name = record.version.name
    if not record.place:
        raise InputError("it was deleted once it was answered (QA_ARCHIVE), so it cannot be compared", where=name, advice="upload it again")
    _refuse_large(name, record.version.size)
    with tempfile.TemporaryDirectory(prefix="qa-gold-") as folder:
        path = Path(folder, "gold.csv")
        try:
            with bucket.open_version(services.bucket, record.version, record.place) as source, path.open("wb") as file:
                unpacked = Unpacked(source, size=record.version.size)
                while content := unpacked.read(_READ_BYTES):
                    file.write(content)
                    _refuse_large(name, file.tell())
        except SOURCE_CHANGED_ERRORS as error:
            raise InputError(f"{record.place} is gone, so it cannot be compared", where=name, advice="upload it again") from error
        try:
            yield from gold_questions(path)
        except InputError as error:
            # The file's own name, not that of the copy.
            raise InputError(error.what, where=error.where.replace(str(path), name), advice=error.advice) from error


def _refuse_large(name: str, size: int) -> None:
    if size > _BYTES_LIMIT:
        raise InputError(f"it is too large for a gold set: {size} bytes, {_BYTES_LIMIT} at most", where=name, advice="cut it")


def _answers(connection: psycopg.Connection, record: FileRecord) -> dict[bytes, str]:
    with long_transaction(connection) as cursor:
        # Row by row: the contexts are many times as large as the answers.
        rows = cursor.stream(
            "SELECT question, context, answer FROM question_answer WHERE source_file = %s AND generation = %s",
            [record.version.name, record.version.generation],
        )
        number, answers = 0, dict[bytes, str]()
        for question, context, answer in rows:
            number += 1
            answers[key(question, context)] = answer or ""
    if number != record.answered:
        raise InputError("the table does not hold its answers as they were loaded", where=record.version.name, advice=_AGAIN)
    return answers
