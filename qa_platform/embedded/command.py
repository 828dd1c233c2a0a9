"""Run a command so that none of its processes outlives it, or outlives the process that ran it.

Every process of the command carries a mark in its environment. A watcher in its own session waits until the pipe to this process closes,
which also happens if this process is killed with SIGKILL. It then ends all processes with the mark, even detached ones. The watcher is
``python -m qa_platform.embedded.command MARK``.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING

from qa_platform.errors import InputError

if TYPE_CHECKING:
    import psutil

_MARK = "QA_LOCAL_RUN"
# `dagster dev` ends its code servers and runs one by one.
_END_SECONDS = 30.0
_SWEEP_SECONDS = 3.0
_POLL_SECONDS = 0.1


class Signals:
    """Catches this process's SIGINT, SIGTERM and SIGHUP while the context lasts.

    A signal handler never raises: the signal may arrive between the start of a process and the assignment that records it. Before a
    command runs, ``check`` raises the exception. While it runs, signals are forwarded to it, and this process ends when it ends.
    Afterwards a signal ends only the wait for others that use the stack.
    """

    _NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        # When a signal was first forwarded to the command, on the monotonic clock.
        self.forwarded_at: float | None = None
        self._command: subprocess.Popen[bytes] | None = None
        self._taken: int | None = None

    def __enter__(self) -> "Signals":
        self._before = {number: signal.signal(number, self._take) for number in self._NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """End this process if a signal has arrived.

        Raises:
            SystemExit: with status 128 + the signal's number.
        """
        if self._taken is not None:
            raise SystemExit(128 + self._taken)

    def hand_over(self, command: "subprocess.Popen[bytes]") -> None:
        """Forward signals to this command from now on, including one that has already arrived."""
        self._command = command
        if self._taken is not None:
            self._forward(self._taken)

    def _take(self, number: int, _frame: FrameType | None) -> None:
        self._taken = number
        # Ctrl-C in a terminal reaches the command directly.
        if self._command is not None and not (number == signal.SIGINT and _in_foreground()):
            self._forward(number)

    def _forward(self, number: int) -> None:
        assert self._command
        with contextlib.suppress(ProcessLookupError):
            self._command.send_signal(number)
        self.forwarded_at = self.forwarded_at or time.monotonic()


def run_command(command: Sequence[str], environment: Mapping[str, str], signals: Signals) -> int:
    """Run a command, and end all processes that it leaves behind.

    Returns:
        The command's exit status; 128 + n if signal n ended it.

    Raises:
        InputError: the command does not exist or cannot be executed.
    """
    mark = uuid.uuid4().hex
    with _watched(mark):
        signals.check()
        try:
            process = subprocess.Popen(command, env={**environment, _MARK: mark})
        except OSError as error:
            raise InputError(f"cannot run {command[0]!r}: {error.strerror}") from error
        signals.hand_over(process)
        status = _wait(process, signals)
    return status if status >= 0 else 128 - status


def _wait(process: "subprocess.Popen[bytes]", signals: Signals) -> int:
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(_POLL_SECONDS if signals.forwarded_at else 1.0)
        if signals.forwarded_at and time.monotonic() > signals.forwarded_at + _END_SECONDS:
            process.kill()


def _in_foreground() -> bool:
    """Whether this process is in the foreground of its terminal."""
    try:
        terminal = os.open(os.ctermid(), os.O_RDONLY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


@contextlib.contextmanager
def _watched(mark: str) -> Iterator[None]:
    watcher = subprocess.Popen([sys.executable, "-m", __name__, mark], stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        assert watcher.stdin
        watcher.stdin.close()
        watcher.wait()


def _sweep(mark: str) -> None:
    """End every process with the mark: by SIGTERM, then by SIGKILL."""
    import psutil

    for number in (signal.SIGTERM, signal.SIGKILL):
        marked = [process for process in psutil.process_iter() if _carries(process, mark)]
        for process in marked:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        psutil.wait_procs(marked, timeout=_SWEEP_SECONDS)


def _carries(process: "psutil.Process", mark: str) -> bool:
    import psutil

    try:
        return process.environ().get(_MARK) == mark
    except (psutil.Error, OSError):
        return False


if __name__ == "__main__":
    sys.stdin.read()
    _sweep(sys.argv[1])
