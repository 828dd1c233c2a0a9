"""No process of a worker outlives its server, however the server ends."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path

# Marks every process of a worker. Its value is the worker's folder.
WORKER_FOLDER_VARIABLE = "QA_PACHD_WORKER"

# Waits for its standard input to close, which means that the server has ended, and kills the marked processes.
_REAPER = f"""
cat > /dev/null
for environment in /proc/[0-9]*/environ; do
    if grep -qzsF "{WORKER_FOLDER_VARIABLE}=$0/" "$environment"; then
        process=${{environment#/proc/}}
        kill -KILL "${{process%/environ}}"
    fi
done
rm -rf "$1"
"""


class Reaper:
    """A small process that kills the processes of workers below ``folder`` when this process is gone.

    It then also removes the folder ``remove``.
    """

    def __init__(self, folder: Path, *, remove: Path) -> None:
        self._process = subprocess.Popen(
            ["sh", "-c", _REAPER, str(folder), str(remove)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def close(self) -> None:
        """Make it do its work now, and wait for it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def kill_leftovers(folder: Path) -> None:
    """Kill the processes that are marked with a worker's folder below ``folder``."""
    mark = f"{WORKER_FOLDER_VARIABLE}={folder}/".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(value.startswith(mark) for value in (process / "environ").read_bytes().split(b"\0")):
                os.kill(int(process.name), signal.SIGKILL)
