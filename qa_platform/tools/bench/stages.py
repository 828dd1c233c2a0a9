"""Where the time of answering goes, in each precision: the engine's stages in sequence on one thread, and the model's operations by
OpenVINO's own counters.

    python -m qa_platform.tools.bench stages --data FOLDER_OF_SQUAD_JSON
"""

import argparse
import collections
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qa_platform.answering.chunks import batches
from qa_platform.answering.model import ModelFiles, find_model, load_tokenizer
from qa_platform.answering.runtimes.base import WindowBatch, pad, widened
from qa_platform.answering.runtimes.graph import Builder, compile_graph, inputs_of
from qa_platform.answering.runtimes.int8 import quantized
from qa_platform.answering.runtimes.openvino import TOKENS
from qa_platform.answering.spans import SpanOptions, best_spans, merge
from qa_platform.answering.windows import Layout, Tokenized, Window, WindowSize, tokenize
from qa_platform.contract import PRECISIONS, ModelChoice, Precision
from qa_platform.tools.bench.answering import gold_questions
from qa_platform.tools.bench.ceiling import matrix_products, work_of

# What OpenVINO's node types do in this model.
_OPERATIONS = {
    "FullyConnected": "products with weights",
    "FullyConnectedQuantizedLegacy": "products with weights",
    "MatMul": "products of attention",
    "Softmax": "softmax of attention",
    "Transpose": "moving heads",
    "Split": "moving heads",
    "MVN": "norms and sums",
    "Add": "norms and sums",
    "Multiply": "norms and sums",
    "MulAdd": "norms and sums",
    "FakeQuantize": "requantising",
    "Reorder": "requantising",
    "Convert": "requantising",
}
_REST = "the model's rest"
_STAGES = (
    *("tokenising, cutting", "padding", *dict.fromkeys(_OPERATIONS.values()), _REST),
    *("OpenVINO beside its operations", "decoding: spans", "decoding: merging"),
)


class _Stages:
    """One precision of the bundled model on one thread. ``seconds`` has the time of each of `_STAGES` for all questions."""

    def __init__(self, files: ModelFiles, precision: Precision) -> None:
        model = quantized(files) if precision == "int8" else Builder(files).build()
        self._request = compile_graph(model, precision=precision, threads=1, counted=True).create_infer_request()
        self._files = files
        self._tokenizer = load_tokenizer(files)
        self._layout = Layout.of(self._tokenizer)
        self.seconds: dict[str, float] = dict.fromkeys(_STAGES, 0.0)
        self.tokens = self.padded = 0

    def run(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Answer all pairs."""
        self.seconds = dict.fromkeys(_STAGES, 0.0)
        self.tokens = self.padded = 0
        size = WindowSize.of(self._files.default_window, None)
        rows = self._timed("tokenising, cutting", partial(tokenize, self._tokenizer, self._layout, list(pairs), size))
        windows = [window for row in rows for window in row.windows]
        portions = list(batches(windows, TOKENS, 1))
        whole = 0.0
        found: dict[int, list] = collections.defaultdict(list)
        for portion in portions:
            batch = self._timed("padding", partial(self._padded, portion))
            self.tokens, self.padded = self.tokens + int(batch.lengths.sum()), self.padded + batch.ids.size
            whole += self._decode(portion, batch, found)
        self.seconds["decoding: merging"] = self._merged(pairs, rows, found)
        self._count(len(portions), whole)

    def _padded(self, portion: Sequence[Window]) -> WindowBatch:
        return widened(pad(portion, self._layout), self._files.longest_window)

    def _decode(self, portion: Sequence[Window], batch: WindowBatch, found: dict[int, list]) -> float:
        """Compute a batch and find its spans. Returns the seconds that the model took."""
        begun = time.perf_counter()
        flat = self._request.infer(inputs_of(batch, self._files))[0].reshape(*batch.ids.shape, 2)
        computed = time.perf_counter() - begun
        spans = self._timed("decoding: spans", partial(best_spans, flat[:, :, 0], flat[:, :, 1], portion, _OPTIONS))
        for window, of_window in zip(portion, spans, strict=True):
            found[window.row].append((window.first, of_window))
        return computed

    def _merged(self, pairs: Sequence[tuple[str, str]], rows: Sequence[Tokenized], found: dict[int, list]) -> float:
        begun = time.perf_counter()
        for number, ((_, context), row) in enumerate(zip(pairs, rows, strict=True)):
            merge(context, row, [spans for _, spans in sorted(found[number], key=lambda entry: entry[0])], _OPTIONS)
        return time.perf_counter() - begun

    def _timed(self, stage: str, work: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        result = work()
        self.seconds[stage] += time.perf_counter() - begun
        return result

    def _count(self, batches_run: int, whole: float) -> None:
        """Add the time of the model's operations. OpenVINO's counters are means over all batches since the model was compiled."""
        counted = 0.0
        for node in self._request.profiling_info:
            took = node.real_time.total_seconds() * batches_run
            self.seconds[_OPERATIONS.get(node.node_type, _REST)] += took
            counted += took
        self.seconds["OpenVINO beside its operations"] = whole - counted


_OPTIONS = SpanOptions()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with SQuAD JSON, or a gold set")
    parser.add_argument("--questions", type=int, default=400)
    options = parser.parse_args()
    pairs = [(question.question, question.context) for question in gold_questions(options.data, options.questions)]
    files = find_model(ModelChoice("bundled"))
    columns = {precision: _Stages(files, precision) for precision in PRECISIONS}
    for stages in columns.values():
        # The first pass compiles the kernels for each shape.
        stages.run(pairs)
        stages.run(pairs)
    print(*_table(columns, pairs, files), sep="\n")
    return 0


def _table(columns: dict[Precision, _Stages], pairs: Sequence[tuple[str, str]], files: ModelFiles) -> list[str]:
    wholes = {precision: sum(stages.seconds.values()) for precision, stages in columns.items()}
    lines = [f"{len(pairs)} questions on one thread; milliseconds a question, and their share"]
    lines.append(f"{'':32}" + "".join(f"{precision:>16}" for precision in columns))
    for stage in _STAGES:
        cells = (
            f"{1000 * stages.seconds[stage] / len(pairs):9.2f} {stages.seconds[stage] / wholes[name]:6.1%}"
            for name, stages in columns.items()
        )
        lines.append(f"{stage:32}" + "".join(cells))
    lines.append(f"{'in all':32}" + "".join(f"{1000 * whole / len(pairs):9.2f}{'':7}" for whole in wholes.values()))
    work = work_of(files.folder, pairs)
    ceilings = {precision: max(product.rate() for product in matrix_products(precision, 1)) for precision in columns}
    lines.append(f"{'share of the ceiling':32}" + "".join(f"{work / wholes[name] / ceilings[name]:16.0%}" for name in columns))
    padding = next(1 - stages.tokens / stages.padded for stages in columns.values())
    lines.append(f"{padding:.1%} of the tokens that are computed are padding")
    return lines


if __name__ == "__main__":
    sys.exit(main())
