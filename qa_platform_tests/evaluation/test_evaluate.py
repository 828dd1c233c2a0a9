import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from qa_platform.answering import Answerer
from qa_platform.cli.answering import evaluate as evaluate_command
from qa_platform.errors import InputError
from qa_platform.evaluation.evaluate import evaluate
from qa_platform.evaluation.gold import read_gold
from qa_platform_tests.evaluation.gold_sets import CONTEXT, gold
from qa_platform_tests.json_schemas import fits


def test_evaluation_groups_by_context_and_by_score() -> None:
    questions = [*gold(15, CONTEXT, "Marta Olsen"), *gold(5, CONTEXT + " The sea is grey." * 40, "nobody at all")]
    result = evaluate(Answerer("bundled"), questions)
    assert (result.total.questions, result.total.exact_match, result.total.f1) == (20, 75.0, 75.0)
    assert [(group.group, group.questions) for group in result.by_context] == [("0 to 249", 15), ("500 to 999", 5)]
    assert [group.questions for group in result.by_score] == [2] * 10
    assert 0 <= result.calibration_error <= 1


def test_the_evaluate_command_prints_json(tmp_path: Path) -> None:
    path = tmp_path / "gold.csv"
    path.write_text(f'question,context,answers\nWho keeps the lighthouse?,"{CONTEXT}",Marta Olsen\n')
    result = CliRunner().invoke(evaluate_command, [str(path), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["total"]["f1"] == 100.0
    assert fits("evaluate", result.stdout)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_gold_set_in_another_encoding_is_named(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "gold.csv"
    path.write_text("question,context,answers\nWer?,Es war Zoë.,Zoë\n", encoding=encoding)
    with pytest.raises(InputError, match=r"gold\.csv: it is not in UTF-8 .* save it as UTF-8"):
        read_gold(path)
