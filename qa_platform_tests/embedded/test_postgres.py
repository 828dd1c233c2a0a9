"""The embedded PostgreSQL on its own."""

import os
import signal
import subprocess
import threading
from pathlib import Path

import psycopg
import pytest

from qa_platform.embedded import postgres_access
from qa_platform.embedded.account import Account
from qa_platform.embedded.supervise import RunningServer, ServerSpec, running
from qa_platform_tests.conftest import Database
from qa_platform_tests.processes import LIMIT_SECONDS, processes_of, until

POSTGRES = ServerSpec("postgres", "qa_platform.embedded.postgres")


def test_a_database_is_empty_and_of_the_tests_own(database: Database) -> None:
    with database.connect() as connection:
        tables = connection.execute("select count(*) from pg_tables where schemaname = 'public'").fetchone()
        name = connection.execute("select current_database()").fetchone()
    assert (tables, name) == ((0,), (database.dbname,))


def test_text_is_utf8_and_sorted_the_same_everywhere(database: Database) -> None:
    with database.connect() as connection:
        assert connection.execute("show server_encoding").fetchone() == ("UTF8",)
        ordered = connection.execute("select array_agg(x order by x) from unnest(array['b', 'a', 'B', 'ä']) x").fetchone()
        assert ordered == (["B", "a", "b", "ä"],)
        assert connection.execute("show timezone").fetchone() == ("UTC",)


@pytest.mark.faults
def test_postgres_ends_with_its_killed_supervisor(tmp_path: Path) -> None:
    server = RunningServer(POSTGRES, tmp_path)
    server.address()
    data = tmp_path / "postgres" / "data"
    assert processes_of(data)
    server.kill()
    until(lambda: processes_of(data) == [])


@pytest.mark.faults
def test_postgres_recovers_from_being_killed_and_from_a_stale_pid_file(tmp_path: Path) -> None:
    server = RunningServer(POSTGRES, tmp_path)
    with psycopg.connect(postgres_access.database_url(server.address(), "answers")) as connection:
        connection.execute("create table kept as select 1 as x")
        connection.commit()
        # So that what was committed asynchronously is on disk.
        connection.execute("checkpoint")
    data = tmp_path / "postgres" / "data"
    postmaster = int((data / "postmaster.pid").read_text().splitlines()[0])
    stale = (data / "postmaster.pid").read_text()
    os.kill(postmaster, signal.SIGKILL)
    until(lambda: processes_of(data) == [])
    # Of all numbers, that of a process which lives and has nothing to do with it.
    (data / "postmaster.pid").write_text(stale.replace(str(postmaster), str(os.getpid()), 1))
    server.wait()
    with (
        running([POSTGRES], tmp_path) as addresses,
        psycopg.connect(postgres_access.database_url(addresses["postgres"], "answers")) as connection,
    ):
        assert connection.execute("select x from kept").fetchall() == [(1,)]


@pytest.mark.faults
def test_a_postgres_without_supervisor_is_found_and_ended(tmp_path: Path) -> None:
    """As on systems whose kernel does not tell PostgreSQL that its supervisor was killed."""
    (tmp_path / "postgres").mkdir()
    with running([POSTGRES], tmp_path):
        pass
    data = tmp_path / "postgres" / "data"
    environment = {**os.environ, "LD_LIBRARY_PATH": ""}
    account = Account.for_servers()
    with account.opened(data) as opened:
        orphan = subprocess.Popen(
            [
                postgres_access.bin_folder() / "postgres",
                "-D",
                opened.path,
                "-c",
                "listen_addresses=",
                "-c",
                f"unix_socket_directories={opened.path}",
            ],
            env=environment,
            cwd=data,
            stderr=subprocess.DEVNULL,
            pass_fds=opened.descriptors,
            **account.identity,
        )
    threading.Thread(target=orphan.wait).start()
    until(lambda: (data / ".s.PGSQL.5432").exists())
    with running([POSTGRES], tmp_path) as addresses:
        assert orphan.wait(LIMIT_SECONDS) == 0
        psycopg.connect(postgres_access.database_url(addresses["postgres"], "answers")).close()


def test_a_long_path_does_not_matter_to_the_socket(tmp_path: Path) -> None:
    state = tmp_path / ("long" * 25) / ("long" * 25)
    state.mkdir(parents=True)
    with running([POSTGRES], state) as addresses:
        folder = Path(addresses["postgres"])
        assert not folder.is_relative_to(state)
        assert folder.stat().st_mode & 0o077 == 0
        psycopg.connect(postgres_access.database_url(addresses["postgres"], "answers")).close()
    assert not folder.exists()
