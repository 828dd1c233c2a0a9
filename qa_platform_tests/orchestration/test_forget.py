"""After a file is answered and forgotten, no service has any of its content: every table, commit and object is searched."""

import json
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import psycopg
import pytest
from click.testing import CliRunner, Result
from pachyderm_sdk import Client
from pachyderm_sdk.api import pfs
from psycopg import sql

from qa_platform.cli.main import main
from qa_platform.clients.pachyderm import open_tar, session
from qa_platform.contract import FileStatus, FileVersion
from qa_platform.embedded.stack import Stack
from qa_platform.errors import InputError
from qa_platform.orchestration.catalog import QUESTION_ANSWER
from qa_platform.orchestration.forget import dagster_history
from qa_platform.provisioning.project_files import project_file
from qa_platform.settings import PachydermSettings
from qa_platform_tests.flow import Flow, bridge, csv_of, flow, put_pipeline

__all__ = ["flow"]

NAME, OTHER = "folder/Ünï, c 100% ...\u2028$(id)'\".csv", "other.csv"
MARKER, OTHER_MARKER = "Zanzibar", "Montevideo"
DATABASES = ("QA_DATABASE_URL", "DAGSTER_PG_URL")


@pytest.fixture(name="flow")
def with_postgres(flow: Flow) -> Iterator[Flow]:
    """The flow on the instance of the stack, whose storage is PostgreSQL, as in a deployment."""
    with dg.DagsterInstance.get() as instance:
        yield Flow(instance, flow.services)


def command(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


def answer(flow: Flow, **markers: str) -> list[FileVersion]:
    """Answer files in one batch."""
    uploads = [flow.upload(name, csv_of(bridge(marker), ("", f"{marker} has no question"))) for name, marker in markers.items()]
    (result,) = flow.tick_and_run()
    assert result.success
    return uploads


def tables_with(marker: str, url: str) -> Iterator[str]:
    with psycopg.connect(url) as connection:
        for (table,) in connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall():
            query = sql.SQL("SELECT count(*) FROM {} t WHERE t::text LIKE %s").format(sql.Identifier(table))
            if connection.execute(query, [f"%{marker}%"]).fetchone() != (0,):
                yield str(table)


def commits_with(marker: str, client: Client) -> Iterator[str]:
    """Every file of every commit of every repo is read."""
    for repo in [info.repo for kind in ("user", "meta", "spec") for info in client.pfs.list_repo(type=kind)]:
        for info in client.pfs.list_commit(repo=repo, all=True):
            root = pfs.File(commit=pfs.Commit(repo=repo, id=info.commit.id), path="/")
            if list(client.pfs.list_file(file=root)):
                with open_tar(client, root) as tar:
                    if any(marker.encode() in content.read() for member in tar if (content := tar.extractfile(member))):
                        yield f"{repo.name}.{repo.type}"


def places_with(marker: str, flow: Flow, stack: Stack) -> set[str]:
    found = {table for name in DATABASES for table in tables_with(marker, stack.variables[name])}
    found |= {blob.name for blob in flow.services.bucket.list_blobs(versions=True) if marker.encode() in blob.download_as_bytes()}
    with session(PachydermSettings(), "searching") as client:
        return found | set(commits_with(marker, client))


@pytest.mark.slow
def test_nothing_of_a_forgotten_file_is_found_anywhere(flow: Flow, stack: Stack) -> None:
    # Together, and then alone: the results of a run with one file repeat its evidence. The last one is at the head of every repo.
    _, other = answer(flow, **{NAME: MARKER, OTHER: OTHER_MARKER})
    (version,) = answer(flow, **{NAME: f"{MARKER} City"})
    # From now on Pachyderm refuses to squash the newest commit's set, which had been the head when the pipeline was updated.
    put_pipeline()
    everywhere = {"question_answer", "question_answer_reject", "event_logs", "asset_check_executions", "asset_keys"}
    everywhere |= {f"{repo}.{kind}" for repo in ("question_answer", "push-answers-to-sql") for kind in ("user", "meta")}
    assert everywhere | {"questions.user"} < places_with(MARKER, flow, stack)
    shown = command("forget", NAME, "--dry-run", "--json")
    assert (shown.exit_code, {json.loads(line)["state"] for line in shown.stdout.splitlines()}) == (0, {"found"})

    done = command("forget", NAME)
    assert (done.exit_code, {line.split()[0] for line in done.stdout.splitlines()}) == (0, {"removed"}), done.output
    assert "\u2028" not in done.output
    assert places_with(MARKER, flow, stack) == set()
    assert command("forget", NAME).stdout == ""

    assert [answer for _, answer in flow.rows(OTHER)] == ["1872"]
    assert OTHER_MARKER in command("answers", OTHER).stdout
    assert (flow.record(other).status, flow.record(version).status) == (FileStatus.FINISHED, FileStatus.FORGOTTEN)
    assert f"processed/{OTHER}/{other.generation}.csv" in flow.objects("processed/")
    newest = flow.instance.get_latest_materialization_event(QUESTION_ANSWER)
    assert newest is not None
    assert newest.asset_materialization is not None
    assert newest.asset_materialization.partition == OTHER
    assert flow.tick() == []


@pytest.mark.parametrize("has_home", [False, True])
def test_a_dagster_that_cannot_be_read_is_named_with_what_to_do(has_home: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path if has_home else tmp_path / "nowhere"))
    monkeypatch.delenv("DAGSTER_PG_URL", raising=False)
    (tmp_path / "dagster.yaml").write_bytes(project_file("dagster.yaml").read_bytes())
    with pytest.raises(InputError, match="Dagster's history cannot be reached") as caught, dagster_history("gold/"):
        pass
    assert "qa-platform doctor" in caught.value.advice
