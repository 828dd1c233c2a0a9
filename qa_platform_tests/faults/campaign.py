"""Rounds of faults while files are uploaded; after each the platform recovers by itself, and every row is accounted for."""

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

from qa_platform import bookkeeping
from qa_platform.errors import QaPlatformError
from qa_platform_tests.faults.audit import Account, Uploader, audit, parked, unsettled
from qa_platform_tests.faults.injection import FAULTS
from qa_platform_tests.faults.world import World

_log = logging.getLogger("faults")

# Uploads that wait or are worked on while faults are injected.
_BUSY_FILES = 6
# Recovery: a lease that runs out, a retry that is due, a run that is started. All take seconds each on an idle machine.
_RECOVERY_SECONDS = 400.0


@dataclass
class Report:
    """What was injected where, and what came of it."""

    seed: int
    injected: dict[str, Counter[str]] = field(default_factory=dict)
    account: Account = field(default_factory=Account)
    uploads: int = 0
    parked: int = 0
    seconds: float = 0.0

    @property
    def total(self) -> int:
        return sum(hits.total() for hits in self.injected.values())

    @property
    def good(self) -> bool:
        account = self.account
        return not (account.lost or account.duplicated or account.wrong)


def run(state: Path, seed: int, *, faults: int, per_round: int, only: str = "") -> Report:
    """Inject faults into a platform in ``state``; stops after the first round whose account is not right."""
    begun, report = time.monotonic(), Report(seed)
    _log.info("seed %d", seed)
    rng = random.Random(seed)
    names = [name for name in FAULTS if only in name]
    report.injected = {name: Counter() for name in names}
    world = World(state, rng)
    try:
        world.supervise()
        uploader = Uploader(world, rng)
        while report.total < faults and report.good:
            _round(world, uploader, report, rng, until=min(faults, report.total + per_round))
            _recover(world, uploader, report)
            report.account = audit(world, uploader)
            report.uploads, report.seconds = len(uploader.all), time.monotonic() - begun
            _log.info("%d faults, %d rows, %s", report.total, report.account.rows, "all accounted for" if report.good else "WRONG")
    finally:
        world.close()
    return report


def _round(world: World, uploader: Uploader, report: Report, rng: random.Random, *, until: int) -> None:
    """Inject faults until there were that many, each kind about as often; what finds no victim is tried later."""
    with _kept_busy(world, uploader):
        while report.total < until:
            fewest = min(hits.total() for hits in report.injected.values())
            due = [name for name, hits in report.injected.items() if hits.total() <= fewest + 1]
            rng.shuffle(due)
            for name in sorted(due, key=lambda name: report.injected[name].total()):
                if hit := FAULTS[name](world, rng):
                    report.injected[name][hit] += 1
                    _log.info("%3d  %s: %s", report.total, name, hit)
                    break
            time.sleep(rng.uniform(0, 2))


@contextmanager
def _kept_busy(world: World, uploader: Uploader) -> Iterator[None]:
    """Upload so that there is always something to do, and start what has died, for as long as the block lasts."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(0.3):
            world.supervise()
            # The test's own connections are cut as well.
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
    while (left := unsettled(world, uploader.newest)) and time.monotonic() < until:
        world.supervise()
        for name in parked(world):
            report.parked += 1
            _log.info("%s is parked; somebody asks for a retry", name)
            with world.database() as connection:
                bookkeeping.request_retry(connection, name)
        time.sleep(1)
    if left:
        _log.info("not settled: %s", left)
