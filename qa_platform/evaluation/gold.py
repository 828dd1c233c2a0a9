"""Gold sets, and the SQuAD metric: exact match and F1.

The metric is that of the SQuAD v1.1 evaluation script (Rajpurkar et al., 2016): both texts are lower-cased, stripped of
punctuation and of the articles a, an, the, and split at white space; the best value over all gold answers counts. For a question
without gold answers (SQuAD v2), the only right answer is none. As in version 2's script, gold answers without a word left do not count.
"""

import collections
import hashlib
import json
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qa_platform.contract import column_label
from qa_platform.errors import InputError
from qa_platform.ingest import ROW_HINTS, FileRejected, RowReader

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class GoldAnswer:
    """One annotator's answer. ``start`` is its character offset in the context, or None where the set has no offsets."""

    text: str
    start: int | None


@dataclass(frozen=True)
class GoldQuestion:
    """A question, its context, and its right answers, which are empty if the question has no answer. ``group`` is its article."""

    id: str
    group: str
    question: str
    context: str
    answers: tuple[GoldAnswer, ...]


def read_gold(path: Path) -> list[GoldQuestion]:
    """All questions of a gold set, see `gold_questions`.

    Raises:
        InputError: see there.
    """
    return list(gold_questions(path))


def gold_questions(path: Path) -> Iterator[GoldQuestion]:
    """Read a gold set: SQuAD JSON (v1 or v2) if its name ends in ``.json``, else a CSV with the columns question, context and answers.

    JSON is read as a whole, a CSV row by row.
    A CSV is read like an upload (see `ingest`): with any of their delimiters, and gzip too. Its ``answers`` cell is a JSON list of
    strings, or one answer as plain text. An empty cell means that there is no answer.

    Raises, while it is iterated:
        InputError: the file is neither, has no questions, or has a row whose right answers cannot be read.
    """
    questions = _read_squad(path) if path.suffix.lower() == ".json" else _read_csv(path)
    try:
        first = next(questions, None)
        if first is None:
            raise InputError("it has no questions", where=str(path))
        yield first
        yield from questions
    except FileRejected as error:
        raise error.of_file(str(path)) from error


def _read_squad(path: Path) -> Iterator[GoldQuestion]:
    location = ""
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
        articles = document.get("data") if isinstance(document, dict) else None
        if not isinstance(articles, list):
            raise InputError("it is not SQuAD JSON: it has no list 'data'", where=str(path))
        for number, article in enumerate(articles, 1):
            location = f", article {number}"
            for part, paragraph in enumerate(article["paragraphs"], 1):
                location = f", article {number}, paragraph {part}"
                for count, qa in enumerate(paragraph["qas"], 1):
                    location = f", article {number}, paragraph {part}, question {count}"
                    if not isinstance(qa["answers"], list):
                        raise TypeError("its 'answers' is not a list of objects with 'text' and 'answer_start'")
                    answers = tuple(GoldAnswer(_text(a, "text"), _start(a)) for a in qa["answers"] if _text(a, "text").strip())
                    group = str(article.get("title") or f"{path.stem}-{number - 1}")
                    yield GoldQuestion(str(qa["id"]), group, _text(qa, "question"), _text(paragraph, "context"), answers)
    except UnicodeDecodeError as error:
        raise InputError(f"it is not in UTF-8 ({error.reason})", where=str(path), advice="save it as UTF-8") from error
    except KeyError as error:
        raise InputError(f"it is not SQuAD JSON: an object in it has no {error}", where=f"{path}{location}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"it is not SQuAD JSON ({type(error).__name__}: {error})", where=f"{path}{location}") from error


def _text(entry: Any, name: str) -> str:
    if not isinstance(entry, Mapping):
        raise TypeError(f"an object with a {name!r} is needed, and this is {entry!r:.40}")
    if isinstance(value := entry[name], str):
        return value
    raise TypeError(f"an object in it has a {name!r} that is not text")


def _start(answer: Mapping[str, Any]) -> int | None:
    start = answer.get("answer_start")
    if isinstance(start, int | None):
        return start
    raise TypeError("an object in it has an 'answer_start' that is not an integer")


def _read_csv(path: Path) -> Iterator[GoldQuestion]:
    with path.open("rb") as file:
        rows = RowReader(file)
        names = [name.strip().lower() for name in rows.columns]
        if names.count("answers") != 1:
            raise InputError(
                "it has no column answers" if "answers" not in names else "it has several columns called answers",
                where=str(path),
                advice="a gold CSV has the columns question, context and answers",
            )
        answers_column = names.index("answers")
        asked = [column_label(rows.columns[position]) for position in (rows.question, rows.context)]
        for row in rows:
            # A row whose only fault is in its question or context is kept: the platform rejects it, so it is not answered.
            if (fault := row.rejection) and fault.column not in asked:
                raise InputError(f"{fault.reason}: {fault.detail}", where=f"{path}, line {row.line}", advice=ROW_HINTS[fault.reason])
            try:
                answers = tuple(GoldAnswer(text, None) for text in _answers_of_cell(row.cells[answers_column]) if text.strip())
            except TypeError as error:
                advice = "write its answers as a JSON list of strings, or one answer as plain text"
                raise InputError(str(error), where=f"{path}, line {row.line}", advice=advice) from error
            yield GoldQuestion(str(row.row), path.stem, row.cells[rows.question], row.cells[rows.context], answers)


def _answers_of_cell(cell: str) -> list[str]:
    """The right answers in a cell. A number in a list is an answer, as it is written.

    Raises:
        TypeError: the list has something other than strings and numbers, or it looks like a list or an object and is no JSON list.
    """
    if not cell.strip():
        return []
    try:
        value = json.loads(cell, parse_int=str, parse_float=str, parse_constant=str)
    except (ValueError, RecursionError):
        value = cell
    if not isinstance(value, list):
        # Such as what Python writes for a list. Taken for one plain answer, it would make every right one count as wrong.
        if cell.strip()[0] + cell.strip()[-1] in ("[]", "{}"):
            raise TypeError("its answers look like a list or an object, and are no JSON list")
        return [cell]
    if not all(isinstance(text, str) for text in value):
        raise TypeError("its list of answers has something other than strings and numbers")
    return value


def held_out(question: GoldQuestion, *, parts: int = 6) -> bool:
    """Whether a question belongs to the held-out part: one paragraph in ``parts``, by the SHA-256 of its text.

    All questions of a paragraph are in the same part, whatever file they came from.
    """
    return int.from_bytes(hashlib.sha256(question.context.encode(errors="surrogatepass")).digest()[:4], "big") % parts == 0


def normalize(text: str) -> list[str]:
    """The words of a text as the SQuAD metric compares them."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """1.0 if the normalised answer equals a normalised gold answer, or if there is neither; else 0.0."""
    words, right = normalize(answer), _with_words(golds)
    return float(words in right) if right else float(not words)


def f1(answer: str, golds: Sequence[str]) -> float:
    """The best harmonic mean of word precision and recall over the gold answers, in [0, 1]."""
    words = normalize(answer)
    return max((_f1_of_words(words, gold) for gold in _with_words(golds)), default=float(not words))


def _with_words(golds: Sequence[str]) -> list[list[str]]:
    return [words for gold in golds if (words := normalize(gold))]


def _f1_of_words(words: list[str], gold: list[str]) -> float:
    same = sum((collections.Counter(words) & collections.Counter(gold)).values())
    return 2 * same / (len(words) + len(gold))
