"""Specifications, secret templates and the workflow are consistent with each other, and the older shapes are accepted as they are."""

import base64
import json
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from pachyderm_sdk.api import pfs, pps
from pydantic import SecretStr

from qa_platform.clients.pachyderm import job_of, session
from qa_platform.contract import ANSWER_PIPELINE, LOAD_PIPELINE
from qa_platform.provisioning.project_files import project_file
from qa_platform.provisioning.secrets import bucket_secret, database_secret
from qa_platform.settings import BucketSettings, PachydermSettings, PostgresSettings
from qa_platform_tests.credentials import service_account
from qa_platform_tests.original_pipelines import DATABASE_VARIABLES, OLD_PUSHING, OLD_TICKING
from qa_platform_tests.pachd_helpers import CLUSTER, IMAGE, Pachd, eventually, needs_workers

PACHYDERM = project_file("pachyderm")
SPECS = ("question_answer/pipeline.json", "question_answer/pipeline_cron.json", "push_answers_to_sql/pipeline.json")


def template(name: str, **values: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "type": "Opaque", "stringData": values}


def runnable(spec: dict[str, Any]) -> str:
    """The spec as it is, but for an image that a cluster can fetch."""
    return json.dumps({**spec, "transform": {**spec["transform"], **({"image": IMAGE} if CLUSTER else {})}})


@needs_workers
def test_specifications_and_secrets_of_the_older_shapes_run_as_they_are(clean_pachyderm: PachydermSettings) -> None:
    bucket_values = {"creds": base64.b64encode(b"{}").decode(), "storage_bucket": "uploads"}
    secrets = [template("gcsaccess", **bucket_values), template("dbaccess", **{key: f"a {key}" for key in DATABASE_VARIABLES.values()})]
    with session(clean_pachyderm, "testing") as client:
        for secret in secrets:
            pps.ApiStub.create_secret(client.pps, file=json.dumps(secret).encode())
        for spec in (OLD_TICKING, OLD_PUSHING):
            client.pps.create_pipeline_v2(create_pipeline_request_json=runnable(spec))
        client.pps.run_cron(pipeline=job_of(ANSWER_PIPELINE, "").pipeline)

        def loaded() -> pps.JobInfo | None:
            jobs = client.pps.list_job(pipeline=job_of(LOAD_PIPELINE, "").pipeline)
            return next((job for job in jobs if job.state == pps.JobState.JOB_SUCCESS and job.data_total == 1), None)

        job = eventually(loaded)
        assert job is not None
        answers = pfs.File.from_uri(f"{ANSWER_PIPELINE}@{job.job.id}:/answers_1.csv")
        with client.pfs.pfs_file(answers) as file:
            assert file.read() == b"from uploads\n"
        lines = eventually(lambda: Pachd(clean_pachyderm.pachd_address).lines(LOAD_PIPELINE, job.job.id))
    assert lines == ["a host ['answers_1.csv']"]


@pytest.mark.parametrize("file", ["question_answer/pipeline.json", "push_answers_to_sql/pipeline.json"])
def test_no_datum_can_hold_its_batch_for_ever(file: str) -> None:
    spec = json.loads((PACHYDERM / file).read_text())
    assert spec["datum_timeout"] == "14400s"
    assert spec["datum_tries"] == 2


@pytest.mark.parametrize("file", SPECS)
def test_a_specification_mounts_its_secrets_where_the_programs_look_and_gives_none_to_the_environment(file: str) -> None:
    # Pachyderm copies the environment of every datum into a repo, in clear.
    secrets = json.loads((PACHYDERM / file).read_text())["transform"].get("secrets", [])
    assert all(secret == {"name": secret["name"], "mount_path": f"/secrets/{secret['name']}"} for secret in secrets)
    assert {secret["name"] for secret in secrets} <= {"dbaccess", "gcsaccess"}


def test_the_keys_that_are_sent_are_those_of_the_older_shapes() -> None:
    assert set(database_secret(PostgresSettings())) == set(DATABASE_VARIABLES.values())
    sent = bucket_secret(BucketSettings(gcs_access=SecretStr(service_account())))
    assert set(sent or ()) == {use["key"] for use in OLD_TICKING["transform"]["secrets"]}


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
