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
from qa_platform.evaluation.gold import GoldQuestion, exact_match, f1, held_out, read_gold
from qa_platform_tests.evaluation.gold_sets import CONTEXT, gold
from qa_platform_tests.json_schemas import fits


def test_evaluation_groups_by_context_and_by_score() -> None:
    questions = [*gold(15, CONTEXT, "Marta Olsen"), *gold(5, CONTEXT + " The sea is grey." * 40, "nobody at all")]
    result = evaluate(Answerer("bundled"), questions)
    assert (result.total.questions, result.total.exact_match, result.total.f1) == (20, 75.0, 75.0)
    assert [(group.group, group.questions) for group in result.by_context] == [("0 to 249", 15), ("500 to 999", 5)]
    assert [group.questions for group in result.by_score] == [2] * 10
    assert 0 <= result.calibration_error <= 1


def test_questions_that_cannot_be_asked_count_as_wrong_and_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "gold.csv"
    path.write_text(f'question,context,answers\nWho keeps the lighthouse?,"{CONTEXT}",Marta Olsen\n\u200b,"{CONTEXT}",\nWho?,\u200b,\n')
    result = evaluate(Answerer("bundled"), read_gold(path))
    assert (result.rejected, result.total.questions) == (2, 3)
    assert result.total.f1 == pytest.approx(33.33)
    assert result.no_answer is not None
    assert result.no_answer.best.f1_unanswerable == 0
    shown = CliRunner().invoke(evaluate_command, [str(path)])
    assert "2 of them cannot be asked, and count as wrong" in shown.output


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
    [
        ("{}", ": it has no list 'data'"),
        ("[]", ": it has no list 'data'"),
        ('{"data": [{}]}', ": an object in it has no 'paragraphs'"),
        ("[" * 100_000, r" \(RecursionError: "),
    ],
)
def test_json_that_is_no_gold_set_is_named_with_what_it_lacks(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "gold.json"
    path.write_text(text)
    with pytest.raises(InputError, match=rf"gold\.json.*: it is not SQuAD JSON{why}"):
        read_gold(path)


@pytest.mark.parametrize("cell", ["['Ada', 'Blum']", '{"text": ["Ada"]}', "[Ada]"])
def test_a_list_of_answers_in_another_notation_is_not_taken_for_an_answer(tmp_path: Path, cell: str) -> None:
    path = tmp_path / "gold.csv"
    path.write_text('question;context;answers\nWho?;Ada;"{}"\n'.format(cell.replace('"', '""')))
    with pytest.raises(InputError, match="look like a list or an object") as caught:
        read_gold(path)
    assert caught.value.where == f"{path}, line 2"


def test_a_gold_answer_without_a_word_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "gold.csv"
    path.write_text('question;context;answers\nWhich grade?;Grade A.;A\nWhen?;Ada;"["""", "" ""]"\n')
    assert [[answer.text for answer in question.answers] for question in read_gold(path)] == [["A"], []]
    assert (exact_match("A", ["A"]), f1("A", ["A"]), f1("", ["the", "dog"]), exact_match("", ["the", "dog"])) == (1, 1, 0, 0)


def test_squad_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "gold.json"
    path.write_text("\ufeff" + squad())
    assert len(read_gold(path)) == 1


def squad(**values: object) -> str:
    """A gold set of one question, with other ``values`` than usual."""
    entry = {"context": "By Ada.", "question": "Who?", "text": "Ada", "answer_start": 3, **values}
    answers = entry.get("answers", [{"text": entry["text"], "answer_start": entry["answer_start"]}])
    qas = [{"id": 1, "question": entry["question"], "answers": answers}]
    return json.dumps({"data": [{"paragraphs": [{"context": entry["context"], "qas": qas}]}]})


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("context", 5, "a 'context' that is not text"),
        ("context", None, "a 'context' that is not text"),
        ("question", 7, "a 'question' that is not text"),
        ("text", None, "a 'text' that is not text"),
        ("answer_start", "3", "an 'answer_start' that is not an integer"),
        ("answers", None, "'answers' is not a list of objects"),
        ("answers", {"text": ["Ada"], "answer_start": [0]}, "'answers' is not a list of objects"),
        ("answers", ["Ada"], "an object with a 'text' is needed, and this is 'Ada'"),
    ],
)
def test_json_with_a_value_of_a_wrong_type_is_named_with_it(tmp_path: Path, name: str, value: object, why: str) -> None:
    path = tmp_path / "gold.json"
    path.write_text(squad(**{name: value}))
    with pytest.raises(InputError, match=rf"it is not SQuAD JSON .*{why}") as caught:
        read_gold(path)
    assert caught.value.where.startswith(f"{path}, article 1")


def test_half_a_character_in_a_context_has_a_part_too(tmp_path: Path) -> None:
    path = tmp_path / "gold.json"
    path.write_text(squad(context="By Ada \ud800."))
    (question,) = read_gold(path)
    assert held_out(question) in (True, False)
    # By the hash of its text in UTF-8, on which the bundled model's figures rest.
    assert [n for n in range(30) if held_out(GoldQuestion("", "", "", f"Zoë {n}", ()))] == [6, 20, 21, 28]


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
        ('Who?,By Ada.,"[1, null]"\n', "line 3: its list of answers has something other than strings and numbers"),
        ('Who?,By Ada.,"[{""a"": 2}]"\n', "line 3: its list of answers has something other"),
    ],
)
def test_a_row_whose_right_answers_cannot_be_told_is_named(tmp_path: Path, row: str, why: str) -> None:
    path = tmp_path / "gold.csv"
    path.write_text(f"question,context,answers\nWho?,By Ada.,Ada\n{row}")
    with pytest.raises(InputError, match=rf"gold\.csv, {why}"):
        read_gold(path)


def test_numbers_in_a_list_of_answers_are_answers_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "gold.csv"
    path.write_text('question,context,answers\nWhen?,In 1872.,"[1872, 1.50, ""Ada""]"\n')
    (question,) = read_gold(path)
    assert [answer.text for answer in question.answers] == ["1872", "1.50", "Ada"]


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
