"""Commands of `qa-platform` that a user runs while the platform works, and how each ended."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

COMMAND_SECONDS = 120.0


@dataclass
class Command:
    """A command of `qa-platform` that was started."""

    arguments: tuple[str, ...]
    process: subprocess.Popen[bytes]
    log: Path
    started: float
    must_succeed: bool = False
    # The database was restored to a state before it.
    is_undone: bool = False

    @classmethod
    def start(cls, arguments: tuple[str, ...], environment: Mapping[str, str], log: Path) -> "Command":
        command = [sys.executable, "-m", "qa_platform.cli.main", *arguments]
        with log.open("wb") as output:
            process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        return cls(arguments, process, log, time.time())

    def wait(self) -> int:
        return self.process.wait(COMMAND_SECONDS)

    @property
    def is_accepted_retry(self) -> bool:
        return self.arguments[0] == "retry" and self.process.returncode == 0 and not self.is_undone

    @property
    def fault(self) -> str:
        """What is wrong with how it ended; "" if nothing. It may refuse or report an unavailable service, unless it must succeed."""
        allowed = {0} if self.must_succeed else {0, 1, os.EX_TEMPFAIL}
        output = self.log.read_text(errors="replace")
        if self.process.returncode in allowed and "Traceback" not in output:
            return ""
        return f"`qa-platform {shlex.join(self.arguments)}` ended with {self.process.returncode}: {output[-2000:]}"
