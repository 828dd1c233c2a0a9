"""The engine compared with the pipeline of transformers 4.57: questions per second, ratios, F1, shares of the ceiling, streaming.

    python -m qa_platform.tools.bench answering --data FOLDER_OF_SQUAD_JSON

Without ``--data``, the questions are the samples' gold set. The DistilBERT-sized model is the bundled one, widened. A ceiling is the speed
of a large matrix product in this run, the faster of torch's and OpenVINO's. The reference's ceiling is the one in float32. Every way of
answering gets the same number of rounds. The best round counts, because other processes can only make a round slower.
"""

import argparse
import csv
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qa_platform.answering import Answerer, AnswerOptions
from qa_platform.answering.csvfile import answer_file
from qa_platform.answering.model import BUNDLED_FOLDER
from qa_platform.answering.runtimes.select import available_cores
from qa_platform.contract import PRECISIONS, ModelChoice, Precision
from qa_platform.evaluation.gold import GoldQuestion, f1, held_out, read_gold
from qa_platform.evaluation.tune import GATE
from qa_platform.tools.bench.ceiling import matrix_products, work_of
from qa_platform.tools.bench.reference import ORACLE_FOLDER, ReferenceRequest, run_reference

_SAMPLES = Path(__file__).parents[3] / "samples" / "gold.csv"
_BATCH_SIZES = (8, 16)
# The minimum speed of the engine as a multiple of the reference's fastest way, by model and precision.
_BARS: dict[str, dict[Precision, float]] = {
    "bundled": {"fp32": 2.0, "bf16": 4.5, "int8": 4.5},
    "DistilBERT": {"fp32": 1.2, "bf16": 4.5, "int8": 4.5},
}
_STREAMED_SHARE, _PEAK_MEBIBYTES, _FIRST_ROW_SECONDS, _START_SECONDS = 0.95, 1024, 5.0, 4.0


@dataclass(frozen=True)
class Line:
    """One way of answering.

    Attributes:
        same: the share of answers that equal the reference's.
        ceiling: the share of the machine's ceiling that is reached.
    """

    name: str
    seconds: float
    f1: float
    same: float
    ceiling: float


@dataclass(frozen=True)
class Setting:
    """The setting of all measurements of a run. Each is repeated ``rounds`` times, and the fastest counts."""

    threads: int
    rounds: int
    oracle: Path


def measure(folder: Path, gold: Sequence[GoldQuestion], setting: Setting) -> list[Line]:
    """Measure the reference one question at a time (first) and batched, then the engine in each precision."""
    pairs = tuple((question.question, question.context) for question in gold)
    requests = {
        f"reference, batch_size {size}" if size else "reference, one question per call": ReferenceRequest(
            str(folder), pairs, batch_size=size, threads=setting.threads
        )
        for size in (0, *_BATCH_SIZES)
    }
    engines = {precision: _warm(folder, precision, pairs[:32], setting.threads) for precision in PRECISIONS}
    products = {precision: matrix_products(precision, setting.threads) for precision in PRECISIONS}
    ceilings = dict.fromkeys(PRECISIONS, 0.0)
    seconds: dict[str, float] = {}
    answers: dict[str, list[tuple[str, int]]] = {}
    # Interleaved, including the ceilings: the machine may be slower a minute later.
    for _ in range(setting.rounds):
        for name, run in zip(requests, run_reference(list(requests.values()), oracle=setting.oracle), strict=True):
            seconds[name] = min(run.seconds, seconds.get(name, run.seconds))
            answers[name] = [(answer.answer, answer.start) for answer in run.best]
        for precision, answerer in engines.items():
            name = f"engine, {precision}"
            begun = time.perf_counter()
            found = list(answerer.answer(pairs))
            took = time.perf_counter() - begun
            seconds[name] = min(took, seconds.get(name, took))
            answers[name] = [(answer.answer, answer.start) for answer in found]
            ceilings[precision] = max(ceilings[precision], *(product.rate() for product in products[precision]))
    work = work_of(folder, pairs)
    print(f"a question takes {work / len(gold) / 1e9:.2f} GFLOP; ceilings in GFLOP/s:", end=" ")
    print(*(f"{precision} {ceiling / 1e9:.0f}" for precision, ceiling in ceilings.items()), sep=", ")
    expected = next(iter(answers.values()))
    reached = dict.fromkeys(requests, ceilings["fp32"]) | {f"engine, {precision}": ceiling for precision, ceiling in ceilings.items()}
    return [_line(name, seconds[name], answers[name], expected, gold, work / seconds[name] / reached[name]) for name in reached]


def _warm(folder: Path, precision: Precision, pairs: Sequence[tuple[str, str]], threads: int) -> Answerer:
    answerer = Answerer(ModelChoice(str(folder), precision=precision), threads=threads)
    list(answerer.answer(pairs))
    return answerer


def _line(
    name: str,
    seconds: float,
    answers: Sequence[tuple[str, int]],
    expected: Sequence[tuple[str, int]],
    gold: Sequence[GoldQuestion],
    ceiling: float,
) -> Line:
    score = sum(f1(text, [a.text for a in question.answers]) for (text, _), question in zip(answers, gold, strict=True)) / len(gold)
    same = sum(left == right for left, right in zip(answers, expected, strict=True)) / len(gold)
    return Line(name, seconds, 100 * score, same, ceiling)


