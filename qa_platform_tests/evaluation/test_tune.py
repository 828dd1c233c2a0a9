from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from qa_platform.answering import Answer, Answerer, AnswerOptions
from qa_platform.cli.answering import tune as tune_command
from qa_platform.contract import ModelChoice
from qa_platform.errors import InputError
from qa_platform.evaluation.tune import Trial, choose, tune
from qa_platform_tests.answering_models import make_bert
from qa_platform_tests.evaluation.gold_sets import CONTEXT, gold


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bert(tmp_path_factory.mktemp("bert"))


def test_the_fastest_precision_within_half_a_point_of_f1_is_chosen() -> None:
    exact = Trial("fp32", 80.0, 100.0)
    assert choose([exact, Trial("bf16", 79.6, 200.0)]).chosen == "bf16"
    assert choose([exact, Trial("bf16", 79.4, 200.0)]).chosen == "fp32"
    assert choose([exact, Trial("bf16", 81.0, 90.0)]).chosen == "fp32"
    assert choose([exact, Trial("bf16", 79.6, 200.0), Trial("int8", 79.5, 250.0)]).chosen == "int8"
    assert choose([exact, Trial("bf16", 79.6, 200.0), Trial("int8", 79.4, 250.0)]).chosen == "bf16"
    assert choose([exact, Trial("bf16", 79.6, 200.0), Trial("int8", 79.6, 190.0)]).chosen == "bf16"


@pytest.mark.parametrize(("right", "allowed"), [((), True), (("Marta Olsen",), False)])
def test_tune_lets_the_model_say_no_answer_where_that_is_right(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right: tuple[str, ...], allowed: bool
) -> None:
    monkeypatch.setenv("QA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("qa_platform.evaluation.tune.PRECISIONS", ("fp32",))
    asked = []

    def answer(self: Answerer, pairs: list[tuple[str, str]], options: AnswerOptions) -> Iterator[Answer]:
        asked.append(options.handle_impossible_answer)
        # As a model does that finds nothing, where it may say so.
        return iter([Answer("" if asked[-1] else "Marta Olsen", 0.5, 0, 0)] * len(pairs))

    monkeypatch.setattr(Answerer, "answer", answer)
    found = tune(ModelChoice(str(folder)), gold(2, CONTEXT, *right), threads=1)
    assert (set(asked), found.trials[0].f1) == ({allowed}, 100)


def test_a_gold_set_of_which_nothing_can_be_asked_chooses_no_precision(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QA_CACHE_DIR", str(tmp_path))
    with pytest.raises(InputError, match="none of its questions can be asked"):
        tune(ModelChoice(str(folder)), [replace(question, question="") for question in gold(3, CONTEXT, "x")], threads=1)
    assert list(tmp_path.iterdir()) == []


def test_tune_takes_no_precision_since_it_tries_them_all(tmp_path: Path) -> None:
    path = tmp_path / "gold.csv"
    path.write_text("question,context\n")
    result = CliRunner().invoke(tune_command, [str(path), "--precision", "int8"])
    assert (result.exit_code, "No such option" in result.output) == (2, True)


def test_auto_is_float32_until_tune_has_found_better(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QA_CACHE_DIR", str(tmp_path))
    wanted = ModelChoice(str(folder), precision="auto")
    assert Answerer(wanted, threads=1).identity.precision == "fp32"
    found = tune(wanted, gold(4, CONTEXT, "Marta Olsen"), threads=1)
    assert [trial.precision for trial in found.trials] == ["fp32", "bf16", "int8"]
    assert Answerer(wanted, threads=1).identity.precision == found.chosen
    # What was found holds for this model alone.
    assert Answerer(ModelChoice(str(make_bert(tmp_path / "other", seed=4)), precision="auto"), threads=1).identity.precision == "fp32"
