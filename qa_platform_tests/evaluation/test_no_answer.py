import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from qa_platform.answering import Answerer
from qa_platform.cli.answering import answer as answer_command
from qa_platform.cli.answering import evaluate as evaluate_command
from qa_platform.contract import ModelChoice
from qa_platform.errors import InputError
from qa_platform.evaluation.evaluate import evaluate
from qa_platform.evaluation.gold import GoldAnswer, GoldQuestion
from qa_platform.evaluation.no_answer import QuestionOutcome, best_threshold, figures_at
from qa_platform_tests.answering_models import make_bert, pairs
from qa_platform_tests.evaluation.gold_sets import CONTEXT
from qa_platform_tests.json_schemas import fits

# Often equal, now and then as close as can be, or infinite.
MARGINS = st.one_of(st.integers(-3, 3).map(float), st.floats(-40, 40), st.sampled_from([math.inf, -math.inf, 1.0, math.nextafter(1.0, 2)]))
OUTCOMES = st.lists(
    st.builds(QuestionOutcome, MARGINS, st.sampled_from([0.0, 0.4, 2 / 3, 1.0]), st.just(0.0), st.sampled_from([0.0, 1.0]), st.booleans()),
    max_size=20,
)


def f1_at(threshold: float, outcomes: list[QuestionOutcome]) -> float:
    return math.fsum(outcome.silence if outcome.margin > threshold else outcome.f1 for outcome in outcomes)


def right(margin: float) -> QuestionOutcome:
    """A question with an answer that the model finds."""
    return QuestionOutcome(margin, 1.0, 1.0, 0.0, answerable=True)


def unanswerable(margin: float) -> QuestionOutcome:
    return QuestionOutcome(margin, 0.0, 0.0, 1.0, answerable=False)


@given(OUTCOMES)
def test_no_threshold_is_better_than_the_best_one_and_it_is_the_default_if_that_is_as_good(outcomes: list[QuestionOutcome]) -> None:
    found = best_threshold(outcomes)
    margins = [outcome.margin for outcome in outcomes if math.isfinite(outcome.margin)]
    # F1 changes at margins only, so these are all thresholds that differ.
    others = [-1000.0, 0.0, *margins]
    assert max(f1_at(other, outcomes) for other in others) == pytest.approx(f1_at(found, outcomes), abs=1e-9)
    if f1_at(0.0, outcomes) == pytest.approx(f1_at(found, outcomes), abs=1e-12):
        assert found == 0


def test_among_equally_good_ranges_the_nearest_to_the_default_is_taken_and_its_middle_in_few_digits() -> None:
    assert best_threshold([right(1.0), unanswerable(2.12345)]) == 1.6
    # Between 1 and 2, and above 3, all but one are right.
    outcomes = [right(1.0), unanswerable(2.0), right(3.0), right(-2.0)]
    assert best_threshold(outcomes) == 1.5
    assert best_threshold([right(5.0)]) == 6.0
    assert best_threshold([unanswerable(-5.0)]) == -6.0
    close = math.nextafter(1.0, 2)
    assert best_threshold([right(1.0), unanswerable(close)]) == 1.0


