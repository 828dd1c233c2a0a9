"""Which old commits are removed: those of the cron variant's ticks too, but none that a file still needs."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from click.testing import CliRunner
from pachyderm_sdk.api import pfs, pps

from qa_platform.batches import squash
from qa_platform.batches.squash import Squashed, squash_old
from qa_platform.cli.main import main
from qa_platform.clients.pachyderm import job_of
from qa_platform.contract import ANSWER_PIPELINE, FileVersion
from qa_platform.ledger import Ledger
from qa_platform.loading import migrate
from qa_platform.provisioning.project_files import project_file
from qa_platform.settings import PachydermSettings, PostgresSettings
from qa_platform_tests.conftest import Database
from qa_platform_tests.pachd_helpers import Pachd, Server, eventually

SPEC = json.loads((project_file("pachyderm") / "question_answer" / "pipeline_cron.json").read_text())
PIPELINE = job_of(ANSWER_PIPELINE, "").pipeline


@pytest.fixture
def pachd(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pachd]:
    server = Server(tmp_path_factory.mktemp("pachd"))
    monkeypatch.setenv("PACHD_ADDRESS", server.address)
    yield Pachd(server.address)
    assert server.stop() == 0


@pytest.fixture
def ledger(database: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    for name, value in database.environment.items():
        monkeypatch.setenv(name, value)
    migrate.upgrade(PostgresSettings())
    with Ledger(PostgresSettings()) as ledger:
        yield ledger


def tick(pachd: Pachd) -> str:
    """One tick, until its job is over; the id of its commit."""
    before = {job.job.id for job in pachd.jobs(ANSWER_PIPELINE)}
    pachd.client.pps.run_cron(pipeline=PIPELINE)
    (job,) = eventually(lambda: [job.job.id for job in pachd.jobs(ANSWER_PIPELINE) if job.job.id not in before])
    assert pachd.wait(ANSWER_PIPELINE, job).state == pps.JobState.JOB_SUCCESS
    return job


def ticks(pachd: Pachd) -> list[str]:
    return [info.commit.id for info in pachd.client.pfs.list_commit(repo=pfs.Repo.from_uri(f"{ANSWER_PIPELINE}_tick"))]


def test_old_ticks_are_removed_unless_a_file_needs_them(pachd: Pachd, ledger: Ledger) -> None:
    source = {"cron": {**SPEC["input"]["cron"], "spec": "@never"}}
    spec = {"pipeline": SPEC["pipeline"], "input": source, "transform": {"cmd": ["true"]}}
    pachd.client.pps.create_pipeline_v2(create_pipeline_request_json=json.dumps(spec))
    made = [tick(pachd) for _ in range(4)]
    waiting = FileVersion("waiting.csv", 1)
    ledger.claim([waiting], owner="job", lease_seconds=60)
    ledger.record_commit("job", [waiting], commit=made[1], job=made[1])
    result = CliRunner().invoke(main, ["pachyderm", "squash"])
    assert (result.exit_code, result.output) == (0, "0 old commits were removed; 0 are kept: in use, or Pachyderm needs them\n")
    assert set(made) <= set(ticks(pachd)), "none is that old"
    assert squash_old(PachydermSettings(), PostgresSettings(), datetime.now(UTC)).removed >= 2
    assert set(made) & set(ticks(pachd)) == {made[1], made[3]}, "one is in use, and one is the newest"
    assert squash_old(PachydermSettings(), PostgresSettings(), datetime.now(UTC)).removed == 0


def test_the_command_removes_all_that_is_old_and_fails_if_it_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = iter([Squashed(2000, 0), Squashed(3, 1), Squashed(0, 1, "needs permissions [REPO_DELETE_COMMIT] on CLUSTER")])
    monkeypatch.setattr(squash, "squash_old", lambda *_: next(rounds))
    result = CliRunner().invoke(main, ["pachyderm", "squash"])
    assert result.exit_code == 1
    assert "2003 old commits were removed; 1 are kept" in result.output
    assert "needs permissions [REPO_DELETE_COMMIT] on CLUSTER" in result.output
