"""Actions of users at any moment: commands, and cancelling runs in Dagster."""

import random
from contextlib import suppress

from dagster_postgres.utils import DagsterPostgresException
from sqlalchemy.exc import SQLAlchemyError

from qa_platform_tests.faults.victims import Fault
from qa_platform_tests.faults.world import World


def command(*arguments: str) -> Fault:
    def fault(world: World, rng: random.Random) -> str:
        world.command(*arguments)
        return "at any moment"

    return fault


def command_on_a_file(*arguments: str) -> Fault:
    def fault(world: World, rng: random.Random) -> str:
        found = world.rows("SELECT source_file, status FROM question_file ORDER BY created_at DESC LIMIT 12")
        if not found:
            return ""
        name, status = rng.choice(found)
        world.command(*arguments, name)
        return f"a file that is {status}"

    return fault


def cancel_run(world: World, rng: random.Random) -> str:
    # Dagster's database may be unavailable just then.
    with suppress(SQLAlchemyError, DagsterPostgresException):
        return "a run" if world.cancel_run(rng) else ""
    return ""


PEOPLE: dict[str, Fault] = {
    "somebody asks for a retry": command_on_a_file("retry"),
    "somebody fetches answers": command_on_a_file("answers"),
    "somebody fetches rejected rows": command_on_a_file("answers", "--rejected"),
    "somebody asks for a file's status": command_on_a_file("status", "--json"),
    "somebody applies the pipelines": command("pachyderm", "apply"),
    "somebody upgrades the tables": command("db", "upgrade"),
    "somebody asks the doctor": command("doctor"),
    "somebody cancels a run": cancel_run,
}
