"""`qa-platform doctor` against real servers: it names every problem with its fix, and one problem does not hold up the other checks."""

import io
import json
import math
import re
import shlex
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import metadata
from itertools import combinations
from pathlib import Path
from typing import Any

import dagster as dg
import grpc
import psycopg
import pytest
from click.testing import CliRunner
from dagster._core.definitions.run_request import InstigatorType
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteInstigatorOrigin, RemoteRepositoryOrigin
from dagster._core.scheduler.instigation import InstigatorState, InstigatorStatus, TickData, TickStatus
from dagster._daemon.daemon import SensorDaemon
from dagster._daemon.types import DaemonHeartbeat
from dagster_postgres import PostgresEventLogStorage, PostgresRunStorage, PostgresScheduleStorage
from dagster_shared.error import SerializableErrorInfo
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
from pachyderm_sdk.api import pps, version
from psycopg import sql
from pydantic import SecretStr
from rich.console import Console
from safetensors import safe_open

from qa_platform.answering.model import BUNDLED, BUNDLED_FOLDER
from qa_platform.cli.doctor import clocks, workers
from qa_platform.cli.doctor import dagster as dagster_part
from qa_platform.cli.doctor.examine import examine
from qa_platform.cli.doctor.findings import Finding, Result, State, Wrong
from qa_platform.cli.doctor.show import show
from qa_platform.cli.main import main
from qa_platform.clients.pachyderm import job_of, session
from qa_platform.clients.postgres import connect
from qa_platform.contract import ANSWER_PIPELINE, HEARTBEAT_ASSET, LOAD_PIPELINE, QUESTIONS_REPO, FileReason, FileVersion
from qa_platform.embedded import postgres_access
from qa_platform.ingest import FileRejection
from qa_platform.ledger import Ledger
from qa_platform.loading import migrate
from qa_platform.provisioning.pipelines import Options, apply, specifications
from qa_platform.provisioning.project_files import project_file
from qa_platform.settings import BucketSettings, PachydermSettings, PipelinesSettings, PostgresSettings, WorkSettings
from qa_platform_tests.conftest import Database, new_database
from qa_platform_tests.credentials import service_account
from qa_platform_tests.flow import wait_until
from qa_platform_tests.json_schemas import fits
from qa_platform_tests.pachd_helpers import Server, eventually, make_by_kubectl, pachd_address, remove_platform

SECRET = "planted-Pa55word-41c0"
LOCKED = "locked_out"


@pytest.fixture(scope="module")
def whole(gcs_address: str, postgres_socket: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a deployment in which everything is as it should be."""
    folder = tmp_path_factory.mktemp("doctor")
    bucket = f"test-{uuid.uuid4().hex}"
    storage.Client("test", AnonymousCredentials(), client_options={"api_endpoint": f"http://{gcs_address}"}).create_bucket(bucket)
    (folder / "dagster.yaml").write_text(project_file("dagster.yaml").read_text())
    with pachd_address(folder) as address, new_database(postgres_socket) as database, pytest.MonkeyPatch.context() as patch:
        variables = {
            "STORAGE_BUCKET": bucket,
            "STORAGE_EMULATOR_HOST": f"http://{gcs_address}",
            "PACHD_ADDRESS": address,
            "DAGSTER_HOME": str(folder),
            "DAGSTER_PG_URL": database.url,
            **database.environment,
        }
        _set(patch, variables)
        migrate.upgrade(PostgresSettings())
        with session(PachydermSettings(), "cleaning") as client:
            remove_platform(client)
            _apply()
            with dg.DagsterInstance.from_config(str(folder)) as instance:
                instance.report_runless_asset_event(dg.AssetMaterialization(HEARTBEAT_ASSET))
            yield variables
            remove_platform(client)


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
    return {finding.name: finding for finding in examine()}


def wrong_ones() -> dict[str, Finding]:
    return {name: finding for name, finding in examined().items() if finding.state is State.WRONG}


def all_is_well() -> None:
    """Nothing is wrong; where a cluster's workers could not start, they need a while."""
    eventually(lambda: not wrong_ones(), lambda: str(wrong_ones()))


def the_wrong_one() -> Finding:
    (finding,) = wrong_ones().values()
    return finding


def follow(fix: str) -> None:
    """Do what was said."""
    program, *words = shlex.split(fix)
    assert program == "qa-platform"
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("states", "last"),
    [
        ([State.OK, State.UNKNOWN], "not checked: part 1"),
        ([State.UNKNOWN, State.WRONG, State.WRONG], "wrong: part 1, part 2"),
        ([State.OK], "all is well"),
    ],
)
def test_the_last_line_names_what_is_worst(states: list[State], last: str) -> None:
    out = Console(file=io.StringIO(), width=80)
    show([Finding(f"part {number}", state, "") for number, state in enumerate(states)], out)
    assert out.file.getvalue().splitlines()[-1] == last  # type: ignore[attr-defined]


