"""The benchmark of the stages of answering, with few questions."""

import sys

import pytest

from qa_platform.answering.model import BUNDLED, find_model
from qa_platform.contract import PRECISIONS, ModelChoice
from qa_platform.tools.bench import stages


def test_every_stage_has_its_time_and_together_they_are_the_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--questions", "3"])
    monkeypatch.setattr(stages, "matrix_products", lambda precision, threads: (_Product(),))
    assert stages.main() == 0
    first, header, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("3 questions on one thread")
    assert header.split() == list(PRECISIONS)
    table = {line[:32].strip(): line[32:].split() for line in lines}
    assert list(table) == [*stages._STAGES, "in all", "share of the ceiling", lines[-1][:32].strip()]
    for column, precision in enumerate(PRECISIONS):
        parts = [float(table[stage][2 * column]) for stage in stages._STAGES]
        assert sum(parts) == pytest.approx(float(table["in all"][column]), abs=0.1), precision
        assert float(table["products with weights"][2 * column]) > 0
        assert float(table["tokenising, cutting"][2 * column]) > 0
    assert "are padding" in lines[-1]


def test_every_operation_of_the_model_that_takes_time_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    found = stages._Stages(find_model(ModelChoice(BUNDLED)), "int8")
    found.run([("Who keeps it?", "It is kept by Marta Olsen. " * 20)])
    assert found.seconds["products with weights"] > found.seconds[stages._REST]
    assert found.seconds["requantising"] > 0


class _Product:
    def rate(self) -> float:
        return 1e12
