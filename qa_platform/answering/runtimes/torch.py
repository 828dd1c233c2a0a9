"""The torch runtime: any extractive model that transformers can load, on CPUs and GPUs."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers.utils.logging
from numpy.typing import NDArray
from transformers import AutoModelForQuestionAnswering

from qa_platform.answering.chunks import ChunkSize
from qa_platform.answering.model import ModelFiles
from qa_platform.answering.runtimes.base import WindowBatch
from qa_platform.answering.runtimes.decoding import spans_of, torch_spans
from qa_platform.answering.spans import SpanOptions, WindowSpans
from qa_platform.answering.windows import Window
from qa_platform.contract import Precision
from qa_platform.errors import DeviceFailed, InputError, TransientError

_log = logging.getLogger(__name__)

_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class _Portions:
    """The portions of work that keep a kind of device busy.

    Attributes:
        tokens: maximum tokens of a batch.
        requests: batches in flight: while one is read, the device has another to compute.
        step: batch lengths are multiples of this, so that the device sees few shapes.
        chunk: how much to read ahead: several batches.
    """

    tokens: int
    requests: int
    step: int
    chunk: ChunkSize


# Families in which padding has no effect if attention masks it. They see all of a window, and accept a mask in the form attention takes.
_PADDABLE = frozenset(
    ("bert", "distilbert", "roberta", "xlm-roberta", "camembert", "electra", "albert", "deberta", "deberta-v2", "ernie", "mpnet")
)

_NO_CUDA = "use cpu, or see that `nvidia-smi` lists a GPU here and that its driver supports the CUDA of this torch"
# What marks an error of the device whose type is a plain RuntimeError.
_DEVICE_FAILURES = ("CUDA error", "CUBLAS_STATUS_", "CUDNN_STATUS_")
# The share of a device's free memory that a batch may take. Four processes may have three batches each on it.
_SHARE_OF_MEMORY = 1 / 16
# Batches that fit, after which the next ones may be twice as large, up to the measured limit.
_FITTING = 32

_PORTIONS = {"cpu": _Portions(4096, 1, 1, ChunkSize()), "cuda": _Portions(2**17, 3, 32, ChunkSize(rows=2048, characters=2**21))}


class TorchRuntime:
    """A model loaded by transformers.

    Raises:
        InputError: there is no such device, the model cannot be loaded, or it does not run in this precision.
        TransientError: the device has no memory for the model.
        DeviceFailed: the device failed.
    """

    def __init__(self, files: ModelFiles, *, precision: Precision, threads: int, device: str) -> None:
        self._device = torch_device(device)
        portions = _PORTIONS.get(self._device.type, _PORTIONS["cpu"])
        self.requests, self.tokens, self.chunk = portions.requests, portions.tokens, portions.chunk
        self._halved = False
        self._fitting = 0
        self._is_paddable = files.family in _PADDABLE and not files.is_decoder
        self._step = portions.step
        self._longest = files.longest_window
        self._takes_types = files.takes_token_types
        # DeBERTa v2 computes positions in float32 whatever the type of its weights; autocast converts where the two meet.
        self._mixed = precision == "bf16" and files.family == "deberta-v2"
        if self._device.type == "cpu":
            torch.set_num_threads(threads)
        # cuDNN makes a plan for every new shape, which takes longer than the batch.
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.name = f"torch {torch.__version__} on {self._device}"
        with _device_errors(self._device):
            if self._device.type == "cuda":
                self.name += f" ({torch.cuda.get_device_name(self._device)})"
            self._model = self._moved(_model(files, precision))
            if self._device.type == "cuda":
                self.tokens = min(self.tokens, self._tokens_that_fit(files.default_window))
        self._most_tokens = self.tokens

    @torch.inference_mode()
    def run(self, batch: WindowBatch) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """See `Runtime.run`.

        Raises:
            TransientError: the device has no memory for the batch.
            DeviceFailed: the device failed.
        """
        try:
            with _device_errors(self._device):
                logits = self._from_device(torch.stack(self._logits(batch)))[:, :, : batch.ids.shape[1]]
        except torch.OutOfMemoryError as error:
            raise self._no_memory_for("a batch") from error
        return logits[0], logits[1]

    def best_spans(self, batch: WindowBatch, windows: Sequence[Window], options: SpanOptions) -> list[WindowSpans]:
        """See `Runtime.best_spans`. A batch that exceeds the device's memory is halved, and the next batches are limited to that size.

        Raises:
            TransientError: the device has no memory for a single window.
            DeviceFailed: the device failed.
        """
        found = self._spans_in_memory(batch, windows, options)
        if found is not None:
            self._grow()
            return found
        # Not where the error is caught, because the error holds the memory of the failed batch.
        if len(windows) == 1:
            raise self._no_memory_for("one window")
        self._halve(batch.ids.size)
        middle = len(windows) // 2
        parts = (slice(None, middle), slice(middle, None))
        batches = [WindowBatch(batch.ids[part], batch.types[part], batch.lengths[part]) for part in parts]
        return [spans for half, part in zip(batches, parts, strict=True) for spans in self.best_spans(half, windows[part], options)]

    def _moved(self, model: Any) -> Any:
        try:
            return model.to(self._device).eval()
        except torch.OutOfMemoryError as error:
            raise self._no_memory_for("the model") from error

    def _no_memory_for(self, what: str) -> TransientError:
        return TransientError(f"it has no memory for {what}", where=str(self._device), advice="free memory, or use a smaller model")

    def _spans_in_memory(self, batch: WindowBatch, windows: Sequence[Window], options: SpanOptions) -> list[WindowSpans] | None:
        try:
            with _device_errors(self._device):
                return self._spans(batch, windows, options)
        except torch.OutOfMemoryError:
            return None

    @torch.inference_mode()
    def _spans(self, batch: WindowBatch, windows: Sequence[Window], options: SpanOptions) -> list[WindowSpans]:
        context_ranges = np.array([(window.offset, window.length) for window in windows], np.int32)
        width, on_device = int(context_ranges[:, 1].max()), self._to_device(context_ranges)
        logits = self._logits(batch)
        if self._device.type != "cuda":
            # Other devices may lack float64.
            on_device, logits = on_device.cpu(), (logits[0].cpu(), logits[1].cpu())
        return spans_of(self._from_device(torch_spans(*logits, on_device, width, options)), windows)

    def _halve(self, tokens: int) -> None:
        if self._device.type == "cuda":
            with _device_errors(self._device):
                torch.cuda.empty_cache()
        self.tokens = min(self.tokens, tokens // 2)
        self._fitting = 0
        if not self._halved:
            self._halved = True
            _log.warning("%s has no memory for a batch of %d tokens: batches are halved until they fit", self._device, tokens)

    def _grow(self) -> None:
        """Let batches grow again after some that fitted: another process may have taken the memory for a moment only."""
        if self.tokens < self._most_tokens:
            self._fitting += 1
            if self._fitting >= _FITTING:
                self.tokens, self._fitting = min(2 * self.tokens, self._most_tokens), 0

    def _logits(self, batch: WindowBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Start and end logits, on the device, with at least as many columns as the batch has."""
        if self._is_paddable:
            return self._computed(batch)
        # Convolutions, pooling and local attention see padding, so windows of different lengths are computed separately.
        logits = torch.zeros((2, *batch.ids.shape), device=self._device)
        for length in np.unique(batch.lengths):
            rows = np.flatnonzero(batch.lengths == length)
            part = WindowBatch(batch.ids[rows, :length], batch.types[rows, :length], batch.lengths[rows])
            logits[:, torch.from_numpy(rows).to(self._device), :length] = torch.stack(self._computed(part))[:, :, :length]
        return logits[0], logits[1]

    def _computed(self, batch: WindowBatch) -> tuple[torch.Tensor, torch.Tensor]:
        length = batch.ids.shape[1]
        if self._is_paddable:
            length = min(-(-length // self._step) * self._step, self._longest)
        inputs = {"input_ids": self._to_device(batch.ids, length).long()}
        inputs["attention_mask"] = self._mask(self._to_device(batch.lengths), length)
        if self._takes_types:
            inputs["token_type_ids"] = self._to_device(batch.types, length).long()
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._mixed):
            output = self._model(**inputs)
        return output.start_logits.float(), output.end_logits.float()

    def _mask(self, lengths: torch.Tensor, length: int) -> torch.Tensor:
        real = torch.arange(length, device=self._device) < lengths[:, None]
        if not self._is_paddable or self._model.config._attn_implementation != "sdpa":
            return real.long()
        # The form that attention takes. For any other form, transformers checks whether it masks anything, which waits for the device.
        return real[:, None, None, :].expand(-1, 1, length, -1)

    def _tokens_that_fit(self, length: int) -> int:
        """The tokens that fit into a batch's share of the device's free memory, judged by a small batch."""
        ids = np.zeros((8, length), np.int32)
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        self.run(WindowBatch(ids, ids, np.full(8, length, np.int32)))
        spent = torch.cuda.max_memory_allocated(self._device) - before
        free, _ = torch.cuda.mem_get_info(self._device)
        return max(length, int(_SHARE_OF_MEMORY * free * ids.size / max(spent, 1)))

    def _to_device(self, values: NDArray[np.int32], columns: int = 0) -> torch.Tensor:
        """The values on the device, padded with zeros to ``columns`` columns."""
        on_gpu = self._device.type == "cuda"
        shape = (*values.shape[:1], max(columns, values.shape[1])) if values.ndim > 1 else values.shape
        # A copy from pinned memory does not wait for the GPU.
        # Filled by NumPy: torch would use several threads for it, which keep their cores busy for a while afterwards.
        host = torch.empty(shape, dtype=torch.int32, pin_memory=on_gpu)
        host.numpy()[..., : values.shape[-1]] = values
        host.numpy()[..., values.shape[-1] :] = 0
        return host.to(self._device, non_blocking=on_gpu)

    def _from_device(self, values: torch.Tensor) -> NDArray[Any]:
        if self._device.type != "cuda":
            return values.cpu().numpy()
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        # Wait for this batch alone, not for the next one, which follows it in the same stream.
        # A blocking event leaves the core to others meanwhile.
        copied = torch.cuda.Event(blocking=True)
        copied.record(torch.cuda.current_stream(self._device))
        copied.synchronize()
        return host.numpy()


def _model(files: ModelFiles, precision: Precision) -> Any:
    where = f"model {files.id}"
    if precision == "bf16" and files.family == "deberta":
        raise InputError("transformers' DeBERTa of the first version cannot compute in bf16", where=where, advice="use fp32")
    if files.family == "longformer":
        # It fails on a context that spells out a separator.
        raise InputError(
            "Longformer is not supported: transformers finds the question by separators, which a context may contain",
            where=where,
            advice="use another model",
        )
    try:
        with _no_progress_bar():
            model, report = AutoModelForQuestionAnswering.from_pretrained(
                files.folder,
                dtype=_DTYPES[precision],
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    # A damaged config.json raises errors of many types.
    except Exception as error:
        raise InputError(f"transformers cannot load {files.folder}: {error}", where=where) from error
    # transformers fills missing weights with random numbers. Extractive answers do not use a pooler.
    if missing := sorted(name for name in report["missing_keys"] if "pooler" not in name):
        raise InputError(f"its weights lack {', '.join(missing[:3])}, and {len(missing)} in all", where=where)
    # transformers 5 ignores them, and computes as if positions were absolute.
    if any("distance_embedding" in name for name in report["unexpected_keys"]):
        kind = files.config.get("position_embedding_type")
        raise InputError(
            f"transformers {transformers.__version__} cannot compute its relative positions ({kind})",
            where=where,
            advice="use a model with absolute positions",
        )
    return model


@contextmanager
def _device_errors(device: torch.device) -> Iterator[None]:
    """Raise `DeviceFailed` for errors of the device. Other errors pass, and so does `torch.OutOfMemoryError`."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if not isinstance(error, torch.AcceleratorError) and not any(mark in str(error) for mark in _DEVICE_FAILURES):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise DeviceFailed(
            f"the device failed: {reason}",
            where=str(device),
            advice="a new process tries again; if it fails too, see `nvidia-smi -q` and the Xid messages in the node's kernel log",
        ) from error


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Switch off the progress bar, which transformers shows even if its output is a file."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def torch_device(name: str) -> torch.device:
    """The torch device with this name.

    Raises:
        InputError: there is no such device.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"there is no device {name!r}", advice="use cpu, or a GPU as torch names it: cuda") from error
    if device.type not in ("cpu", "cuda") and not _is_accelerator(device):
        raise InputError(f"this torch ({torch.__version__}) sees no {device.type}", where=f"device {name!r}", advice="use cpu")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(f"torch {torch.__version__} cannot use it: {_why_no_cuda()}", where=f"device {name!r}", advice=_NO_CUDA)
        if (device.index or 0) >= (count := torch.cuda.device_count()):
            raise InputError(
                f"this torch ({torch.__version__}) sees {count} GPUs", where=f"device {name!r}", advice="use cpu, or one of them"
            )
    return device


def _why_no_cuda() -> str:
    """Why torch has no CUDA here, such as an old driver. The number of GPUs does not tell: the driver may list one that CUDA cannot use."""
    try:
        torch.cuda.init()
    # A build without CUDA asserts.
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().partition("\n")[0]
    return "it reports no GPU"


def _is_accelerator(device: torch.device) -> bool:
    """Whether this machine has this device and torch can compute on it."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator is not None and device.type == accelerator.type and (device.index or 0) < torch.accelerator.device_count()
