"""The engine against transformers 4.57's pipeline, in one run: questions per second, ratios, F1, and shares of the ceiling.

    python -m qa_platform.bench answering --data FOLDER_OF_SQUAD_JSON

Without ``--data`` the samples' gold set is asked. The DistilBERT-sized model has random weights: its speed means something, its
answers do not. Ceilings are what torch's matrix product reaches in that precision here; the work of a question is counted from
the model's dimensions and the windows' lengths.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qa_platform.answering import Answerer
from qa_platform.answering.model import BUNDLED_FOLDER, find_model, load_tokenizer
from qa_platform.answering.runtime import PRECISIONS, Precision, available_cores
from qa_platform.answering.squad import GoldQuestion, f1, held_out, read_gold
from qa_platform.answering.windows import Layout, WindowSize, tokenize
from qa_platform.bench.reference import ORACLE_FOLDER, ReferenceRequest, run_reference
from qa_platform.contract import ModelChoice

_SAMPLES = Path(__file__).parents[2] / "samples" / "gold.csv"
_BATCH_SIZES = (8, 16)


@dataclass(frozen=True)
class Line:
    """One way of answering. ``same`` is the share of answers equal to the reference's; ``ceiling`` that of the machine's arithmetic."""

    name: str
    seconds: float
    f1: float
    same: float
    ceiling: float | None = None


def measure(folder: Path, gold: Sequence[GoldQuestion], *, threads: int, oracle: Path) -> list[Line]:
    """The reference one question at a time (first) and batched, then the engine in each precision."""
    pairs = tuple((question.question, question.context) for question in gold)
    requests = [ReferenceRequest(str(folder), pairs, batch_size=size, threads=threads) for size in (0, *_BATCH_SIZES)]
    runs = run_reference(requests, oracle=oracle)
    expected = [(answer.answer, answer.start) for answer in runs[0].best]
    lines = []
    for size, run in zip((0, *_BATCH_SIZES), runs, strict=True):
        answers = [(answer.answer, answer.start) for answer in run.best]
        lines.append(
            _line(f"reference, batch_size {size}" if size else "reference, one question per call", run.seconds, answers, expected, gold)
        )
    work = work_of(folder, pairs)
    for precision in PRECISIONS:
        answerer = Answerer(ModelChoice(str(folder), precision=precision), threads=threads)
        list(answerer.answer(pairs[:32]))
        begun = time.perf_counter()
        found = list(answerer.answer(pairs))
        seconds = time.perf_counter() - begun
        share = work / seconds / peak(precision, threads)
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
    """Floating-point operations per second of a large matrix product."""
    import torch

    torch.set_num_threads(threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    left, right = torch.randn(2048, 768, dtype=dtype), torch.randn(3072, 768, dtype=dtype)
    best = 0.0
    for _ in range(8):
        begun = time.perf_counter()
        for _ in range(10):
            torch.nn.functional.linear(left, right)
        best = max(best, 10 * 2 * 2048 * 768 * 3072 / (time.perf_counter() - begun))
    return best


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
    parser.add_argument("--oracle", type=Path, default=ORACLE_FOLDER, help="folder in which the reference is installed")
    parser.add_argument("--bundled-only", action="store_true")
    options = parser.parse_args()
    if not options.oracle.is_dir():
        print(f"the reference is not installed in {options.oracle}: run make setup", file=sys.stderr)
        return 1
    paths = [_SAMPLES] if options.data is None else sorted(options.data.rglob("*.json")) if options.data.is_dir() else [options.data]
    # Of what the bundled model was trained on, only the part that was held out says how good it is.
    gold = [question for path in paths for question in read_gold(path) if options.data is None or held_out(question)]
    random.Random(1).shuffle(gold)
    gold = gold[: options.questions]
    print(f"{options.threads} threads")
    print(
        *_table("bundled model", measure(BUNDLED_FOLDER, gold, threads=options.threads, oracle=options.oracle), len(gold)),
        sep="\n",
        flush=True,
    )
    if options.bundled_only:
        return 0
    with tempfile.TemporaryDirectory(prefix="qa-bench-") as scratch:
        some = gold[: max(1, len(gold) // 4)]
        lines = measure(write_distilbert(Path(scratch)), some, threads=options.threads, oracle=options.oracle)
    print(*_table("DistilBERT's dimensions, random weights", lines, len(some)), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
