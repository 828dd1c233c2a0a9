"""`qa-platform doctor` against real servers: what is wrong is named with what mends it, and nothing else is held up by it."""

import json
import shlex
import socket
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc
import psycopg
import pytest
from click.testing import CliRunner
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
from pachyderm_sdk.api import pfs, pps

from qa_platform import doctor
from qa_platform.cli import main
from qa_platform.contract import ANSWER_PIPELINE, LOAD_PIPELINE, QUESTIONS_REPO
from qa_platform.doctor import Finding, State
from qa_platform.embedded import postgres
from qa_platform.following import job_of
from qa_platform.loading import migrate
from qa_platform.pachd import session
from qa_platform.pachyderm_apply import Options, apply, specifications
from qa_platform.project_files import project_file
from qa_platform.settings import BucketSettings, PachydermSettings, PostgresSettings
from qa_platform_tests.conftest import Database, new_database
from qa_platform_tests.pachd_helpers import Server
from qa_platform_tests.test_pachyderm_apply import service_account

SECRET = "planted-Pa55word-41c0"
LOCKED = "locked_out"


@pytest.fixture(scope="module")
def whole(gcs_address: str, postgres_socket: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a deployment in which everything is as it should be."""
    folder = tmp_path_factory.mktemp("doctor")
    bucket = f"test-{uuid.uuid4().hex}"
    storage.Client("test", AnonymousCredentials(), client_options={"api_endpoint": f"http://{gcs_address}"}).create_bucket(bucket)
    (folder / "dagster.yaml").write_text(project_file("dagster.yaml").read_text())
    server = Server(folder)
    with new_database(postgres_socket) as database, pytest.MonkeyPatch.context() as patch:
        variables = {
            "STORAGE_BUCKET": bucket,
            "STORAGE_EMULATOR_HOST": f"http://{gcs_address}",
            "PACHD_ADDRESS": server.address,
            "DAGSTER_HOME": str(folder),
            "DAGSTER_PG_URL": database.url,
            **database.environment,
        }
        _set(patch, variables)
        migrate.upgrade(PostgresSettings())
        _apply()
        yield variables
    assert server.stop() == 0


@pytest.fixture
def environment(whole: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The same, as this process's environment."""
    _set(monkeypatch, whole)
    return whole


@pytest.fixture
def pachyderm(environment: dict[str, str]) -> Iterator[PachydermSettings]:
    """Its pachd, which is put in order again after the test."""
    yield PachydermSettings()
    with session(PachydermSettings(), "putting in order") as client:
        for name in (LOAD_PIPELINE, ANSWER_PIPELINE):
            client.pps.delete_pipeline(pipeline=job_of(name, "").pipeline, force=True)
    _apply()


def _set(patch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name in ("PG_PASSWORD", "PACH_TOKEN", "GCS_ACCESS", "GOOGLE_APPLICATION_CREDENTIALS"):
        patch.delenv(name, raising=False)
    for name, value in variables.items():
        patch.setenv(name, value)


def _apply(**options: Any) -> None:
    apply(PachydermSettings(), PostgresSettings(), BucketSettings(), Options(**options))


def examined() -> dict[str, Finding]:
    return {finding.name: finding for finding in doctor.examine()}


def wrong_ones() -> dict[str, Finding]:
    return {name: finding for name, finding in examined().items() if finding.state is State.WRONG}


def the_wrong_one() -> Finding:
    (finding,) = wrong_ones().values()
    return finding


def follow(mend: str) -> None:
    """Do what was said."""
    program, *words = shlex.split(mend)
    assert program == "qa-platform"
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output


def test_when_all_is_well_it_says_so(environment: dict[str, str]) -> None:
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == "all is well"
    document = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).output)
    assert document["ok"]
    assert {finding["state"] for finding in document["findings"]} == {"ok"}


