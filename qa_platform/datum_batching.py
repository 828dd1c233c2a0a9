"""Pachyderm's datum batching, from the program's side: one process works on datum after datum.

Each call of NextDatum completes the previous datum and returns the environment of the next one. A non-empty error fails the
previous datum: Pachyderm stores the text as its reason, restarts the process, and retries. The process ends when it is killed
while it waits.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import NoReturn

from qa_platform.contract import DatumFault
from qa_platform.errors import InputError, QaPlatformError

_log = logging.getLogger(__name__)

_PFS = PurePosixPath("/pfs")

# The length at which a reported cause is cut. Pachyderm stores it with the datum.
_CAUSE_LIMIT = 4_000

# Works on the datum that an environment describes. An exception fails the datum.
Work = Callable[[Mapping[str, str]], None]


def serve(work: Work, port: int) -> NoReturn:
    """Work on datum after datum until the process is killed or Pachyderm's worker goes away.

    Args:
        port: the port of Pachyderm's worker, on loopback.
    """
    # Imported here, because `fault_of` is also used without datum batching.
    import grpc
    from pachyderm_sdk.api.worker import WorkerStub

    # By address: `localhost` may be ::1 first, where the worker does not listen, and another user of the machine might.
    with grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.enable_http_proxy", 0)]) as channel:
        stub, error = WorkerStub(channel), ""
        while True:
            environment = dict(entry.split("=", 1) for entry in stub.next_datum(error=error).env)
            error = _attempt(work, environment)


def path_of(datum: str, root: Path, *, within: Path) -> Path:
    """The path of a datum as this process sees it. In its environment it begins with ``/pfs``.

    Args:
        root: where the datum's files are. A server without containers puts them below QA_PFS_ROOT.
        within: the folder that must contain it.

    Raises:
        InputError: it lies elsewhere.
    """
    path = Path(datum)
    if not path.is_relative_to(root) and path.is_relative_to(_PFS):
        path = root / path.relative_to(_PFS)
    if ".." in path.parts or not path.is_relative_to(within):
        raise InputError(f"it does not lie in {within}", where=f"datum {datum}")
    return path


def _attempt(work: Work, environment: Mapping[str, str]) -> str:
    """The error to report for a datum with NextDatum; empty on success."""
    try:
        work(environment)
    except Exception as error:
        fault = fault_of(error)
        _log.error("datum failed: %s", fault, exc_info=not isinstance(error, QaPlatformError))
        return fault.to_json()
    return ""


def fault_of(error: Exception) -> DatumFault:
    """The fault to report for an error. Platform errors know whether the file is to blame; for a failing disk or network, or too
    little memory, it never is.
    """
    if isinstance(error, QaPlatformError):
        default = _UNAVAILABLE if error.blameless else _BAD_FILE
        return DatumFault(error.blameless, error.cause[:_CAUSE_LIMIT], error.advice or default)
    cause = f"{type(error).__name__}: {error}"[:_CAUSE_LIMIT]
    if isinstance(error, OSError):
        return DatumFault(True, cause, _UNAVAILABLE)
    if isinstance(error, MemoryError) or "can't start new thread" in cause:
        return DatumFault(True, cause, _TOO_SMALL)
    return DatumFault(False, cause, "report it: the program failed with an unexpected error")


_UNAVAILABLE = "the file is retried automatically; `qa-platform doctor` checks every service"
_TOO_SMALL = "give the workers more memory, or their pods more processes; then the file is retried automatically"
_BAD_FILE = "see the file's error in `qa-platform status FILE`, then `qa-platform retry FILE`"
