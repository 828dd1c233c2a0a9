"""The engine on a GPU: questions per second, and the share of the device's peak speed that they reach.

    python -m qa_platform.tools.bench gpu

It measures two models: the bundled one, and one of BERT-large's size with random weights, which compute as long as trained ones. Every
question has its own context of about 200 tokens. A ceiling is the speed of the fastest large matrix product. The comparison is the pipeline
of transformers 4.57 on the same device, at its best batch size, in bfloat16.
"""

import argparse
import csv
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qa_platform.answering import Answerer
from qa_platform.answering.model import BUNDLED_FOLDER
from qa_platform.answering.processes import processes_for
from qa_platform.answering.runtimes.select import available_cores
from qa_platform.answering.runtimes.torch import torch_device
from qa_platform.contract import ModelChoice, Precision
from qa_platform.errors import InputError
from qa_platform.provisioning.project_files import project_file
from qa_platform.tools.bench.ceiling import Product, work_of
from qa_platform.tools.bench.reference import ORACLE_FOLDER, ReferenceRequest, run_reference

# Questions per second, end to end.
GOALS: dict[tuple[str, Precision], float] = {("bundled", "bf16"): 10_000, ("BERT-large's size", "bf16"): 3_000}
LARGE: dict[str, Any] = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
# The share of ``--questions`` that a model is asked in a precision: fewer if it is slow.
_SHARES: dict[tuple[str, Precision], float] = {("BERT-large's size", "bf16"): 1 / 4, ("BERT-large's size", "fp32"): 1 / 20}
_ROUNDS = 2
# About 200 tokens, together with the question.
_CONTEXT_WORDS = 150
_WARM_UP_QUESTIONS = 512
# The pipeline answers a few hundred questions per second.
_PIPELINE_QUESTIONS, _PIPELINE_BATCHES = 1000, (32, 128)
_SQUARES = {"cuda": (4096, 8192, 16384), "cpu": (1024,)}


@dataclass(frozen=True)
class Line:
    """One way of answering.

    ``questions``: how many were asked; ``rate``: questions answered per second; ``operations`` and ``ceiling``: its floating-point
    operations per second, and those of the ceiling.
    """

    name: str
    questions: int
    rate: float
    operations: float
    ceiling: float

    def __str__(self) -> str:
        share = self.operations / self.ceiling
        return f"{self.name:80}{self.questions:10}{self.rate:12.1f}{self.operations / 1e12:10.2f}{self.ceiling / 1e12:10.2f}{share:8.1%}"


def questions(count: int) -> list[tuple[str, str]]:
    """The samples' questions, each with a different excerpt of the samples' contexts."""
    with (project_file("samples") / "gold.csv").open(newline="", encoding="utf-8") as gold:
        samples = list(csv.DictReader(gold))
    words = " ".join(dict.fromkeys(sample["context"] for sample in samples)).split(" ")
    rng = random.Random(1)
    starts = [rng.randrange(len(words) - _CONTEXT_WORDS) for _ in range(count)]
    contexts = [f"{' '.join(words[start : start + _CONTEXT_WORDS])} {number}." for number, start in enumerate(starts)]
    return [(samples[number % len(samples)]["question"], context) for number, context in enumerate(contexts)]


def write_large(folder: Path) -> Path:
    """Write a model of BERT-large's size with random weights, and the bundled model's tokenizer."""
    from transformers import AutoModelForQuestionAnswering, BertConfig

    torch.manual_seed(1)
    AutoModelForQuestionAnswering.from_config(BertConfig(**LARGE), dtype=torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((BUNDLED_FOLDER / name).read_bytes())
    return folder


def ceiling(precision: Precision, device: str) -> float:
    """Operations per second of the fastest large matrix product."""
    kind = torch_device(device).type
    return max(_product(size, _DTYPES[precision], device).rate() for size in _SQUARES.get(kind, _SQUARES["cpu"]))


def _product(size: int, dtype: torch.dtype, device: str) -> Product:
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))

    def compute() -> None:
        torch.mm(left, right)
        if left.is_cuda:
            torch.cuda.synchronize(device)

    compute()
    return Product(compute, 2 * size**3)


