"""Finds and awaits processes, for tests that start and end them."""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil

LIMIT_SECONDS = 120.0

T = TypeVar("T")


def until(condition: Callable[[], T]) -> T:
    """Wait until a condition is true, and return its value."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
    return value


def processes_of(state: Path) -> list[psutil.Process]:
    """The processes of a stack, recognised by their command line, their working folder, or their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = [*process.cmdline(), process.cwd(), process.environ().get("DAGSTER_HOME", "")]
            if process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE and any(str(state) in word for word in words):
                found.append(process)
    return found