@pytest.mark.parametrize(
    ("changes", "name", "mend"),
    [
        ({"PG_HOST": "/nowhere"}, "PostgreSQL", "PG_HOST"),
        ({"PG_DBNAME": "nowhere"}, "PostgreSQL", "PG_DBNAME"),
        ({"STORAGE_BUCKET": "no-such-bucket"}, "bucket", "gcloud storage buckets create gs://no-such-bucket"),
        ({"STORAGE_EMULATOR_HOST": "http://127.0.0.1:1"}, "bucket", "STORAGE_EMULATOR_HOST"),
        ({"PACHD_ADDRESS": "grpc://127.0.0.1:1"}, "pachd", "PACHD_ADDRESS"),
        ({"PACHD_ADDRESS": "localhost"}, "pachd", "export PACHD_ADDRESS=grpc://"),
        ({"DAGSTER_HOME": "/nowhere"}, "Dagster home", "/nowhere/dagster.yaml"),
        ({"DAGSTER_PG_URL": f"postgresql://u:{SECRET}@127.0.0.1:1/d"}, "Dagster storage", "DAGSTER_PG_URL"),
        ({"DAGSTER_PG_URL": f"postgresql://u:{SECRET}@[/d"}, "Dagster storage", "DAGSTER_PG_URL"),
        ({"DAGSTER_PG_URL": ""}, "Dagster storage", "export DAGSTER_PG_URL="),
    ],
)
def test_one_thing_that_is_wrong_is_named_with_its_mend_and_the_rest_is_looked_at(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], name: str, mend: str
) -> None:
    for variable, value in changes.items():
        monkeypatch.setenv(variable, value)
    for variable in ("PG_PASSWORD", "PACH_TOKEN", "GCS_ACCESS"):
        monkeypatch.setenv(variable, SECRET)
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert result.exit_code == 1
    findings = {finding["name"]: finding for finding in json.loads(result.output)["findings"]}
    assert [found for found in findings.values() if found["state"] == "wrong"] == [findings[name]]
    assert mend in findings[name]["mend"]
    assert SECRET not in result.output
    assert SECRET not in CliRunner().invoke(main, ["doctor"]).output
    assert sum(finding["state"] == "ok" for finding in findings.values()) > 5


@pytest.mark.parametrize("away", [False, True])
def test_a_storage_that_only_dagster_yaml_knows_is_asked(
    environment: dict[str, str], postgres_socket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, away: bool
) -> None:
    host = "127.0.0.1" if away else quote(postgres_socket, safe="")
    where = {"hostname": host, "port": 1 if away else 5432, "username": environment["PG_USER"], "db_name": environment["PG_DBNAME"]}
    config = {"storage": {"postgres": {"postgres_db": {**where, "password": {"env": "DAGSTER_PG_PASSWORD"}}}}}
    (tmp_path / "dagster.yaml").write_text(json.dumps(config))
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.setenv("DAGSTER_PG_URL", "")
    monkeypatch.delenv("DAGSTER_PG_PASSWORD", raising=False)
    assert "dagster instance info" in the_wrong_one().mend
    monkeypatch.setenv("DAGSTER_PG_PASSWORD", SECRET)
    finding = examined()["Dagster storage"]
    assert finding.state is (State.WRONG if away else State.OK)
    assert environment["PG_DBNAME"] in finding.detail
    assert SECRET not in str(finding)


