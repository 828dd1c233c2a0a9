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
from qa_platform.clients.pachyderm import session
from qa_platform.clients.postgres import connect
from qa_platform.embedded import postgres_access
from qa_platform.embedded.stack import Stack, open_stack
from qa_platform.embedded.supervise import ServerSpec, running
from qa_platform.settings import PachydermSettings, PostgresSettings
from qa_platform_tests.loading_helpers import empty_tables, migrated_database
from qa_platform_tests.pachd_helpers import CLUSTER, LIMIT_SECONDS, pachd_address, remove_platform

# A shell starts background processes with Ctrl-C ignored, which everything that the tests start would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Extend the timeout of tests on a cluster, where every wait takes longer."""
    for item in items if CLUSTER else ():
        if not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(max(300, 10 * LIMIT_SECONDS)))


@contextmanager
def server_folder() -> Iterator[Path]:
    """A folder for servers. Its path is short enough for PostgreSQL's socket."""
    with tempfile.TemporaryDirectory(prefix="qa-tests-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@dataclass(frozen=True)
class Database:
    """A database for one test. ``host`` is the folder of a Unix socket."""

    host: str
    port: int
    user: str
    dbname: str

    @property
    def url(self) -> str:
        return postgres_access.database_url(self.host, self.dbname)

    @property
    def environment(self) -> dict[str, str]:
        """The variables that ``PostgresSettings`` reads."""
        return {"PG_HOST": self.host, "PG_PORT": str(self.port), "PG_USER": self.user, "PG_DBNAME": self.dbname}

    @property
    def settings(self) -> PostgresSettings:
        return PostgresSettings(host=self.host, port=self.port, user=self.user, dbname=self.dbname)

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
def new_database(postgres_socket: str, *, encoding: str = "UTF8") -> Iterator[Database]:
    """An empty database, dropped at the end."""
    other = "" if encoding == "UTF8" else f" encoding '{encoding}' locale_provider libc lc_collate 'C' lc_ctype 'C'"
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(postgres_access.database_url(postgres_socket, "postgres"), autocommit=True) as connection:
        connection.execute(sql.SQL("create database {} template template0" + other).format(sql.Identifier(name)))
        yield Database(postgres_socket, postgres_access.PORT, postgres_access.USER, name)
        connection.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@pytest.fixture(scope="module")
def migrated(postgres_socket: str) -> PostgresSettings:
    """A database with the platform's tables, shared by the tests of a module."""
    return migrated_database(postgres_socket)


@pytest.fixture(name="postgres")
def migrated_and_empty(migrated: PostgresSettings) -> PostgresSettings:
    """The module's database, with empty tables."""
    with connect(migrated) as connection:
        empty_tables(connection)
    return migrated


@pytest.fixture
def connection(postgres: PostgresSettings) -> Iterator[psycopg.Connection]:
    """A connection to the module's database."""
    with connect(postgres) as found:
        yield found


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """The whole embedded stack, prepared, for this test session. ``stack.variables`` has the addresses and tokens of its services,
    ``stack.environment`` is a whole environment for a subprocess.
    """
    with server_folder() as state, open_stack(state) as stack:
        yield stack


@pytest.fixture(scope="module")
def pachyderm_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PachydermSettings]:
    """The pachd that the tests of a module share: the one that ``QA_TEST_PACHD`` names, or an embedded server."""
    with pachd_address(tmp_path_factory.mktemp("pachd")) as address:
        yield PachydermSettings(pachd_address=address)


@pytest.fixture
def clean_pachyderm(pachyderm_cluster: PachydermSettings) -> Iterator[PachydermSettings]:
    """The module's pachd without the platform's pipelines, repo and secrets. Those that the test creates are removed."""
    with session(pachyderm_cluster, "cleaning") as client:
        remove_platform(client)
        yield pachyderm_cluster
        remove_platform(client)


@pytest.fixture(scope="session")
def gcs_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``host:port`` of a GCS emulator that serves this test session."""
    with running([ServerSpec("gcs", "qa_platform.embedded.gcs")], tmp_path_factory.mktemp("gcs")) as addresses:
        yield addresses["gcs"]


@pytest.fixture
def bucket(gcs_address: str) -> storage.Bucket:
    """An empty bucket for one test, opened with Google's client."""
    client = storage.Client("test", AnonymousCredentials(), client_options={"api_endpoint": f"http://{gcs_address}"})
    return client.create_bucket(f"test-{uuid.uuid4().hex}")
