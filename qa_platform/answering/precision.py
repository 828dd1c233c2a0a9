"""The precision ``auto``: the one that `qa-platform tune` chose for a model on this machine, kept on disk; float32 before that.

A choice holds for one model, the versions of the libraries, and the kind of CPU and GPU.
"""

import functools
import importlib.metadata
import json
import platform
from hashlib import sha256
from pathlib import Path

from qa_platform.answering.model import ModelFiles
from qa_platform.contract import PRECISIONS, Precision
from qa_platform.settings import TuningSettings

_PACKAGES = ("qa-platform", "openvino", "torch", "transformers")
# The instructions that decide how fast a CPU computes in each precision.
_CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def tuned_precision(files: ModelFiles, device: str) -> Precision:
    """The precision that was chosen for a model on this machine, or float32."""
    try:
        chosen = json.loads(_path(files, device).read_text(encoding="utf-8"))["chosen"]
    except (OSError, ValueError, KeyError, TypeError):
        return "fp32"
    return next((precision for precision in PRECISIONS if precision == chosen), "fp32")


def remember_precision(files: ModelFiles, device: str, document: dict[str, object]) -> None:
    """Write the choice to disk; ``document["chosen"]`` is the precision."""
    path = _path(files, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1), encoding="utf-8")


def _path(files: ModelFiles, device: str) -> Path:
    key = json.dumps([files.id, files.revision, device, _gpu(device), _versions(), _cpu()])
    return TuningSettings().cache_dir.expanduser() / "tuned" / f"{sha256(key.encode()).hexdigest()[:24]}.json"


def _versions() -> list[str]:
    versions = []
    for package in _PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} absent")
    return versions


def _gpu(device: str) -> str:
    if device == "cpu":
        return ""
    import torch

    try:
        return torch.cuda.get_device_name(device)
    except (AssertionError, RuntimeError, ValueError):
        # There is no such GPU; loading the model raises an error that says so.
        return ""


@functools.cache
def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    flags = set(facts.get("flags", "").split())
    return f"{facts.get('model name', platform.machine())} {' '.join(flag for flag in _CPU_FLAGS if flag in flags)}"
