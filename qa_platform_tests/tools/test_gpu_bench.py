"""The GPU benchmark of the engine, run on the CPU with tiny sizes."""

import sys

import pytest

from qa_platform.tools.bench import gpu
from qa_platform.tools.bench.reference import ORACLE_FOLDER


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    return gpu.main()


def test_without_the_device_it_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--device", "cuda:99") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("device 'cuda:99': torch ")
    assert captured.err.count("\n") == 1


def test_every_question_has_a_context_of_its_own() -> None:
    asked = gpu.questions(300)
    assert len({context for _, context in asked}) == 300
    assert asked == gpu.questions(300)


@pytest.mark.slow
@pytest.mark.skipif(not ORACLE_FOLDER.is_dir(), reason=f"the reference is not installed in {ORACLE_FOLDER}: run make setup")
def test_it_prints_every_way_beside_the_ceiling_and_ends_with_the_goals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    monkeypatch.setattr(gpu, "LARGE", tiny)
    monkeypatch.setattr(gpu, "_SQUARES", {"cpu": (64,)})
    monkeypatch.setattr(gpu, "_PIPELINE_BATCHES", (2,))
    monkeypatch.setattr(gpu, "processes_for", lambda device: 2)
    monkeypatch.setattr(gpu, "GOALS", dict.fromkeys(gpu.GOALS, 0.001))
    assert run(monkeypatch, "--device", "cpu:0", "--questions", "4") == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last.startswith("the goals are met, in questions/s: bundled in bf16 ")
    lines = [line for line in lines if line.endswith("%")]
    ways = ("fp32", "fp32", "bf16", "bf16", "bf16")
    assert [line.split(",")[:2] for line in lines] == [[model, f" {way}"] for model in ("bundled", "BERT-large's size") for way in ways]
    assert ["in 2 processes" in line for line in lines] == 2 * [False, True, False, True, False]


def test_a_missed_goal_is_named() -> None:
    rates = dict.fromkeys(gpu.GOALS, 2_999.0)
    assert gpu.verdict(rates) == (
        "the goals are MISSED, in questions/s: bundled in bf16 2999 of 10000, BERT-large's size in bf16 2999 of 3000"
    )
