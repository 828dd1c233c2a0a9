"""The ceiling: the fastest that this machine can compute, and how much computation a question needs.

The ceiling is the speed of a large matrix product. The work of a question is the number of operations in its matrix products, computed from
the dimensions of the model and the lengths of the windows. Work divided by time, as a share of the ceiling, shows how close a way of
answering comes to the machine's limit.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qa_platform.answering.model import find_model, load_tokenizer
from qa_platform.answering.windows import Layout, WindowSize, tokenize
from qa_platform.contract import ModelChoice, Precision

# The dimensions of the matrix product.
_ROWS, _DEPTH, _COLUMNS = 2048, 768, 3072


def work_of(folder: Path, pairs: Sequence[tuple[str, str]]) -> float:
    """The floating-point operations in the matrix products of all windows."""
    files = find_model(ModelChoice(str(folder)))
    config = files.config
    width = int(config.get("hidden_size") or config["dim"])
    inner = int(config.get("intermediate_size") or config["hidden_dim"])
    layers = int(config.get("num_hidden_layers") or config["n_layers"])
    tokenizer = load_tokenizer(files)
    rows = tokenize(tokenizer, Layout.of(tokenizer), list(pairs), WindowSize.of(files.default_window, None))
    lengths = [len(window.ids) for row in rows for window in row.windows]
    return float(sum(layers * length * (2 * width * (4 * width + 2 * inner) + 4 * length * width) for length in lengths))


@dataclass(frozen=True)
class Product:
    """A large matrix product, which measures the ceiling of this machine, and the number of its floating-point operations."""

    compute: Callable[[], object]
    operations: float

    def rate(self) -> float:
        """Operations per second."""
        best = 0.0
        for _ in range(8):
            begun = time.perf_counter()
            for _ in range(5):
                self.compute()
            best = max(best, 5 * self.operations / (time.perf_counter() - begun))
        return best


def matrix_products(precision: Precision, threads: int) -> tuple[Product, ...]:
    """OpenVINO's product and torch's: which is faster depends on the processor. No torch in int8, where it is slower than in bf16."""
    work = 2 * _ROWS * _DEPTH * _COLUMNS
    openvino = Product(_openvino_products(precision, threads), 2 * work)
    return (openvino,) if precision == "int8" else (openvino, Product(_torch_product(precision, threads), work))


def _torch_product(precision: Precision, threads: int) -> Callable[[], object]:
    import torch

    torch.set_num_threads(threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    left, right = torch.randn(_ROWS, _DEPTH, dtype=dtype), torch.randn(_COLUMNS, _DEPTH, dtype=dtype)
    return lambda: torch.nn.functional.linear(left, right)


def _openvino_products(precision: Precision, threads: int) -> Callable[[], object]:
    """Two products, to the larger width and back, so that the intermediate result also has this precision."""
    import numpy as np
    import openvino as ov
    from openvino import opset13 as op

    from qa_platform.answering.runtimes.int8 import bounds, rounded, rounded_weight

    rng = np.random.default_rng(0)
    left = op.parameter([1, -1, _DEPTH], np.float32)
    value: ov.Node = left
    for outputs, channels, highest in ((_COLUMNS, _DEPTH, 4.0), (_DEPTH, _COLUMNS, 100.0)):
        weight = rng.normal(size=(outputs, channels)).astype(np.float32)
        if precision == "int8":
            low, high = bounds(-highest, highest)
            value = op.matmul(rounded(value, low=low, high=high), rounded_weight(weight), False, True)
        else:
            value = op.matmul(value, op.constant(weight), False, True)
    options = {"INFERENCE_PRECISION_HINT": "f32" if precision == "fp32" else "bf16", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    request = ov.Core().compile_model(ov.Model([op.result(value)], [left], "products"), "CPU", options).create_infer_request()
    values = rng.normal(size=(1, _ROWS, _DEPTH)).astype(np.float32)
    return lambda: request.infer([values])
