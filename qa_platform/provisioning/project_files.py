"""The files at the top of the project, outside the package: `dagster.yaml`, `workspace.yaml`, the folder `pachyderm`."""

import sys
from pathlib import Path


def project_file(name: str) -> Path:
    """The path of a file or folder of the project: in the checkout that the package runs from, else in its installation.

    Raises:
        FileNotFoundError: it is in neither.
    """
    candidates = (Path(__file__).resolve().parents[2] / name, Path(sys.prefix) / "share" / "qa-platform" / name)
    for path in candidates:
        if path.exists():
            return path
    raise FileNotFoundError(f"{name} is neither at {candidates[0]} nor at {candidates[1]}; install the package again")
