"""Faults of Pachyderm: it dies, cannot be reached, is slow and strict, is out of disk space, or is restored."""

import random
import time
from functools import partial

import psutil

from qa_platform.contract import ANSWER_PIPELINE
from qa_platform_tests.faults.victims import Fault, copy_folder, fill_disk_of, hit_process
from qa_platform_tests.faults.world import World

# The variants of pachd's options.
UNKIND: list[dict[str, str]] = [
    {},
    {"QA_PACHD_LOKI": "0", "QA_PACHD_POD_SECONDS": "1", "QA_PACHD_FINISH_SECONDS": "0.5"},
    {"QA_PACHD_LOG_SECONDS": "5", "QA_PACHD_FILE_SET_SECONDS": "30"},
]


def kill_pachd(world: World, rng: random.Random) -> str:
    world.restart_pachd()
    return "pachd"


def cut_off_pachd(world: World, rng: random.Random) -> str:
    with world.pachd.closed():
        time.sleep(rng.uniform(0.2, 6))
    return "connections to pachd"


def take_the_secret_away(world: World, rng: random.Random) -> str:
    """Delete the database's secret for a while. The loader's pods do not start until it is back."""
    with world.without_secret():
        time.sleep(rng.uniform(0.5, 8))
    return "dbaccess"


def make_pachd_unkind(world: World, rng: random.Random) -> str:
    """Restart pachd like a cluster at its worst (slow pods and commits, late log lines, no logs of idle pipelines), or as it was."""
    options = rng.choice(UNKIND)
    world.restart_pachd(options)
    return "a slow cluster" if options else "a quick one"


def lose_output(world: World, rng: random.Random) -> str:
    """Kill an answering worker on a pachd that cannot restart it: the job succeeds without its output."""
    world.restart_pachd({"QA_PACHD_NO_RESTART": ANSWER_PIPELINE})
    hit = hit_process(world, rng, "worker", psutil.Process.kill)
    time.sleep(rng.uniform(0, 3))
    world.restart_pachd()
    return hit


def restore_pachyderm(world: World, rng: random.Random) -> str:
    copy = world.state / "pachd.copy"
    world.restart("pachd", partial(copy_folder, target=copy))
    time.sleep(rng.uniform(1, 12))
    world.restart("pachd", partial(copy_folder, copy))
    world.pachyderm_restored = True
    world.must_succeed("pachyderm", "apply")
    return "pachd"


PACHYDERM: dict[str, Fault] = {
    "kill -9 of pachd": kill_pachd,
    "pachd cut off": cut_off_pachd,
    "the database's secret is gone": take_the_secret_away,
    "pachd is unkind": make_pachd_unkind,
    "a job loses its output": lose_output,
    "disk full under pachd": fill_disk_of("pachd"),
    "Pachyderm is restored": restore_pachyderm,
}
