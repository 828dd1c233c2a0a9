"""Reading a model's weights out of its safetensors files."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from qa_platform.answering.model import ModelFiles
from qa_platform.errors import InputError

_FLOATS = ("F16", "F32", "F64")


class Weights:
    """A model's tensors by name, as float32. Each is read from disk on access.

    Raises:
        InputError: from ``weights[name]``: there is no such tensor, or it is not floating point.
    """

    def __init__(self, files: ModelFiles) -> None:
        self._model = files.id
        self._tensors: dict[str, Any] = {}
        for path in files.weights:
            file = safe_open(path, framework="numpy")
            for name in file.keys():  # noqa: SIM118  # not a mapping
                # Old checkpoints have TensorFlow's names for scale and shift.
                self._tensors[name.replace(".gamma", ".weight").replace(".beta", ".bias")] = (path, file, name)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        if name not in self._tensors:
            raise InputError(f"its weights lack {name}", where=f"model {self._model}")
        path, file, stored = self._tensors[name]
        kind = file.get_slice(stored).get_dtype()
        if kind == "BF16":
            return _bfloat16(path, stored)
        if kind not in _FLOATS:
            raise InputError(
                f"{path} has {name} in {kind}",
                where=f"model {self._model}",
                advice=f"use weights in one of {', '.join(_FLOATS)}, BF16",
            )
        return np.ascontiguousarray(file.get_tensor(stored).astype(np.float32))


def _bfloat16(path: Path, name: str) -> NDArray[np.float32]:
    """A bfloat16 tensor as float32. NumPy lacks bfloat16, whose values are the upper halves of float32."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        begin, end = header[name]["data_offsets"]
        file.seek(begin, io.SEEK_CUR)
        halves = np.frombuffer(file.read(end - begin), "<u2")
    return (halves.astype(np.uint32) << 16).view(np.float32).reshape(header[name]["shape"])
