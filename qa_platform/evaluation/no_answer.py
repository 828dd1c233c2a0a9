"""Choosing, on a gold set, how much likelier "no answer" must be than the best answer before the model gives it."""

import collections
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class QuestionOutcome:
    """What a question scores, with and without an answer from the model.

    ``margin`` is the log probability of "no answer" minus that of the best answer; infinite if there is no answer to give. ``f1`` and
    ``exact_match`` are those of the best answer, in [0, 1]; ``silence`` is the value of both without an answer. ``answerable``: the
    question has a right answer.
    """

    margin: float
    f1: float
    exact_match: float
    silence: float
    answerable: bool


@dataclass(frozen=True)
class ThresholdFigures:
    """The figures, in percent, if "no answer" is given where its margin exceeds ``threshold``: of all questions, and of both kinds."""

    threshold: float
    exact_match: float
    f1: float
    f1_answerable: float
    f1_unanswerable: float


@dataclass(frozen=True)
class ThresholdComparison:
    """How thresholds for "no answer" do on a gold set.

    ``in_use`` is the threshold behind all other figures of an evaluation; ``default`` has the figures at 0, ``best`` those at the threshold
    with the best F1.
    """

    in_use: float
    default: ThresholdFigures
    best: ThresholdFigures


def compare_thresholds(outcomes: Sequence[QuestionOutcome], in_use: float) -> ThresholdComparison:
    """Compare the default threshold with the best one. ``outcomes`` must have questions of both kinds."""
    return ThresholdComparison(in_use, figures_at(0.0, outcomes), figures_at(best_threshold(outcomes), outcomes))


def best_threshold(outcomes: Sequence[QuestionOutcome]) -> float:
    """The threshold with the best F1. Among equally good ones it is 0 if possible, else one from the range that is nearest to 0."""
    gains: dict[float, float] = collections.defaultdict(float)
    for outcome in outcomes:
        # An infinite margin is on the same side of every threshold.
        if math.isfinite(outcome.margin):
            gains[outcome.margin] += outcome.silence - outcome.f1
    margins = sorted(gains)
    ranges = itertools.pairwise([-math.inf, *margins, math.inf])
    # From the lowest threshold, which all margins exceed, upwards.
    totals = itertools.accumulate((-gains[margin] for margin in margins), initial=sum(gains.values()))
    # Rounded, so that equal F1 does not differ by the order of summation.
    (low, high), _ = max(zip(ranges, totals, strict=True), key=lambda found: (round(found[1], 9), *_nearness(*found[0])))
    return 0.0 if low <= 0 < high else _middle(low, high)


def _nearness(low: float, high: float) -> tuple[bool, float]:
    return low <= 0 < high, -min(abs(low), abs(high))


def _middle(low: float, high: float) -> float:
    """A number near the middle of ``[low, high)``, with few digits. If one end is infinite, it is 1 away from the other."""
    if low == -math.inf:
        low = high - 2
    elif high == math.inf:
        high = low + 2
    margin = (high - low) / 4
    candidates = (round((low + high) / 2, digits) for digits in range(17))
    # The lower end is always in the range.
    return next((value for value in candidates if low + margin <= value < high - margin), low)


def figures_at(threshold: float, outcomes: Sequence[QuestionOutcome]) -> ThresholdFigures:
    """The figures at a threshold. ``outcomes`` must have questions of both kinds."""

    def percent(figure: Callable[[QuestionOutcome], float], among: Sequence[QuestionOutcome]) -> float:
        values = [outcome.silence if outcome.margin > threshold else figure(outcome) for outcome in among]
        return round(100 * sum(values) / len(values), 2)

    def f1(outcome: QuestionOutcome) -> float:
        return outcome.f1

    return ThresholdFigures(
        threshold,
        percent(lambda outcome: outcome.exact_match, outcomes),
        percent(f1, outcomes),
        percent(f1, [outcome for outcome in outcomes if outcome.answerable]),
        percent(f1, [outcome for outcome in outcomes if not outcome.answerable]),
    )
