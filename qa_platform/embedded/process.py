"""Embedded servers as processes: how a stack starts one, knows that it serves, and makes sure that it ends.

A server is ``python -m <module> --state DIR --address-file FILE``. It keeps all that must survive in DIR, writes its address into
FILE once it serves, and ends on SIGTERM, on SIGINT, and when its standard input reaches end of file. Its parent holds the
other end of that pipe, so that even a parent killed with SIGKILL takes its servers with it.

The first half of this module is for the parent, the second for the servers.
"""

import argparse
import contextlib
import fcntl
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from qa_platform.errors import TransientError

logger = logging.getLogger(__name__)

# A machine that is busy with other things starts servers slowly; on an idle one they take about two seconds.
START_SECONDS = 90.0
STOP_SECONDS = 30.0
_POLL_SECONDS = 0.02
_LOG_TAIL_BYTES = 4000


@dataclass(frozen=True)
class ServerSpec:
    """A server that can be started: its name is that of its log and its folder, ``module`` is what ``python -m`` runs."""

    name: str
    module: str


# Called again and again while something is waited for, it ends the waiting by an exception of its own.
Check = Callable[[], None]


def no_check() -> None:
    """Wait on."""


class RunningServer:
    """A started server. ``address`` waits until it serves."""

    def __init__(self, spec: ServerSpec, state: Path, *, environment: dict[str, str] | None = None, check: Check = no_check) -> None:
        """Start a server on ``state/<name>``; its messages go to ``state/logs/<name>.log``.

        Raises:
            TransientError: an earlier server still holds that folder and does not let go of it.
        """
        self.spec = spec
        self._log = state / "logs" / f"{spec.name}.log"
        self._address_file = state / f"{spec.name}.address"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        folder = state / spec.name
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", spec.module, "--state", str(folder), "--address-file", str(self._address_file)]
        # The server inherits the lock and holds it for as long as it lives, whatever becomes of this process.
        with _locked(state / f"{spec.name}.lock", check) as lock, self._log.open("ab") as log:
            self._address_file.unlink(missing_ok=True)
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=(lock.fileno(),),
                env=environment,
                # Out of the terminal's foreground group: Ctrl-C is for the command; the servers go when it is done.
                start_new_session=True,
            )

    def address(self, *, check: Check = no_check) -> str:
        """The server's address, once it serves.

        Raises:
            TransientError: it ended, or does not serve after START_SECONDS; the message holds the end of its log.
        """
        deadline = time.monotonic() + START_SECONDS
        while True:
            check()
            if self._address_file.exists():
                return self._address_file.read_text().strip()
            if self._process.poll() is not None:
                raise TransientError(f"embedded {self.spec.name} ended with status {self._process.returncode}: {self._log_tail()}")
            if time.monotonic() > deadline:
                raise TransientError(f"embedded {self.spec.name} does not serve after {START_SECONDS:.0f} s: {self._log_tail()}")
            time.sleep(_POLL_SECONDS)

    def end(self) -> None:
        """Ask the server to end; return at once."""
        if self._process.stdin:
            self._process.stdin.close()
        self._process.terminate()

    def wait(self) -> None:
        """Wait until the server has ended; after STOP_SECONDS its process group is killed."""
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            logger.warning("embedded %s does not end; killing it", self.spec.name)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._address_file.unlink(missing_ok=True)

    def kill(self) -> None:
        """Kill the server without warning, as a crash would."""
        self._process.kill()
        self._process.wait()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _log_tail(self) -> str:
        return f"see {self._log}\n{self._log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors='replace')}"


@contextlib.contextmanager
def running(
    specs: Sequence[ServerSpec], state: Path, *, environment: dict[str, str] | None = None, check: Check = no_check
) -> Iterator[dict[str, str]]:
    """Start servers side by side; yield their addresses by name; end them side by side.

    Raises:
        TransientError: one of them does not start.
    """
    servers: list[RunningServer] = []
    try:
        # One by one into the list, so that those already started are ended where a later one fails.
        for spec in specs:
            servers.append(RunningServer(spec, state, environment=environment, check=check))  # noqa: PERF401
        yield {server.spec.name: server.address(check=check) for server in servers}
    finally:
        for server in servers:
            server.end()
        for server in servers:
            server.wait()


@contextlib.contextmanager
def _locked(path: Path, check: Check) -> Iterator[IO[bytes]]:
    """Hold an exclusive lock on a file, which must be free within STOP_SECONDS: a server of before may be on its way out."""
    with path.open("ab") as lock:
        deadline = time.monotonic() + STOP_SECONDS
        while not try_lock(lock):
            check()
            if time.monotonic() > deadline:
                raise TransientError(f"{path} is held by another process, which does not end; see who has it open")
            time.sleep(_POLL_SECONDS)
        yield lock


def try_lock(file: IO[bytes]) -> bool:
    """Take an exclusive lock on an open file, if nobody has it. It is held until the last copy of the descriptor is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@dataclass(frozen=True)
class ServerArguments:
    """What a server is told."""

    state: Path
    address_file: Path


def server_arguments(description: str) -> ServerArguments:
    """Parse a server's command line, and begin to log to standard error."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--state", type=Path, required=True, help="folder of everything that must survive")
    parser.add_argument("--address-file", type=Path, required=True, help="written when the server serves")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    return ServerArguments(arguments.state.resolve(), arguments.address_file.resolve())


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one step: a reader sees the old text or the new one."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(text)
    Path(file.name).replace(path)


class Ending:
    """Notices that a server has to end: SIGTERM, SIGINT, or end of file on standard input. For a process's main thread."""

    def __init__(self) -> None:
        self._wakeup, written = os.pipe()
        os.set_blocking(written, False)
        self._requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request)
        # Only there to interrupt `wait` when a child has ended.
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(written, warn_on_full_buffer=False)

    def _request(self, *_: object) -> None:
        self._requested = True

    def wait(self, seconds: float | None = None, *, unless: Callable[[], bool] = lambda: False) -> bool:
        """Whether the server has to end; waits for that at most ``seconds``, or until a child has ended and ``unless`` is true."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while not self._requested and not unless():
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([sys.stdin, self._wakeup], [], [], left)
            if sys.stdin in ready and not os.read(sys.stdin.fileno(), 4096):
                self._requested = True
            if self._wakeup in ready:
                os.read(self._wakeup, 4096)
            if deadline is not None and time.monotonic() >= deadline:
                break
        return self._requested
