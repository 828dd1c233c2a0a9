"""The type of a fault, and finding the process that a fault hits."""

import random
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from qa_platform_tests.faults.world import World

# A fault returns what it hit, or "" if there was nothing to hit.
Fault = Callable[[World, random.Random], str]

# The longest that a fault waits for a request or a process of the platform.
PATIENCE_SECONDS = 8.0


def hit_process(world: World, rng: random.Random, kind: str, act: Callable[[psutil.Process], object]) -> str:
    """Do something to a process of a kind, at a random point between its start and its end."""
    until = time.monotonic() + PATIENCE_SECONDS
    wait = rng.choice([0, 0.3, rng.uniform(0, 3)])
    while time.monotonic() < until:
        victims = world.processes(kind)
        if victims and wait:
            time.sleep(wait)
            wait = 0
            continue
        rng.shuffle(victims)
        for process in victims:
            with suppress(psutil.Error):
                words = process.cmdline()
                act(process)
                return next((word for word in words if word.startswith("qa_platform.")), "a run")
        time.sleep(0.1)
    return ""


def fill_disk_of(server: str) -> Fault:
    """Prevent a server from writing beyond the first bytes of any file, as on a full disk."""

    def fault(world: World, rng: random.Random) -> str:
        process = world.server_process(server)
        soft, hard = process.rlimit(psutil.RLIMIT_FSIZE)
        limit = rng.randint(0, 100_000)
        process.rlimit(psutil.RLIMIT_FSIZE, (limit, hard))
        time.sleep(rng.uniform(0.5, 5))
        process.rlimit(psutil.RLIMIT_FSIZE, (soft, hard))
        return server

    return fault


def copy_folder(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
