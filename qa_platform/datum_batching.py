"""Pachyderm's datum batching, from the program's side: one process works on datum after datum.

Each call of NextDatum completes the datum before it and brings the next one's environment. A non-empty error fails that datum:
Pachyderm keeps the text as the datum's reason, starts the process again, and retries. The process ends by being killed while it
waits.
"""

import logging
from collections.abc import Callable, Mapping
from typing import NoReturn

from qa_platform.contract import DatumFault
from qa_platform.errors import QaPlatformError

_log = logging.getLogger(__name__)

# Characters of a cause that are reported. Pachyderm stores them with the datum.
_CAUSE_LIMIT = 4_000

# Works on the datum that an environment describes; what it raises fails the datum.
Work = Callable[[Mapping[str, str]], None]


def serve(work: Work, port: int) -> NoReturn:
    """Work on datum after datum until the process is killed, or Pachyderm's worker goes away.

    Args:
        port: of Pachyderm's worker, on loopback.
    """
    # Here, not above: what a program reports is also wanted where datums are not batched.
    import grpc
    from pachyderm_sdk.api.worker import WorkerStub

    with grpc.insecure_channel(f"localhost:{port}") as channel:
        stub, error = WorkerStub(channel), ""
        while True:
            environment = dict(entry.split("=", 1) for entry in stub.next_datum(error=error).env)
            error = _attempt(work, environment)


def _attempt(work: Work, environment: Mapping[str, str]) -> str:
    """What NextDatum reports of a datum; empty for success."""
    try:
        work(environment)
    except Exception as error:
        fault = fault_of(error)
        _log.error("datum failed: %s", fault, exc_info=not isinstance(error, QaPlatformError))
        return fault.to_json()
    return ""


def fault_of(error: Exception) -> DatumFault:
    """What to report of an error. Platform errors know who is to blame; a failing disk or network is nobody's fault."""
    if isinstance(error, QaPlatformError):
        default = _UNAVAILABLE if error.blameless else _BAD_FILE
        return DatumFault(error.blameless, error.cause[:_CAUSE_LIMIT], error.advice or default)
    cause = f"{type(error).__name__}: {error}"[:_CAUSE_LIMIT]
    if isinstance(error, OSError):
        return DatumFault(True, cause, _UNAVAILABLE)
    return DatumFault(False, cause, "report it: the program failed in a way that it does not know")


_UNAVAILABLE = "the file is tried again by itself; `qa-platform doctor` looks at every service"
_BAD_FILE = "see what is said of the file, then `qa-platform retry FILE`"
