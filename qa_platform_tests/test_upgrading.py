"""Upgrading from the two original pipelines and back, by the steps in `docs/upgrading.md`: no row and no answer is lost."""

import json
from collections.abc import Iterator

import grpc
import pytest
from pachyderm_sdk import Client
from pachyderm_sdk.api import pfs, pps
from pydantic import SecretStr

from qa_platform.clients.pachyderm import job_of, session
from qa_platform.contract import ANSWER_PIPELINE, LOAD_PIPELINE
from qa_platform.loading import migrate
from qa_platform.provisioning.pipelines import Options, apply
from qa_platform.settings import BucketSettings, PachydermSettings, PostgresSettings
from qa_platform_tests.conftest import Database
from qa_platform_tests.original_pipelines import OLD_PUSHING, OLD_TICKING
from qa_platform_tests.pachd_helpers import Server, eventually

PIPELINES = [job_of(name, "").pipeline for name in (ANSWER_PIPELINE, LOAD_PIPELINE)]
ANSWERS = "/answers_1.csv"
FIVE_COLUMNS = "question varchar(10000), answer varchar(10000), context varchar(500000), model varchar(1000), qa_timestamp timestamp"
INSERT = "INSERT INTO question_answer (question, answer, context, model, qa_timestamp) VALUES (%s, 'a', 'c', 'm', now())"


@pytest.fixture
def pachyderm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PachydermSettings]:
    server = Server(tmp_path_factory.mktemp("pachd"))
    yield PachydermSettings(pachd_address=server.address)
    assert server.stop() == 0


def create_originals(client: Client) -> None:
    for spec in (OLD_TICKING, OLD_PUSHING):
        client.pps.create_pipeline_v2(create_pipeline_request_json=json.dumps(spec))


def tick(client: Client) -> str:
    """One tick of the originals, until its answers are loaded; the id of their commit."""
    client.pps.run_cron(pipeline=PIPELINES[0])

    def loaded() -> str:
        jobs = client.pps.list_job(pipeline=PIPELINES[1])
        return next((job.job.id for job in jobs if job.state == pps.JobState.JOB_SUCCESS and job.data_total == 1), "")

    return eventually(loaded)


def answers_at(client: Client, commit: str) -> bytes:
    with client.pfs.pfs_file(pfs.File.from_uri(f"{ANSWER_PIPELINE}@{commit}:{ANSWERS}")) as file:
        return file.read()


def running(client: Client) -> bool:
    return all(info.state != pps.PipelineState.PIPELINE_PAUSED for info in client.pps.list_pipeline(details=True))


def test_there_and_back_keeps_every_row_and_every_answer(pachyderm: PachydermSettings, database: Database) -> None:
    postgres = PostgresSettings(
        host=database.host, port=database.port, user=database.user, dbname=database.dbname, password=SecretStr("secret")
    )
    with session(pachyderm, "testing") as client, database.connect(autocommit=True) as connection:
        # As it was.
        values = {"dbaccess": dict.fromkeys(("host", "user", "password", "dbname", "sslrootcert", "sslcert", "sslkey"), "x")}
        values["gcsaccess"] = {"creds": "e30=", "storage_bucket": "uploads"}
        for name, keys in values.items():
            client.pps.create_secret(name=name, data=keys)
        create_originals(client)
        connection.execute(f"CREATE TABLE question_answer ({FIVE_COLUMNS})")
        for question in ("old 1", "old 2"):
            connection.execute(INSERT, [question])
        before = connection.execute("SELECT * FROM question_answer ORDER BY question").fetchall()
        commit = tick(client)
        kept = answers_at(client, commit)

        # There.
        for pipeline in PIPELINES:
            client.pps.stop_pipeline(pipeline=pipeline)
        migrate.upgrade(postgres)
        changes = {change.name: change.action for change in apply(pachyderm, postgres, BucketSettings(), Options(tag="new"))}
        assert (changes[ANSWER_PIPELINE], changes[LOAD_PIPELINE], changes["dbaccess"], changes["gcsaccess"]) == (
            *("updated", "updated", "sent again"),
            "unchanged",
        )
        eventually(lambda: not running(client))
        for pipeline in PIPELINES:
            client.pps.start_pipeline(pipeline=pipeline)
        eventually(lambda: running(client))
        assert answers_at(client, commit) == kept
        head = eventually(lambda: _finished_head(client))
        assert list(client.pfs.list_file(file=pfs.File.from_uri(f"{ANSWER_PIPELINE}@{head}:/"))) == []
        connection.execute(INSERT, ["a writer of five columns"])
        after = connection.execute("SELECT * FROM question_answer WHERE source_file IS NULL ORDER BY question").fetchall()
        assert [row[:5] for row in after][1:] == before

        # Back.
        for pipeline in reversed(PIPELINES):
            client.pps.delete_pipeline(pipeline=pipeline)
        with pytest.raises(grpc.RpcError):
            client.pps.inspect_pipeline(pipeline=PIPELINES[0])
        create_originals(client)
        assert answers_at(client, tick(client)) == kept
        connection.execute(INSERT, ["old 3"])
        assert connection.execute("SELECT count(*) FROM question_answer").fetchone() == (4,)


def _finished_head(client: Client) -> str:
    """The head of the answers, once the platform's pipeline has made it."""
    info = client.pfs.inspect_commit(commit=pfs.Commit.from_uri(f"{ANSWER_PIPELINE}@master"))
    return info.commit.id if info.finished.timestamp() > 0 else ""
