"""Rotation of passwords and tokens while files wait, by the steps in docs/operating.md: no file is charged, and all are loaded."""

from collections.abc import Iterator

import psycopg
import pytest
from click.testing import CliRunner
from psycopg.sql import SQL, Identifier, Literal

from qa_platform.cli.main import main
from qa_platform.contract import FileStatus
from qa_platform.embedded.stack import Stack
from qa_platform_tests.batches.test_run import jobs_in_progress
from qa_platform_tests.flow import Flow, bridge, csv_of, flow, let_the_claim_run_out, wait_until

__all__ = ["flow"]

pytestmark = pytest.mark.slow

ROLE = "rotated"
OLD, NEW = "the old pass'word", "the new pass\\word"


def apply() -> None:
    """Send the secrets to the workers, as a person does. None is at work: they read secrets when they start."""
    wait_until(lambda: not jobs_in_progress(), "no job is at work")
    result = CliRunner().invoke(main, ["pachyderm", "apply"])
    assert result.exit_code == 0, result.output
    assert "secret dbaccess: sent again" in result.output


@pytest.fixture
def owner(flow: Flow, stack: Stack) -> Iterator[psycopg.Connection]:
    """The connection of the database's owner, who made a role for the platform and its workers."""
    password = stack.tokens["postgres"]
    with psycopg.connect(stack.variables["QA_DATABASE_URL"], password=password, autocommit=True) as connection:
        connection.execute(SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(Identifier(ROLE), Literal(OLD)))
        connection.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {ROLE}")
        try:
            yield connection
        finally:
            apply()
            connection.execute(f"DROP OWNED BY {ROLE}")
            connection.execute(f"DROP ROLE {ROLE}")


def test_files_that_wait_while_a_password_is_changed_are_loaded_uncharged(
    flow: Flow, owner: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as platform:
        platform.setenv("PG_USER", ROLE)
        platform.setenv("PG_PASSWORD", OLD)
        apply()
        versions = [flow.upload(f"rotation/{town}.csv", csv_of(bridge(town))) for town in ("Ulm", "Hof")]
        (request,) = flow.tick()
        # 1. In PostgreSQL. Dagster has the old one.
        owner.execute(SQL("ALTER ROLE {} PASSWORD {}").format(Identifier(ROLE), Literal(NEW)))
        assert not flow.run(request).success
        # 2. In Dagster. The workers have the old one.
        platform.setenv("PG_PASSWORD", NEW)
        for version in versions:
            let_the_claim_run_out(version)
        (request,) = flow.tick()
        assert not flow.run(request).success
        records = [flow.record(version) for version in versions]
        assert [(record.status, record.attempts) for record in records] == [(FileStatus.PENDING, 0)] * 2
        assert all("password authentication failed" in record.error and "dbaccess" in record.error for record in records)
        # 3. In Pachyderm.
        apply()
        (request,) = wait_until(flow.tick, "they are due")
        assert flow.run(request).success
        assert [(flow.record(version).status, flow.record(version).attempts) for version in versions] == [(FileStatus.FINISHED, 0)] * 2
        assert [len(flow.rows(version.name)) for version in versions] == [1, 1]


def test_a_file_that_waits_while_pachds_token_is_changed_is_loaded_uncharged(flow: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    version = flow.upload("rotation/token.csv", csv_of(bridge("Ulm")))
    (request,) = flow.tick()
    with monkeypatch.context() as platform:
        platform.setenv("PACH_TOKEN", "revoked")
        assert not flow.run(request).success
    assert (flow.record(version).status, flow.record(version).attempts) == (FileStatus.PENDING, 0)
    (request,) = wait_until(flow.tick, "it is due")
    assert flow.run(request).success
    assert (flow.record(version).status, flow.record(version).attempts) == (FileStatus.FINISHED, 0)
