import csv
import errno
import fcntl
import gzip
import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from qa_platform.answering import Answerer, AnswerOptions, csvfile
from qa_platform.answering.csvfile import answer_file, answer_stream
from qa_platform.cli.answering import _progress
from qa_platform.cli.answering import answer as answer_command
from qa_platform.contract import ANSWER_COLUMNS
from qa_platform.errors import InputError, TransientError
from qa_platform.ingest import FileRejected, TextLimits
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


def stop_after(rows: int, error: type[BaseException] = KeyboardInterrupt) -> csvfile.Report:
    asked = 0

    def stop(_: object) -> None:
        nonlocal asked
        asked += 1
        if asked == rows:
            raise error

    return stop


def stopped_file(answerer: Answerer, source: Path, target: Path, *, rows: int) -> Path:
    """A run into ``target`` that was interrupted after so many rows; the state that it left."""
    with pytest.raises(KeyboardInterrupt):
        answer_file(answerer, source, target, AnswerOptions(), stop_after(rows))
    return target.with_name(target.name + ".partial.json")


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


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


def test_what_is_answered_has_the_delimiter_of_the_input(tiny: Answerer) -> None:
    with_commas, with_semicolons = io.BytesIO(), io.BytesIO()
    answer_stream(tiny, io.BytesIO(b'question,context\nWho?,"Ada, or; Bo."\n'), with_commas, AnswerOptions())
    answer_stream(tiny, io.BytesIO(b'sep=;\nquestion;context\nWho?;"Ada, or; Bo."\n'), with_semicolons, AnswerOptions())
    text = with_semicolons.getvalue().decode()
    assert list(csv.reader(io.StringIO(text), delimiter=";")) == rows_of(with_commas.getvalue())