def test_a_dagster_with_another_kind_of_storage_is_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dagster.yaml").touch()
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.delenv("DAGSTER_PG_URL", raising=False)
    assert {result.state for result in dagster_part.PART.examine()} == {State.OK}


def test_when_all_is_well_it_says_so(environment: dict[str, str]) -> None:
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == "all is well"
    written = CliRunner().invoke(main, ["doctor", "--json"]).output
    assert fits("doctor", written)
    document = json.loads(written)
    assert document["ok"]
    assert {finding["state"] for finding in document["findings"]} == {"ok"}


@pytest.mark.parametrize(
    ("changes", "name", "fix"),
    [
        ({"PG_HOST": "/nowhere"}, "PostgreSQL", "PG_HOST"),
        ({"PG_DBNAME": "nowhere"}, "PostgreSQL", "PG_DBNAME"),
        ({"STORAGE_BUCKET": "no-such-bucket"}, "bucket", "gcloud storage buckets create gs://no-such-bucket"),
        ({"STORAGE_EMULATOR_HOST": "http://127.0.0.1:1"}, "bucket", "STORAGE_EMULATOR_HOST"),
        ({"PACHD_ADDRESS": "grpc://127.0.0.1:1"}, "pachd", "PACHD_ADDRESS"),
        ({"PACHD_ADDRESS": "localhost"}, "pachd", "set it to grpc://"),
        ({"PACHD_ADDRESS": "grpc://[::1"}, "pachd", "set it to grpc://"),
        ({"PACHD_ADDRESS": "grpc://localhost:99999"}, "pachd", "set it to grpc://"),
        ({"QA_OWNERS": "bob"}, "variables", "docs/configuration.md"),
        ({"QA_EXECUTOR": "k8s"}, "variables", "docs/configuration.md"),
        ({"QA_STEP_RESOURCES": "{bad"}, "variables", "docs/configuration.md"),
        ({"QA_NOTIFY_URLS": f"slack://{SECRET}"}, "variables", "docs/configuration.md"),
        ({"QA_LOW_SCORE": "2"}, "variables", "docs/configuration.md"),
        ({"QA_BATCH_FILES": "many"}, "variables", "docs/configuration.md"),
        ({"QA_SHARD_ROWS": "0", "QA_EMAIL_TO": "a@example.com"}, "variables", "docs/configuration.md"),
        ({"QA_PRECISION": "auto"}, "variables", "qa-platform tune"),
        ({"PACH_CA_BUNDLE": "/nowhere.pem"}, "pachd", "set it to a PEM file"),
        ({"DAGSTER_HOME": "/nowhere"}, "Dagster home", "/nowhere/dagster.yaml"),
        ({"DAGSTER_PG_URL": f"postgresql://u:{SECRET}@127.0.0.1:1/d"}, "Dagster storage", "DAGSTER_PG_URL"),
        ({"DAGSTER_PG_URL": f"postgresql://u:{SECRET}@[/d"}, "Dagster storage", "DAGSTER_PG_URL"),
        ({"DAGSTER_PG_URL": ""}, "Dagster storage", "export DAGSTER_PG_URL="),
    ],
)
def test_one_thing_that_is_wrong_is_named_with_its_fix_and_the_rest_is_looked_at(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], name: str, fix: str
) -> None:
    for variable, value in changes.items():
        monkeypatch.setenv(variable, value)
    for variable in ("PG_PASSWORD", "PACH_TOKEN", "GCS_ACCESS"):
        monkeypatch.setenv(variable, SECRET)
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert result.exit_code == 1
    findings = {finding["name"]: finding for finding in json.loads(result.output)["findings"]}
    assert [found for found in findings.values() if found["state"] == "wrong"] == [findings[name]]
    assert fix in findings[name]["fix"]
    assert SECRET not in result.output
    assert SECRET not in CliRunner().invoke(main, ["doctor"]).output
    assert sum(finding["state"] == "ok" for finding in findings.values()) > 5


