"""The process of a datum batching pipeline: it asks for one datum after the other, and is started again when it fails."""

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
    """An attempt at a datum has failed; the message is the reason that the datum gets."""


class Cancelled(Exception):
    """The job was stopped meanwhile."""


class Process(Protocol):
    """A user's process that has been started."""

    exit_status: int | None

    def kill(self) -> None: ...


def exit_text(status: int | None) -> str:
    """How Pachyderm words the end of a process."""
    if status is not None and status < 0:
        return f"signal: {(signal.strsignal(-status) or str(-status)).lower()}"
    return f"exit status {status}"


def duration_text(seconds: float) -> str:
    return f"{seconds * 1000:.6f}ms" if seconds < 1 else f"{seconds:.9f}s"


class BatchProcess:
    """The process of one datum set, and its successors.

    ``launch`` starts one; it is told whether it is a successor. ``note`` takes lines for the log.
    """

    def __init__(self, *, launch: Callable[["BatchProcess", bool], Process], note: Callable[[str], None]) -> None:
        self._launch = launch
        self._note = note
        self._changed = threading.Condition()
        self._process: Process | None = None
        self._began = 0.0
        self._starts = 0
        # A call that an earlier process left behind must not take what is meant for its successor.
        self._generation = 0
        # What the process said of its last datum when it asked for the next one; None while it works on one.
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
        """Starts the process and returns when it has asked for a datum, which every process must do.

        Raises:
            DatumError: it ended instead.
            Cancelled: it was killed meanwhile.
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
        """Hands over a datum and returns when the process has asked for the next one. After a failure there is a new process.

        Where even that one could not start, all further datums pass as if they had been processed: so does Pachyderm.

        Raises:
            DatumError: it reported an error, has ended, or took too long.
            Cancelled: it was killed meanwhile.
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
        """What is wrong with the datum; empty if nothing."""
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
        """Kills a process that has not ended, and then lets go whoever waits for it: it must not see that its call has ended."""
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
        """What the process calls: ends the datum that it had, and blocks until there is another."""
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
        """Ends the process, and whoever waits for it. The last NextDatum never returns."""
        with self._changed:
            again, self._killed = self._killed, True
            if self._process is not None and not again:
                self._stop(self._process)
            self._changed.notify_all()