def write_widened(folder: Path) -> Path:
    """Write the bundled model at twice its width, which is DistilBERT's size. Its answers stay the same (Net2Net, Chen et al., 2016).

    Every channel is duplicated. A weight that reads a channel is split between the two copies at random.
    """
    import numpy as np
    from numpy.typing import NDArray
    from safetensors.numpy import load_file, save_file

    rng = np.random.default_rng(0)
    config = json.loads((BUNDLED_FOLDER / "config.json").read_text())
    head = config["hidden_size"] // config["num_attention_heads"]

    def twice(channels: int) -> NDArray[np.intp]:
        """The old channel of every new one. The copies within a head are adjacent, so that they stay in one head."""
        return np.tile(np.arange(channels).reshape(-1, 1, head), (1, 2, 1)).ravel()

    tensors = {}
    for name, stored in load_file(BUNDLED_FOLDER / "model.safetensors").items():
        wide = stored.astype(np.float32)
        if "query" in name:
            # The dot products of a head have doubled, but their divisor, the square root of the head's size, has grown only by sqrt(2).
            wide *= np.float32(0.5**0.5)
        table = name.endswith("_embeddings.weight")
        if not (table or name.startswith("qa_outputs")):
            wide = wide[twice(len(wide))]
        if wide.ndim == 2:
            rows, channels = wide.shape
            wide = wide[:, twice(channels)]
            if not table:
                share = rng.uniform(size=(rows, channels // head, 1, head)).astype(np.float32)
                wide *= np.concatenate([share, 1 - share], 2).reshape(wide.shape)
        tensors[name] = np.ascontiguousarray(wide)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    doubled = {name: 2 * config[name] for name in ("hidden_size", "intermediate_size")}
    (folder / "config.json").write_text(json.dumps({**config, **doubled, "dtype": "float32"}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((BUNDLED_FOLDER / name).read_bytes())
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
    """Answer a CSV with the bundled model both ways, interleaved. Use a fresh process: its peak memory is a result."""
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
    return Streamed(len(pairs), len(pairs) / memory, len(pairs) / streamed, first, peak_mebibytes())


def peak_mebibytes() -> int:
    """The most memory that this process has had."""
    # Not getrusage: it includes the memory of the process that this one was forked from.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) // 1024


def _answer_file(answerer: Answerer, source: Path) -> tuple[float, float]:
    """Seconds to answer the whole file, and to answer its first row."""
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
            "import json, sys; from dataclasses import asdict; from pathlib import Path; "
            "from qa_platform.tools.bench.answering import stream; "
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
    """A line per precision of the engine: whether it meets its bar against the reference's fastest way."""
    fastest = min(line.seconds for line in lines[: 1 + len(_BATCH_SIZES)])
    for line, (precision, bar) in zip(lines[1 + len(_BATCH_SIZES) :], _BARS[model].items(), strict=True):
        ratio = fastest / line.seconds
        gained = line.f1 - lines[0].f1
        yield (
            f"{precision}: {ratio:.2f} x the fastest of the reference{_verdict(ratio >= bar, f'at least {bar}')}, "
            f"F1 {gained:+.2f}{_verdict(gained >= -GATE, f'at most {GATE} less')}"
        )


def _table(title: str, lines: Sequence[Line], questions: int) -> Iterator[str]:
    one, batched = lines[0].seconds, min(line.seconds for line in lines[1 : 1 + len(_BATCH_SIZES)])
    yield f"\n{title}, {questions} questions"
    yield f"{'':34}{'questions/s':>12}{'x one by one':>14}{'x best batch':>14}{'F1':>8}{'same':>9}{'ceiling':>9}"
    for line in lines:
        ratios = f"{one / line.seconds:14.2f}{batched / line.seconds:14.2f}"
        yield f"{line.name:34}{questions / line.seconds:12.1f}{ratios}{line.f1:8.2f}{line.same:9.2%}{line.ceiling:9.0%}"


def gold_questions(data: Path | None, number: int) -> list[GoldQuestion]:
    """Questions from a folder with SQuAD JSON or from a gold set; from the samples if ``data`` is None."""
    paths = [_SAMPLES] if data is None else sorted(data.rglob("*.json")) if data.is_dir() else [data]
    # The bundled model was trained on the rest of the data, so only the held-out part is used.
    asked = (question for path in paths for question in read_gold(path) if data is None or held_out(question))
    # Without duplicates: the engine answers equal pairs only once, and a duplicate would count twice.
    gold = list({(question.question, question.context): question for question in asked}.values())
    random.Random(1).shuffle(gold)
    return gold[:number]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with SQuAD JSON, or a gold set")
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--rounds", type=int, default=2, help="rounds of all measurements; the fastest counts")
    parser.add_argument("--oracle", type=Path, default=ORACLE_FOLDER, help="folder in which the reference is installed")
    parser.add_argument("--bundled-only", action="store_true")
    options = parser.parse_args()
    if not options.oracle.is_dir():
        print(f"the reference is not installed in {options.oracle}: run make setup", file=sys.stderr)
        return 1
    gold = gold_questions(options.data, options.questions)
    setting = Setting(options.threads, options.rounds, options.oracle)
    print(f"{setting.threads} threads, the best of {setting.rounds} rounds")
    lines = measure(BUNDLED_FOLDER, gold, setting)
    print(*_table("bundled model", lines, len(gold)), *_bars("bundled", lines), sep="\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="qa-bench-") as scratch:
        for text in _measure_streaming(gold, setting, Path(scratch)):
            print(text, flush=True)
        if not options.bundled_only:
            lines = measure(write_widened(Path(scratch)), gold, setting)
            print(*_table("DistilBERT's size, the bundled model widened", lines, len(gold)), *_bars("DistilBERT", lines), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
