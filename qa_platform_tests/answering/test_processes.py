"""Several processes that answer for one answerer, here on the CPU."""

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from qa_platform.answering import Answer, Answerer, engine
from qa_platform.answering import processes as answering_processes
from qa_platform.answering.chunks import ChunkSize
from qa_platform.answering.engine import LoadedModel, Wanted
from qa_platform.answering.model import find_model
from qa_platform.answering.processes import Processes, processes_for
from qa_platform.answering.runtimes import select
from qa_platform.answering.spans import SpanOptions, WindowSpans
from qa_platform.answering.windows import WindowSize
from qa_platform.contract import ModelChoice
from qa_platform.errors import DeviceFailed, InputError, TransientError
from qa_platform_tests.answering_models import make_bert, pairs
from qa_platform_tests.flow import wait_until

pytestmark = pytest.mark.slow

ROWS = [*pairs(300, longest=80), ("", "no question"), ("no context", "")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def alone(folder: Path) -> Answerer:
    return Answerer(str(folder), threads=1)


@pytest.fixture(scope="module")
def both(folder: Path) -> Answerer:
    return Answerer(str(folder), threads=1, processes=2)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Processes, "chunk", ChunkSize(rows=20, characters=2**16))


def children() -> set[int]:
    """The processes that answer for this one."""
    found = set()
    for child in psutil.Process().children():
        # One that is just ending has no command line.
        with suppress(psutil.NoSuchProcess):
            if "spawn_main" in " ".join(child.cmdline()):
                found.add(child.pid)
    return found


def places(answers: Iterable[Answer]) -> list[tuple[str, int, int]]:
    return [(answer.answer, answer.start, answer.end) for answer in answers]


def test_they_answer_as_one_process_does_and_in_order(alone: Answerer, both: Answerer) -> None:
    ours, theirs = list(both.answer(ROWS, top_k=3)), list(alone.answer(ROWS, top_k=3))
    assert places(ours) == places(theirs)
    assert [answer.error for answer in ours] == [answer.error for answer in theirs]
    # Rows that are computed together differ, and so do the last digits.
    assert [answer.score for answer in ours] == pytest.approx([answer.score for answer in theirs], rel=1e-4)
    assert both.identity == alone.identity
    assert both.runtime == f"{alone.runtime}, in 2 processes"
    assert len(children()) == 2


def test_they_end_with_their_object_also_after_one_was_killed(folder: Path) -> None:
    others = children()
    answerer = Answerer(str(folder), threads=1, processes=2)
    answers = answerer.answer(ROWS * 20)
    next(answers)
    psutil.Process((children() - others).pop()).kill()
    with pytest.raises(TransientError, match="an answering process died"):
        list(answers)
    # Others are started, and the error is forgotten.
    assert len(list(answerer.answer(ROWS[:5]))) == 5
    gc.disable()
    try:
        del answers, answerer
        wait_until(lambda: children() == others, "they outlive their object")
    finally:
        gc.enable()


def test_what_the_rows_raise_comes_after_the_answers_to_all_before(alone: Answerer, both: Answerer) -> None:
    def failing() -> Iterator[tuple[str, str]]:
        yield from ROWS[:75]
        raise OSError("the disk is gone")

    answers = both.answer(failing())
    assert places(next(answers) for _ in range(75)) == places(alone.answer(ROWS[:75]))
    with pytest.raises(OSError, match="the disk is gone"):
        next(answers)


def test_few_rows_are_read_ahead_of_the_answers(both: Answerer) -> None:
    read = 0

    def counted() -> Iterator[tuple[str, str]]:
        nonlocal read
        for row in ROWS:
            read += 1
            yield row

    answers = both.answer(counted())
    for _ in range(40):
        next(answers)
    # The first chunk has 32 rows; what was answered, and four chunks under way.
    assert read <= 32 + 6 * 20
    del answers
    assert len(list(both.answer(ROWS[:5]))) == 5, "given up early, they still answer"


@pytest.mark.faults
def test_a_killed_process_fails_the_rows_under_way_and_the_next_are_answered(alone: Answerer, both: Answerer) -> None:
    list(both.answer(ROWS[:5]))
    answers = both.answer(ROWS)
    next(answers)
    for child in children():
        os.kill(child, signal.SIGKILL)
    with pytest.raises(TransientError, match="device cpu: an answering process died"):
        list(answers)
    assert places(both.answer(ROWS)) == places(alone.answer(ROWS))


def on_a_failing_device(folder: Path, broken: Path) -> LoadedModel:
    """A model whose device fails for good if ``broken`` exists when the model is loaded, as a GPU fails for a whole process.

    If ``broken`` has a text, the device fails while the model is loaded.
    """
    if broken.exists() and broken.read_text():
        broken.unlink()
        raise DeviceFailed("the device failed: CUDA error: initialization error", where="cpu")
    model = LoadedModel.of(find_model(ModelChoice(str(folder))), "fp32", threads=1, device="cpu")
    if broken.exists():

        def failing(*_: object) -> list[WindowSpans]:
            raise DeviceFailed("the device failed: CUDA error: unspecified launch failure", where="cpu")

        cast("Any", model.runtime).best_spans = failing
    return model


