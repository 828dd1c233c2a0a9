"""The lease of a run survives all transient trouble of the database, and ends with the run."""

import logging
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import psycopg
import pytest
from psycopg import sql

from qa_platform.batches.holding import lease
from qa_platform.embedded import postgres_access
from qa_platform.errors import InputError, TransientError
from qa_platform.ledger import Ledger
from qa_platform.settings import PostgresSettings
from qa_platform_tests.ledger.helpers import A1
from qa_platform_tests.loading_helpers import migrated_database
from qa_platform_tests.pachd_helpers import eventually

SECONDS = 2
_LOG = logging.getLogger("holding")


@dataclass(frozen=True)
class Place:
    """A database, a role of its own, which is no superuser, and a connection of its owner."""

    owner: psycopg.Connection
    settings: PostgresSettings

    def do(self, *statements: str) -> None:
        names = {"database": sql.Identifier(self.settings.dbname), "role": sql.Identifier(self.settings.user)}
        for statement in statements:
            self.owner.execute(sql.SQL(statement).format(**names))

    def end_sessions(self) -> None:
        self.owner.execute("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = %s", [self.settings.user])

    def seconds_left(self) -> float:
        """Seconds for which the claim still holds; 0 or less once it has expired."""
        query = "SELECT extract(epoch FROM claim_until - clock_timestamp())::float FROM question_file WHERE claim_owner = 'run'"
        row = self.owner.execute(query).fetchone()
        assert row
        return float(row[0])


@pytest.fixture
def place(postgres_socket: str) -> Iterator[Place]:
    settings = migrated_database(postgres_socket)
    user = f"runner_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(postgres_access.database_url(postgres_socket, settings.dbname), autocommit=True) as owner:
        place = Place(owner, settings.model_copy(update={"user": user}))
        place.do("CREATE ROLE {role} LOGIN", "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role}")
        yield place
        place.end_sessions()
        place.do("DROP OWNED BY {role}", "DROP ROLE {role}")


@contextmanager
def held_up(place: Place) -> Iterator[None]:
    """Another session holds the claims' row."""
    with psycopg.connect(postgres_access.database_url(place.settings.host, place.settings.dbname)) as other:
        other.execute("SELECT FROM question_file FOR UPDATE")
        yield


@contextmanager
def nothing_else(place: Place) -> Iterator[None]:
    yield


@dataclass(frozen=True)
class Trouble:
    """What is done to the database, how it is undone, and what else happens meanwhile."""

    begin: tuple[str, ...]
    end: tuple[str, ...]
    meanwhile: Callable[[Place], AbstractContextManager[None]] = field(default=nothing_else)


TROUBLES = {
    "the backend is terminated": Trouble((), ()),
    "read-only": Trouble(
        ("ALTER DATABASE {database} SET default_transaction_read_only = on",),
        ("ALTER DATABASE {database} RESET default_transaction_read_only",),
    ),
    "out of connections": Trouble(("ALTER ROLE {role} CONNECTION LIMIT 0",), ("ALTER ROLE {role} CONNECTION LIMIT -1",)),
    "no connection is allowed": Trouble(
        ("REVOKE CONNECT ON DATABASE {database} FROM PUBLIC",), ("GRANT CONNECT ON DATABASE {database} TO PUBLIC",)
    ),
    "a statement's time-out": Trouble(("ALTER ROLE {role} SET statement_timeout = '50ms'",), ("ALTER ROLE {role} RESET ALL",), held_up),
    "a lock's time-out": Trouble(("ALTER ROLE {role} SET lock_timeout = '50ms'",), ("ALTER ROLE {role} RESET ALL",), held_up),
    "a privilege is taken away": Trouble(("REVOKE UPDATE ON question_file FROM {role}",), ("GRANT UPDATE ON question_file TO {role}",)),
    "the role may not log in": Trouble(("ALTER ROLE {role} NOLOGIN",), ("ALTER ROLE {role} LOGIN",)),
    "the table is renamed": Trouble(("ALTER TABLE question_file RENAME TO elsewhere",), ("ALTER TABLE elsewhere RENAME TO question_file",)),
    "a trigger raises": Trouble(
        (
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE ''no''; END'",
            "CREATE TRIGGER refuse BEFORE UPDATE ON question_file FOR EACH ROW EXECUTE FUNCTION refuse()",
        ),
        ("DROP TRIGGER refuse ON question_file",),
    ),
}


@pytest.mark.parametrize("name", TROUBLES)
def test_a_lease_outlives_trouble_of_the_database(place: Place, caplog: pytest.LogCaptureFixture, name: str) -> None:
    trouble = TROUBLES[name]
    with Ledger(place.settings) as ledger:
        ledger.claim([A1], owner="run", lease_seconds=SECONDS)
        with lease(ledger, "run", SECONDS, _LOG):
            place.do(*trouble.begin)
            place.end_sessions()
            with trouble.meanwhile(place):
                if trouble.begin:
                    eventually(lambda: sum("could not be renewed" in entry.message for entry in caplog.records) > 1)
            place.do(*trouble.end)
            before = place.seconds_left()
            eventually(lambda: place.seconds_left() > max(before, 0))
            place.end_sessions()
            eventually(lambda: place.seconds_left() > SECONDS * 0.9)


class Refusing:
    """A ledger whose renewals raise one error after the other, then succeed."""

    def __init__(self, *errors: Exception) -> None:
        self._errors = list(errors)
        self.renewed = threading.Event()

    def renew(self, owner: str, lease_seconds: int) -> int:
        if self._errors:
            raise self._errors.pop(0)
        self.renewed.set()
        return 1


def test_no_kind_of_error_ends_the_renewals() -> None:
    names = ("DeadlockDetected", "AdminShutdown", "CannotConnectNow", "TooManyConnections", "IdleInTransactionSessionTimeout")
    raw = [getattr(psycopg.errors, name)("not now") for name in names]
    # Looked up by psycopg itself where a host has several addresses.
    others = [TransientError("down"), InputError("refused"), OSError(-2, "Name or service not known"), ValueError("strange")]
    ledger = Refusing(*raw, *others)
    with lease(ledger, "run", 1, _LOG):  # type: ignore[arg-type]
        assert ledger.renewed.wait(20)


def test_a_lease_ends_with_its_block_and_not_before(place: Place) -> None:
    with Ledger(place.settings) as ledger:
        ledger.claim([A1], owner="run", lease_seconds=SECONDS)
        with lease(ledger, "run", SECONDS, _LOG):
            assert "lease" in {thread.name for thread in threading.enumerate()}
        assert "lease" not in {thread.name for thread in threading.enumerate()}
        left = place.seconds_left()
        eventually(lambda: place.seconds_left() < left - 0.2)
