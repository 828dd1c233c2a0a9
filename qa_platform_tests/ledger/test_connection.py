"""The connection of a ledger: kept between calls, replaced when it breaks, shared by threads."""

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from qa_platform.clients.postgres import APPLICATION, connect
from qa_platform.contract import FileVersion
from qa_platform.errors import InputError, TransientError
from qa_platform.ledger import Ledger
from qa_platform.settings import PostgresSettings
from qa_platform_tests.flow import wait_until
from qa_platform_tests.loading_helpers import migrated_database

A1 = FileVersion("a.csv", 1)


@pytest.fixture
def migrated(postgres_socket: str) -> PostgresSettings:
    return migrated_database(postgres_socket)


@pytest.fixture
def observer(migrated: PostgresSettings) -> Iterator[psycopg.Connection]:
    with connect(migrated) as connection:
        # PostgreSQL lists the session that migrated for a moment after it has ended.
        wait_until(lambda: not sessions(connection), "the session that migrated is still listed")
        yield connection


@pytest.fixture
def ledger(migrated: PostgresSettings) -> Iterator[Ledger]:
    with Ledger(migrated) as ledger:
        yield ledger


def sessions(observer: psycopg.Connection) -> list[int]:
    rows = observer.execute(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name = %s AND pid <> pg_backend_pid()",
        [APPLICATION],
    )
    return [pid for (pid,) in rows]


def test_a_ledger_connects_on_first_use_and_keeps_one_connection(ledger: Ledger, observer: psycopg.Connection) -> None:
    assert sessions(observer) == []
    ledger.claim([A1], owner="run", lease_seconds=60)
    (session,) = sessions(observer)
    assert ledger.claimed() == {"a.csv": "run"}
    assert sessions(observer) == [session]


def test_a_connection_that_the_server_ended_is_replaced_without_an_error(ledger: Ledger, observer: psycopg.Connection) -> None:
    ledger.claim([A1], owner="run", lease_seconds=60)
    (session,) = sessions(observer)
    observer.execute("SELECT pg_terminate_backend(%s, 5000)", [session])
    assert ledger.claimed() == {"a.csv": "run"}


def test_a_ledger_goes_on_after_an_error(ledger: Ledger) -> None:
    with pytest.raises(InputError):
        ledger.request_retries(["unknown.csv"])
    assert ledger.claim([A1], owner="run", lease_seconds=60) == [A1]


def test_an_unavailable_server_is_transient(migrated: PostgresSettings) -> None:
    with Ledger(migrated.model_copy(update={"host": "/nowhere"})) as ledger, pytest.raises(TransientError):
        ledger.claimed()


def test_a_closed_ledger_opens_again_on_use(ledger: Ledger, observer: psycopg.Connection) -> None:
    ledger.claimed()
    ledger.close()
    ledger.close()
    assert ledger.claimed() == {}


@pytest.mark.filterwarnings("error")
def test_a_forgotten_ledger_leaves_no_connection_behind(migrated: PostgresSettings) -> None:
    Ledger(migrated).claimed()
    gc.collect()


def test_threads_share_a_ledger(ledger: Ledger, observer: psycopg.Connection) -> None:
    versions = [FileVersion(f"{number}.csv", 1) for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda version: ledger.claim([version], owner=version.name, lease_seconds=60), versions))
    assert won == [[version] for version in versions]
    assert len(sessions(observer)) == 1
