import csv
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from qa_platform.answering import Answerer, AnswerOptions
from qa_platform.answering.commands import answer as answer_command
from qa_platform.answering.commands import evaluate as evaluate_command
from qa_platform.answering.csvfile import answer_file, answer_stream
from qa_platform.answering.evaluate import evaluate
from qa_platform.answering.squad import GoldAnswer, GoldQuestion
from qa_platform.answering.tuning import Trial, choose, tune
from qa_platform.contract import ANSWER_COLUMNS, ModelChoice
from qa_platform_tests.answering_models import make_bert, pairs

CONTEXT = "The lighthouse on Ferris Rock is kept by Marta Olsen, who took over in 1987."
LINES = f'''id,Question,context,score
1,Who keeps the lighthouse?,"{CONTEXT}",mine
2,When did she take over?,"{CONTEXT}",mine
3,too few
4,,nothing asked,mine
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Answerer:
    return Answerer(str(folder), threads=1)


def rows_of(text: bytes) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text.decode(), newline="")))


def write_rows(path: Path, rows: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("question", "context"), *rows])
    return path


def test_a_csv_keeps_its_columns_and_damaged_rows_say_why(tiny: Answerer) -> None:
    out = io.BytesIO()
    counts = answer_stream(tiny, io.BytesIO(LINES.encode()), out, AnswerOptions())
    header, *rows = rows_of(out.getvalue())
    assert header == ["id", "Question", "context", "input_score", *ANSWER_COLUMNS]
    assert [row[-1] for row in rows] == ["", "", "too_few_cells", "empty_question"]
    assert rows[0][:4] == ["1", "Who keeps the lighthouse?", CONTEXT, "mine"]
    assert (counts.answered, counts.no_answer, counts.rejected) == (2, 0, 2)


def test_with_several_answers_the_others_have_a_column(tiny: Answerer) -> None:
    out = io.BytesIO()
    answer_stream(tiny, io.BytesIO(LINES.encode()), out, AnswerOptions(top_k=3))
    header, first, *_ = rows_of(out.getvalue())
    assert header[-1] == "alternatives"
    others = json.loads(first[-1])
    assert len(others) == 2
    assert all(CONTEXT[other["start"] : other["end"]] == other["text"] for other in others)


def test_a_stopped_file_is_taken_up_where_it_was(tiny: Answerer, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.csv", pairs(300, seed=2))
    answer_file(tiny, source, tmp_path / "whole.csv", AnswerOptions())
    asked = 0

    def stop_at_200(_: object) -> None:
        nonlocal asked
        asked += 1
        if asked == 200:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer_file(tiny, source, tmp_path / "out.csv", AnswerOptions(), stop_at_200)
    assert not (tmp_path / "out.csv").exists()
    with (tmp_path / "out.csv.partial").open("ab") as partial:
        partial.write(b'cut off in the mid"')
    counts = answer_file(tiny, source, tmp_path / "out.csv", AnswerOptions())
    assert counts.rows == 300
    taken_up, whole = (rows_of((tmp_path / name).read_bytes()) for name in ("out.csv", "whole.csv"))
    score = whole[0].index("score")
    # Scores may differ in their last digit, as the rows have other neighbours.
    assert [row[:score] + row[score + 1 :] for row in taken_up] == [row[:score] + row[score + 1 :] for row in whole]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", "out.csv", "whole.csv"]


def test_a_stopped_file_is_begun_anew_with_other_options(tiny: Answerer, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.csv", pairs(50, seed=2))

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer_file(tiny, source, tmp_path / "out.csv", AnswerOptions(), stop)
    assert answer_file(tiny, source, tmp_path / "out.csv", AnswerOptions(min_score=1.0)).rows == 50
    rows = rows_of((tmp_path / "out.csv").read_bytes())
    assert {row[-1] for row in rows[1:]} == {"low_score"}


def test_the_command_writes_to_standard_output_and_counts_on_the_other(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text(LINES)
    result = CliRunner().invoke(answer_command, [str(source), "--model", str(folder), "--threads", "1"])
    assert result.exit_code == 0, result.output
    assert len(rows_of(result.stdout.encode())) == 5
    assert result.stderr == "4 rows, 2 answered, 0 without answer, 2 rejected\n"


def test_an_interrupted_command_goes_on_when_given_again(folder: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.csv", pairs(5000, seed=3))
    main = "from qa_platform.answering.commands import answer; answer()"
    command = [sys.executable, "-c", main, str(source), "-o", str(tmp_path / "out.csv"), "--model", str(folder), "--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        partial = tmp_path / "out.csv.partial"
        limit = time.monotonic() + 60
        while not (partial.exists() and partial.stat().st_size > 30_000) and time.monotonic() < limit:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, message = process.communicate()
    assert process.returncode == 130
    assert "goes on from here" in message
    done = json.loads((tmp_path / "out.csv.partial.json").read_text())["answered"]
    assert 0 < done < 5000
    subprocess.run(command, check=True, capture_output=True)
    assert len(rows_of((tmp_path / "out.csv").read_bytes())) == 5001


@pytest.mark.slow
def test_memory_stays_bounded_over_200_000_rows(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    with source.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("question", "context"))
        writer.writerows(
            (f"Who keeps light {number}?", f"Light {number} is kept by keeper {number * 7}, " + "x y " * 5) for number in range(200_000)
        )
    code = (
        "import sys; from pathlib import Path; from qa_platform.answering import Answerer, AnswerOptions;"
        "from qa_platform.answering.csvfile import answer_file;"
        "counts = answer_file(Answerer(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), AnswerOptions());"
        # The high-water mark of this process alone: getrusage's begins with that of the one it was forked from.
        "[peak] = [line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')];"
        "print(counts.rows, int(peak) // 1024)"
    )
    command = [sys.executable, "-c", code, str(folder), str(source), str(tmp_path / "out.csv")]
    rows, mebibytes = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert rows == 200_000
    # The bundled model's weights take 90 MiB more than the tiny one's.
    assert mebibytes < 700


def gold(count: int, context: str, *answers: str) -> list[GoldQuestion]:
    return [
        GoldQuestion(str(n), "g", "Who keeps the lighthouse?", context, tuple(GoldAnswer(a, None) for a in answers)) for n in range(count)
    ]


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


def test_the_fastest_precision_within_half_a_point_of_f1_is_chosen() -> None:
    exact = Trial("fp32", 80.0, 100.0)
    assert choose([exact, Trial("bf16", 79.6, 200.0)]).chosen == "bf16"
    assert choose([exact, Trial("bf16", 79.4, 200.0)]).chosen == "fp32"
    assert choose([exact, Trial("bf16", 81.0, 90.0)]).chosen == "fp32"
    assert choose([exact, Trial("bf16", 79.6, 200.0), Trial("int8", 79.5, 250.0)]).chosen == "int8"
    assert choose([exact, Trial("bf16", 79.6, 200.0), Trial("int8", 79.4, 250.0)]).chosen == "bf16"
    assert choose([exact, Trial("bf16", 79.6, 200.0), Trial("int8", 79.6, 190.0)]).chosen == "bf16"


def test_auto_is_float32_until_tune_has_found_better(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QA_CACHE_DIR", str(tmp_path))
    wanted = ModelChoice(str(folder), precision="auto")
    assert Answerer(wanted, threads=1).identity.precision == "fp32"
    found = tune(wanted, gold(4, CONTEXT, "Marta Olsen"), threads=1)
    assert [trial.precision for trial in found.trials] == ["fp32", "bf16", "int8"]
    assert Answerer(wanted, threads=1).identity.precision == found.chosen
    # What was found holds for this model alone.
    assert Answerer(ModelChoice(str(make_bert(tmp_path / "other", seed=4)), precision="auto"), threads=1).identity.precision == "fp32"
