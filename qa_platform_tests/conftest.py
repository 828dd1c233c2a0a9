"""Fixtures that several test files share: real servers, started once and on first use."""

import signal
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
from psycopg import sql

import qa_platform.answering  # noqa: F401  # keeps OpenVINO from reporting to its makers, also where a test is first to import it
from qa_platform.embedded import postgres
from qa_platform.embedded.process import ServerSpec, running
from qa_platform.embedded.stack import Stack, open_stack

# A shell starts what it puts into the background with Ctrl-C ignored, and so would be all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def server_folder() -> Iterator[Path]:
    """A folder for servers that run as another user. Not pytest's own: each test session shuts that to all others."""
    with tempfile.TemporaryDirectory(prefix="qa-tests-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@dataclass(frozen=True)
class Database:
    """A database of a test's own. ``host`` is the folder of a Unix socket."""

    host: str
    port: int
    user: str
    dbname: str

    @property
    def url(self) -> str:
        return postgres.database_url(self.host, self.dbname)

    @property
    def environment(self) -> dict[str, str]:
        """The variables that ``PostgresSettings`` reads."""
        return {"PG_HOST": self.host, "PG_PORT": str(self.port), "PG_USER": self.user, "PG_DBNAME": self.dbname}

    def connect(self, *, autocommit: bool = False) -> psycopg.Connection:
        return psycopg.connect(self.url, autocommit=autocommit)


@pytest.fixture(scope="session")
def postgres_socket() -> Iterator[str]:
    """The socket folder of a PostgreSQL that serves this test session."""
    with server_folder() as state, running([ServerSpec("postgres", "qa_platform.embedded.postgres")], state) as addresses:
        yield addresses["postgres"]


@pytest.fixture
def database(postgres_socket: str) -> Iterator[Database]:
    """An empty database, dropped after the test."""
    with new_database(postgres_socket) as database:
        yield database


@contextmanager
def new_database(postgres_socket: str) -> Iterator[Database]:
    """An empty database, dropped at the end."""
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(postgres.database_url(postgres_socket, "postgres"), autocommit=True) as connection:
        connection.execute(sql.SQL("create database {} template template0").format(sql.Identifier(name)))
        yield Database(postgres_socket, postgres.PORT, postgres.USER, name)
        connection.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """The whole embedded stack, prepared, for this test session. ``stack.variables`` is what tells a program where everything is,
    ``stack.environment`` a whole environment for a subprocess.
    """
    with server_folder() as state, open_stack(state) as stack:
        yield stack


@pytest.fixture(scope="session")
def gcs_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``host:port`` of a GCS emulator that serves this test session."""
    with running([ServerSpec("gcs", "qa_platform.embedded.gcs")], tmp_path_factory.mktemp("gcs")) as addresses:
        yield addresses["gcs"]


@pytest.fixture
def bucket(gcs_address: str) -> storage.Bucket:
    """An empty bucket of a test's own, by Google's client."""
    client = storage.Client("test", AnonymousCredentials(), client_options={"api_endpoint": f"http://{gcs_address}"})
    return client.create_bucket(f"test-{uuid.uuid4().hex}")
