"""The files that lie at the top of the project, not in the package: `dagster.yaml`, `workspace.yaml`, the folder `pachyderm`."""

import sys
from pathlib import Path


def project_file(name: str) -> Path:
    """A file or folder of the project: in the checkout that the package runs from, else where its installation has put it.

    Raises:
        FileNotFoundError: it is in neither place.
    """
    candidates = (Path(__file__).resolve().parents[1] / name, Path(sys.prefix) / "share" / "qa-platform" / name)
    for path in candidates:
        if path.exists():
            return path
    raise FileNotFoundError(f"{name} is neither at {candidates[0]} nor at {candidates[1]}; install the package again")
