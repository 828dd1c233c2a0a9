"""A ledger on a real PostgreSQL."""

from collections.abc import Iterator

import psycopg
import pytest

from qa_platform.ledger import Ledger
from qa_platform.settings import PostgresSettings


@pytest.fixture
def ledger(migrated: PostgresSettings, connection: psycopg.Connection) -> Iterator[Ledger]:
    """A ledger whose table is empty."""
    with Ledger(migrated) as ledger:
        yield ledger
