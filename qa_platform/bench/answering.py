"""The engine against transformers 4.57's pipeline, in one run: questions per second, ratios, F1, shares of the ceiling, streaming.

    python -m qa_platform.bench answering --data FOLDER_OF_SQUAD_JSON

Without ``--data`` the samples' gold set is asked. The DistilBERT-sized model has random weights: its speed means something, its
answers do not. Ceilings are what a matrix product of torch (int8: of OpenVINO) reaches in this run; the work of a question is counted
from the model's dimensions and the windows' lengths. Every way of answering has the same number of rounds, and its best counts:
what else the machine does can only make a round slower.
"""

import argparse
import csv
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qa_platform.answering import Answerer, AnswerOptions
from qa_platform.answering.csvfile import answer_file
from qa_platform.answering.model import BUNDLED_FOLDER, find_model, load_tokenizer
from qa_platform.answering.runtime import available_cores
from qa_platform.answering.squad import GoldQuestion, f1, held_out, read_gold
from qa_platform.answering.windows import Layout, WindowSize, tokenize
from qa_platform.bench.reference import ORACLE_FOLDER, ReferenceRequest, run_reference
from qa_platform.contract import PRECISIONS, ModelChoice, Precision

_SAMPLES = Path(__file__).parents[2] / "samples" / "gold.csv"
_BATCH_SIZES = (8, 16)
# The product that shows what the arithmetic reaches.
_ROWS, _DEPTH, _COLUMNS = 2048, 768, 3072
# What the engine promises: times the reference one by one and times its best batch; by model and precision.
_BARS: dict[str, dict[Precision, float]] = {
    "bundled": {"fp32": 2.0, "bf16": 4.5, "int8": 4.5},
    "DistilBERT": {"fp32": 1.2, "bf16": 4.5, "int8": 4.5},
}
_STREAMED_SHARE, _PEAK_MEBIBYTES, _FIRST_ROW_SECONDS, _START_SECONDS = 0.95, 1024, 5.0, 4.0


@dataclass(frozen=True)
class Line:
    """One way of answering. ``same`` is the share of answers equal to the reference's; ``ceiling`` that of the machine's arithmetic."""

    name: str
    seconds: float
    f1: float
    same: float
    ceiling: float | None = None


@dataclass(frozen=True)
class Setting:
    """What all measurements of a run share. ``rounds``: how often each is made; the fastest counts."""

    threads: int
    rounds: int
    oracle: Path


def measure(folder: Path, gold: Sequence[GoldQuestion], setting: Setting) -> list[Line]:
    """The reference one question at a time (first) and batched, then the engine in each precision."""
    pairs = tuple((question.question, question.context) for question in gold)
    sizes = (0, *_BATCH_SIZES)
    requests = [ReferenceRequest(str(folder), pairs, batch_size=size, threads=setting.threads) for size in sizes]
    every = run_reference(requests * setting.rounds, oracle=setting.oracle)
    runs = [min(every[number :: len(sizes)], key=lambda run: run.seconds) for number in range(len(sizes))]
    expected = [(answer.answer, answer.start) for answer in runs[0].best]
    lines = []
    for size, run in zip(sizes, runs, strict=True):
        answers = [(answer.answer, answer.start) for answer in run.best]
        lines.append(
            _line(f"reference, batch_size {size}" if size else "reference, one question per call", run.seconds, answers, expected, gold)
        )
    work = work_of(folder, pairs)
    for precision in PRECISIONS:
        answerer = Answerer(ModelChoice(str(folder), precision=precision), threads=setting.threads)
        list(answerer.answer(pairs[:32]))
        seconds = float("inf")
        for _ in range(setting.rounds):
            begun = time.perf_counter()
            found = list(answerer.answer(pairs))
            seconds = min(seconds, time.perf_counter() - begun)
        ceiling = peak(precision, setting.threads)
        print(f"{precision}: a question takes {work / len(gold) / 1e9:.2f} GFLOP, the ceiling is {ceiling / 1e9:.0f} GFLOP/s")
        share = work / seconds / ceiling
        lines.append(_line(f"engine, {precision}", seconds, [(a.answer, a.start) for a in found], expected, gold, ceiling=share))
    return lines


