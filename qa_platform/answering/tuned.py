"""The choices for a model on this machine, stored on disk: the precision for ``auto``, from `qa-platform tune`, and the threshold of
"no answer", from `qa-platform evaluate`.

A choice holds for one model, the installed versions of the libraries, and the kind of CPU and GPU.
"""

import functools
import importlib.metadata
import json
import math
import platform
from hashlib import sha256
from pathlib import Path
from typing import Any

from qa_platform.answering.model import ModelFiles
from qa_platform.contract import PRECISIONS, Precision
from qa_platform.errors import InputError
from qa_platform.settings import TuningSettings

_THRESHOLD = "no_answer_threshold"
_PACKAGES = ("qa-platform", "openvino", "torch", "transformers")
# The instructions that decide how fast a CPU computes in each precision.
_CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def tuned_precision(files: ModelFiles, device: str) -> Precision:
    """The precision that was chosen for a model on this machine, or float32."""
    chosen = _read(_path(files, device)).get("chosen")
    return next((precision for precision in PRECISIONS if precision == chosen), "fp32")


def tuned_threshold(files: ModelFiles, device: str) -> float | None:
    """The threshold of "no answer" that was chosen for a model on this machine, if one was."""
    value = _read(_path(files, device)).get(_THRESHOLD)
    return value if isinstance(value, float) and math.isfinite(value) else None


def remember_precision(files: ModelFiles, device: str, document: dict[str, object]) -> None:
    """Write the choice to disk; ``document["chosen"]`` is the precision.

    Raises:
        InputError: there is no folder for it.
    """
    _remember(_path(files, device), document)


def remember_threshold(files: ModelFiles, device: str, threshold: float) -> None:
    """Write the threshold of "no answer" to disk.

    Raises:
        InputError: there is no folder for it.
    """
    _remember(_path(files, device), {_THRESHOLD: threshold})


def _read(path: Path | None) -> dict[str, Any]:
    """The choices on disk. Empty if there are none, or no folder for them."""
    if path is None:
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _remember(path: Path | None, choices: dict[str, object]) -> None:
    """Write choices to disk. Other stored choices stay."""
    if path is None:
        raise InputError("this user has no home folder to store the choice in", advice="set QA_CACHE_DIR to a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**_read(path), **choices}, indent=1), encoding="utf-8")


def _path(files: ModelFiles, device: str) -> Path | None:
    """The file of the choices; None if the folder is in a home that this user does not have."""
    key = json.dumps([files.revision, device, _gpu(device), _versions(), _cpu()])
    try:
        folder = TuningSettings().cache_dir.expanduser()
    except RuntimeError:
        return None
    return folder / "tuned" / f"{sha256(key.encode()).hexdigest()[:24]}.json"


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
