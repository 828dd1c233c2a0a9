"""The parent's side of an embedded server: start its process, wait until it serves, and end it.

A server is ``python -m <module> --state DIR --address-file FILE [--token-file FILE]``. It keeps its state in DIR, and writes its address
to the address file once it serves. The token file has the token that clients must send. The server ends on SIGTERM, on SIGINT, and when its
standard input reaches end of file. The parent holds the other end of that pipe, so its servers end even if it is killed with SIGKILL.
`qa_platform.embedded.serving` is the server's side.
"""

import contextlib
import fcntl
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from qa_platform.embedded.private import make_token, own_folder, token_file
from qa_platform.errors import TransientError

logger = logging.getLogger(__name__)

# Servers start in about two seconds on an idle machine, and much more slowly on a busy one.
START_SECONDS = 90.0
STOP_SECONDS = 30.0
_POLL_SECONDS = 0.02
_LOG_TAIL_BYTES = 4000


@dataclass(frozen=True)
class ServerSpec:
    """A server to start.

    Attributes:
        name: the name of the server's folder and log file.
        module: the module that ``python -m`` runs.
        guarded: the server refuses clients that do not send its token (`private.token_file`). Otherwise it is open.
    """

    name: str
    module: str
    guarded: bool = False


# Called repeatedly during a wait. It raises an exception to end the wait.
Check = Callable[[], None]


def no_check() -> None:
    """A check that never ends the wait."""


class RunningServer:
    """A started server process. ``address`` waits until it serves."""

    def __init__(self, spec: ServerSpec, state: Path, *, environment: dict[str, str] | None = None, check: Check = no_check) -> None:
        """Start a server whose state is in ``state/<name>``. It logs to ``state/logs/<name>.log``.

        Args:
            spec: the server.
            state: the folder with the state, the logs and the locks of all servers.
            environment: the server's environment; None for this process's own.
            check: called while an earlier server on the same folder is ending.

        Raises:
            TransientError: an earlier server still holds the folder after STOP_SECONDS.
            InputError: the folder belongs to another user, or others can write to it.
        """
        self.spec = spec
        self._log = state / "logs" / f"{spec.name}.log"
        self._address_file = state / f"{spec.name}.address"
        own_folder(self._log.parent)
        folder = own_folder(state / spec.name)
        command = [sys.executable, "-m", spec.module, "--state", str(folder), "--address-file", str(self._address_file)]
        if spec.guarded:
            make_token(token_file(state, spec.name))
            command += ["--token-file", str(token_file(state, spec.name))]
        # The server inherits the lock, and holds it as long as it lives, even if this process dies.
        with _locked(state / f"{spec.name}.lock", check) as lock, self._log.open("ab") as log:
            self._address_file.unlink(missing_ok=True)
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=(lock.fileno(),),
                env=environment,
                # Outside the terminal's foreground group: Ctrl-C must reach the command, but not the servers, which end after it.
                start_new_session=True,
            )

    def address(self, *, check: Check = no_check) -> str:
        """Wait until the server serves, and return its address.

        Raises:
            TransientError: the server ended, or does not serve after START_SECONDS. The error contains the end of its log.
        """
        deadline = time.monotonic() + START_SECONDS
        while True:
            check()
            if self._address_file.exists():
                return self._address_file.read_text().strip()
            if self._process.poll() is not None:
                raise self._failure(f"embedded {self.spec.name} ended with status {self._process.returncode}")
            if time.monotonic() > deadline:
                raise self._failure(f"embedded {self.spec.name} does not serve after {START_SECONDS:.0f} s")
            time.sleep(_POLL_SECONDS)

    def end(self) -> None:
        """Ask the server to end, without waiting for it."""
        if self._process.stdin:
            self._process.stdin.close()
        self._process.terminate()

    def wait(self) -> None:
        """Wait until the server has ended. Its process group is killed after STOP_SECONDS."""
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            logger.warning("embedded %s does not end; killing it", self.spec.name)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._address_file.unlink(missing_ok=True)

    def kill(self) -> None:
        """Kill the server with SIGKILL, as a crash would."""
        self._process.kill()
        self._process.wait()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _failure(self, what: str) -> TransientError:
        tail = self._log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")
        return TransientError(f"{what}. Its log ends with:\n{tail}", where=str(self._log))


@contextlib.contextmanager
def running(
    specs: Sequence[ServerSpec], state: Path, *, environment: dict[str, str] | None = None, check: Check = no_check
) -> Iterator[dict[str, str]]:
    """Start servers in parallel, yield their addresses by name, and end them in parallel.

    Raises:
        TransientError: a server does not start.
    """
    servers: list[RunningServer] = []
    try:
        # Appended one by one, so that started servers are ended if a later one fails.
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
    """Hold an exclusive lock on a file. Waits up to STOP_SECONDS, because an earlier server may be ending."""
    with path.open("ab") as lock:
        deadline = time.monotonic() + STOP_SECONDS
        while not try_lock(lock):
            check()
            if time.monotonic() > deadline:
                raise TransientError(
                    "another process holds this lock and does not end", where=str(path), advice="find out which process has it open"
                )
            time.sleep(_POLL_SECONDS)
        yield lock


def try_lock(file: IO[bytes]) -> bool:
    """Try to take an exclusive lock on an open file. Returns whether it was free. Closing the last copy of the descriptor releases it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