def _line(
    name: str,
    seconds: float,
    answers: Sequence[tuple[str, int]],
    expected: Sequence[tuple[str, int]],
    gold: Sequence[GoldQuestion],
    *,
    ceiling: float | None = None,
) -> Line:
    score = sum(f1(text, [a.text for a in question.answers]) for (text, _), question in zip(answers, gold, strict=True)) / len(gold)
    same = sum(left == right for left, right in zip(answers, expected, strict=True)) / len(gold)
    return Line(name, seconds, 100 * score, same, ceiling)


def work_of(folder: Path, pairs: Sequence[tuple[str, str]]) -> float:
    """Floating-point operations of the matrix products of all windows."""
    files = find_model(ModelChoice(str(folder)))
    config = files.config
    width = int(config.get("hidden_size") or config["dim"])
    inner = int(config.get("intermediate_size") or config["hidden_dim"])
    layers = int(config.get("num_hidden_layers") or config["n_layers"])
    tokenizer = load_tokenizer(files)
    rows = tokenize(tokenizer, Layout.of(tokenizer), list(pairs), WindowSize.of(files.default_window, None))
    lengths = [len(window.ids) for row in rows for window in row.windows]
    return float(sum(layers * length * (2 * width * (4 * width + 2 * inner) + 4 * length * width) for length in lengths))


def peak(precision: Precision, threads: int) -> float:
    """Operations per second of a large matrix product."""
    product, count = (_int8_products(threads), 2) if precision == "int8" else (_float_product(precision, threads), 1)
    best = 0.0
    for _ in range(8):
        begun = time.perf_counter()
        for _ in range(10):
            product()
        best = max(best, 10 * count * 2 * _ROWS * _DEPTH * _COLUMNS / (time.perf_counter() - begun))
    return best


