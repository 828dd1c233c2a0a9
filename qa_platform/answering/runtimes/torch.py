"""The torch runtime: any extractive model that transformers can load, on CPUs and GPUs."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForQuestionAnswering
from transformers.utils import logging

from qa_platform.answering.model import ModelFiles
from qa_platform.answering.runtimes.base import Batch
from qa_platform.contract import Precision
from qa_platform.errors import InputError

_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
_TOKENS = {"cpu": 4096, "cuda": 65536}


class TorchRuntime:
    """A model loaded by transformers. On a GPU two batches run at once, so that one is copied while the other is computed.

    Raises:
        InputError: there is no such device, the model cannot be loaded, or it does not run in this precision.
    """

    def __init__(self, files: ModelFiles, *, precision: Precision, threads: int, device: str) -> None:
        self._device = _device(device)
        self.name = f"torch {torch.__version__} on {self._device}"
        self.requests = 2 if self._device.type == "cuda" else 1
        self.tokens = _TOKENS.get(self._device.type, _TOKENS["cpu"])
        self._takes_types = files.takes_token_types
        where = f"model {files.id}"
        if precision == "bf16" and files.family == "deberta":
            raise InputError("transformers' DeBERTa of the first version cannot compute in bf16", where=where, advice="use fp32")
        # The second version computes positions in float32 whatever its weights are; autocast converts where the two meet.
        self._mixed = precision == "bf16" and files.family == "deberta-v2"
        if self._device.type == "cpu":
            torch.set_num_threads(threads)
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
        # transformers has filled them with random numbers. A pooler has no part in extractive answers.
        if missing := sorted(name for name in report["missing_keys"] if "pooler" not in name):
            raise InputError(f"its weights lack {', '.join(missing[:3])}, and {len(missing)} in all", where=where)
        self._model = model.to(self._device).eval()

    @torch.inference_mode()
    def run(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """See `Runtime.run`."""
        lengths = self._to_device(batch.lengths)
        inputs = {"input_ids": self._to_device(batch.ids).long()}
        inputs["attention_mask"] = (torch.arange(batch.ids.shape[1], device=self._device) < lengths[:, None]).long()
        if self._takes_types:
            inputs["token_type_ids"] = self._to_device(batch.types).long()
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._mixed):
            output = self._model(**inputs)
        logits = self._from_device(torch.stack((output.start_logits, output.end_logits)).float())
        return logits[0], logits[1]

    def _to_device(self, values: NDArray[np.int32]) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        if self._device.type == "cuda":
            # A copy from pinned memory does not wait for the GPU.
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)

    def _from_device(self, values: torch.Tensor) -> NDArray[np.float32]:
        if self._device.type != "cuda":
            return values.cpu().numpy()
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        # Wait for this batch alone, not for the next one, which follows it in the same stream.
        copied = torch.cuda.Event()
        copied.record()
        copied.synchronize()
        return host.numpy()


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Switch off the progress bar, which transformers shows even where its output is a file."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"there is no device {name!r}", advice="use cpu, or a GPU as torch names it: cuda") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise InputError(
            f"this torch ({torch.__version__}) sees {torch.cuda.device_count()} GPUs", where=f"device {name!r}", advice="use cpu"
        )
    return device
