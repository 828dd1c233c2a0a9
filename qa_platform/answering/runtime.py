"""What runs a model: OpenVINO on CPUs for the BERT line of families, torch for every other family and for GPUs.

Measured on CPUs with AVX-512 and AMX; see the README for the table.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qa_platform.answering.model import ModelFiles
from qa_platform.contract import Precision
from qa_platform.errors import InputError


@dataclass(frozen=True)
class Batch:
    """Windows padded on the right. ``ids`` and ``types`` have shape (windows, tokens); ``lengths`` (windows,)."""

    ids: NDArray[np.int32]
    types: NDArray[np.int32]
    lengths: NDArray[np.int32]


class Runtime(Protocol):
    """A loaded model. ``run`` may be called by ``requests`` threads at once, with at most ``tokens`` tokens a batch.

    ``name`` says what runs it, with its version.
    """

    name: str
    requests: int
    tokens: int

    def run(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Start and end logits, each of shape (windows, tokens)."""
        ...


def load_runtime(files: ModelFiles, *, precision: Precision, threads: int, device: str = "cpu") -> Runtime:
    """Load a model's weights: OpenVINO where it knows the family, else torch.

    Raises:
        InputError: this model cannot run in this precision.
    """
    from qa_platform.answering import openvino_runtime

    if device == "cpu" and openvino_runtime.knows(files):
        return openvino_runtime.OpenVinoRuntime(files, precision=precision, threads=threads)
    if precision == "int8":
        raise InputError(
            f"model {files.id}: int8 is there for the BERT line of models on CPUs, not for {files.family or 'this family'} on {device}; "
            "take bf16 or fp32"
        )
    from qa_platform.answering import torch_runtime

    return torch_runtime.TorchRuntime(files, precision=precision, threads=threads, device=device)


def available_cores() -> int:
    """Cores that this process may use: its affinity, and the CPU quota of its container (cgroup v2), rounded down."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _cgroup_quota(Path("/sys/fs/cgroup/cpu.max")) or cores))


def _cgroup_quota(path: Path) -> int | None:
    try:
        quota, period = path.read_text().split()
        return int(quota) // int(period)
    except (OSError, ValueError):
        return None