def _float_product(precision: Precision, threads: int) -> Callable[[], object]:
    import torch

    torch.set_num_threads(threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    left, right = torch.randn(_ROWS, _DEPTH, dtype=dtype), torch.randn(_COLUMNS, _DEPTH, dtype=dtype)
    return lambda: torch.nn.functional.linear(left, right)


def _int8_products(threads: int) -> Callable[[], object]:
    """Two of OpenVINO's, there and back, so that what is written in between is int8. Torch's are slower than its own in bf16."""
    import numpy as np
    import openvino as ov
    from openvino import opset13 as op

    from qa_platform.answering.quantized import rounded, rounded_weight

    rng = np.random.default_rng(0)
    left = op.parameter([1, -1, _DEPTH], np.float32)
    value: ov.Node = left
    for outputs, channels, highest in ((_COLUMNS, _DEPTH, 4.0), (_DEPTH, _COLUMNS, 100.0)):
        weight = rng.normal(size=(outputs, channels)).astype(np.float32)
        value = op.matmul(rounded(value, low=-highest, high=highest), rounded_weight(weight), False, True)
    options = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    request = ov.Core().compile_model(ov.Model([op.result(value)], [left], "products"), "CPU", options).create_infer_request()
    values = rng.normal(size=(1, _ROWS, _DEPTH)).astype(np.float32)
    return lambda: request.infer([values])


def write_distilbert(folder: Path) -> Path:
    """A model of DistilBERT's dimensions with random weights and the bundled tokenizer."""
    import numpy as np
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    width, inner, layers, vocabulary = 768, 3072, 6, 30522
    shapes: dict[str, tuple[int, ...]] = {
        "distilbert.embeddings.word_embeddings.weight": (vocabulary, width),
        "distilbert.embeddings.position_embeddings.weight": (512, width),
        "qa_outputs.weight": (2, width),
        "qa_outputs.bias": (2,),
    }
    norms = ["distilbert.embeddings.LayerNorm"]
    for layer in range(layers):
        name = f"distilbert.transformer.layer.{layer}."
        norms += [name + "sa_layer_norm", name + "output_layer_norm"]
        dense = {f"attention.{part}_lin": (width, width) for part in ("q", "k", "v", "out")}
        for part, shape in {**dense, "ffn.lin1": (inner, width), "ffn.lin2": (width, inner)}.items():
            shapes |= {f"{name}{part}.weight": shape, f"{name}{part}.bias": shape[:1]}
    tensors = {name: rng.normal(0, 0.05, shape).astype(np.float32) for name, shape in shapes.items()}
    for norm in norms:
        tensors |= {f"{norm}.weight": np.ones(width, np.float32), f"{norm}.bias": np.zeros(width, np.float32)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config: dict[str, Any] = {
        "model_type": "distilbert",
        "architectures": ["DistilBertForQuestionAnswering"],
        "dim": width,
        "hidden_dim": inner,
    }
    config |= {"n_layers": layers, "n_heads": 12, "vocab_size": vocabulary, "max_position_embeddings": 512, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes((BUNDLED_FOLDER / "tokenizer.json").read_bytes())
    tokenizer = json.loads((BUNDLED_FOLDER / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "tokenizer_class": "DistilBertTokenizer"}))
    return folder


@dataclass(frozen=True)
class Streamed:
    """Rows per second in memory and from CSV to CSV; seconds until the first row was written; the process's peak memory in MiB."""

    rows: int
    in_memory: float
    streamed: float
    first_row: float
    mebibytes: int


def stream(source: Path, precision: str, *, threads: int, rounds: int) -> Streamed:
    """Answer a CSV with the bundled model both ways, in turns. For a process of its own: its peak memory is a result."""
    answerer = Answerer(ModelChoice("bundled", precision=precision), threads=threads)
    with source.open(newline="", encoding="utf-8") as file:
        pairs = [(row["question"], row["context"]) for row in csv.DictReader(file)]
    list(answerer.answer(pairs[:32]))
    memory = streamed = first = float("inf")
    for _ in range(rounds):
        begun = time.perf_counter()
        list(answerer.answer(pairs))
        memory = min(memory, time.perf_counter() - begun)
        seconds, first_row = _answer_file(answerer, source)
        streamed, first = min(streamed, seconds), min(first, first_row)
    return Streamed(len(pairs), len(pairs) / memory, len(pairs) / streamed, first, _peak_mebibytes())


def _peak_mebibytes() -> int:
    # Not getrusage: its figure begins with what the process was forked from.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) // 1024


def _answer_file(answerer: Answerer, source: Path) -> tuple[float, float]:
    """Seconds until the whole file was answered, and until its first row was."""
    arrived: list[float] = []
    begun = time.perf_counter()
    answer_file(answerer, source, source.with_suffix(".out"), AnswerOptions(), lambda _: arrived.append(time.perf_counter()))
    return time.perf_counter() - begun, arrived[0] - begun


def _measure_streaming(gold: Sequence[GoldQuestion], setting: Setting, scratch: Path) -> Iterator[str]:
    source = scratch / "in.csv"
    with source.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("question", "context"))
        writer.writerows((question.question, question.context) for question in gold)
    yield "\nbundled model, from CSV to CSV"
    for precision in PRECISIONS:
        code = (
            "import json, sys; from dataclasses import asdict; from pathlib import Path; from qa_platform.bench.answering import stream;"
            "print(json.dumps(asdict(stream(Path(sys.argv[1]), sys.argv[2], threads=int(sys.argv[3]), rounds=int(sys.argv[4])))))"
        )
        found = Streamed(**json.loads(_run(code, str(source), precision, str(setting.threads), str(setting.rounds))))
        share = found.streamed / found.in_memory
        yield (
            f"{precision}: {found.rows} rows, {found.streamed:.1f}/s, {share:.1%} of the {found.in_memory:.1f}/s in memory"
            f"{_verdict(share >= _STREAMED_SHARE, f'at least {_STREAMED_SHARE:.0%}')}; first row after {found.first_row:.2f} s"
            f"{_verdict(found.first_row < _FIRST_ROW_SECONDS, f'under {_FIRST_ROW_SECONDS:.0f} s')}; peak memory {found.mebibytes} MiB"
            f"{_verdict(found.mebibytes < _PEAK_MEBIBYTES, f'under {_PEAK_MEBIBYTES} MiB')}"
        )
    code = (
        "from qa_platform.answering import Answerer;"
        "print(next(Answerer('bundled').answer([('Who built the bridge?', 'The bridge was built by Ada Blum.')])).answer)"
    )
    seconds = []
    for _ in range(setting.rounds):
        begun = time.perf_counter()
        _run(code)
        seconds.append(time.perf_counter() - begun)
    verdict = _verdict(min(seconds) < _START_SECONDS, f"under {_START_SECONDS:.0f} s")
    yield f"from the start of a process to its first answer: {min(seconds):.2f} s{verdict}"


def _run(code: str, *arguments: str) -> str:
    return subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


def _verdict(met: bool, bar: str) -> str:
    return f" ({bar}: {'met' if met else 'MISSED'})"


def _bars(model: str, lines: Sequence[Line]) -> Iterator[str]:
    """Whether the engine's lines keep what is promised, against the slowest-to-beat way of asking the reference."""
    fastest = min(line.seconds for line in lines[: 1 + len(_BATCH_SIZES)])
    for line, (precision, bar) in zip(lines[1 + len(_BATCH_SIZES) :], _BARS[model].items(), strict=True):
        ratio = fastest / line.seconds
        yield f"{precision}: {ratio:.2f} x the fastest of the reference{_verdict(ratio >= bar, f'at least {bar}')}"


def _table(title: str, lines: Sequence[Line], questions: int) -> Iterator[str]:
    one, batched = lines[0].seconds, min(line.seconds for line in lines[1 : 1 + len(_BATCH_SIZES)])
    yield f"\n{title}, {questions} questions"
    yield f"{'':34}{'questions/s':>12}{'x one by one':>14}{'x best batch':>14}{'F1':>8}{'same':>9}{'ceiling':>9}"
    for line in lines:
        ceiling = f"{line.ceiling:9.0%}" if line.ceiling is not None else ""
        ratios = f"{one / line.seconds:14.2f}{batched / line.seconds:14.2f}"
        yield f"{line.name:34}{questions / line.seconds:12.1f}{ratios}{line.f1:8.2f}{line.same:9.2%}{ceiling}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with SQuAD JSON, or a gold set")
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--rounds", type=int, default=2, help="measurements of everything, of which the fastest counts")
    parser.add_argument("--oracle", type=Path, default=ORACLE_FOLDER, help="folder in which the reference is installed")
    parser.add_argument("--bundled-only", action="store_true")
    options = parser.parse_args()
    if not options.oracle.is_dir():
        print(f"the reference is not installed in {options.oracle}: run make setup", file=sys.stderr)
        return 1
    paths = [_SAMPLES] if options.data is None else sorted(options.data.rglob("*.json")) if options.data.is_dir() else [options.data]
    # Of what the bundled model was trained on, only the part that was held out says how good it is.
    asked = (question for path in paths for question in read_gold(path) if options.data is None or held_out(question))
    # Each once: the engine answers equal pairs once, and a question that stands in a set ten times would weigh ten times.
    gold = list({(question.question, question.context): question for question in asked}.values())
    random.Random(1).shuffle(gold)
    gold = gold[: options.questions]
    setting = Setting(options.threads, options.rounds, options.oracle)
    print(f"{setting.threads} threads, the best of {setting.rounds} rounds")
    lines = measure(BUNDLED_FOLDER, gold, setting)
    print(*_table("bundled model", lines, len(gold)), *_bars("bundled", lines), sep="\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="qa-bench-") as scratch:
        for text in _measure_streaming(gold, setting, Path(scratch)):
            print(text, flush=True)
        if not options.bundled_only:
            some = gold[: max(1, len(gold) // 4)]
            lines = measure(write_distilbert(Path(scratch)), some, setting)
            print(*_table("DistilBERT's dimensions, random weights", lines, len(some)), *_bars("DistilBERT", lines), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
