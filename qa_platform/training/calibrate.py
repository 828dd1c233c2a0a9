"""Calibrate a model's scores: find how likely its answers are right, and write that into its ``config.json``.

    python -m qa_platform.training.calibrate --model FOLDER --data A.json B.json

The held-out paragraphs (`gold.held_out`) of all files are answered: on questions that it was trained on, a model is too sure of itself. Two
numbers are fitted, by logistic regression on the exact matches (Platt, 1999), and each file counts the same. What they gain is measured on
questions that they were not fitted to: one half of the paragraphs is judged with the numbers of the other half. The numbers that are
written are those of all.
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
_NARROWEST = 1e-6


@dataclass(frozen=True)
class Scored:
    """The answers to a file's held-out questions: their scores, whether they are right (1.0 or 0.0), and in which half they are."""

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
    """The answers to the held-out ones of ``questions``."""
    asked = [question for question in questions if held_out(question)]
    answers = list(answerer.answer((question.question, question.context) for question in asked))
    right = [exact_match(a.answer, [gold.text for gold in q.answers]) for a, q in zip(answers, asked, strict=True)]
    halves = [held_out(question, parts=12) for question in asked]
    return Scored(name, np.array([answer.score for answer in answers]), np.array(right), np.array(halves, bool))


def fitted(files: Sequence[Scored]) -> Calibration:
    """The calibration under which the answers of all files are likeliest to be right and wrong as they are; each file counts the same.

    Raises:
        InputError: there are no answers, or the higher scores are not the better ones.
    """
    files = [file for file in files if len(file)]
    if not files:
        raise InputError("there are too few held-out paragraphs", where="--data", advice="give a larger gold set")
    scores = np.concatenate([file.scores for file in files]).clip(_NARROWEST, 1 - _NARROWEST)
    right = np.concatenate([file.right for file in files])
    weights = np.concatenate([np.full(len(file), len(scores) / len(files) / len(file)) for file in files])
    inputs = np.stack([np.log(scores / (1 - scores)), np.ones_like(scores)], 1)
    unchanged = np.array([1.0, 0.0])
    chosen = unchanged
    # Newton's method. A few questions change little: a normal prior of variance 1 lies around the calibration that changes nothing.
    for _ in range(_STEPS):
        chances = 1 / (1 + np.exp(-inputs @ chosen))
        gradient = inputs.T @ (weights * (chances - right)) + chosen - unchanged
        curvature = (inputs * (weights * chances * (1 - chances))[:, None]).T @ inputs + np.eye(2)
        chosen = chosen - np.linalg.solve(curvature, gradient)
    slope, intercept = np.round(chosen, 3).tolist()
    if slope <= 0:
        raise InputError("its higher scores are not the better ones", where="--model", advice="train it first")
    return Calibration(slope, intercept)


def write(folder: Path, found: Calibration) -> Calibration:
    """Write a calibration that was found on top of the one that the model has. Returns both in one."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    present = Calibration.of(config, model=str(folder))
    both = Calibration(round(found.slope * present.slope, 3), round(found.slope * present.intercept + found.intercept, 3))
    path.write_text(json.dumps({**config, KEY: both.entry()}, indent=2, sort_keys=True) + "\n")
    return both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the model's folder")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="gold sets, of which the held-out paragraphs are asked")
    args = parser.parse_args()
    answerer = Answerer(str(args.model))
    files = [answered(answerer, path.stem, read_gold(path)) for path in args.data]
    print("mean distance of score and exact match over the tenths, on questions that were not fitted to")
    print(f"{'':32}{'questions':>12}{'before':>10}{'after':>10}")
    for first in (True, False):
        other = fitted([file.half(not first) for file in files])
        for file in filter(len, (file.half(first) for file in files)):
            print(f"{file.name:32}{len(file):12}{file.error(Calibration()):10.3f}{file.error(other):10.3f}")
    print("written:", write(args.model, fitted(files)))


if __name__ == "__main__":
    main()
