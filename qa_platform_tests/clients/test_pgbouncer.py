"""The platform behind a PgBouncer in transaction mode, where each transaction may use another server connection."""

import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from qa_platform.clients.postgres import connect
from qa_platform.contract import FileStatus, FileVersion
from qa_platform.embedded import postgres_access
from qa_platform.embedded.account import Account
from qa_platform.errors import InputError
from qa_platform.ledger import Ledger
from qa_platform.loading import migrate
from qa_platform.loading.load import load_file
from qa_platform.results.rejected_csv import rejected_report
from qa_platform.settings import PostgresSettings
from qa_platform_tests.conftest import Database, server_folder
from qa_platform_tests.loading_helpers import AnsweredUpload, answered_rows, ingested

BACKENDS = 3
# Round robin: the next transaction of a client is on another connection of the server than its last one, as often as can be.
CONFIGURATION = """
[databases]
* = host={socket} port={server_port} user={user}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
server_round_robin = 1
default_pool_size = {backends}
min_pool_size = {backends}
max_client_conn = 50
"""


@pytest.fixture(scope="module")
def bouncer(postgres_socket: str) -> Iterator[int]:
    """The port on 127.0.0.1 of a PgBouncer before the session's PostgreSQL."""
    program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    if program is None:
        pytest.skip("no PgBouncer on this machine (Debian and Ubuntu: apt-get install pgbouncer)")
    # It refuses to be root, and only the embedded server's account may enter the folder of its socket.
    account = Account.for_servers()
    with server_folder() as home, socket.create_server(("127.0.0.1", 0)) as free, account.opened(Path(postgres_socket)) as opened:
        port = free.getsockname()[1]
        free.close()
        home.chmod(0o755)
        text = CONFIGURATION.format(
            socket=opened.path, server_port=postgres_access.PORT, user=postgres_access.USER, port=port, backends=BACKENDS
        )
        (home / "pgbouncer.ini").write_text(text)
        with (home / "log").open("wb") as log:
            process = subprocess.Popen(
                [program, home / "pgbouncer.ini"], stdout=log, stderr=log, pass_fds=opened.descriptors, **account.identity
            )
        try:
            _wait_for(port, process, home / "log")
            yield port
        finally:
            process.terminate()
            process.wait(30)


def _wait_for(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    until, pause = time.monotonic() + 30, threading.Event()
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 5).close()
            return
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            pause.wait(0.05)


@pytest.fixture
def bounced(bouncer: int, database: Database) -> PostgresSettings:
    """An empty database, through PgBouncer."""
    return PostgresSettings(host="127.0.0.1", port=bouncer, user=database.user, dbname=database.dbname)


@pytest.fixture
def migrated(bounced: PostgresSettings) -> PostgresSettings:
    migrate.upgrade(bounced)
    return bounced


def left_in_sessions(database: Database) -> tuple[Any, ...]:
    """What the server's sessions still have of transactions that are over: locks of ours, temporary tables."""
    with database.connect() as direct:
        found = direct.execute(
            """
            SELECT (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database =
                       (SELECT oid FROM pg_database WHERE datname = current_database())),
                   (SELECT count(*) FROM pg_class WHERE relpersistence = 't'),
                   (SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in transaction%')
            """
        ).fetchone()
    assert found is not None
    return found


def test_transactions_of_one_connection_are_on_several_of_the_server(migrated: PostgresSettings) -> None:
    """Else what follows would prove nothing."""
    with connect(migrated) as one, connect(migrated) as other:
        # Both hold a connection of the server, so that there are two; then their next transactions take turns.
        with one.transaction(), other.transaction():
            one.execute("SELECT 1")
            other.execute("SELECT 1")
        backends = {found for _ in range(2 * BACKENDS) for found in one.execute("SELECT pg_backend_pid()").fetchone() or ()}
    assert len(backends) > 1


def test_several_that_migrate_at_once_all_find_the_tables_up_to_date(bounced: PostgresSettings, database: Database) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: migrate.upgrade(bounced), range(4)))
    with connect(bounced) as connection:
        assert migrate.current(connection) == migrate.HEAD
    assert left_in_sessions(database) == (0, 0, 0)


def test_loads_replays_and_newer_generations_leave_exact_rows_and_nothing_in_a_session(
    migrated: PostgresSettings, database: Database, tmp_path: Path
) -> None:
    folders = [
        AnsweredUpload(answered_rows(100 + generation), generation=generation, shard_rows=50).write(tmp_path / str(generation))
        for generation in (1, 2, 3)
    ]

    def load(folder: Path) -> int:
        with connect(migrated) as connection:
            # Often enough for psycopg to prepare the statements on the server, which it must not.
            return sum(load_file(connection, folder).inserted for _ in range(6))

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(load, [folders[0]] * 3)).count(0) == 2
        assert left_in_sessions(database) == (0, 0, 0)
        list(pool.map(load, reversed(folders)))
    with connect(migrated) as connection:
        rows = connection.execute("SELECT row_number, generation FROM question_answer ORDER BY row_number").fetchall()
        assert rows == [(number, 3) for number in range(1, 104)]
        written = "SELECT xmin::text, ctid::text FROM question_answer ORDER BY row_number"
        before = connection.execute(written).fetchall()
        replay = load_file(connection, folders[2])
        assert (replay.inserted, replay.updated, replay.deleted) == (0, 0, 0)
        assert connection.execute(written).fetchall() == before
        assert load_file(connection, folders[0]).status is FileStatus.SUPERSEDED
    assert left_in_sessions(database) == (0, 0, 0)


def test_a_load_that_fails_leaves_nothing(migrated: PostgresSettings, database: Database, tmp_path: Path) -> None:
    folder = AnsweredUpload(answered_rows(7)).write(tmp_path / "file")
    answers = folder / "part-00002" / "answers.csv"
    answers.write_bytes(answers.read_bytes()[:-10])
    with connect(migrated) as connection:
        with pytest.raises(InputError, match="row 7"):
            load_file(connection, folder)
        assert connection.execute("SELECT count(*) FROM question_answer").fetchone() == (0,)
    assert left_in_sessions(database) == (0, 0, 0)


def test_claims_are_taken_by_one_renewed_and_given_back(migrated: PostgresSettings, database: Database) -> None:
    versions = [FileVersion(f"{number}.csv", 1) for number in range(20)]

    def claim(owner: str) -> int:
        with Ledger(migrated) as ledger:
            won = len(ledger.claim(versions, owner=owner, lease_seconds=60))
            assert ledger.renew(owner, 60) == won
            return won

    owners = [f"run {number}" for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(claim, owners)) == [0, 0, 0, 20]
    assert left_in_sessions(database) == (0, 0, 0)
    with Ledger(migrated) as ledger:
        for owner in owners:
            ledger.release(owner)
        assert ledger.claimed() == {}
        assert {record.status for record in ledger.records(versions).values()} == {FileStatus.PENDING}


def test_a_report_is_streamed(migrated: PostgresSettings, database: Database, tmp_path: Path) -> None:
    with Ledger(migrated) as ledger, connect(migrated) as connection:
        load_file(connection, ingested(b"question,context\n" + b",c\n" * 500, tmp_path / "file"))
        assert len(list(rejected_report(ledger, connection, "history.csv"))) == 501
    assert left_in_sessions(database) == (0, 0, 0)


def test_a_database_that_is_not_there_is_named(bounced: PostgresSettings) -> None:
    with pytest.raises(InputError, match="check PG_DBNAME"):
        connect(bounced.model_copy(update={"dbname": "nowhere"}))
