"""The server's side of an embedded server: its arguments, its address file, and the request to end.

`qa_platform.embedded.supervise` describes how servers are started and ended.
"""

import argparse
import logging
import os
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ServerArguments:
    """The command line of a server.

    Attributes:
        state: the folder of everything that must survive a restart.
        address_file: the file that receives the server's address once it serves.
        token: the token that every client must send; empty for an open server.
    """

    state: Path
    address_file: Path
    token: str = ""


def server_arguments(description: str) -> ServerArguments:
    """Parse a server's command line, and start logging to standard error. Files created from now on are private to their owner."""
    os.umask(0o077)
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--state", type=Path, required=True, help="folder of everything that must survive a restart")
    parser.add_argument("--address-file", type=Path, required=True, help="file to write the address to once the server serves")
    parser.add_argument(
        "--token-file", type=Path, help="file with the token that clients must send; without it the server is open to everybody"
    )
    arguments = parser.parse_args()
    token = arguments.token_file.read_text().strip() if arguments.token_file else ""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    return ServerArguments(arguments.state.resolve(), arguments.address_file.resolve(), token)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file atomically: a reader sees the old or the new text, never a part. Only the owner can read the file."""
    # `tempfile` creates files with mode 0600.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(text)
    Path(file.name).replace(path)


class Shutdown:
    """The request to end a server: SIGTERM, SIGINT, or end of file on standard input.

    It installs signal handlers, so it must be created on the main thread.
    """

    def __init__(self) -> None:
        self._wakeup, written = os.pipe()
        os.set_blocking(written, False)
        self._requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request)
        # Only interrupts `wait` when a child process has ended.
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(written, warn_on_full_buffer=False)

    def _request(self, *_: object) -> None:
        self._requested = True

    def wait(self, seconds: float | None = None, *, unless: Callable[[], bool] = lambda: False) -> bool:
        """Wait for the request. Returns whether it has arrived.

        Args:
            seconds: the longest wait; None for no limit.
            unless: ends the wait early when it returns true. It is called again whenever a child process has ended.
        """
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
