"""Calibrate a model's scores: find how likely its answers are right, and write that into its ``config.json``.

    python -m qa_platform.training.calibrate --model FOLDER --data A.json B.json

The model answers the held-out paragraphs (`gold.held_out`) of all files, because it is overconfident on questions that it was trained on.
Two numbers are fitted by logistic regression on the exact matches (Platt, 1999); each file has the same weight. The gain is measured on
questions that the numbers were not fitted to: each half of the paragraphs is judged with the numbers of the other half. The numbers that
are written are fitted to all paragraphs.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qa_platform.answering import Answerer
from qa_platform.answering.calibration import KEY, Calibration
from qa_platform.errors import InputError
from qa_platform.evaluation.evaluate import calibration_error
from qa_platform.evaluation.gold import GoldQuestion, exact_match, held_out, read_gold

_STEPS = 50
_SMALL_STEP = 1e-9
# Scores of 0 and 1 have no logit.
_NARROWEST = 1e-6


@dataclass(frozen=True)
class Scored:
    """The answers to a file's held-out questions: their scores, whether they are right (1.0 or 0.0), and whether in the first half."""

    name: str
    scores: NDArray[np.float64]
    right: NDArray[np.float64]
    first_half: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.scores)

    def half(self, first: bool) -> "Scored":
        chosen = self.first_half == first
        return Scored(self.name, self.scores[chosen], self.right[chosen], self.first_half[chosen])

    def error(self, calibration: Calibration) -> float:
        return calibration_error([calibration.score(score) for score in self.scores.tolist()], self.right.tolist())


def answered(answerer: Answerer, name: str, questions: Sequence[GoldQuestion]) -> Scored:
    """The answers to the held-out questions among ``questions``. Rejected questions are left out."""
    asked = [question for question in questions if held_out(question)]
    answers = answerer.answer((question.question, question.context) for question in asked)
    pairs = [(question, answer) for question, answer in zip(asked, answers, strict=True) if not answer.error]
    right = [exact_match(answer.answer, [gold.text for gold in question.answers]) for question, answer in pairs]
    halves = [held_out(question, parts=12) for question, _ in pairs]
    return Scored(name, np.array([answer.score for _, answer in pairs]), np.array(right), np.array(halves, bool))


def fitted(files: Sequence[Scored]) -> Calibration:
    """The most likely calibration, given which answers of all files are right. Each file has the same weight.

    Raises:
        InputError: there are no answers, or higher scores are not better.
    """
    files = [file for file in files if len(file)]
    if not files:
        raise InputError("there are too few held-out paragraphs", where="--data", advice="give a larger gold set")
    scores = np.concatenate([file.scores for file in files]).clip(_NARROWEST, 1 - _NARROWEST)
    right = np.concatenate([file.right for file in files])
    weights = np.concatenate([np.full(len(file), len(scores) / len(files) / len(file)) for file in files])
    inputs = np.stack([np.log(scores / (1 - scores)), np.ones_like(scores)], 1)
    unchanged = np.array([1.0, 0.0])

    # A normal prior of variance 1 around the calibration that changes nothing, so that a few questions change little.
    def loss(values: NDArray[np.float64]) -> float:
        logits = inputs @ values
        return float(weights @ (np.logaddexp(0, logits) - right * logits) + ((values - unchanged) ** 2).sum() / 2)

    chosen = unchanged
    # Newton's method. The loss is convex; far from its minimum a full step may overshoot.
    for _ in range(_STEPS):
        chances = np.exp(-np.logaddexp(0, -inputs @ chosen))
        gradient = inputs.T @ (weights * (chances - right)) + chosen - unchanged
        curvature = (inputs * (weights * chances * (1 - chances))[:, None]).T @ inputs + np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        while loss(chosen - step) > loss(chosen) and np.abs(step).max() > _SMALL_STEP:
            step = step / 2
        chosen = chosen - step
    slope, intercept = np.round(chosen, 3).tolist()
    if slope <= 0:
        raise InputError("its higher scores are not better", where="--model", advice="train it first")
    return Calibration(slope, intercept)


def write(folder: Path, found: Calibration) -> Calibration:
    """Combine a calibration, fitted to the scores as they are, with the one that the model has. Write and return the combination.

    Raises:
        InputError: the combination is beyond the limits of `Calibration.of`.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text())
    present = Calibration.of(config, model=str(folder))
    slope, intercept = found.slope * present.slope, found.slope * present.intercept + found.intercept
    both = Calibration.of({KEY: Calibration(round(slope, 3), round(intercept, 3)).entry()}, model=str(folder))
    path.write_text(json.dumps({**config, KEY: both.entry()}, indent=2, sort_keys=True) + "\n")
    return both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the model's folder")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="gold sets; their held-out paragraphs are asked")
    args = parser.parse_args()
    if not args.model.is_dir():
        parser.error(f"{args.model} is not a folder")
    try:
        _calibrate(args.model, args.data)
    except (InputError, OSError) as error:
        parser.error(str(error))


def _calibrate(model: Path, data: Sequence[Path]) -> None:
    gold = [(path.stem, read_gold(path)) for path in data]
    answerer = Answerer(str(model))
    files = [answered(answerer, name, questions) for name, questions in gold]
    found = fitted(files)
    print("mean distance between score and exact match by decile, on questions outside the fit")
    print(f"{'':32}{'questions':>12}{'before':>10}{'after':>10}")
    for first in (True, False):
        other = [half for file in files if len(half := file.half(not first))]
        judged = [half for file in files if len(half := file.half(first))]
        for file in judged if other else ():
            print(f"{file.name:32}{len(file):12}{file.error(Calibration()):10.3f}{file.error(fitted(other)):10.3f}")
    print("written:", write(model, found))


if __name__ == "__main__":
    main()
