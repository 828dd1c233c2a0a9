"""The faults: what each one does to the world, and whether it found a victim."""

import random
import time
from collections.abc import Callable
from contextlib import suppress

import psutil

from qa_platform_tests.faults.proxies import CUT
from qa_platform_tests.faults.world import LEASE_SECONDS, World, resume_later

# How long a fault that waits for a request of the platform waits.
_PATIENCE_SECONDS = 8.0

# Each returns what it hit, or "" where there was nothing to hit just then.
Fault = Callable[[World, random.Random], str]


def kill_run(world: World, rng: random.Random) -> str:
    return _each(world, rng, "run", psutil.Process.kill)


def terminate_run(world: World, rng: random.Random) -> str:
    """Tell a run to end, as Dagster does when somebody terminates it."""
    return _each(world, rng, "run", psutil.Process.terminate)


def stall_run(world: World, rng: random.Random) -> str:
    """Stop a run for longer than its claims last, so that it wakes up when others do its work."""

    def stall(process: psutil.Process) -> None:
        process.suspend()
        resume_later(process, LEASE_SECONDS * 1.5)

    return _each(world, rng, "run", stall)


def kill_daemon(world: World, rng: random.Random) -> str:
    world.kill_daemon()
    return "daemon"


def kill_pachd(world: World, rng: random.Random) -> str:
    world.restart_pachd()
    return "pachd"


def cut_off_pachd(world: World, rng: random.Random) -> str:
    with world.pachd.closed():
        time.sleep(rng.uniform(0.2, 6))
    return "connections to pachd"


def kill_worker(world: World, rng: random.Random) -> str:
    return _each(world, rng, "worker", psutil.Process.kill)


def fill_disk(world: World, rng: random.Random) -> str:
    """Let a pipeline worker write no more than a few bytes into any file, as on a disk that is full."""

    def fill(process: psutil.Process) -> None:
        limit = rng.randint(0, 2000)
        process.rlimit(psutil.RLIMIT_FSIZE, (limit, limit))

    return _each(world, rng, "worker", fill)


def kill_postgres(world: World, rng: random.Random) -> str:
    world.kill_postgres(seconds=rng.choice([0, 0, rng.uniform(0, 5)]))
    return "postmaster"


def kill_backend(world: World, rng: random.Random) -> str:
    return "a backend" if world.kill_backend(rng) else ""


def refuse_postgres(world: World, rng: random.Random) -> str:
    with world.postgres_refuses():
        time.sleep(rng.uniform(0.5, 6))
    return "connections to PostgreSQL"


def two_sensors(world: World, rng: random.Random) -> str:
    world.tell_agent({"do": "sensors"})
    return "two more sensors"


def same_run_twice(world: World, rng: random.Random) -> str:
    query = """
        SELECT claim_owner, batch_id, array_agg(source_file ORDER BY source_file), array_agg(generation ORDER BY source_file)
        FROM question_file WHERE claim_until > now() AND batch_id <> '' AND claim_owner = dagster_run GROUP BY 1, 2
    """
    with world.database() as connection:
        found = connection.execute(query).fetchall()
    if not found:
        return ""
    run, batch, names, generations = rng.choice(found)
    world.tell_agent({"do": "again", "run": run, "batch": batch, "versions": list(zip(names, generations, strict=True))})
    return "a run"


def bucket_answers(kind: str) -> Fault:
    def fault(world: World, rng: random.Random) -> str:
        # Any request, or one of those that are rare and matter most.
        on = rng.choice([None, "read", "copy", "delete"]) if kind != CUT else None
        world.proxy.arm(kind, on=on, count=rng.choice([1, 1, 2, 4, 12]))
        until = time.monotonic() + _PATIENCE_SECONDS
        while not world.proxy.spoilt and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 2))
        world.proxy.disarm()
        return ", ".join(sorted(set(world.proxy.spoilt)))

    return fault


FAULTS: dict[str, Fault] = {
    "kill -9 of a run worker": kill_run,
    "termination of a run worker": terminate_run,
    "kill -9 of the daemon": kill_daemon,
    "kill -9 of pachd": kill_pachd,
    "kill -9 of a pipeline worker": kill_worker,
    "kill -9 of PostgreSQL": kill_postgres,
    "kill -9 of a PostgreSQL backend": kill_backend,
    "PostgreSQL refuses connections": refuse_postgres,
    "pachd cut off": cut_off_pachd,
    "bucket answers 429": bucket_answers("429"),
    "bucket answers 500": bucket_answers("500"),
    "bucket answers 503": bucket_answers("503"),
    "bucket answers 412": bucket_answers("412"),
    "download cut in the middle": bucket_answers(CUT),
    "disk full under a pipeline worker": fill_disk,
    "two sensors at once": two_sensors,
    "the same run twice": same_run_twice,
    "run worker stalled beyond its lease": stall_run,
}


def _each(world: World, rng: random.Random, kind: str, act: Callable[[psutil.Process], object]) -> str:
    """Do something to a process of a kind, as soon as there is one, anywhere between its start and its end."""
    until = time.monotonic() + _PATIENCE_SECONDS
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
