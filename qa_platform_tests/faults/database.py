"""Faults of PostgreSQL: it dies, refuses connections or writes, lacks a privilege, or is restored."""

import random
import subprocess
import time
from pathlib import Path

import psycopg

from qa_platform.embedded import postgres_access
from qa_platform_tests.faults.victims import Fault
from qa_platform_tests.faults.world import ROLE, World


def kill_postgres(world: World, rng: random.Random) -> str:
    world.kill_postgres(seconds=rng.choice([0, 0, rng.uniform(0, 5)]))
    return "postmaster"


def kill_backend(world: World, rng: random.Random) -> str:
    return "a backend" if world.kill_backend(rng) else ""


def refuse_postgres(world: World, rng: random.Random) -> str:
    with world.postgres_refuses():
        time.sleep(rng.uniform(0.5, 6))
    return "connections to PostgreSQL"


def make_the_database_read_only(world: World, rng: random.Random) -> str:
    _set_role(world, "SET default_transaction_read_only = on")
    time.sleep(rng.uniform(0.5, 6))
    _set_role(world, "RESET default_transaction_read_only")
    return "PostgreSQL"


def _set_role(world: World, setting: str) -> None:
    with world.database() as connection:
        connection.execute(f"ALTER ROLE {ROLE} {setting}")
        # Sessions keep the settings with which they started.
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", [ROLE])


def take_a_privilege(world: World, rng: random.Random) -> str:
    table = rng.choice(["question_answer", "question_answer_reject", "question_file"])
    privilege = rng.choice(["SELECT", "INSERT", "UPDATE", "DELETE"])
    _execute(world, f"REVOKE {privilege} ON {table} FROM {ROLE}")
    time.sleep(rng.uniform(0.5, 6))
    _execute(world, f"GRANT {privilege} ON {table} TO {ROLE}")
    return f"{privilege} on {table}"


def _execute(world: World, statement: str) -> None:
    with world.database() as connection:
        connection.execute(statement)


def restore_database(world: World, rng: random.Random) -> str:
    dump = _dump(world)
    time.sleep(rng.uniform(1, 12))
    _restore(world, dump)
    for command in world.commands:
        command.wait()
        command.is_undone = True
    # The restore cannot complete during other faults. It is repeated while the platform recovers.
    world.command("restore").wait()
    world.database_restored = True
    return "PostgreSQL"


def _dump(world: World) -> Path:
    dump = world.state / "answers.dump"
    url = world.database_url(postgres_access.ANSWERS_DATABASE)
    subprocess.run([postgres_access.bin_folder() / "pg_dump", "-Fc", "-f", dump, url], check=True)
    return dump


def _restore(world: World, dump: Path) -> None:
    """Drop the database of the answers, despite open connections, and restore it from a dump."""
    name = postgres_access.ANSWERS_DATABASE
    url = world.database_url("postgres")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
        connection.execute(f"CREATE DATABASE {name}")
        # Only the owner may connect until it is complete.
        connection.execute(f"REVOKE CONNECT ON DATABASE {name} FROM PUBLIC")
    target = world.database_url(name)
    subprocess.run([postgres_access.bin_folder() / "pg_restore", "--single-transaction", "-d", target, dump], check=True)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"GRANT CONNECT ON DATABASE {name} TO PUBLIC")


DATABASE: dict[str, Fault] = {
    "kill -9 of PostgreSQL": kill_postgres,
    "kill -9 of a PostgreSQL backend": kill_backend,
    "PostgreSQL refuses connections": refuse_postgres,
    "the database is read-only": make_the_database_read_only,
    "a privilege is missing": take_a_privilege,
    "the database is restored": restore_database,
}
