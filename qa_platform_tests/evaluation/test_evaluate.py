import gzip
import json
import re
from collections.abc import Callable
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


@pytest.mark.parametrize("name", ["gold.csv", "gold.json"])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_gold_set_in_another_encoding_is_named(tmp_path: Path, encoding: str, name: str) -> None:
    path = tmp_path / name
    path.write_text("question,context,answers\nWer?,Es war Zoë.,Zoë\n", encoding=encoding)
    with pytest.raises(InputError, match=rf"{re.escape(name)}\b.*: .*(?i:as UTF-8)"):
        read_gold(path)


@pytest.mark.parametrize(
    ("text", "why"),
    [("{}", "it has no list 'data'"), ("[]", "it has no list 'data'"), ('{"data": [{}]}', "an object in it has no 'paragraphs'")],
)
def test_json_that_is_no_gold_set_is_named_with_what_it_lacks(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "gold.json"
    path.write_text(text)
    with pytest.raises(InputError, match=rf"gold\.json: it is not SQuAD JSON: {why}"):
        read_gold(path)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("text", ["{0}", "\ufeff{0}", "sep=;\r\n{0}", "\n{0}\n;;;\n"], ids=["plain", "mark", "sep", "blank"])
def test_a_gold_set_may_be_of_any_dialect_of_an_upload(tmp_path: Path, text: str, pack: Callable[[bytes], bytes]) -> None:
    rows = 'Topic;ANSWERS;Context;Question\nx;["Ada Blum", "Blum"];"By Ada; in 1872.";Who?\nx;;By Ada.;When?\n'
    path = tmp_path / "gold.csv.gz"
    for delimiter in ";\t|":
        path.write_bytes(pack(text.format(rows).replace(";", delimiter).encode()))
        who, when = read_gold(path)
        assert (who.question, who.context, [answer.text for answer in who.answers]) == (
            "Who?",
            f"By Ada{delimiter} in 1872.",
            ["Ada Blum", "Blum"],
        )
        assert (when.question, when.answers) == ("When?", ())


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("Who?,By Ada.\n", "line 3: too_few_cells: 2 cells"),
        ("Who?,By Ada.,a,b\n", "line 3: too_many_cells: 4 cells"),
        ('Who?,By "Ada"x,"Ada"x\n', "line 3: bad_quoting"),
        ("Who?,By Ada.,A\0a\n", "line 3: nul_character"),
        ('Who?,By Ada.,"Ada\n', "line 3.*: unbalanced_quote"),
    ],
)
def test_a_row_whose_right_answers_cannot_be_told_is_named(tmp_path: Path, row: str, why: str) -> None:
    path = tmp_path / "gold.csv"
    path.write_text(f"question,context,answers\nWho?,By Ada.,Ada\n{row}")
    with pytest.raises(InputError, match=rf"gold\.csv, {why}"):
        read_gold(path)


def test_a_question_that_cannot_be_asked_stays_in_the_gold_set(tmp_path: Path) -> None:
    path = tmp_path / "gold.csv"
    path.write_text("question,context,answers\n,By Ada.,Ada\n")
    assert [[answer.text for answer in question.answers] for question in read_gold(path)] == [["Ada"]]


@pytest.mark.parametrize(("header", "why"), [("question,context", "no column answers"), ("question,context,answers,Answers", "several")])
def test_a_gold_set_needs_one_column_of_right_answers(tmp_path: Path, header: str, why: str) -> None:
    path = tmp_path / "gold.csv"
    path.write_text(f"{header}\nWho?,By Ada.,Ada,Ada\n")
    with pytest.raises(InputError, match=why):
        read_gold(path)
