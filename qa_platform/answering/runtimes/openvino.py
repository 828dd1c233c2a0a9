"""The OpenVINO runtime: models that `graph` can build, on CPUs."""

import queue
from collections.abc import Sequence

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from qa_platform.answering.chunks import ChunkSize
from qa_platform.answering.model import ModelFiles
from qa_platform.answering.runtimes.base import WindowBatch, widened
from qa_platform.answering.runtimes.graph import Builder, compile_graph, inputs_of
from qa_platform.answering.runtimes.int8 import quantized
from qa_platform.answering.spans import SpanOptions, WindowSpans, best_spans
from qa_platform.answering.windows import Window
from qa_platform.contract import Precision
from qa_platform.errors import InputError

# Tokens per batch. With more, a layer's intermediate values leave the caches; with fewer, the multipliers are idle.
TOKENS = 1024


class OpenVinoRuntime:
    """A model compiled for this CPU, with one single-threaded request per thread.

    Raises:
        InputError: the weights do not fit the model's ``config.json``, or this machine cannot run the precision.
    """

    def __init__(self, files: ModelFiles, *, precision: Precision, threads: int) -> None:
        self.name = f"openvino {ov.__version__}"
        self.requests = threads
        self.tokens = TOKENS
        self.chunk = ChunkSize()
        self._files = files
        model = _load(files, precision=precision, threads=threads)
        self._idle: queue.SimpleQueue[ov.InferRequest] = queue.SimpleQueue()
        for _ in range(self.requests):
            self._idle.put(model.create_infer_request())

    def run(self, batch: WindowBatch) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """See `Runtime.run`."""
        wide = widened(batch, self._files.longest_window)
        request = self._idle.get()
        try:
            flat = request.infer(inputs_of(wide, self._files))[0].copy()
        finally:
            self._idle.put(request)
        logits = flat.reshape(*wide.ids.shape, 2)[:, : batch.ids.shape[1]]
        return logits[:, :, 0], logits[:, :, 1]

    def best_spans(self, batch: WindowBatch, windows: Sequence[Window], options: SpanOptions) -> list[WindowSpans]:
        """See `Runtime.best_spans`."""
        return best_spans(*self.run(batch), windows, options)


def _load(files: ModelFiles, *, precision: Precision, threads: int) -> ov.CompiledModel:
    try:
        model = quantized(files) if precision == "int8" else Builder(files).build()
        return compile_graph(model, precision=precision, threads=threads)
    except RuntimeError as error:
        # OpenVINO merges rounding into neighbouring operations, and what it can merge differs from processor to processor.
        advice = "use bf16 or fp32" if precision == "int8" else ""
        raise InputError(
            f"this OpenVINO ({ov.__version__}) cannot run it in {precision} here", where=f"model {files.id}", advice=advice
        ) from error
