"""Evaluating a model on a gold set: exact match and F1, by length of context and by score."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from qa_platform.answering.engine import Answer, Answerer, AnswerOptions
from qa_platform.contract import ModelChoice, RowReason
from qa_platform.evaluation.gold import GoldQuestion, exact_match, f1
from qa_platform.evaluation.no_answer import QuestionOutcome, ThresholdComparison, compare_thresholds

_CONTEXT_BOUNDS = (250, 500, 1000, 2000, 4000)
_DECILES = 10

T = TypeVar("T")


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

    ``rejected`` counts the questions that could not be asked, such as empty ones; they count as wrong. ``by_score`` has the figures by
    decile of the score. ``calibration_error`` is the mean distance between score and exact match over these deciles. ``no_answer`` is None
    if the model had to give an answer, or if the set does not have questions both with and without an answer.
    """

    model: ModelChoice
    total: Figures
    rejected: int
    by_context: tuple[Figures, ...]
    by_score: tuple[Figures, ...]
    calibration_error: float
    no_answer: ThresholdComparison | None


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
        handle_impossible_answer: whether the model may give no answer; None allows it if the set has questions without one.
        align_to_words: whether answers are widened to whole words.
        report: called after each question.
    """
    if handle_impossible_answer is None:
        handle_impossible_answer = has_unanswerable(gold)
    options = AnswerOptions(handle_impossible_answer=handle_impossible_answer, align_to_words=align_to_words)
    answers = []
    for answer in answerer.answer(_pairs(gold), options):
        answers.append(answer)
        report()
    judged = list(map(_judge, gold, answers))
    by_score = _deciles(judged)
    calibration = calibration_error([entry.score for entry in judged], [entry.exact_match for entry in judged])
    threshold = answerer.no_answer_threshold(options)
    no_answer = None
    if threshold is not None and has_both_kinds(gold):
        no_answer = compare_thresholds(_outcomes(answerer, gold, answers, options), threshold)
    rejected = sum(answer.is_rejected for answer in answers)
    return Evaluation(answerer.identity, _figures("all", judged), rejected, _by_context(judged), by_score, calibration, no_answer)


def calibration_error(scores: Sequence[float], exact_matches: Sequence[float]) -> float:
    """The mean distance between score and exact match over the tenths of the scores, weighted by their size. All are in [0, 1]."""
    parts = _tenths(sorted(zip(scores, exact_matches, strict=True), key=lambda pair: pair[0]))
    return sum(abs(sum(score - right for score, right in part)) for part in parts) / len(scores)


def has_both_kinds(gold: Sequence[GoldQuestion]) -> bool:
    """Whether the set has both questions with an answer and questions without one."""
    return len({bool(question.answers) for question in gold}) > 1


def has_unanswerable(gold: Sequence[GoldQuestion]) -> bool:
    """Whether the set has questions without an answer."""
    return any(not question.answers for question in gold)


def _pairs(gold: Sequence[GoldQuestion]) -> list[tuple[str, str]]:
    return [(question.question, question.context) for question in gold]


def _outcomes(answerer: Answerer, gold: Sequence[GoldQuestion], answers: Sequence[Answer], options: AnswerOptions) -> list[QuestionOutcome]:
    """The outcome of every question, with and without its best answer. Questions that got no answer are asked again for the best one."""
    silent = [question for question, answer in zip(gold, answers, strict=True) if answer.error is RowReason.NO_ANSWER]
    best = answerer.answer(_pairs(silent), replace(options, handle_impossible_answer=False))
    outcomes = []
    for question, answer in zip(gold, answers, strict=True):
        judged = _judge(question, next(best) if answer.error is RowReason.NO_ANSWER else answer)
        # A rejected row has no answer at any threshold.
        margin = math.inf if answer.null_margin is None else answer.null_margin
        silence = 0.0 if answer.is_rejected else f1("", [gold.text for gold in question.answers])
        outcomes.append(QuestionOutcome(margin, judged.f1, judged.exact_match, silence, bool(question.answers)))
    return outcomes


def _judge(question: GoldQuestion, answer: Answer) -> _Judged:
    if answer.is_rejected:
        return _Judged(len(question.context), 0.0, 0.0, 0.0)
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
    parts = _tenths(sorted(judged, key=lambda entry: entry.score))
    return tuple(_figures(f"{part[0].score:.3f} to {part[-1].score:.3f}", part) for part in parts)


def _tenths(ranked: Sequence[T]) -> list[Sequence[T]]:
    """Ten groups of about equal size; fewer groups if there are fewer entries."""
    count = min(_DECILES, len(ranked))
    bounds = [len(ranked) * number // count for number in range(count + 1)]
    return [ranked[low:high] for low, high in itertools.pairwise(bounds)]


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