@pytest.fixture
def dagster_storage(postgres_socket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    """An empty database for the storage of a Dagster of its own."""
    (tmp_path / "dagster.yaml").write_text(project_file("dagster.yaml").read_text())
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    with new_database(postgres_socket) as database:
        monkeypatch.setenv("DAGSTER_PG_URL", database.url)
        yield database


def heartbeat() -> Result:
    *_, result = dagster_part.PART.examine()
    return result


def test_a_sensor_that_has_not_begun_is_well_and_its_storage_stays_empty(dagster_storage: Database) -> None:
    assert heartbeat().state is State.OK
    assert heartbeat().detail.startswith("none yet")
    with dagster_storage.connect() as connection:
        assert connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone() == (0,)


@pytest.mark.usefixtures("dagster_storage")
def test_a_heartbeat_that_has_ceased_comes_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    location = RegisteredCodeLocationOrigin("qa-platform")
    origin = RemoteInstigatorOrigin(RemoteRepositoryOrigin(location, "__repository__"), "incoming_files")
    state = InstigatorState(origin, InstigatorType.SENSOR, InstigatorStatus.RUNNING)

    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:

        def sign_of_life(seconds_ago: float) -> None:
            instance.add_daemon_heartbeat(DaemonHeartbeat(time.time() - seconds_ago, SensorDaemon.daemon_type(), "daemon", []))

        def tick(status: TickStatus, **more: Any) -> None:
            names = (origin.get_id(), origin.instigator_name, InstigatorType.SENSOR)
            instance.create_tick(TickData(*names, status, time.time(), selector_id=state.selector_id, **more))

        instance.report_runless_asset_event(dg.AssetMaterialization(HEARTBEAT_ASSET))
        assert heartbeat().state is State.OK
        for name in ("QA_HEARTBEAT_SECONDS", "QA_SENSOR_SECONDS"):
            monkeypatch.setenv(name, "1")
        wait_until(lambda: heartbeat().state is State.WRONG, "the heartbeat is too old")
        assert "there should be one every 1 s: Dagster's daemon is not running" in heartbeat().detail
        sign_of_life(500)
        assert re.search(r"Dagster's daemon is not running; it last reported 5\d\d s ago$", heartbeat().detail)
        assert heartbeat().fix.startswith("start Dagster's daemon")
        sign_of_life(0)
        assert "has not ticked since: the code location does not load" in heartbeat().detail
        assert "docker compose logs code-location" in heartbeat().fix
        instance.add_instigator_state(state)
        tick(TickStatus.SKIPPED, skip_reason="1 runs were requested\nbut do not exist")
        assert "ended: 1 runs were requested but do not exist" in heartbeat().detail
        cause = SerializableErrorInfo("the bucket cannot be reached", [], "TransientError")
        tick(TickStatus.FAILURE, error=SerializableErrorInfo("Error occurred during the execution", [], "SensorExecutionError", cause))
        assert "failed: the bucket cannot be reached" in heartbeat().detail
        tick(TickStatus.STARTED)
        assert "has not ended" in heartbeat().detail
        instance.update_instigator_state(state.with_status(InstigatorStatus.STOPPED))
        assert "the sensor incoming_files is switched off" in heartbeat().detail
        assert heartbeat().fix.startswith("switch it on in Dagster")


def storage_config(where: Mapping[str, Any], *, in_parts: bool) -> dict[str, Any]:
    """The storage in a `dagster.yaml`: as Dagster writes it today, or in the three parts that its chart writes."""
    config = {"postgres_db": {**where, "password": {"env": "DAGSTER_PG_PASSWORD"}}}
    if not in_parts:
        return {"storage": {"postgres": config}}
    parts = {"run": PostgresRunStorage, "event_log": PostgresEventLogStorage, "schedule": PostgresScheduleStorage}
    return {f"{name}_storage": {"module": part.__module__, "class": part.__name__, "config": config} for name, part in parts.items()}


@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("away", [False, True])
def test_a_storage_that_only_dagster_yaml_knows_is_asked(
    environment: dict[str, str], postgres_socket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, away: bool, in_parts: bool
) -> None:
    # A socket's folder, as SQLAlchemy takes it.
    options = {} if away else {"params": {"host": postgres_socket}}
    where = {
        "hostname": "127.0.0.1",
        **options,
        "port": 1 if away else 5432,
        "username": environment["PG_USER"],
        "db_name": environment["PG_DBNAME"],
    }
    (tmp_path / "dagster.yaml").write_text(json.dumps(storage_config(where, in_parts=in_parts)))
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    # The file does not name it.
    monkeypatch.setenv("DAGSTER_PG_URL", "postgresql://127.0.0.1:1/elsewhere")
    monkeypatch.delenv("DAGSTER_PG_PASSWORD", raising=False)
    with pytest.raises(Wrong, match="cannot be resolved") as caught:
        list(dagster_part.PART.examine())
    assert "dagster instance info" in caught.value.result.fix
    monkeypatch.setenv("DAGSTER_PG_PASSWORD", SECRET)
    finding = examined()["Dagster storage"]
    assert finding.state is (State.WRONG if away else State.OK)
    # Three parts in one database are one.
    assert finding.detail.count(f"/{environment['PG_DBNAME']}") == 1
    assert SECRET not in str(finding)


@pytest.mark.parametrize("password", ["hun/ter2", "hunter@secret/2x", "p@hunter2", "123/hunter2", "hunter?2"])
def test_no_part_of_a_password_that_is_not_encoded_is_shown(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, password: str
) -> None:
    monkeypatch.setenv("DAGSTER_PG_URL", f"postgresql://qa:{password}@127.0.0.1:1/dagster")
    finding = examined()["Dagster storage"]
    assert finding.state is State.WRONG
    assert not any(part in str(finding) for part in ("ter2", "2x", "unter", "?2"))


def test_an_address_may_have_options_of_its_own_and_an_encoded_user(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    address = environment["DAGSTER_PG_URL"]
    separator = "&" if "?" in address else "?"
    monkeypatch.setenv("DAGSTER_PG_URL", f"{address}{separator}connect_timeout=10")
    assert examined()["Dagster storage"].state is State.OK
    monkeypatch.setenv("DAGSTER_PG_URL", "postgresql://sa%40project.iam:x@127.0.0.1:1/dagster")
    assert "sa@project.iam@127.0.0.1/dagster" in examined()["Dagster storage"].detail


def test_an_address_with_sqlalchemys_driver_is_asked_as_dagster_asks_it(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = environment["DAGSTER_PG_URL"]
    assert address.startswith("postgresql://")
    monkeypatch.setenv("DAGSTER_PG_URL", address.replace("postgresql://", "postgresql+psycopg2://", 1))
    assert examined()["Dagster storage"].state is State.OK


def test_each_database_of_a_storage_in_parts_is_looked_at(postgres_socket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.setenv("DAGSTER_PG_PASSWORD", SECRET)
    with new_database(postgres_socket) as events, new_database(postgres_socket, encoding="LATIN1") as runs:
        server = {"hostname": "127.0.0.1", "params": {"host": postgres_socket}, "username": events.user}
        config = storage_config({**server, "db_name": events.dbname}, in_parts=True)
        config["run_storage"] = storage_config({**server, "db_name": runs.dbname}, in_parts=True)["run_storage"]
        (tmp_path / "dagster.yaml").write_text(json.dumps(config))
        _, storage, beat = dagster_part.PART.examine()
    assert storage.state is State.WRONG
    assert f"{runs.dbname}: the database is encoded in LATIN1" in storage.detail
    assert beat.detail.startswith("none yet")


def test_a_dagster_yaml_that_dagster_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dagster.yaml").write_text("storage: {no_such: {}}")
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    with pytest.raises(Wrong, match="Dagster does not accept"):
        list(dagster_part.PART.examine())


@pytest.mark.parametrize(
    ("ahead", "state", "said"),
    [
        ({}, State.UNKNOWN, "neither PostgreSQL nor the bucket answers"),
        ({"PostgreSQL": 4.0, "the bucket": -1.0}, State.OK, "agree within 5 s"),
        ({"PostgreSQL": 60.0, "the bucket": 1.0}, State.WRONG, "PostgreSQL is 59 s ahead of this machine and the bucket"),
        ({"PostgreSQL": 60.0, "the bucket": 61.0}, State.WRONG, "this machine is 60 s behind PostgreSQL and the bucket"),
        ({"PostgreSQL": -60.0}, State.WRONG, "PostgreSQL is 60 s behind this machine; with only two clocks, either may be wrong"),
    ],
)
def test_the_clock_that_is_off_is_named(ahead: dict[str, float], state: State, said: str) -> None:
    result = clocks.compare({"this machine": 0.0, **ahead})
    assert result.state is state
    assert said in result.detail


def test_the_clocks_of_the_services_are_read(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    [result] = clocks.PART.examine()
    assert result.detail.startswith("this machine, PostgreSQL, the bucket agree")
    now = time.time
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now() - 1000)
        [result] = clocks.PART.examine()
    # To a few seconds: the bucket tells whole seconds, and the answers take a while.
    assert re.search(r"^this machine is (99[5-9]|100\d) s behind PostgreSQL and the bucket$", result.detail)
    assert result.fix.endswith("on this machine")
    # A server whose clock is off, as far as this database can tell.
    with connect(PostgresSettings()) as connection:
        connection.execute("CREATE FUNCTION public.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS $$SELECT now() + '1 hour'$$")
        connection.execute(f"ALTER DATABASE {environment['PG_DBNAME']} SET search_path = public, pg_catalog")
        try:
            [result] = clocks.PART.examine()
        finally:
            connection.execute(f"ALTER DATABASE {environment['PG_DBNAME']} RESET search_path")
            connection.execute("DROP FUNCTION public.clock_timestamp()")
    assert re.search(r"^PostgreSQL is (359[5-9]|360\d) s ahead of this machine and the bucket$", result.detail)


def test_workers_with_too_little_memory_for_the_model_are_named(
    pachyderm: PachydermSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert examined()["worker memory"].detail == "limited to 2Gi; bundled takes about 572 MiB"
    assert "no job has loaded a file" in examined()["worker database"].detail
    (tmp_path / "sizes.json").write_text(json.dumps({ANSWER_PIPELINE: {"resource_limits": {"memory": "512Mi"}}}))
    monkeypatch.setenv("QA_PIPELINES_PATCH", str(tmp_path / "sizes.json"))
    _apply(patch=PipelinesSettings().patch, now=True)
    finding = the_wrong_one()
    assert finding.name == "worker memory"
    assert "limited to 512Mi" in finding.detail
    assert "resource_limits.memory" in finding.fix
    monkeypatch.setenv("QA_MODEL", "acme/large")
    assert "the memory need of acme/large is unknown" in examined()["worker memory"].detail


@pytest.mark.parametrize(("quantity", "expected"), [("2Gi", 2**31), ("512M", 512e6), ("1.5e9", 1.5e9), ("1024", 1024)])
def test_quantities_of_memory_are_those_of_kubernetes(quantity: str, expected: float) -> None:
    assert workers.bytes_of(quantity) == expected


def test_the_parameters_of_the_images_models_are_known() -> None:
    with safe_open(BUNDLED_FOLDER / "model.safetensors", framework="numpy") as file:
        assert sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys()) == workers.PARAMETERS[BUNDLED]  # noqa: SIM118
    dockerfile = project_file("deploy/Dockerfile").read_text()
    assert {name for name in workers.PARAMETERS if f"ARG MODEL={name}\n" in dockerfile} == workers.PARAMETERS.keys() - {BUNDLED}


def test_a_wrong_password_is_told_from_a_server_that_is_away(
    environment: dict[str, str], postgres_socket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with psycopg.connect(postgres_access.database_url(postgres_socket, "postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {LOCKED} LOGIN PASSWORD 'right'")
        hba = Path(postgres_socket).parent / "data" / "pg_hba.conf"
        rules = hba.read_text()
        hba.write_text(f"local all {LOCKED} scram-sha-256\n{rules}")
        connection.execute("SELECT pg_reload_conf()")
        try:
            monkeypatch.setenv("PG_USER", LOCKED)
            monkeypatch.setenv("PG_PASSWORD", SECRET)
            found = wrong_ones()
            monkeypatch.setenv("PG_PASSWORD", "right")
            assert "permission denied" in the_wrong_one().detail
            assert "GRANT SELECT ON question_answer_version" in the_wrong_one().fix
        finally:
            hba.write_text(rules)
            connection.execute("SELECT pg_reload_conf()")
            connection.execute(f"DROP ROLE {LOCKED}")
    assert list(found) == ["PostgreSQL"]
    assert "password authentication failed" in found["PostgreSQL"].detail
    assert "PG_PASSWORD" in found["PostgreSQL"].fix
    assert SECRET not in str(found)


def test_tables_that_are_not_there_are_fixed_by_the_command_that_is_named(
    environment: dict[str, str], database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PG_DBNAME", database.dbname)
    finding = the_wrong_one()
    assert finding.name == "tables"
    assert examined()["table privileges"].state is State.UNKNOWN
    follow(finding.fix)
    all_is_well()


def test_rights_that_are_missing_are_listed(environment: dict[str, str], postgres_socket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with psycopg.connect(postgres_access.database_url(postgres_socket, environment["PG_DBNAME"]), autocommit=True) as connection:
        connection.execute("CREATE ROLE reader LOGIN")
        connection.execute("GRANT SELECT ON question_answer, question_answer_reject, question_file, question_answer_version TO reader")
        monkeypatch.setenv("PG_USER", "reader")
        finding = the_wrong_one()
        assert "INSERT on question_file" in finding.detail
        connection.execute(shlex.split(finding.fix.partition(": ")[2])[-1])
        all_is_well()
        database = sql.Identifier(environment["PG_DBNAME"])
        connection.execute(sql.SQL("REVOKE TEMPORARY ON DATABASE {} FROM PUBLIC").format(database))
        try:
            finding = the_wrong_one()
            assert "may not create temporary tables" in finding.detail
            connection.execute(shlex.split(finding.fix.partition(": ")[2])[-1])
            all_is_well()
        finally:
            connection.execute(sql.SQL("GRANT TEMPORARY ON DATABASE {} TO PUBLIC").format(database))
        connection.execute("DROP OWNED BY reader; DROP ROLE reader")


def test_a_source_that_cannot_be_archived_is_named_with_the_reason(environment: dict[str, str]) -> None:
    version = FileVersion("held.csv", 1)
    with Ledger(PostgresSettings()) as ledger:
        ledger.reject_file(version, FileRejection(FileReason.NOT_UTF8, "no"))
        ledger.record_archive_failure(version, error="under active Temporary hold", work=WorkSettings())
        try:
            found = the_wrong_one()
        finally:
            ledger.record_archived(version, place="")
    assert found.name == "archiving"
    assert "held.csv" in found.detail
    assert "under active Temporary hold" in found.detail


def test_files_that_wait_for_something_else_to_be_fixed_are_named_with_the_reason(environment: dict[str, str]) -> None:
    version = FileVersion("waits.csv", 1)
    with Ledger(PostgresSettings()) as ledger, connect(PostgresSettings()) as connection:
        ledger.claim([version], owner="test", lease_seconds=10)
        ledger.defer_run("test", error="model '/none': it cannot be loaded", work=WorkSettings())
        ledger.release("test")
        try:
            found = the_wrong_one()
        finally:
            connection.execute("DELETE FROM question_file WHERE source_file = 'waits.csv'")
    assert found.name == "waiting files"
    assert re.fullmatch(r"a file waits for the next attempt, at [\d:]+ UTC: .*model '/none': it cannot be loaded", found.detail)


def test_an_answered_csv_that_cannot_be_written_is_named_with_the_reason(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    version = FileVersion("refused.csv", 1)
    with Ledger(PostgresSettings()) as ledger, connect(PostgresSettings()) as connection:
        ledger.claim([version], owner="test", lease_seconds=10)
        connection.execute("UPDATE question_file SET status = 'loaded' WHERE source_file = 'refused.csv'")
        ledger.release("test")
        ledger.record_archived(version, place="", owes_csv=True)
        (record,) = ledger.owed_csvs(limit=5)
        ledger.record_csv_failure(record, error="under active Temporary hold", work=WorkSettings())
        all_is_well()
        monkeypatch.setenv("QA_ANSWERED_PREFIX", "answered/")
        try:
            found = the_wrong_one()
        finally:
            connection.execute("DELETE FROM question_file WHERE source_file = 'refused.csv'")
    assert found.name == "answered CSVs"
    assert "refused.csv" in found.detail
    assert "under active Temporary hold" in found.detail


def test_a_role_that_may_only_read_is_named_with_the_command_that_gives_one(environment: dict[str, str]) -> None:
    bucket = storage.Client("test").bucket(environment["STORAGE_BUCKET"])
    policy = bucket.get_iam_policy()
    policy["roles/storage.objectViewer"] = {"allUsers"}
    bucket.set_iam_policy(policy)
    try:
        found = the_wrong_one()
    finally:
        policy.bindings = []
        bucket.set_iam_policy(policy)
    assert found.name == "bucket permissions"
    assert "storage.objects.create, storage.objects.delete" in found.detail
    assert "add-iam-policy-binding" in found.fix


def test_a_missing_secret_is_fixed_by_the_command_that_is_named(pachyderm: PachydermSettings) -> None:
    with session(pachyderm, "taking a secret away") as client:
        client.pps.delete_secret(secret=pps.Secret(name="dbaccess"))
    finding = wrong_ones()["secret dbaccess"]
    assert "there is no secret dbaccess" in finding.detail
    follow(finding.fix.partition("then: ")[2])
    all_is_well()
    assert "its keys cannot be read back: the programs need host, user" in examined()["secret dbaccess"].detail


def test_a_secret_that_somebody_else_made_is_well_and_said_to_be_theirs(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "written" in examined()["secret dbaccess"].detail
    # A server of its own, since the address of a cluster is not enough to do what kubectl does.
    server = Server(tmp_path)
    monkeypatch.setenv("PACHD_ADDRESS", server.address)
    make_by_kubectl(server, "dbaccess", {"host": "theirs"})
    _apply()
    all_is_well()
    assert "created by another tool (kubectl, Helm, Terraform) and used as it is" in examined()["secret dbaccess"].detail
    assert server.stop() == 0


def test_a_pipeline_of_another_version_is_fixed_by_the_command_that_is_named(pachyderm: PachydermSettings) -> None:
    _apply(registry="docker.io/acme", tag="v0.0.1", now=True)
    found = wrong_ones()
    assert set(found) == {f"pipeline {ANSWER_PIPELINE}", f"pipeline {LOAD_PIPELINE}"}
    finding = found[f"pipeline {ANSWER_PIPELINE}"]
    assert "docker.io/acme/qa-platform-question-answer:v0.0.1" in finding.detail
    assert "--registry docker.io/acme --tag v0" in finding.fix
    follow(f"{finding.fix} --now")
    all_is_well()


def test_a_pipeline_with_another_specification_is_fixed_by_the_command_that_is_named(pachyderm: PachydermSettings) -> None:
    spec = dict(specifications(Options(), PostgresSettings(), bucket=BucketSettings()))[ANSWER_PIPELINE]
    spec["datum_tries"] = 7
    with session(pachyderm, "changing a pipeline") as client:
        client.pps.create_pipeline_v2(create_pipeline_request_json=json.dumps(spec), update=True)
    finding = the_wrong_one()
    assert finding.name == f"pipeline {ANSWER_PIPELINE}"
    assert "7" in finding.detail
    follow(f"{finding.fix} --now")
    all_is_well()


def test_another_image_a_stopped_pipeline_and_a_missing_one_are_named(pachyderm: PachydermSettings) -> None:
    spec = dict(specifications(Options(), PostgresSettings(), bucket=BucketSettings()))[LOAD_PIPELINE]
    spec["transform"]["image"] = "acme/push:1"
    with session(pachyderm, "changing pipelines") as client:
        client.pps.stop_pipeline(pipeline=job_of(ANSWER_PIPELINE, "").pipeline)
        client.pps.create_pipeline_v2(create_pipeline_request_json=json.dumps(spec), update=True)
        found = wrong_ones()
        assert found[f"pipeline {ANSWER_PIPELINE}"].fix == f"pachctl start pipeline {ANSWER_PIPELINE}"
        assert "acme/push:1" in found[f"pipeline {LOAD_PIPELINE}"].detail
        client.pps.delete_pipeline(pipeline=job_of(LOAD_PIPELINE, "").pipeline)
    assert "there is no pipeline" in wrong_ones()[f"pipeline {LOAD_PIPELINE}"].detail


def test_a_bare_pachd_lacks_everything_and_one_command_fixes_it(pachyderm: PachydermSettings) -> None:
    with session(pachyderm, "clearing") as client:
        remove_platform(client)
    found = wrong_ones()
    expected = (f"repo {QUESTIONS_REPO}", "secret dbaccess", f"pipeline {ANSWER_PIPELINE}", f"pipeline {LOAD_PIPELINE}")
    assert tuple(found) == expected
    follow(found[expected[0]].fix)
    all_is_well()


def test_the_cron_variant_is_well_too_and_applied_again_it_stays_as_it_is(
    pachyderm: PachydermSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = CliRunner().invoke(main, ["pachyderm", "apply", "--cron"])
    assert without.exit_code == 1
    assert "GCS_ACCESS" in without.stderr
    monkeypatch.setenv("GCS_ACCESS", service_account())
    _apply(cron=True, now=True)
    all_is_well()
    again = apply(pachyderm, PostgresSettings(), BucketSettings(), Options(cron=True))
    assert {change.action for change in again if change.kind == "pipeline"} == {"unchanged"}
    with session(pachyderm, "clearing") as client:
        client.pps.delete_secret(secret=pps.Secret(name="gcsaccess"))
    assert "there is no secret gcsaccess" in wrong_ones()["secret gcsaccess"].detail


Answer = Callable[[bytes, grpc.ServicerContext], bytes]


@contextmanager
def in_front(address: str, answers: Mapping[str, Answer], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Points PACHD_ADDRESS to a server that answers some calls itself, by their full names, and hands on all others."""
    channel = grpc.insecure_channel(address.removeprefix("grpc://"))

    class Proxy(grpc.GenericRpcHandler):
        def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            method = handler_call_details.method

            def call(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
                if method in answers:
                    yield answers[method](next(requests), context)
                    return
                try:
                    yield from channel.stream_stream(method)(requests)
                except grpc.RpcError as error:
                    context.abort(error.code(), error.details() or "")

            return grpc.stream_stream_rpc_method_handler(call)

    with ThreadPoolExecutor(8) as pool:
        server = grpc.server(pool, handlers=[Proxy()])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        monkeypatch.setenv("PACHD_ADDRESS", f"grpc://127.0.0.1:{port}")
        try:
            yield
        finally:
            server.stop(0)
            channel.close()


ROLES = ("projectWriter", "secretAdmin", "repoWriter")


@pytest.fixture(scope="module")
def guarded(whole: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A pachd with authentication, on which the robot `owner` applied. Other tokens name the roles of the robot `qa`, with a + between."""
    folder = tmp_path_factory.mktemp("guarded")
    sets = [left for number in (0, 1, 2) for left in combinations(ROLES, number)]
    robots = {f"token:{'+'.join(roles)}": {"robot": "qa", "roles": roles} for roles in sets}
    robots["token:owner"] = {"robot": "owner", "roles": ROLES}
    (folder / "tokens.json").write_text(json.dumps(robots))
    server = Server(folder, {"QA_PACHD_TOKENS": str(folder / "tokens.json")})
    owner = PachydermSettings(pachd_address=server.address, pach_token=SecretStr("token:owner"))
    apply(owner, PostgresSettings(), BucketSettings())
    yield server.address
    assert server.stop() == 0


def as_robot(monkeypatch: pytest.MonkeyPatch, address: str, token: str) -> None:
    monkeypatch.setenv("PACHD_ADDRESS", address)
    monkeypatch.setenv("PACH_TOKEN", f"token:{token}")


PROJECT_COMMAND = "pachctl auth set project default projectWriter robot:qa"
CLUSTER_COMMAND = "pachctl auth set cluster secretAdmin,repoWriter robot:qa"


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("roles", "fix"),
    [
        ("secretAdmin+repoWriter", PROJECT_COMMAND),
        ("projectWriter+repoWriter", CLUSTER_COMMAND),
        ("projectWriter+secretAdmin", CLUSTER_COMMAND),
        ("", f"{PROJECT_COMMAND} && {CLUSTER_COMMAND}"),
    ],
)
def test_a_role_that_is_missing_is_named_with_the_command_that_gives_it(
    guarded: str, monkeypatch: pytest.MonkeyPatch, roles: str, fix: str
) -> None:
    as_robot(monkeypatch, guarded, roles)
    findings = examined()
    assert [finding.name for finding in findings.values() if finding.state is State.WRONG] == ["Pachyderm roles"]
    assert findings["Pachyderm roles"].fix.startswith(f"as an administrator: {fix};")
    assert [role for role in ROLES if role in findings["Pachyderm roles"].detail] == [role for role in ROLES if role not in roles]
    # What may not be seen is not taken for missing. Pipelines are seen, and compared by a dry run, without any role.
    expected = set() if "secretAdmin" in roles else {"secret dbaccess", "secret gcsaccess"}
    expected |= set() if "repoWriter" in roles else {"worker database"}
    assert {name for name, finding in findings.items() if finding.state is State.UNKNOWN} == expected
    assert findings[f"repo {QUESTIONS_REPO}"].detail == "it exists"
    assert all(findings[f"pipeline {name}"].state is State.OK for name in (ANSWER_PIPELINE, LOAD_PIPELINE))


def test_with_the_three_roles_all_is_well_and_without_authentication_none_is_needed(
    environment: dict[str, str], guarded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "authentication is off" in examined()["Pachyderm roles"].detail
    as_robot(monkeypatch, guarded, "owner")
    all_is_well()
    assert examined()["Pachyderm roles"].detail == "robot:owner has every role that the platform needs"


@pytest.mark.usefixtures("environment")
def test_apply_without_a_role_says_who_names_it(guarded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    as_robot(monkeypatch, guarded, "projectWriter")
    result = CliRunner().invoke(main, ["pachyderm", "apply"])
    assert result.exit_code == 1
    assert "robot:qa is not authorized" in result.stderr
    assert "`qa-platform doctor` names the missing one" in result.stderr


@pytest.mark.usefixtures("environment")
def test_a_pachd_that_asks_for_a_token_says_so(guarded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACHD_ADDRESS", guarded)
    finding = the_wrong_one()
    monkeypatch.setenv("PACH_TOKEN", SECRET)
    refused = the_wrong_one()
    assert "PACH_TOKEN is not set" in finding.detail
    # Without --quiet pachctl prints more than the token.
    assert 'PACH_TOKEN="$(pachctl auth get-robot-token --quiet' in finding.fix
    assert "does not accept PACH_TOKEN" in refused.detail
    assert "check PACH_TOKEN" in CliRunner().invoke(main, ["pachyderm", "jobs"]).stderr
    assert SECRET not in str(refused)


@pytest.mark.parametrize(
    ("minor", "state", "said"), [(7, State.WRONG, "too old"), (10, State.OK, "only 2.12.x is supported"), (12, State.OK, "")]
)
def test_a_version_of_pachyderm_that_is_not_the_supported_one_is_named(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, minor: int, state: State, said: str
) -> None:
    told = bytes(version.Version(major=2, minor=minor, micro=4))
    with in_front(environment["PACHD_ADDRESS"], {"/versionpb_v2.API/GetVersion": lambda request, context: told}, monkeypatch):
        finding = examined()["pachd"]
    assert finding.state is state
    assert f"version 2.{minor}.4" in finding.detail
    assert said in finding.detail
    assert ("supported" in finding.detail) == (minor == 10)


def test_a_pipeline_that_crashes_gives_its_own_reason_and_a_job_that_does_not_start_is_named(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with session(PachydermSettings(), "looking") as client:
        info = client.pps.inspect_pipeline(pipeline=job_of(LOAD_PIPELINE, "").pipeline, details=True)
        answering = client.pps.inspect_pipeline(pipeline=job_of(ANSWER_PIPELINE, "").pipeline, details=True)
    info.state, info.reason = pps.PipelineState.PIPELINE_CRASHING, 'CreateContainerConfigError: secret "dbaccess" not found'
    restarting = pps.JobInfo(job=job_of(ANSWER_PIPELINE, "4" * 32), state=pps.JobState.JOB_RUNNING, restart=9)

    def inspect(request: bytes, context: grpc.ServicerContext) -> bytes:
        return bytes(info if pps.InspectPipelineRequest.FromString(request).pipeline.name == LOAD_PIPELINE else answering)

    answers: dict[str, Answer] = {
        "/pps_v2.API/InspectPipeline": inspect,
        "/pps_v2.API/ListJob": lambda request, context: bytes(restarting),
    }
    with in_front(environment["PACHD_ADDRESS"], answers, monkeypatch):
        found = wrong_ones()
    assert set(found) == {f"pipeline {ANSWER_PIPELINE}", f"pipeline {LOAD_PIPELINE}"}
    assert 'CreateContainerConfigError: secret "dbaccess" not found' in found[f"pipeline {LOAD_PIPELINE}"].detail
    assert f"job {'4' * 32}: it restarted 9 times" in found[f"pipeline {ANSWER_PIPELINE}"].detail
    assert f"qa-platform pachyderm logs {'4' * 32}" in found[f"pipeline {ANSWER_PIPELINE}"].fix


def test_a_server_that_never_answers_is_named_within_the_deadline(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"grpc://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("PACHD_ADDRESS", address)
        begun = time.monotonic()
        findings = {finding.name: finding for finding in examine(deadline=2)}
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
    assert finding.fix == "pip install 'rich<1' 'no-such-package>=2'"


def test_a_variable_of_the_wrong_type_is_named_without_its_value(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PG_PORT", SECRET)
    finding = wrong_ones()["PostgreSQL"]
    assert "PG_PORT" in finding.detail
    assert SECRET not in str(examined())