def test_a_stopped_file_is_taken_up_where_it_was(tiny: Answerer, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.csv", pairs(300, seed=2))
    answer_file(tiny, source, tmp_path / "whole.csv", AnswerOptions())
    stopped_file(tiny, source, tmp_path / "out.csv", rows=200)
    assert not (tmp_path / "out.csv").exists()
    with (tmp_path / "out.csv.partial").open("ab") as partial:
        partial.write(b'cut off in the mid"')
    skipped: list[object] = []
    reported: list[object] = []
    counts = answer_file(tiny, source, tmp_path / "out.csv", AnswerOptions(), reported.append, skipped=skipped.append)
    assert (counts.rows, len(skipped), len(reported)) == (300, 200, 100)
    taken_up, whole = (rows_of((tmp_path / name).read_bytes()) for name in ("out.csv", "whole.csv"))
    score = whole[0].index("score")
    # Scores may differ in their last digit, as the rows have other neighbours.
    assert [row[:score] + row[score + 1 :] for row in taken_up] == [row[:score] + row[score + 1 :] for row in whole]
    assert names_in(tmp_path) == ["in.csv", "out.csv", "whole.csv"]


def test_a_stopped_file_is_begun_anew_with_other_options(tiny: Answerer, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.csv", pairs(50, seed=2))
    stopped_file(tiny, source, tmp_path / "out.csv", rows=1)
    assert answer_file(tiny, source, tmp_path / "out.csv", AnswerOptions(min_score=1.0)).rows == 50
    rows = rows_of((tmp_path / "out.csv").read_bytes())
    assert {row[-1] for row in rows[1:]} == {"low_score"}


def test_a_stopped_file_is_begun_anew_with_other_limits(tiny: Answerer, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.csv", pairs(50, seed=2))
    stopped_file(tiny, source, tmp_path / "out.csv", rows=5)
    assert answer_file(tiny, source, tmp_path / "out.csv", AnswerOptions(), limits=TextLimits(context=1)).rejected == 50
    assert {row[-1] for row in rows_of((tmp_path / "out.csv").read_bytes())[1:]} == {"context_too_long"}


def test_a_checkpoint_does_not_vouch_for_the_rows_of_another_run(tiny: Answerer, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.csv", pairs(50, seed=2))
    stopped_file(tiny, source, tmp_path / "out.csv", rows=5)
    with pytest.raises(RuntimeError):
        answer_file(tiny, source, tmp_path / "out.csv", AnswerOptions(min_score=1.0), stop_after(40, RuntimeError))
    assert answer_file(tiny, source, tmp_path / "out.csv", AnswerOptions()).rows == 50
    assert {row[-1] for row in rows_of((tmp_path / "out.csv").read_bytes())[1:]} == {""}


def test_a_partial_file_that_lost_rows_is_begun_anew(tiny: Answerer, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.csv", pairs(50, seed=2))
    stopped_file(tiny, source, tmp_path / "out.csv", rows=40)
    partial = tmp_path / "out.csv.partial"
    os.truncate(partial, partial.stat().st_size - 100)
    assert answer_file(tiny, source, tmp_path / "out.csv", AnswerOptions()).rows == 50
    written = (tmp_path / "out.csv").read_bytes()
    assert b"\0" not in written
    assert len(rows_of(written)) == 51


def test_what_a_run_that_is_killed_has_answered_is_not_answered_again(
    tiny: Answerer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csvfile, "_CHECKPOINT_SECONDS", -1)
    source = write_rows(tmp_path / "in.csv", pairs(50, seed=2))
    with pytest.raises(MemoryError):
        answer_file(tiny, source, tmp_path / "out.csv", AnswerOptions(), stop_after(40, MemoryError))
    skipped: list[object] = []
    assert answer_file(tiny, source, tmp_path / "out.csv", AnswerOptions(), skipped=skipped.append).rows == 50
    assert len(skipped) == 40


@pytest.mark.parametrize("damage", [{"size": "x"}, {"size": -1}, {"size": 1.5}, {"answered": None}, {"rejected": True}, {"more": 1}])
def test_with_a_damaged_checkpoint_the_file_is_begun_anew(tiny: Answerer, tmp_path: Path, damage: dict[str, object]) -> None:
    source = write_rows(tmp_path / "in.csv", pairs(10, seed=2))
    state = stopped_file(tiny, source, tmp_path / "out.csv", rows=5)
    state.write_text(json.dumps(json.loads(state.read_text()) | damage))
    skipped: list[object] = []
    assert answer_file(tiny, source, tmp_path / "out.csv", AnswerOptions(), skipped=skipped.append).rows == 10
    assert not skipped
    assert len(rows_of((tmp_path / "out.csv").read_bytes())) == 11


def test_rows_are_on_the_disk_before_a_name_says_so(tiny: Answerer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = write_rows(tmp_path / "in.csv", pairs(10, seed=2)), tmp_path / "out.csv"
    settled = 0
    fsync = os.fsync

    def settle(descriptor: int) -> None:
        nonlocal settled
        fsync(descriptor)
        settled = os.fstat(descriptor).st_size

    monkeypatch.setattr(os, "fsync", settle)
    state = stopped_file(tiny, source, target, rows=5)
    assert settled == json.loads(state.read_text())["size"]
    answer_file(tiny, source, target, AnswerOptions())
    assert settled == target.stat().st_size


@pytest.mark.parametrize(
    ("target", "ending"),
    [
        *((target, ending) for target in ("out.csv", "out.csv.gz") for ending in ("", ".partial", ".partial.json", ".partial.json.new")),
        ("out.csv.gz", ".packed"),
    ],
)
def test_an_output_that_would_overwrite_the_input_is_refused(tiny: Answerer, tmp_path: Path, target: str, ending: str) -> None:
    name = target + ending
    source = tmp_path / name
    source.write_text(LINES)
    link = tmp_path / "link.csv"
    link.symlink_to(source)
    for asked in (source, link):
        with pytest.raises(InputError, match="name another output"):
            answer_file(tiny, asked, tmp_path / target, AnswerOptions())
    assert source.read_text() == LINES
    assert names_in(tmp_path) == ["link.csv", name]


def test_the_command_does_not_answer_a_partial_file_into_the_gzip_that_it_is_written_for(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "my.csv.gz.partial"
    source.write_text(LINES)
    result = CliRunner().invoke(answer_command, [str(source), "--model", str(folder), "--threads", "1", "-o", str(tmp_path / "my.csv.gz")])
    assert "this is the input" in str(result.exception)
    assert source.read_text() == LINES
    assert names_in(tmp_path) == [source.name]


def test_only_an_ordinary_file_is_an_output(tiny: Answerer, tmp_path: Path) -> None:
    source, pipe = tmp_path / "in.csv", tmp_path / "pipe"
    source.write_text(LINES)
    os.mkfifo(pipe)
    # No device: should this fail, it would be replaced on the whole machine.
    for target in (pipe, tmp_path):
        with pytest.raises(InputError, match="not an ordinary file"):
            answer_file(tiny, source, target, AnswerOptions())
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert names_in(tmp_path) == ["in.csv", "pipe"]


def test_an_output_that_is_a_link_stays_one(tiny: Answerer, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text(LINES)
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "out.csv"
    link.symlink_to("elsewhere/real.csv")
    for _ in range(2):
        answer_file(tiny, tmp_path / "in.csv", link, AnswerOptions())
        assert link.is_symlink()
        assert len(rows_of((tmp_path / "elsewhere" / "real.csv").read_bytes())) == 5
    assert names_in(tmp_path / "elsewhere") == ["real.csv"]


def test_nothing_is_kept_of_a_rejected_file(tiny: Answerer, tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text('question,context\n"never closed')
    with pytest.raises(FileRejected):
        answer_file(tiny, source, tmp_path / "out.csv", AnswerOptions())
    write_rows(source, pairs(300, seed=2))
    with source.open("a") as file:
        file.write('"never closed')
    stopped_file(tiny, source, tmp_path / "out.csv", rows=5)
    with pytest.raises(FileRejected):
        answer_file(tiny, source, tmp_path / "out.csv", AnswerOptions())
    assert names_in(tmp_path) == ["in.csv"]


def test_a_second_run_into_the_same_output_ends_and_leaves_the_first_alone(tiny: Answerer, tmp_path: Path) -> None:
    source, target = write_rows(tmp_path / "in.csv", pairs(10, seed=2)), tmp_path / "out.csv"

    def again(_: object) -> None:
        with pytest.raises(InputError, match="another run is writing this file"):
            answer_file(tiny, source, target, AnswerOptions())

    assert answer_file(tiny, source, target, AnswerOptions(), again).rows == 10
    assert len(rows_of(target.read_bytes())) == 11


def test_a_run_that_has_just_ended_keeps_its_output(tiny: Answerer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = write_rows(tmp_path / "in.csv", pairs(10, seed=2)), tmp_path / "out.csv"
    flock = fcntl.flock

    def end_first(file: io.BufferedWriter, operation: int) -> None:
        (tmp_path / "out.csv.partial").rename(target)
        target.write_text("whole")
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", end_first)
    with pytest.raises(InputError, match="another run"):
        answer_file(tiny, source, target, AnswerOptions())
    assert target.read_text() == "whole"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_counts_only_what_this_run_answers_for_the_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    now = 100.0
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with _progress(10_000, unit="rows", shown=True) as advance:
        for _ in range(900):
            advance(10, skipped=True)
        now = 102.0
        for _ in range(10):
            advance(10)
    assert "910 rows, 5/s, 0:00:18 left" in terminal.getvalue()


def test_the_command_writes_to_standard_output_and_counts_on_the_other(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text(LINES)
    result = CliRunner().invoke(answer_command, [str(source), "--model", str(folder), "--threads", "1"])
    assert result.exit_code == 0, result.output
    assert len(rows_of(result.stdout.encode())) == 5
    assert result.stderr == "4 rows, 2 answered, 0 without answer, 2 rejected\n"


def test_the_command_writes_gzip_where_the_name_says_so(folder: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.csv", tmp_path / "out.csv.gz"
    source.write_text(LINES)
    words = [str(source), "--model", str(folder), "--threads", "1"]
    assert CliRunner().invoke(answer_command, [*words, "-o", str(target)]).exit_code == 0
    assert gzip.decompress(target.read_bytes()) == CliRunner().invoke(answer_command, [*words, "-o", "-"]).stdout_bytes
    assert names_in(tmp_path) == ["in.csv", "out.csv.gz"]


def test_of_gzip_for_which_the_disk_has_no_room_no_half_is_left(tiny: Answerer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    source = write_rows(tmp_path / "in.csv", pairs(5, seed=2))
    with pytest.raises(OSError, match="No space"):
        answer_file(tiny, source, tmp_path / "out.csv.gz", AnswerOptions())
    assert names_in(tmp_path) == ["in.csv", "out.csv.gz.partial", "out.csv.gz.partial.json"]


@pytest.mark.parametrize("target", ["-", "out.csv", "out.csv.gz", "out.parquet"])
def test_the_command_names_the_file_that_it_cannot_read(folder: Path, tmp_path: Path, target: str) -> None:
    source = tmp_path / "in.csv"
    source.write_bytes(b"")
    output = target if target == "-" else str(tmp_path / target)
    result = CliRunner().invoke(answer_command, [str(source), "--model", str(folder), "--threads", "1", "-o", output])
    assert str(result.exception).startswith(f"{source}: empty_file: ")
    assert names_in(tmp_path) == ["in.csv"]


@pytest.mark.parametrize("change", [b"Who?,Ada.\n", b""])
def test_an_input_that_changes_while_it_is_read_is_refused(tiny: Answerer, tmp_path: Path, change: bytes) -> None:
    source = write_rows(tmp_path / "in.csv", pairs(40, seed=3))

    def rewrite(_: object) -> None:
        # Of the same size, or longer.
        with source.open("r+b") as file:
            content = file.read()
            file.seek(0)
            file.write(content + change)
        os.utime(source, ns=(1, 1))

    with pytest.raises(TransientError, match="it changed while it was read"):
        answer_file(tiny, source, tmp_path / "out.csv", AnswerOptions(), rewrite)
    assert names_in(tmp_path) == ["in.csv"]


def test_an_error_of_the_device_leaves_what_was_answered(tiny: Answerer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_rows(tmp_path / "in.csv", pairs(40, seed=3))

    def fails(_: object) -> None:
        raise TransientError("an answering process died")

    with pytest.raises(TransientError, match="died"):
        answer_file(tiny, source, tmp_path / "out.csv", AnswerOptions(), fails)
    assert "out.csv.partial" in names_in(tmp_path)
    # A threshold that is stored meanwhile is no change of the input.
    thresholds = iter([0.5, 0.6])
    monkeypatch.setattr(tiny, "no_answer_threshold", lambda _: next(thresholds, 0.6))
    assert answer_file(tiny, source, tmp_path / "out.csv", AnswerOptions()).rows == 40


def test_a_pipe_s_name_in_the_file_system_is_no_file(tiny: Answerer, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.csv", pairs(1, seed=3))
    read, write = os.pipe()
    try:
        with pytest.raises(InputError, match="not an ordinary file"):
            answer_file(tiny, source, Path(f"/dev/fd/{write}"), AnswerOptions())
    finally:
        os.close(read)
        os.close(write)


def test_an_interrupted_command_goes_on_when_given_again(folder: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.csv", pairs(5000, seed=3))
    main = "from qa_platform.cli.answering import answer; answer()"
    command = [sys.executable, "-c", main, str(source), "-o", str(tmp_path / "out.csv"), "--model", str(folder), "--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        partial = tmp_path / "out.csv.partial"
        limit = time.monotonic() + 60
        while not (partial.exists() and partial.stat().st_size > 30_000) and time.monotonic() < limit:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, message = process.communicate()
    assert process.returncode == 130
    assert "continues from here" in message
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


def test_a_full_disk_behind_standard_output_is_a_message(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text(LINES)
    command = [sys.executable, "-m", "qa_platform.cli.main", "answer", str(source), "--model", str(folder), "--threads", "1"]
    # Buffered, as from a shell: then Python itself would complain once more at its end.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment)
    assert ended.returncode == 1
    [message] = ended.stderr.splitlines()
    assert message.startswith("Error: ")
    assert "no space for the output" in message