def test_a_wrong_password_is_told_from_a_server_that_is_away(
    environment: dict[str, str], postgres_socket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with psycopg.connect(postgres.database_url(postgres_socket, "postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {LOCKED} LOGIN PASSWORD 'right'")
        (hba,) = connection.execute("SHOW hba_file").fetchone() or ("",)
        rules = Path(hba).read_text()
        Path(hba).write_text(f"local all {LOCKED} scram-sha-256\n{rules}")
        connection.execute("SELECT pg_reload_conf()")
        try:
            monkeypatch.setenv("PG_USER", LOCKED)
            monkeypatch.setenv("PG_PASSWORD", SECRET)
            found = wrong_ones()
            monkeypatch.setenv("PG_PASSWORD", "right")
            assert "permission denied" in the_wrong_one().detail
            assert "GRANT SELECT ON question_answer_version" in the_wrong_one().mend
        finally:
            Path(hba).write_text(rules)
            connection.execute("SELECT pg_reload_conf()")
            connection.execute(f"DROP ROLE {LOCKED}")
    assert list(found) == ["PostgreSQL"]
    assert "password authentication failed" in found["PostgreSQL"].detail
    assert "PG_PASSWORD" in found["PostgreSQL"].mend
    assert SECRET not in str(found)


def test_tables_that_are_not_there_are_mended_by_the_command_that_is_named(
    environment: dict[str, str], database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PG_DBNAME", database.dbname)
    finding = the_wrong_one()
    assert finding.name == "tables"
    assert examined()["table privileges"].state is State.UNKNOWN
    follow(finding.mend)
    assert wrong_ones() == {}


def test_rights_that_are_missing_are_listed(environment: dict[str, str], postgres_socket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with psycopg.connect(postgres.database_url(postgres_socket, environment["PG_DBNAME"]), autocommit=True) as connection:
        connection.execute("CREATE ROLE reader LOGIN")
        connection.execute("GRANT SELECT ON question_answer, question_answer_reject, question_file, question_answer_version TO reader")
        monkeypatch.setenv("PG_USER", "reader")
        finding = the_wrong_one()
        assert "INSERT on question_file" in finding.detail
        connection.execute(shlex.split(finding.mend.partition(": ")[2])[-1])
        assert wrong_ones() == {}
        connection.execute("DROP OWNED BY reader; DROP ROLE reader")


def test_a_missing_secret_and_a_missing_key_are_mended_by_the_command_that_is_named(pachyderm: PachydermSettings) -> None:
    with session(pachyderm, "taking a secret away") as client:
        client.pps.delete_secret(secret=pps.Secret(name="dbaccess"))
        found = wrong_ones()
        assert "there is no secret dbaccess" in found["secret dbaccess"].detail
        client.pps.create_secret(name="dbaccess", data={"host": "h"})
        incomplete = wrong_ones()["secret dbaccess"]
    assert "missing key" in incomplete.detail
    follow(incomplete.mend.partition("then: ")[2])
    assert wrong_ones() == {}


def test_a_pipeline_of_another_version_is_mended_by_the_command_that_is_named(pachyderm: PachydermSettings) -> None:
    _apply(registry="docker.io/acme", tag="v0.0.1", now=True)
    found = wrong_ones()
    assert set(found) == {f"pipeline {ANSWER_PIPELINE}", f"pipeline {LOAD_PIPELINE}"}
    finding = found[f"pipeline {ANSWER_PIPELINE}"]
    assert "docker.io/acme/qa-platform-question-answer:v0.0.1" in finding.detail
    assert "--registry docker.io/acme --tag v0" in finding.mend
    follow(f"{finding.mend} --now")
    assert wrong_ones() == {}


def test_a_pipeline_with_another_specification_is_mended_by_the_command_that_is_named(pachyderm: PachydermSettings) -> None:
    spec = dict(specifications(Options(), PostgresSettings()))[ANSWER_PIPELINE]
    spec["datum_tries"] = 7
    with session(pachyderm, "changing a pipeline") as client:
        client.pps.create_pipeline_v2(create_pipeline_request_json=json.dumps(spec), update=True)
    finding = the_wrong_one()
    assert finding.name == f"pipeline {ANSWER_PIPELINE}"
    assert "7" in finding.detail
    follow(f"{finding.mend} --now")
    assert wrong_ones() == {}


def test_another_image_a_stopped_pipeline_and_a_missing_one_are_named(pachyderm: PachydermSettings) -> None:
    spec = dict(specifications(Options(), PostgresSettings()))[LOAD_PIPELINE]
    spec["transform"]["image"] = "acme/push:1"
    with session(pachyderm, "changing pipelines") as client:
        client.pps.stop_pipeline(pipeline=job_of(ANSWER_PIPELINE, "").pipeline)
        client.pps.create_pipeline_v2(create_pipeline_request_json=json.dumps(spec), update=True)
        found = wrong_ones()
        assert found[f"pipeline {ANSWER_PIPELINE}"].mend == f"pachctl start pipeline {ANSWER_PIPELINE}"
        assert "acme/push:1" in found[f"pipeline {LOAD_PIPELINE}"].detail
        client.pps.delete_pipeline(pipeline=job_of(LOAD_PIPELINE, "").pipeline)
    assert "there is no pipeline" in wrong_ones()[f"pipeline {LOAD_PIPELINE}"].detail


def test_a_bare_pachd_lacks_everything_and_one_command_mends_it(pachyderm: PachydermSettings) -> None:
    with session(pachyderm, "clearing") as client:
        for name in (LOAD_PIPELINE, ANSWER_PIPELINE):
            client.pps.delete_pipeline(pipeline=job_of(name, "").pipeline, force=True)
        client.pfs.delete_repo(repo=pfs.Repo.from_uri(QUESTIONS_REPO), force=True)
        client.pps.delete_secret(secret=pps.Secret(name="dbaccess"))
    found = wrong_ones()
    expected = (f"repo {QUESTIONS_REPO}", "secret dbaccess", f"pipeline {ANSWER_PIPELINE}", f"pipeline {LOAD_PIPELINE}")
    assert tuple(found) == expected
    follow(found[expected[0]].mend)
    assert wrong_ones() == {}


def test_the_cron_variant_is_well_too_and_applied_again_it_stays_as_it_is(
    pachyderm: PachydermSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = CliRunner().invoke(main, ["pachyderm", "apply", "--cron"])
    assert without.exit_code == 1
    assert "GCS_ACCESS" in without.stderr
    monkeypatch.setenv("GCS_ACCESS", service_account())
    _apply(cron=True, now=True)
    assert wrong_ones() == {}
    again = apply(pachyderm, PostgresSettings(), BucketSettings(), Options(cron=True))
    assert {change.action for change in again if change.kind == "pipeline"} == {"unchanged"}
    with session(pachyderm, "clearing") as client:
        client.pps.delete_secret(secret=pps.Secret(name="gcsaccess"))
    assert "there is no secret gcsaccess" in wrong_ones()["secret gcsaccess"].detail


def test_a_pachd_that_asks_for_a_token_says_so(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "no authentication token (try logging in)")
        yield b""

    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        version = {"GetVersion": grpc.unary_unary_rpc_method_handler(lambda request, context: b"\x08\x02\x10\x0c")}
        repos = {"ListRepo": grpc.unary_stream_rpc_method_handler(refuse)}
        handlers = {"versionpb_v2.API": version, "pfs_v2.API": repos}
        server.add_generic_rpc_handlers(tuple(grpc.method_handlers_generic_handler(name, calls) for name, calls in handlers.items()))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        monkeypatch.setenv("PACHD_ADDRESS", f"grpc://127.0.0.1:{port}")
        finding = the_wrong_one()
        monkeypatch.setenv("PACH_TOKEN", SECRET)
        refused = the_wrong_one()
        server.stop(0)
    assert "PACH_TOKEN is not set" in finding.detail
    assert "PACH_TOKEN=" in finding.mend
    assert "does not accept PACH_TOKEN" in refused.detail
    assert SECRET not in str(refused)


def test_a_server_that_never_answers_is_named_within_the_deadline(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"grpc://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("PACHD_ADDRESS", address)
        begun = time.monotonic()
        findings = {finding.name: finding for finding in doctor.examine(deadline=2)}
        assert time.monotonic() - begun < 10
    assert findings["pachd"].state is State.WRONG
    assert address in findings["pachd"].detail
    assert findings[f"pipeline {ANSWER_PIPELINE}"].state is State.UNKNOWN
    assert findings["PostgreSQL"].state is State.OK


def test_a_package_that_does_not_fit_is_named_with_what_to_install(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    requires = [*(metadata.requires("qa-platform") or []), "rich<1", "no-such-package>=2", "no-such-extra>=2; extra == 'more'"]
    monkeypatch.setattr(metadata, "requires", lambda name: requires)
    finding = the_wrong_one()
    assert "rich is" in finding.detail
    assert "no-such-package is not installed" in finding.detail
    assert finding.mend == "pip install 'rich<1' 'no-such-package>=2'"


def test_a_variable_of_the_wrong_type_is_named_without_its_value(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PG_PORT", SECRET)
    finding = wrong_ones()["PostgreSQL"]
    assert "PG_PORT" in finding.detail
    assert SECRET not in str(examined())
