"""Finding the fastest precision for a model on this machine that costs little accuracy.

A precision passes the gate if its F1 on the gate's questions is at most GATE below the F1 of float32.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from qa_platform.answering.engine import Answerer, AnswerOptions
from qa_platform.answering.model import find_model
from qa_platform.answering.tuned import remember_precision
from qa_platform.contract import PRECISIONS, ModelChoice, Precision
from qa_platform.errors import InputError
from qa_platform.evaluation.evaluate import has_unanswerable
from qa_platform.evaluation.gold import GoldQuestion, f1

# The percentage points of F1 that a faster precision may cost.
GATE = 0.5
_PASSES = 3


@dataclass(frozen=True)
class Trial:
    """One precision on the gate's questions: F1 in percent, and questions per second after warming up."""

    precision: Precision
    f1: float
    questions_per_second: float


@dataclass(frozen=True)
class Tuning:
    """The precision that was chosen, and all that were tried, float32 first."""

    chosen: Precision
    trials: tuple[Trial, ...]

    def passes(self, trial: Trial) -> bool:
        """Whether a precision passes the gate."""
        return trial.f1 >= self.trials[0].f1 - GATE


def tune(choice: ModelChoice, gold: Sequence[GoldQuestion], *, threads: int = 0, device: str = "cpu") -> Tuning:
    """Try every precision that a model runs in, choose the fastest that passes the gate, and store it for ``auto``.

    Raises:
        InputError: the model cannot be used at all, or none of the questions can be asked.
    """
    trials = []
    for precision in PRECISIONS:
        try:
            trials.append(_try(Answerer(replace(choice, precision=precision), threads=threads, device=device, processes=0), gold))
        except InputError:
            # Not every model runs in every precision; all run in float32.
            if precision == "fp32":
                raise
    result = choose(trials)
    remember_precision(find_model(choice), device, asdict(result))
    return result


def choose(trials: Sequence[Trial]) -> Tuning:
    """The fastest of the trials that pass the gate. The first trial is float32."""
    undecided = Tuning("fp32", tuple(trials))
    fastest = max(filter(undecided.passes, trials), key=lambda trial: trial.questions_per_second)
    return Tuning(fastest.precision, undecided.trials)


def _try(answerer: Answerer, gold: Sequence[GoldQuestion]) -> Trial:
    pairs = [(question.question, question.context) for question in gold]
    options = AnswerOptions(handle_impossible_answer=has_unanswerable(gold))
    # The first answers are slower, as code is generated on demand.
    list(answerer.answer(pairs, options))
    seconds = math.inf
    # The best of a few passes: other load on the machine only ever slows a pass down, and precisions may be close to each other.
    for _ in range(_PASSES):
        begun = time.perf_counter()
        answers = list(answerer.answer(pairs, options))
        seconds = min(seconds, time.perf_counter() - begun)
    if all(answer.is_rejected for answer in answers):
        raise InputError(
            "none of its questions can be asked", where="the gold set", advice="give questions and contexts that are not empty"
        )
    scores = [f1(answer.answer, [a.text for a in question.answers]) for answer, question in zip(answers, gold, strict=True)]
    return Trial(answerer.identity.precision, 100 * sum(scores) / len(scores), len(gold) / seconds)  # type: ignore[arg-type]
