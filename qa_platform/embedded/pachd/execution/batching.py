"""The process of a pipeline with datum batching. It requests one datum after the other, and is restarted when it fails."""

import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from qa_platform.embedded.pachd.errors import PachError

_CANCELLED = "context canceled"
# A killed process ends at once, unless the machine is stuck.
_DEATH_SECONDS = 10.0


class DatumError(Exception):
    """An attempt at a datum has failed. The message becomes the datum's reason."""


class Cancelled(Exception):
    """The job was stopped in the meantime."""


class Process(Protocol):
    """A running process of user code."""

    exit_status: int | None

    def kill(self) -> None: ...


def exit_text(status: int | None) -> str:
    """Pachyderm's text for the end of a process."""
    if status is not None and status < 0:
        return f"signal: {(signal.strsignal(-status) or str(-status)).lower()}"
    return f"exit status {status}"


def duration_text(seconds: float) -> str:
    return f"{seconds * 1000:.6f}ms" if seconds < 1 else f"{seconds:.9f}s"


class BatchProcess:
    """The process of one datum set, and its restarts.

    Args:
        launch: starts a process. It is given this object, and whether this is a restart.
        note: writes a line to the log.
    """

    def __init__(self, *, launch: Callable[["BatchProcess", bool], Process], note: Callable[[str], None]) -> None:
        self._launch = launch
        self._note = note
        self._changed = threading.Condition()
        self._process: Process | None = None
        self._began = 0.0
        self._starts = 0
        # Incremented at each restart: a pending call of an earlier process must not take its successor's datum.
        self._generation = 0
        # The error of the last datum, as reported with the request for the next one; None while the process works on a datum.
        self._asked: str | None = None
        self._offer: Sequence[str] | None = None
        self._gone = False
        self._killed = False

    @property
    def process(self) -> Process:
        assert self._process is not None
        return self._process

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def start(self) -> None:
        """Start the process, and return once it has requested a datum, which every process must do.

        Raises:
            DatumError: it ended instead.
            Cancelled: it was killed in the meantime.
        """
        with self._changed:
            self._note("beginning to run user code")
            self._began = time.monotonic()
            self._asked = None
            self._starts += 1
            process = self._process = self._launch(self, self._starts > 1)
            if self._killed:
                process.kill()
            self._changed.wait_for(lambda: self._killed or self._asked is not None or process.exit_status is not None)
            if self._killed:
                raise Cancelled
            if self._asked is None:
                raise DatumError(self._ended(process))

    def process_datum(self, environment: Sequence[str], timeout: float | None) -> None:
        """Hand over a datum, and return once the process has requested the next one. After a failure, the process is restarted.

        If the restart fails too, all further datums count as processed, as in Pachyderm.

        Raises:
            DatumError: the process reported an error, ended, or took too long.
            Cancelled: it was killed in the meantime.
        """
        with self._changed:
            if self._gone:
                return
            problem = self._converse(self.process, environment, timeout)
            if problem == "":
                return
            self._stop(self.process)
            try:
                self.start()
            except DatumError as error:
                self._gone = True
                problem = f"{problem}\nerror restarting user code: {error}"
        raise DatumError(problem)

    def _converse(self, process: Process, environment: Sequence[str], timeout: float | None) -> str:
        """Hand over a datum and wait. Returns the problem with it; empty if there is none."""
        self._offer, self._asked = environment, None
        self._changed.notify_all()
        done = self._changed.wait_for(
            lambda: self._killed or (self._offer is None and self._asked is not None) or process.exit_status is not None, timeout
        )
        if self._killed:
            raise Cancelled
        answer, self._offer = (self._asked if self._offer is None else None), None
        if answer is not None:
            return answer
        return self._ended(process) if done else "context deadline exceeded"

    def _ended(self, process: Process) -> str:
        text = exit_text(process.exit_status)
        self._note(f"errored running user code after {duration_text(time.monotonic() - self._began)}: {text}")
        return f"error running user code: {text if process.exit_status else 'user code exited prematurely'}"

    def _stop(self, process: Process) -> None:
        """Kill a process that has not ended, then release its pending call. In this order, so that it never sees the call end."""
        ended = process.exit_status is not None
        if not ended:
            process.kill()
        self._generation += 1
        self._changed.notify_all()
        if not ended:
            self._changed.wait_for(lambda: process.exit_status is not None, _DEATH_SECONDS)
            took = duration_text(time.monotonic() - self._began)
            self._note(f"errored running user code after {took}: {exit_text(process.exit_status)} because {_CANCELLED}")

    def next_datum(self, error: str, alive: Callable[[], bool]) -> list[str]:
        """Serve a call of the process: end its last datum with ``error``, and block until there is another one."""
        with self._changed:
            generation = self._generation
            self._asked = error
            self._changed.notify_all()
            while self._offer is None and generation == self._generation and not self._killed and alive():
                self._changed.wait(1.0)
            if self._offer is None or generation != self._generation or not alive():
                raise PachError("there is no further datum for this process")
            environment, self._offer, self._asked = list(self._offer), None, None
            return environment

    def kill(self) -> None:
        """End the process and everything that waits for it. Its last NextDatum never returns."""
        with self._changed:
            again, self._killed = self._killed, True
            if self._process is not None and not again:
                self._stop(self._process)
            self._changed.notify_all()