def measure(
    name: str, folder: Path, pairs: Sequence[tuple[str, str]], device: str, ceilings: dict[Precision, float]
) -> Iterator[tuple[Precision, Line]]:
    """Measure the engine in each precision: in one process, then in its default number for the device."""
    work = work_of(folder, pairs) / len(pairs)
    for precision, most in ceilings.items():
        asked = pairs[: max(1, int(len(pairs) * _SHARES.get((name, precision), 1)))]
        for processes in dict.fromkeys((1, processes_for(device))):
            answerer = Answerer(ModelChoice(str(folder), precision=precision), device=device, processes=processes)
            list(answerer.answer(pairs[: processes * _WARM_UP_QUESTIONS]))
            rate = len(asked) / min(_seconds(answerer, asked) for _ in range(_ROUNDS))
            yield precision, Line(f"{name}, {precision}, {answerer.runtime}", len(asked), rate, rate * work, most)


def _seconds(answerer: Answerer, pairs: Sequence[tuple[str, str]]) -> float:
    begun = time.perf_counter()
    for _ in answerer.answer(pairs):
        pass
    return time.perf_counter() - begun


def measure_pipeline(name: str, folder: Path, pairs: Sequence[tuple[str, str]], device: str, oracle: Path, most: float) -> Line:
    """Measure the pipeline of transformers in bfloat16, at its best batch size."""
    asked = tuple(pairs[:_PIPELINE_QUESTIONS])
    requests = [ReferenceRequest(str(folder), asked, batch_size=size, device=device, dtype="bfloat16") for size in _PIPELINE_BATCHES]
    seconds = {run.seconds: size for run, size in zip(run_reference(requests, oracle=oracle), _PIPELINE_BATCHES, strict=True)}
    rate, work = len(asked) / min(seconds), work_of(folder, asked) / len(asked)
    return Line(f"{name}, bf16, pipeline, batch {seconds[min(seconds)]}", len(asked), rate, rate * work, most)


def are_met(rates: dict[tuple[str, Precision], float]) -> bool:
    return all(rates[which] >= goal for which, goal in GOALS.items())


def verdict(rates: dict[tuple[str, Precision], float]) -> str:
    """Whether the goals are met, in one line."""
    each = [f"{model} in {precision} {rates[model, precision]:.0f} of {goal:.0f}" for (model, precision), goal in GOALS.items()]
    return f"the goals are {'met' if are_met(rates) else 'MISSED'}, in questions/s: {', '.join(each)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="as torch names it (default %(default)s); cpu is for trying, with few questions")
    parser.add_argument("--questions", type=int, default=40_000)
    parser.add_argument("--oracle", type=Path, default=ORACLE_FOLDER, help="folder in which the reference is installed")
    options = parser.parse_args()
    try:
        torch_device(options.device)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    if not options.oracle.is_dir():
        print(f"the reference is not installed in {options.oracle}: run make setup", file=sys.stderr)
        return 1
    pairs = questions(options.questions)
    ceilings = {precision: ceiling(precision, options.device) for precision in _DTYPES}
    print(f"{available_cores()} cores, the best of {_ROUNDS} rounds")
    print(f"{'':80}{'questions':>10}{'questions/s':>12}{'TFLOP/s':>10}{'ceiling':>10}{'share':>8}")
    rates: dict[tuple[str, Precision], float] = {}
    with tempfile.TemporaryDirectory(prefix="qa-bench-") as scratch:
        for name, folder in (("bundled", BUNDLED_FOLDER), ("BERT-large's size", write_large(Path(scratch)))):
            for precision, line in measure(name, folder, pairs, options.device, ceilings):
                rates[name, precision] = line.rate
                print(line, flush=True)
            print(measure_pipeline(name, folder, pairs, options.device, options.oracle, ceilings["bf16"]), flush=True)
    print(verdict(rates))
    return 0 if are_met(rates) else 1


if __name__ == "__main__":
    sys.exit(main())
