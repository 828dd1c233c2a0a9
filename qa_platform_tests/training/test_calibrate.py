"""The calibration of a model's scores."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qa_platform.answering import Answerer
from qa_platform.answering.calibration import KEY, Calibration
from qa_platform.answering.model import BUNDLED_FOLDER, find_model
from qa_platform.contract import ModelChoice
from qa_platform.errors import InputError
from qa_platform.evaluation.evaluate import calibration_error
from qa_platform.evaluation.gold import held_out, read_gold
from qa_platform.training import calibrate
from qa_platform.training.calibrate import Scored, fitted, write
from qa_platform_tests.answering_models import make_model
from qa_platform_tests.checkout import PROJECT

GOLD = PROJECT / "samples" / "gold.csv"


def drawn(count: int, truth: Calibration, *, seed: int) -> Scored:
    """Answers that are right as often as ``truth`` says."""
    rng = np.random.default_rng(seed)
    probabilities = rng.beta(2, 1, count)
    right = rng.random(count) < [truth.score(probability) for probability in probabilities.tolist()]
    return Scored("drawn", probabilities, right.astype(float), np.arange(count) % 2 == 0)


def test_the_calibration_that_drew_the_answers_is_found() -> None:
    truth = Calibration(0.6, 0.4)
    found = fitted([drawn(20_000, truth, seed=1), drawn(5_000, truth, seed=2)])
    assert (found.slope, found.intercept) == pytest.approx((0.6, 0.4), abs=0.05)
    unseen = drawn(20_000, truth, seed=3)
    assert unseen.error(found) < 0.015 < 0.05 < unseen.error(Calibration())


@pytest.mark.parametrize("truth", [Calibration(0.3, -1.0), Calibration(0.4, 0.0)])
def test_a_model_that_is_much_too_sure_is_calibrated(truth: Calibration) -> None:
    rng = np.random.default_rng(1)
    probabilities = 1 / (1 + np.exp(-rng.normal(3, 3, 3000)))
    right = rng.random(3000) < [truth.score(probability) for probability in probabilities.tolist()]
    found = fitted([Scored("sure", probabilities, right.astype(float), right)])
    assert (found.slope, found.intercept) == pytest.approx((truth.slope, truth.intercept), abs=0.2)


def test_rejected_questions_count_for_nothing(tmp_path: Path) -> None:
    gold = [question for question in read_gold(GOLD) if held_out(question)][:6]
    rejected = [replace(question, question="word " * 400, answers=()) for question in gold]
    answerer = Answerer(str(make_model("bert", tmp_path)), threads=1)
    assert len(calibrate.answered(answerer, "gold", [*gold, *rejected])) == len(calibrate.answered(answerer, "gold", gold)) == 6


def test_every_file_counts_the_same() -> None:
    low, high = Calibration(1.0, -1.0), Calibration(1.0, 1.0)
    found = fitted([drawn(20_000, low, seed=1), drawn(500, high, seed=2)])
    assert abs(found.intercept) < 0.3


@pytest.mark.parametrize("right", [0.0, 1.0])
def test_a_few_answers_change_little(right: float) -> None:
    few = Scored("few", np.array([0.4, 0.9, 0.6, 0.5]), np.full(4, right), np.array([True, True, False, False]))
    found = fitted([few])
    assert 0 < found.slope < 3
    assert abs(found.intercept) < 3


def test_scores_that_say_nothing_are_refused() -> None:
    scores = np.linspace(0.01, 0.99, 1000)
    with pytest.raises(InputError, match="higher scores"):
        fitted([Scored("upside down", scores, (scores < 0.5).astype(float), scores < 0.5)])
    with pytest.raises(InputError, match="too few held-out"):
        fitted([Scored("empty", np.array([]), np.array([]), np.array([], bool))])


def test_the_error_is_the_mean_distance_over_the_tenths() -> None:
    scores = [0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95] * 10
    assert calibration_error(scores, [1.0] * 100) == pytest.approx(0.5)
    assert calibration_error(scores, scores) == pytest.approx(0)
    assert calibration_error([0.3], [1.0]) == pytest.approx(0.7)


@pytest.mark.slow
def test_the_command_writes_what_it_finds_on_top_of_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(BUNDLED_FOLDER, tmp_path / "model")
    before = find_model(ModelChoice(str(model)))
    monkeypatch.setattr(sys, "argv", ["calibrate", "--model", str(model), "--data", str(GOLD)])
    calibrate.main()
    after = find_model(ModelChoice(str(model)))
    assert after.calibration != before.calibration
    assert json.loads((model / "config.json").read_text()).keys() == before.config.keys() | {KEY}
    asked = sum(map(held_out, read_gold(GOLD)))
    output = capsys.readouterr().out
    counts = [int(line.split()[1]) for line in output.splitlines() if line.startswith("gold ")]
    assert sum(counts) == asked > 0
    assert str(after.calibration) in output


@pytest.mark.parametrize("which", ["model", "data", "empty"])
def test_a_mistake_is_named_and_nothing_is_written(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model("bert", tmp_path / "model")
    before = (model / "config.json").read_bytes()
    (tmp_path / "empty.csv").write_text("question,context,answers\n")
    wrong = {"model": ("--model", "bundled"), "data": ("--data", "no.json"), "empty": ("--data", str(tmp_path / "empty.csv"))}[which]
    monkeypatch.setattr(sys, "argv", ["calibrate", "--model", str(model), "--data", str(GOLD), *wrong])
    with pytest.raises(SystemExit):
        calibrate.main()
    assert wrong[1] in capsys.readouterr().err or which == "empty"
    assert (model / "config.json").read_bytes() == before


def test_what_no_model_may_have_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=KEY):
        write(tmp_path, Calibration(101.0, 0.0))
    assert (tmp_path / "config.json").read_text() == "{}"


def test_two_calibrations_in_turn_are_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    first, second = Calibration(0.5, 0.25), Calibration(2.0, -0.5)
    write(tmp_path, first)
    both = write(tmp_path, second)
    for probability in (0.1, 0.5, 0.9):
        assert both.score(probability) == pytest.approx(second.score(first.score(probability)))
