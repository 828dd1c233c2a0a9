"""Faults of the platform's own processes: they die, stall, find the disk full, or run twice."""

import random

import psutil

from qa_platform_tests.faults.victims import Fault, hit_process
from qa_platform_tests.faults.world import LEASE_SECONDS, World, resume_later


def kill_run(world: World, rng: random.Random) -> str:
    return hit_process(world, rng, "run", psutil.Process.kill)


def terminate_run(world: World, rng: random.Random) -> str:
    """Ask a run to end, as Dagster does when a user terminates it."""
    return hit_process(world, rng, "run", psutil.Process.terminate)


def stall_run(world: World, rng: random.Random) -> str:
    """Suspend a run for longer than its claims last, so that it resumes while others do its work."""

    def stall(process: psutil.Process) -> None:
        process.suspend()
        resume_later(process, LEASE_SECONDS * 1.5)

    return hit_process(world, rng, "run", stall)


def kill_daemon(world: World, rng: random.Random) -> str:
    world.kill_daemon()
    return "daemon"


def kill_worker(world: World, rng: random.Random) -> str:
    return hit_process(world, rng, "worker", psutil.Process.kill)


def fill_disk(world: World, rng: random.Random) -> str:
    """Prevent a pipeline worker from writing more than a few bytes to any file, as on a full disk."""

    def fill(process: psutil.Process) -> None:
        limit = rng.randint(0, 2000)
        process.rlimit(psutil.RLIMIT_FSIZE, (limit, limit))

    return hit_process(world, rng, "worker", fill)


def two_sensors(world: World, rng: random.Random) -> str:
    world.tell_agent({"do": "sensors"})
    return "two more sensors"


def same_run_twice(world: World, rng: random.Random) -> str:
    query = """
        SELECT claim_owner, batch_id, array_agg(source_file ORDER BY source_file), array_agg(generation ORDER BY source_file)
        FROM question_file WHERE claim_until > now() AND batch_id <> '' AND claim_owner = dagster_run GROUP BY 1, 2
    """
    found = world.rows(query)
    if not found:
        return ""
    run, batch, names, generations = rng.choice(found)
    world.tell_agent({"do": "again", "run": run, "batch": batch, "versions": list(zip(names, generations, strict=True))})
    return "a run"


PROCESSES: dict[str, Fault] = {
    "kill -9 of a run worker": kill_run,
    "termination of a run worker": terminate_run,
    "run worker stalled beyond its lease": stall_run,
    "kill -9 of the daemon": kill_daemon,
    "kill -9 of a pipeline worker": kill_worker,
    "disk full under a pipeline worker": fill_disk,
    "two sensors at once": two_sensors,
    "the same run twice": same_run_twice,
}
