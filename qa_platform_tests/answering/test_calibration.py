"""Scores of models whose config.json has a calibration."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qa_platform.answering import Answerer
from qa_platform.answering.calibration import KEY, Calibration
from qa_platform.answering.model import find_model
from qa_platform.contract import ModelChoice, RowReason
from qa_platform.errors import InputError
from qa_platform_tests.answering_models import make_model, pairs

CALIBRATIONS = st.builds(Calibration, st.floats(0.01, 100), st.floats(-100, 100))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model("bert", tmp_path)


def calibrate(folder: Path, entry: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), KEY: entry}))


@given(CALIBRATIONS, st.floats(0, 1), st.floats(0, 1))
def test_scores_are_probabilities_in_the_order_of_the_models_own(calibration: Calibration, one: float, other: float) -> None:
    low, high = (calibration.score(probability) for probability in sorted((one, other)))
    assert 0 <= low <= 1
    # Neighbouring numbers may be rounded past each other.
    assert low <= high or math.isclose(low, high)
    assert (calibration.score(0.0), calibration.score(1.0)) == (0.0, 1.0)


@given(st.floats(0.001, 0.999))
def test_the_logit_is_multiplied_and_moved(probability: float) -> None:
    logit = math.log(probability / (1 - probability))
    assert Calibration(0.7, 0.2).score(probability) == pytest.approx(1 / (1 + math.exp(-0.7 * logit - 0.2)))
    assert Calibration().score(probability) == pytest.approx(probability)


def test_a_calibrated_model_gives_the_same_answers_with_other_scores(folder: Path) -> None:
    rows = pairs(12)
    before = list(Answerer(str(folder), threads=1).answer(rows, top_k=3))
    revision = find_model(ModelChoice(str(folder))).revision
    calibrate(folder, {"slope": 0.5, "intercept": 1.0})
    after = list(Answerer(str(folder), threads=1).answer(rows, top_k=3))
    score = Calibration(0.5, 1.0).score
    for old, new in zip(before, after, strict=True):
        assert (new.answer, new.start, new.end) == (old.answer, old.start, old.end)
        assert new.score == pytest.approx(score(old.score))
        assert [span.score for span in new.alternatives] == pytest.approx([score(span.score) for span in old.alternatives])
    assert find_model(ModelChoice(str(folder))).revision != revision, "equal uploads would be unchanged, with the old scores"
    lowest = min(answer.score for answer in after)
    flagged = Answerer(str(folder), threads=1).answer(rows, min_score=lowest + 1e-9)
    assert [answer.error for answer in flagged].count(RowReason.LOW_SCORE) >= 1, "the score that is seen is the one that is compared"


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        1.5,
        {},
        {"slope": 1.0},
        {"slope": 0, "intercept": 0},
        {"slope": -1, "intercept": 0},
        {"slope": "1", "intercept": 0},
        {"slope": 1, "intercept": 1e9},
        {"slope": float("nan"), "intercept": 0},
        {"slope": 1, "intercept": float("nan")},
        {"slope": 1, "intercept": 0, "base": 2},
        {"slope": True, "intercept": False},
    ],
)
def test_an_entry_that_is_no_calibration_is_refused(folder: Path, entry: Any) -> None:
    calibrate(folder, entry)
    with pytest.raises(InputError, match=KEY):
        Answerer(str(folder), threads=1).warm_up()
