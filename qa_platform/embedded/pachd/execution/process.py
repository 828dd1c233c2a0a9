"""A process of user code, in its own process group. Its output is read line by line as it is printed."""

import contextlib
import logging
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

_LOG = logging.getLogger(__name__)
_LINE_LIMIT = 2**20
_LAST_LINES_SECONDS = 0.5


@dataclass(frozen=True)
class Command:
    """A command. The lines of ``stdin`` are joined, and end with a newline, as in Pachyderm."""

    argv: Sequence[str]
    stdin: Sequence[str]
    env: Mapping[str, str]
    folder: str | None


class UserProcess:
    """A process, started immediately. ``on_change`` is called from another thread when it has ended.

    Raises:
        OSError: the command cannot be started.
    """

    def __init__(self, command: Command, *, on_line: Callable[[str], None], on_change: Callable[[], None]) -> None:
        self._on_line = on_line
        self._on_change = on_change
        self.exit_status: int | None = None
        with tempfile.TemporaryFile() as stdin:
            if command.stdin:
                stdin.write(("\n".join(command.stdin) + "\n").encode())
                stdin.seek(0)
            self._process = subprocess.Popen(
                list(command.argv),
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=dict(command.env),
                cwd=command.folder,
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        threading.Thread(target=self._wait, daemon=True).start()

    def kill(self) -> None:
        """Kill the process and everything that it has started. Once it has ended, do nothing: its pid may belong to another process."""
        if self._process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            while line := stream.readline(_LINE_LIMIT):
                self._on_line(line.decode(errors="replace").rstrip("\r\n"))

    def _wait(self) -> None:
        # The process is not reaped before its group is killed, so that its pid cannot be reused.
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        self.kill()
        status = self._process.wait()
        # A process that left the group may hold the pipe open forever. By the timeout, everything printed so far has been read.
        self._reader.join(_LAST_LINES_SECONDS)
        self.exit_status = status
        self._on_change()
