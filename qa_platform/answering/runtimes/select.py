"""Choosing a model's runtime: OpenVINO for BERT-like families on CPUs, torch for every other family and for GPUs.

The choice follows measurements on CPUs with AVX-512 and AMX; see docs/performance.md.
"""

import os
from pathlib import Path

from qa_platform.answering.model import ModelFiles
from qa_platform.answering.runtimes.base import Runtime
from qa_platform.contract import Precision
from qa_platform.errors import InputError

_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


def load_runtime(files: ModelFiles, *, precision: Precision, threads: int, device: str = "cpu") -> Runtime:
    """Load a model's weights into OpenVINO if `graph` can build the model, else into torch.

    Raises:
        InputError: this model cannot run in this precision, or it needs torch, which is not installed.
    """
    # A runtime's libraries take a second or more to import, so only the one that is used is imported.
    from qa_platform.answering.runtimes.graph import supports

    if device == "cpu" and supports(files):
        from qa_platform.answering.runtimes.openvino import OpenVinoRuntime

        return OpenVinoRuntime(files, precision=precision, threads=threads)
    if precision == "int8":
        raise InputError(
            f"int8 works for BERT-like models on CPUs, not for {files.family or 'this family'} on {device}",
            where=f"model {files.id}",
            advice="use bf16 or fp32",
        )
    try:
        from qa_platform.answering.runtimes.torch import TorchRuntime
    except ModuleNotFoundError as error:
        raise InputError(
            f"{files.family or 'its family'} on {device} needs {error.name}, which is not installed",
            where=f"model {files.id}",
            advice="pip install 'qa-platform[torch]'",
        ) from error

    return TorchRuntime(files, precision=precision, threads=threads, device=device)


def available_cores() -> int:
    """The number of cores that this process may use: its affinity, capped by its container's CPU quota (cgroup v2), rounded down.

    At least 1.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota(_CPU_MAX)
    return cores if quota is None else max(1, min(cores, quota))


def _cgroup_quota(path: Path) -> int | None:
    try:
        quota, period = path.read_text().split()
        return int(quota) // int(period)
    except (OSError, ValueError):
        return None
