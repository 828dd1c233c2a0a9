"""Specifications, secret templates and the workflow: consistent with each other, and the older shapes are taken as they are."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from pachyderm_sdk.api import pfs, pps
from pydantic import SecretStr

from qa_platform.contract import ANSWER_PIPELINE, LOAD_PIPELINE
from qa_platform.following import job_of
from qa_platform.pachd import session
from qa_platform.pachyderm_secrets import bucket_secret, database_secret
from qa_platform.project_files import project_file
from qa_platform.settings import BucketSettings, PachydermSettings, PostgresSettings
from qa_platform_tests.pachd_helpers import Server, eventually
from qa_platform_tests.test_pachyderm_apply import service_account

PACHYDERM = project_file("pachyderm")
SPECS = ("question_answer/pipeline.json", "question_answer/pipeline_cron.json", "push_answers_to_sql/pipeline.json")

# The shapes that deployments of the first pipelines have: a cron input and bash with lines on its standard input; glob "/", a
# script, and seven variables from one secret.
OLD_TICKING = {
    "pipeline": {"name": ANSWER_PIPELINE},
    "description": "Fetches files from a bucket and answers their questions.",
    "transform": {
        "cmd": ["/bin/bash"],
        "stdin": [
            "echo $GCS_ACCESS > $QA_PFS_ROOT/raw.txt",
            "base64 --decode $QA_PFS_ROOT/raw.txt > $QA_PFS_ROOT/account.json",
            "export GOOGLE_APPLICATION_CREDENTIALS=$QA_PFS_ROOT/account.json",
            'test "$(cat $GOOGLE_APPLICATION_CREDENTIALS)" = "{}" && echo "from $STORAGE_BUCKET" > $QA_PFS_ROOT/out/answers_1.csv',
        ],
        "image": "someone/answers:0123456789abcdef0123456789abcdef01234567",
        "secrets": [
            {"name": "gcsaccess", "env_var": "GCS_ACCESS", "key": "creds"},
            {"name": "gcsaccess", "env_var": "STORAGE_BUCKET", "key": "storage_bucket"},
        ],
    },
    "input": {"cron": {"name": "tick", "spec": "@every 60s"}},
}
DATABASE_VARIABLES = {
    "PG_HOST": "host",
    "PG_PASSWORD": "password",
    "PG_USER": "user",
    "PG_DBNAME": "dbname",
    "PG_SSLROOTCERT": "sslrootcert",
    "PG_SSLCLIENT_CERT": "sslcert",
    "PG_SSL_CLIENT_KEY": "sslkey",
}
OLD_PUSHING = {
    "pipeline": {"name": LOAD_PIPELINE},
    "description": "Pushes answers to the database.",
    "transform": {
        "cmd": ["python", "-c", "import os; print(os.environ['PG_HOST'], os.listdir(os.environ['question_answer']))"],
        "image": "someone/pushes:0123456789abcdef0123456789abcdef01234567",
        "secrets": [{"name": "dbaccess", "env_var": name, "key": key} for name, key in DATABASE_VARIABLES.items()],
    },
    "input": {"pfs": {"repo": ANSWER_PIPELINE, "glob": "/"}},
}


def template(name: str, **values: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "type": "Opaque", "stringData": values}


@pytest.fixture
def pachyderm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PachydermSettings]:
    server = Server(tmp_path_factory.mktemp("pachd"))
    yield PachydermSettings(pachd_address=server.address)
    assert server.stop() == 0


def test_specifications_and_secrets_of_the_older_shapes_run_as_they_are(pachyderm: PachydermSettings) -> None:
    bucket_values = {"creds": base64.b64encode(b"{}").decode(), "storage_bucket": "uploads"}
    secrets = [template("gcsaccess", **bucket_values), template("dbaccess", **{key: f"a {key}" for key in DATABASE_VARIABLES.values()})]
    with session(pachyderm, "testing") as client:
        for secret in secrets:
            pps.ApiStub.create_secret(client.pps, file=json.dumps(secret).encode())
        for spec in (OLD_TICKING, OLD_PUSHING):
            client.pps.create_pipeline_v2(create_pipeline_request_json=json.dumps(spec))
        client.pps.run_cron(pipeline=job_of(ANSWER_PIPELINE, "").pipeline)

        def loaded() -> pps.JobInfo | None:
            jobs = client.pps.list_job(pipeline=job_of(LOAD_PIPELINE, "").pipeline)
            return next((job for job in jobs if job.state == pps.JobState.JOB_SUCCESS and job.data_total == 1), None)

        job = eventually(loaded)
        assert job is not None
        answers = pfs.File.from_uri(f"{ANSWER_PIPELINE}@{job.job.id}:/answers_1.csv")
        with client.pfs.pfs_file(answers) as file:
            assert file.read() == b"from uploads\n"
        lines = [message.message for message in client.pps.get_logs(pipeline=job.job.pipeline, job=job.job) if message.user]
    assert lines == ["a host ['answers_1.csv']"]


@pytest.mark.parametrize("file", SPECS)
def test_a_specification_takes_its_secrets_from_keys_that_are_sent(file: str) -> None:
    sent = {
        "dbaccess": database_secret(PostgresSettings()),
        "gcsaccess": bucket_secret(BucketSettings(gcs_access=SecretStr(service_account()))) or {},
    }
    transform = json.loads((PACHYDERM / file).read_text())["transform"]
    for secret in transform.get("secrets", ()):
        assert secret["key"] in sent[secret["name"]]
    variables = {s["env_var"]: s["key"] for s in transform.get("secrets", ()) if s["name"] == "dbaccess"}
    assert variables in ({}, DATABASE_VARIABLES)


def test_the_templates_have_the_keys_that_are_sent_and_no_values() -> None:
    for name, sent in (("dbaccess", database_secret(PostgresSettings())), ("gcsaccess", {"creds": "", "storage_bucket": ""})):
        assert json.loads((PACHYDERM / "secrets" / f"{name}.json").read_text()) == template(name, **dict.fromkeys(sent, ""))


def test_the_workflow_pushes_the_images_that_the_specifications_name() -> None:
    workflow = yaml.safe_load(project_file(".github/workflows/images.yaml").read_text())
    images = {entry["image"]: entry["dockerfile"] for entry in workflow["jobs"]["image"]["strategy"]["matrix"]["include"]}
    pushed = {image: file for image, file in images.items() if file.startswith("pachyderm/")}
    named = {json.loads((PACHYDERM / file).read_text())["transform"]["image"].partition(":")[0] for file in SPECS}
    assert set(pushed) == named
    assert all(project_file(file).exists() for file in pushed.values())