@pytest.mark.faults
def test_a_device_that_failed_is_tried_again_by_new_processes(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.touch()
    others = children()
    model = Processes(partial(on_a_failing_device, folder, broken), 2, "cpu", threads=1)
    wanted = Wanted(WindowSize.of(384, None), SpanOptions(), 0.0)
    for _ in range(2):
        with pytest.raises(DeviceFailed, match="unspecified launch failure"):
            list(model.answers(iter([ROWS]), wanted))
    broken.write_text("while loading")
    with pytest.raises(DeviceFailed, match="initialization error"):
        list(model.answers(iter([ROWS]), wanted))
    failed = children() - others
    assert len(list(model.answers(iter([ROWS]), wanted))) == len(ROWS)
    wait_until(lambda: not failed & children(), "the processes whose device failed are still there")


def test_each_tokenises_with_its_share_of_the_cores_or_with_the_threads_it_is_given(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "available_cores", lambda: 10)
    for threads, expected in ((0, "5"), (3, "3")):
        model = loaded_processes(Answerer(str(folder), threads=threads, processes=2))
        assert model._submit(os.getenv, "RAYON_NUM_THREADS").result() == expected


def loaded_processes(answerer: Answerer) -> Processes:
    model = answerer._warm().model
    assert isinstance(model, Processes)
    return model


@pytest.mark.faults
def test_new_processes_answer_with_the_same_model_or_not_at_all(tmp_path: Path) -> None:
    folder = make_bert(tmp_path)
    answerer = Answerer(str(folder), threads=1, processes=2)
    before = children()
    answers = answerer.answer(ROWS)
    # While rows are under way: processes whose death is known before are replaced in silence.
    next(answers)
    for child in children() - before:
        os.kill(child, signal.SIGKILL)
    with pytest.raises(TransientError, match="died"):
        list(answers)
    # Other weights have another revision.
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(TransientError, match=r"device cpu: the model cannot be loaded again: .*revision"):
        list(answerer.answer(ROWS))


@contextmanager
def answering(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program, in a session of its own, that answers until it is stopped. Then the processes that answer for it have ended, too."""
    program = f"""
import itertools
from qa_platform.answering import Answerer
for _ in Answerer({str(folder)!r}, threads=1, processes=2).answer(itertools.repeat(("Who?", "Olsen took over."))):
    print("answered", flush=True)
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], stdout=pipe, stderr=pipe, start_new_session=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"answered\n"
        helpers = [child for child in psutil.Process(parent.pid).children() if "spawn_main" in " ".join(child.cmdline())]
        assert len(helpers) == 2
        parent.stdout.close()
        yield parent
    _, left = psutil.wait_procs(helpers, timeout=30)
    assert left == []


@pytest.mark.faults
def test_an_interrupt_ends_them_at_once(folder: Path) -> None:
    """As at a terminal, which sends it to all of them."""
    with answering(folder) as parent:
        os.killpg(parent.pid, signal.SIGINT)
        assert parent.stderr is not None
        assert parent.stderr.read().count(b"Traceback") <= 2, "the interrupted program's own, and no process's beside it"


@pytest.mark.faults
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_they_end_with_the_process_that_they_answer_for(folder: Path, sign: signal.Signals) -> None:
    with answering(folder) as parent:
        parent.send_signal(sign)


def test_they_end_with_the_answerer(folder: Path) -> None:
    before = children()
    answerer = Answerer(str(folder), threads=1, processes=2)
    list(answerer.answer(ROWS[:5]))
    own = [psutil.Process(pid) for pid in children() - before]
    assert len(own) == 2
    del answerer
    _, left = psutil.wait_procs(own, timeout=30)
    assert left == []


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    folder = make_bert(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] + 1}))
    with pytest.raises(InputError) as alone:
        Answerer(str(folder), threads=1).warm_up()
    with pytest.raises(InputError) as of_processes:
        Answerer(str(folder), threads=1, processes=2).warm_up()
    assert (str(of_processes.value), of_processes.value.where) == (str(alone.value), alone.value.where)


def test_how_many_a_device_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for cores in (1, 2, 4, 8, 16, 64):
        monkeypatch.setattr(answering_processes, "available_cores", lambda cores=cores: cores)
        found[cores] = processes_for("cuda:0")
        assert processes_for("cpu") == 1
    assert found == {1: 1, 2: 1, 4: 1, 8: 2, 16: 4, 64: 4}


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 64), ("6400000 100000", 64), ("150000 100000", 1), ("50000 100000", 1), ("not this", 64)]
)
def test_the_cores_are_those_of_the_container_and_at_least_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quota: str, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.setattr(select, "_CPU_MAX", tmp_path / "cpu.max")
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert select.available_cores() == cores


def test_their_number_is_not_negative() -> None:
    with pytest.raises(InputError, match="processes: must be 0 or more, and is -1"):
        Answerer(processes=-1)
