"""Evaluating a model on a gold set: exact match and F1, by length of context and by score."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qa_platform.answering.engine import Answer, Answerer
from qa_platform.contract import ModelChoice
from qa_platform.evaluation.gold import GoldQuestion, exact_match, f1

_CONTEXT_BOUNDS = (250, 500, 1000, 2000, 4000)
_DECILES = 10


@dataclass(frozen=True)
class Figures:
    """The figures of a group of questions: their number, and the means of exact match, F1 (both in percent) and score (a probability)."""

    group: str
    questions: int
    exact_match: float
    f1: float
    score: float


@dataclass(frozen=True)
class Evaluation:
    """A model's figures on a gold set.

    ``by_score`` has deciles of the score. ``calibration_error`` is the mean distance between score and exact match over them, in [0, 1],
    weighted by their size.
    """

    model: ModelChoice
    total: Figures
    by_context: tuple[Figures, ...]
    by_score: tuple[Figures, ...]
    calibration_error: float


@dataclass(frozen=True)
class _Judged:
    characters: int
    score: float
    exact_match: float
    f1: float


def evaluate(
    answerer: Answerer,
    gold: Sequence[GoldQuestion],
    *,
    handle_impossible_answer: bool | None = None,
    align_to_words: bool = True,
    report: Callable[[], object] = lambda: None,
) -> Evaluation:
    """Answer a gold set, and compare the answers with the right ones.

    Args:
        handle_impossible_answer: whether the model may give no answer; None allows it where the set has questions without one.
        align_to_words: whether answers are widened to whole words.
        report: called after each question.
    """
    if handle_impossible_answer is None:
        handle_impossible_answer = has_unanswerable(gold)
    pairs = [(question.question, question.context) for question in gold]
    answers = answerer.answer(pairs, handle_impossible_answer=handle_impossible_answer, align_to_words=align_to_words)
    judged = []
    for question, answer in zip(gold, answers, strict=True):
        judged.append(_judge(question, answer))
        report()
    by_score = _deciles(judged)
    calibration = sum(group.questions * abs(group.score - group.exact_match / 100) for group in by_score) / len(judged)
    return Evaluation(answerer.identity, _figures("all", judged), _by_context(judged), by_score, calibration)


def has_unanswerable(gold: Sequence[GoldQuestion]) -> bool:
    """Whether the set has questions without an answer."""
    return any(not question.answers for question in gold)


def _judge(question: GoldQuestion, answer: Answer) -> _Judged:
    golds = [gold.text for gold in question.answers]
    return _Judged(len(question.context), answer.score, exact_match(answer.answer, golds), f1(answer.answer, golds))


def _by_context(judged: Sequence[_Judged]) -> tuple[Figures, ...]:
    groups = []
    for low, high in zip((0, *_CONTEXT_BOUNDS), (*_CONTEXT_BOUNDS, None), strict=True):
        members = [entry for entry in judged if low <= entry.characters and (high is None or entry.characters < high)]
        if members:
            groups.append(_figures(f"{low} to {high - 1}" if high else f"{low} or more", members))
    return tuple(groups)


def _deciles(judged: Sequence[_Judged]) -> tuple[Figures, ...]:
    """Ten groups of equal size, lowest scores first; fewer groups where there are fewer questions."""
    ranked = sorted(judged, key=lambda entry: entry.score)
    count = min(_DECILES, len(ranked))
    bounds = [len(ranked) * number // count for number in range(count + 1)]
    parts = [ranked[low:high] for low, high in itertools.pairwise(bounds)]
    return tuple(_figures(f"{part[0].score:.3f} to {part[-1].score:.3f}", part) for part in parts)


def _figures(group: str, judged: Sequence[_Judged]) -> Figures:
    def mean(figure: Callable[[_Judged], float]) -> float:
        return sum(map(figure, judged)) / len(judged)

    return Figures(
        group,
        len(judged),
        round(100 * mean(lambda entry: entry.exact_match), 2),
        round(100 * mean(lambda entry: entry.f1), 2),
        round(mean(lambda entry: entry.score), 4),
    )
