"""The benchmark of a large model on a CPU, run with a tiny model."""

import re
import sys

import pytest

from qa_platform.tools.bench import gpu, large


class _Product:
    def rate(self) -> float:
        return 1e12


def test_each_precision_has_its_rate_for_the_machine_and_for_a_core(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
    monkeypatch.setattr(gpu, "LARGE", tiny)
    monkeypatch.setattr(large, "matrix_products", lambda precision, threads: (_Product(),))
    monkeypatch.setattr(large, "available_cores", lambda: 2)
    monkeypatch.setattr(sys, "argv", ["bench", "--questions", "8"])
    assert large.main() == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("BERT-large's size, 8 questions of ")
    for precision, line in zip(("bf16", "int8"), lines, strict=True):
        found = re.fullmatch(rf"{precision}: ([\d.]+) questions/s, ([\d.]+) a core, (\d+)% of the ceiling", line)
        assert found
        assert float(found[1]) == pytest.approx(2 * float(found[2]), abs=0.11)
