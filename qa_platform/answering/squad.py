"""SQuAD data: reading gold sets, and exact match and F1 by SQuAD's own definition.

The metric is that of the SQuAD v1.1 evaluation script (Rajpurkar et al., 2016): both texts are lower-cased, stripped of
punctuation and of the articles a, an, the, and split at white space; the best value over all gold answers counts. A question
without gold answers (SQuAD v2) is right exactly when nothing is answered.
"""

import collections
import csv
import hashlib
import json
import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qa_platform.errors import InputError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class GoldAnswer:
    """One annotator's answer; ``start`` is its character offset in the context, or None where the set does not say."""

    text: str
    start: int | None


@dataclass(frozen=True)
class GoldQuestion:
    """A question, its context, and the answers that count as right (none: unanswerable)."""

    id: str
    group: str
    question: str
    context: str
    answers: tuple[GoldAnswer, ...]


def read_gold(path: Path) -> list[GoldQuestion]:
    """Read a gold set: SQuAD JSON (v1 or v2), or a CSV with the columns question, context and answers.

    A CSV's ``answers`` cell is a JSON list of strings, or a single answer as plain text; an empty cell means unanswerable.

    Raises:
        InputError: the file is neither, naming what is missing.
    """
    try:
        questions = list(_read_csv(path) if path.suffix.lower() == ".csv" else _read_squad(path))
    except UnicodeDecodeError as error:
        # Its position is one in the block that was read, not in the file.
        raise InputError(f"{path}: not in UTF-8 ({error.reason}); save it as UTF-8") from error
    if not questions:
        raise InputError(f"{path}: no questions in this gold set")
    return questions


def _read_squad(path: Path) -> Iterator[GoldQuestion]:
    try:
        articles = json.loads(path.read_text(encoding="utf-8"))["data"]
        for number, article in enumerate(articles):
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    answers = tuple(GoldAnswer(a["text"], a.get("answer_start")) for a in qa["answers"])
                    group = article.get("title") or f"{path.stem}-{number}"
                    yield GoldQuestion(str(qa["id"]), group, qa["question"], paragraph["context"], answers)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a gold set in SQuAD JSON ({type(error).__name__}: {error})") from error


def _read_csv(path: Path) -> Iterator[GoldQuestion]:
    csv.field_size_limit(2**31 - 1)
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = {"question", "context", "answers"} - set(reader.fieldnames or ())
        if missing:
            raise InputError(f"{path}: a gold CSV has the columns question, context and answers; missing: {', '.join(sorted(missing))}")
        for number, row in enumerate(reader, start=1):
            if None in (row["question"], row["context"], row["answers"]):
                raise InputError(f"{path}: row {number} has fewer cells than the header")
            answers = tuple(GoldAnswer(text, None) for text in _answers_of_cell(row["answers"]))
            yield GoldQuestion(str(number), path.stem, row["question"], row["context"], answers)


def _answers_of_cell(cell: str) -> list[str]:
    if not cell.strip():
        return []
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return [cell]
    return [str(text) for text in value] if isinstance(value, list) else [cell]


def held_out(question: GoldQuestion, *, parts: int = 6) -> bool:
    """Whether a question belongs to the held-out part: one paragraph in ``parts``, by the SHA-256 of its text.

    A paragraph is in or out as a whole, whatever file it came from, so no context is ever on both sides.
    """
    return int.from_bytes(hashlib.sha256(question.context.encode()).digest()[:4], "big") % parts == 0


def normalize(text: str) -> list[str]:
    """The words of a text as the SQuAD metric compares them."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """1.0 if the normalised answer equals a normalised gold answer (or nothing was to be answered and nothing was), else 0.0."""
    words = normalize(answer)
    return float(any(words == normalize(gold) for gold in golds)) if golds else float(not words)


def f1(answer: str, golds: Sequence[str]) -> float:
    """The best harmonic mean of word precision and recall over the gold answers, in [0, 1]."""
    words = normalize(answer)
    return max((_f1_of_words(words, normalize(gold)) for gold in golds), default=float(not words))


def _f1_of_words(words: list[str], gold: list[str]) -> float:
    if not words or not gold:
        return float(words == gold)
    same = sum((collections.Counter(words) & collections.Counter(gold)).values())
    return 2 * same / (len(words) + len(gold))
