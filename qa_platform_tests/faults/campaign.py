"""Rounds of faults while files are uploaded. After each round the platform recovers by itself, and every row is accounted for."""

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

from qa_platform.errors import QaPlatformError
from qa_platform_tests.faults.audit import Account, Uploader, audit, parked, unsettled
from qa_platform_tests.faults.catalogue import TARGETS
from qa_platform_tests.faults.victims import Fault
from qa_platform_tests.faults.world import World

_log = logging.getLogger("faults")

# Unfinished uploads while faults are injected.
_BUSY_FILES = 6
# The limit of a recovery: leases expire, retries become due, runs start. On an idle machine, each of these takes seconds.
_RECOVERY_SECONDS = 400.0
# The longest that a target with more faults than another waits before each fault.
_HEAD_START_SECONDS = 6.0
# The limit for a file that is uploaded to an idle platform.
_INNOCENT_SECONDS = 120.0


@dataclass
class Report:
    """The injected faults and their outcome."""

    seed: int
    injected: dict[str, Counter[str]] = field(default_factory=dict)
    account: Account = field(default_factory=Account)
    uploads: int = 0
    parked: int = 0
    commands: int = 0
    # The longest time for a file that was uploaded after a recovery.
    innocent_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def total(self) -> int:
        return sum(hits.total() for hits in self.injected.values())

    @property
    def good(self) -> bool:
        account = self.account
        return not (account.lost or account.duplicated or account.wrong)


def run(state: Path, seed: int, *, total: int, per_round: int, only: str = "") -> Report:
    """Inject faults into a platform in ``state``. Stops after the first round whose account is wrong."""
    begun, report = time.monotonic(), Report(seed)
    _log.info("seed %d", seed)
    rng = random.Random(seed)
    targets = {target: {name: fault for name, fault in faults.items() if only in name} for target, faults in TARGETS.items()}
    targets = {target: faults for target, faults in targets.items() if faults}
    report.injected = {name: Counter() for faults in targets.values() for name in faults}
    world = World(state, rng)
    try:
        world.supervise()
        uploader = Uploader(world, rng)
        while report.total < total and report.good:
            _round(world, uploader, report, targets, until=min(total, report.total + per_round))
            _recover(world, uploader, report)
            report.account = audit(world, uploader)
            report.uploads, report.seconds = len(uploader.all), time.monotonic() - begun
            _log.info("%d faults, %d rows, %s", report.total, report.account.rows, "all accounted for" if report.good else "WRONG")
    finally:
        world.close()
    return report


def _round(world: World, uploader: Uploader, report: Report, targets: Mapping[str, Mapping[str, Fault]], *, until: int) -> None:
    """Inject faults into all targets in parallel, until the total is ``until``."""
    with _kept_busy(world, uploader), ThreadPoolExecutor(len(targets)) as pool:
        injecting = [
            pool.submit(_inject, world, report, faults, random.Random(f"{report.seed} {target} {until}"), until=until)
            for target, faults in targets.items()
        ]
        for working in injecting:
            working.result()


def _inject(world: World, report: Report, faults: Mapping[str, Fault], rng: random.Random, *, until: int) -> None:
    """Inject faults into one target, each kind about equally often. A fault that finds no victim is tried later."""
    while report.total < until:
        fewest = min(report.injected[name].total() for name in faults)
        # While the database is down, other targets have nothing to hit. So a target that is ahead waits for the others, up to a limit.
        lagging = time.monotonic() + _HEAD_START_SECONDS
        while fewest > min(hits.total() for hits in report.injected.values()) and time.monotonic() < lagging:
            time.sleep(0.2)
        due = [name for name in faults if report.injected[name].total() <= fewest + 1]
        rng.shuffle(due)
        for name in sorted(due, key=lambda name: report.injected[name].total()):
            if hit := faults[name](world, rng):
                report.injected[name][hit] += 1
                _log.info("%3d  %s: %s", report.total, name, hit)
                break
        time.sleep(rng.uniform(0, 2))


@contextmanager
def _kept_busy(world: World, uploader: Uploader) -> Iterator[None]:
    """During the block, upload files so that there is always work, and restart dead processes."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(0.3):
            world.supervise()
            # The test's own connections are cut too.
            with suppress(psycopg.Error, QaPlatformError):
                for _ in range(_BUSY_FILES - len(unsettled(world, uploader.newest))):
                    uploader.upload()

    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        try:
            yield
        finally:
            over.set()
            working.result()


def _recover(world: World, uploader: Uploader, report: Report) -> None:
    until = time.monotonic() + _RECOVERY_SECONDS
    while ((left := unsettled(world, uploader.newest)) or world.database_restored) and time.monotonic() < until:
        world.supervise()
        if world.database_restored:
            restoring = world.command("restore")
            world.database_restored = restoring.wait() != 0
        for name in parked(world):
            report.parked += 1
            _log.info("%s is parked; somebody asks for a retry", name)
            with world.ledger() as ledger:
                ledger.request_retries([name])
        time.sleep(1)
    for command in world.commands:
        command.wait()
    report.commands += len(world.commands)
    if world.database_restored:
        restoring.must_succeed = True
    if left:
        _log.info("not settled: %s", left)
        return
    innocent = uploader.innocent()
    begun = time.monotonic()
    while unsettled(world, {innocent.version.name: innocent}) and time.monotonic() - begun < _INNOCENT_SECONDS:
        world.supervise()
        time.sleep(0.5)
    report.innocent_seconds = max(report.innocent_seconds, time.monotonic() - begun)