def test_figures_are_those_of_both_kinds_of_questions() -> None:
    outcomes = [right(-1.0), replace(right(0.5), f1=0.5, exact_match=0.0), right(2.0), unanswerable(0.0)]
    figures = figures_at(0.0, outcomes)
    assert (figures.f1, figures.exact_match, figures.f1_answerable, figures.f1_unanswerable) == (25.0, 25.0, 33.33, 0.0)
    figures = figures_at(-0.5, outcomes)
    assert (figures.f1, figures.f1_answerable, figures.f1_unanswerable) == (50.0, 33.33, 100.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def gold(folder: Path) -> list[GoldQuestion]:
    """Questions of which the model finds some answers, and as many without one; two of them cannot be asked."""
    asked = [*pairs(30, longest=60), (" ", CONTEXT), (" ", CONTEXT)]
    answers = Answerer(str(folder), threads=1).answer(asked)
    # The article counts as no word, so that silence is right.
    others = ["something else", "the"]
    found = [GoldAnswer(answer.answer if n % 4 == 1 and answer.answer else others[n % 8 // 4], None) for n, answer in enumerate(answers)]
    return [GoldQuestion(str(n), "g", *pair, (found[n],) if n % 2 else ()) for n, pair in enumerate(asked)]


def test_what_is_promised_of_a_threshold_is_what_it_makes_of_the_set(folder: Path, gold: list[GoldQuestion]) -> None:
    answerer = Answerer(str(folder), threads=1)
    plain = evaluate(answerer, gold)
    assert plain.no_answer is not None
    best = plain.no_answer.best
    assert plain.no_answer.in_use == plain.no_answer.default.threshold == 0
    assert plain.total.f1 == plain.no_answer.default.f1 < best.f1
    at_best = evaluate(Answerer(ModelChoice(str(folder), no_answer_threshold=best.threshold), threads=1), gold)
    assert at_best.no_answer == replace(plain.no_answer, in_use=best.threshold)
    assert (at_best.total.f1, at_best.total.exact_match) == (best.f1, best.exact_match)
    assert evaluate(answerer, gold, handle_impossible_answer=False).no_answer is None
    assert evaluate(answerer, [question for question in gold if question.answers], handle_impossible_answer=True).no_answer is None


def write(gold: list[GoldQuestion], path: Path) -> Path:
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["question", "context", "answers"])
        rows.writerows([q.question, q.context, json.dumps([a.text for a in q.answers]) if q.answers else ""] for q in gold)
    return path


def test_a_threshold_that_evaluate_stores_is_that_of_later_answers(
    folder: Path, gold: list[GoldQuestion], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QA_CACHE_DIR", str(tmp_path / "cache"))
    path = write(gold, tmp_path / "gold.csv")
    words = [str(path), "--model", str(folder), "--threads", "1"]

    def silent(*options: str) -> int:
        result = CliRunner().invoke(answer_command, [*words, *options])
        assert result.exit_code == 0, result.output
        return result.stdout.count("no_answer")

    at_default = silent("--impossible")
    shown = CliRunner().invoke(evaluate_command, words)
    assert shown.exit_code == 0, shown.output
    assert "--remember" in shown.output
    assert silent("--impossible") == at_default
    result = CliRunner().invoke(evaluate_command, [*words, "--remember", "--json"])
    assert fits("evaluate", result.stdout)
    best = json.loads(result.stdout)["no_answer"]["best"]["threshold"]
    assert f"QA_NO_ANSWER_THRESHOLD={best}" in shown.output
    assert silent("--impossible") != at_default
    assert silent() == 0, "the model says it only where it may"
    assert f"in use, {best}" in CliRunner().invoke(evaluate_command, words).output
    # What is configured comes first, and lets the model say it.
    monkeypatch.setenv("QA_MODEL", str(folder))
    monkeypatch.setenv("QA_NO_ANSWER_THRESHOLD", "0")
    assert silent() == silent("--impossible") == at_default
    # It is no threshold of another model.
    monkeypatch.setenv("QA_MODEL", "bundled")
    assert silent() == 0


@pytest.mark.parametrize("options", [[], ["--impossible"], ["--no-impossible"]])
def test_there_is_no_threshold_to_store_without_both_kinds_of_questions(tmp_path: Path, options: list[str]) -> None:
    rows = [("Who?", CONTEXT, "Marta"), *([("Why?", CONTEXT, "")] if options == ["--no-impossible"] else [])]
    questions = [GoldQuestion("1", "g", who, context, (GoldAnswer(text, None),) if text else ()) for who, context, text in rows]
    result = CliRunner().invoke(evaluate_command, [str(write(questions, tmp_path / "gold.csv")), "--remember", *options])
    assert isinstance(result.exception, InputError)
    assert "no threshold to store" in str(result.exception)
