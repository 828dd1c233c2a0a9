"""`qa-platform pachyderm apply` and the related commands, against their own pachd."""

import base64
import datetime
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from pachyderm_sdk.api import pfs, pps
from pachyderm_sdk.api.pfs.extension import ApiStub as PfsStub
from pachyderm_sdk.api.pps.extension import ApiStub as PpsStub
from pydantic import SecretStr

from qa_platform.batches.jobs import refuse_stopped
from qa_platform.cli.main import main
from qa_platform.clients.pachyderm import job_of, session
from qa_platform.contract import ANSWER_PIPELINE, LOAD_PIPELINE
from qa_platform.errors import InputError, TransientError
from qa_platform.provisioning import pipelines
from qa_platform.provisioning.pipelines import Change, Options, apply, specifications
from qa_platform.provisioning.secrets import bucket_secret, database_secret, find_secret
from qa_platform.settings import BucketSettings, PachydermSettings, PipelinesSettings, PostgresSettings
from qa_platform_tests.credentials import certificate, pem_of, private_key, service_account
from qa_platform_tests.json_schemas import fits
from qa_platform_tests.pachd_helpers import LIMIT_SECONDS, Server, eventually, make_by_kubectl

POSTGRES = PostgresSettings(host="db.example", user="u", password=SecretStr("p"), dbname="d")


def account(text: str) -> BucketSettings:
    return BucketSettings(gcs_access=SecretStr(text), storage_bucket="uploads")


@pytest.fixture(autouse=True)
def _quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines, "_POLL_SECONDS", 0.1)


@pytest.fixture
def clean(clean_pachyderm: PachydermSettings) -> PachydermSettings:
    """A pachd without anything of the platform's."""
    return clean_pachyderm


@pytest.fixture
def with_secrets_of_others(tmp_path: Path) -> Iterator[PachydermSettings]:
    """A pachd in whose namespace kubectl made both secrets. A cluster of which only the address is known cannot have them."""
    server = Server(tmp_path)
    for name, values in (("dbaccess", {"host": "theirs"}), ("gcsaccess", {"creds": "theirs"})):
        make_by_kubectl(server, name, values)
    yield PachydermSettings(pachd_address=server.address)
    assert server.stop() == 0


def actions(changes: list[Change]) -> dict[str, str]:
    return {change.name: change.action for change in changes}


def images(pachyderm: PachydermSettings) -> set[str]:
    with session(pachyderm, "looking") as client:
        found = (pipelines.find_pipeline(client, name) for name in (ANSWER_PIPELINE, LOAD_PIPELINE))
        return {info.details.transform.image for info in found if info}


def secret_written(pachyderm: PachydermSettings, name: str) -> datetime.datetime:
    with session(pachyderm, "looking") as client:
        return client.pps.inspect_secret(secret=pps.Secret(name=name)).creation_timestamp


def test_everything_is_created_once_and_then_unchanged(clean: PachydermSettings) -> None:
    bucket = account(base64.b64encode(service_account().encode()).decode())
    assert set(actions(apply(clean, POSTGRES, bucket)).values()) == {"created"}
    again = actions(apply(clean, POSTGRES, bucket))
    assert again == {
        "questions": "unchanged",
        "dbaccess": "sent again",
        "gcsaccess": "sent again",
        ANSWER_PIPELINE: "unchanged",
        LOAD_PIPELINE: "unchanged",
    }


def test_a_dry_run_shows_what_would_change_and_changes_nothing(clean: PachydermSettings) -> None:
    assert set(actions(apply(clean, POSTGRES, BucketSettings(), Options(dry_run=True))).values()) == {"created", "unchanged"}
    assert images(clean) == set()
    apply(clean, POSTGRES, BucketSettings())
    before = images(clean)
    changes = {c.name: c for c in apply(clean, POSTGRES, BucketSettings(), Options(tag="v9", dry_run=True))}
    assert changes[ANSWER_PIPELINE].action == "updated"
    added = [line for line in changes[ANSWER_PIPELINE].detail.splitlines() if line.startswith("+ ")]
    assert len(added) == 1
    assert ":v9" in added[0]
    assert images(clean) == before


def test_registry_and_tag_make_the_images_names(clean: PachydermSettings) -> None:
    apply(clean, POSTGRES, BucketSettings(), Options(registry="docker.io/acme/", tag="1.2"))
    assert images(clean) == {"docker.io/acme/qa-platform-question-answer:1.2", "docker.io/acme/qa-platform-push-answers-to-sql:1.2"}
    # As after a change of a password: what is not named stays.
    again = actions(apply(clean, POSTGRES, BucketSettings()))
    assert (again[ANSWER_PIPELINE], again[LOAD_PIPELINE]) == ("unchanged", "unchanged")
    apply(clean, POSTGRES, BucketSettings(), Options(tag="1.3"))
    assert images(clean) == {"docker.io/acme/qa-platform-question-answer:1.3", "docker.io/acme/qa-platform-push-answers-to-sql:1.3"}


def test_an_unusual_port_reaches_the_loader_though_the_secret_has_no_place_for_it(clean: PachydermSettings) -> None:
    apply(clean, POSTGRES.model_copy(update={"port": 6432}), BucketSettings())
    with session(clean, "looking") as client:
        info = client.pps.inspect_pipeline(pipeline=job_of(LOAD_PIPELINE, "").pipeline, details=True)
    assert info.details.transform.env == {"PG_PORT": "6432"}


def test_what_pipelines_have_in_their_environment_is_not_shown(clean: PachydermSettings) -> None:
    apply(clean, POSTGRES.model_copy(update={"port": 6432}), BucketSettings())
    with session(clean, "writing a secret where none belongs") as client:
        spec = json.loads(client.pps.inspect_pipeline(pipeline=job_of(LOAD_PIPELINE, "").pipeline, details=True).user_spec_json)
        spec["transform"]["env"] |= {"PGPASSWORD": "hunter2"}
        client.pps.create_pipeline_v2(create_pipeline_request_json=json.dumps(spec), update=True)
    changes = {c.name: c for c in apply(clean, POSTGRES.model_copy(update={"port": 7432}), BucketSettings(), Options(dry_run=True))}
    lines = [" ".join(line.split()).rstrip(",") for line in changes[LOAD_PIPELINE].detail.splitlines()]
    assert changes[LOAD_PIPELINE].action == "updated"
    assert '- "PGPASSWORD": "***"' in lines
    assert '+ "PG_PORT": "*** (another value)"' in lines
    assert not any(value in changes[LOAD_PIPELINE].detail for value in ("hunter2", "6432", "7432"))


def test_a_secret_without_a_given_value_is_left_as_it_is(clean: PachydermSettings) -> None:
    changes = {change.name: change for change in apply(clean, POSTGRES, BucketSettings())}
    assert changes["gcsaccess"].action == "unchanged"
    assert "it does not exist: only the cron variant needs it" in changes["gcsaccess"].detail
    with session(clean, "looking") as client:
        assert find_secret(client, "gcsaccess") is None
        client.pps.create_secret(name="gcsaccess", data={"creds": "mine"})
    written = secret_written(clean, "gcsaccess")
    apply(clean, POSTGRES, BucketSettings())
    assert secret_written(clean, "gcsaccess") == written


def test_without_the_databases_host_its_secret_is_left_as_it_is(clean: PachydermSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PG_HOST", raising=False)
    apply(clean, POSTGRES, BucketSettings())
    written = secret_written(clean, "dbaccess")
    change = next(change for change in apply(clean, PostgresSettings(), BucketSettings()) if change.name == "dbaccess")
    assert change.action == "unchanged"
    assert "neither PG_HOST nor QA_PIPELINES_PG_HOST is set; written" in change.detail
    assert secret_written(clean, "dbaccess") == written


def test_the_workers_may_reach_the_database_at_another_host(monkeypatch: pytest.MonkeyPatch) -> None:
    assert PipelinesSettings().for_workers(POSTGRES) is POSTGRES
    monkeypatch.setenv("QA_PIPELINES_PG_HOST", "10.0.0.7")
    assert database_secret(PipelinesSettings().for_workers(POSTGRES)) == {**database_secret(POSTGRES), "host": "10.0.0.7"}


@pytest.mark.parametrize("registry", ["https://docker.io/acme", "docker.io/ac me", "docker.io//acme", "-x"])
def test_a_registry_that_no_image_has_is_refused(registry: str) -> None:
    with pytest.raises(InputError, match="is not the registry of an image"):
        apply(PachydermSettings(), POSTGRES, BucketSettings(), Options(registry=registry))


@pytest.mark.parametrize("tag", ["v1 2", "a:b", "x" * 129, "v1@sha"])
def test_a_tag_that_no_image_has_is_refused(tag: str) -> None:
    with pytest.raises(InputError, match="is not the tag of an image"):
        apply(PachydermSettings(), POSTGRES, BucketSettings(), Options(tag=tag))


@pytest.mark.parametrize("registry", ["docker.io/acme", "docker.io/acme/", "localhost:5000", "registry.example:5000/a/b_c", "acme"])
def test_a_registry_makes_the_names_of_the_images(registry: str) -> None:
    specs = dict(specifications(Options(registry=registry, tag="v1.2"), POSTGRES, bucket=BucketSettings()))
    assert specs[ANSWER_PIPELINE]["transform"]["image"] == f"{registry.rstrip('/')}/qa-platform-question-answer:v1.2"


def test_a_secret_that_apply_made_is_sent_again(clean: PachydermSettings) -> None:
    apply(clean, POSTGRES, BucketSettings())
    written = secret_written(clean, "dbaccess")
    (change,) = (change for change in apply(clean, POSTGRES, BucketSettings()) if change.name == "dbaccess")
    assert change.action == "sent again"
    # Kubernetes has whole seconds.
    assert secret_written(clean, "dbaccess") >= written


def lose_an_answer(patch: pytest.MonkeyPatch, stub: type, method: str, *, of: str = "") -> None:
    """Let the first call of a method get through twice, as when its answer is lost and gRPC repeats it; ``of``: what it contains."""
    call, lost = getattr(stub, method), list[str]()

    def twice(self: object, **request: Any) -> object:
        if not lost and of in str(request) and not request.get("dry_run"):
            lost.append(method)
            call(self, **request)
        return call(self, **request)

    patch.setattr(stub, method, twice)


@pytest.mark.parametrize("method", ["delete_secret", "create_secret"])
def test_a_secret_is_there_although_an_answer_was_lost(clean: PachydermSettings, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    apply(clean, POSTGRES, BucketSettings())
    with monkeypatch.context() as patch:
        lose_an_answer(patch, PpsStub, method)
        assert actions(apply(clean, POSTGRES, BucketSettings()))["dbaccess"] == "sent again"
    with session(clean, "looking") as client:
        assert find_secret(client, "dbaccess")


def test_everything_is_created_although_answers_are_lost(clean: PachydermSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        lose_an_answer(patch, PfsStub, "create_repo")
        lose_an_answer(patch, PpsStub, "create_secret")
        lose_an_answer(patch, PpsStub, "create_pipeline_v2", of=ANSWER_PIPELINE)
        made = actions(apply(clean, POSTGRES, BucketSettings()))
    assert {name: made[name] for name in ("questions", "dbaccess", LOAD_PIPELINE)} == dict.fromkeys(
        ("questions", "dbaccess", LOAD_PIPELINE), "created"
    )
    again = actions(apply(clean, POSTGRES, BucketSettings(), Options(dry_run=True)))
    assert again == {**dict.fromkeys(again, "unchanged"), "dbaccess": "sent again"}


def test_a_pipeline_that_another_process_created_meanwhile_is_updated(clean: PachydermSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    create, others = PpsStub.create_pipeline_v2, list[str]()

    def after_another(self: PpsStub, **request: Any) -> object:
        if not others:
            others.append(ANSWER_PIPELINE)
            create(self, create_pipeline_request_json=request["create_pipeline_request_json"].replace(":v2", ":v1"))
        return create(self, **request)

    with monkeypatch.context() as patch:
        patch.setattr(PpsStub, "create_pipeline_v2", after_another)
        assert actions(apply(clean, POSTGRES, BucketSettings(), Options(tag="v2")))[ANSWER_PIPELINE] == "updated"
    assert all(image.endswith(":v2") for image in images(clean))


def test_a_secret_that_somebody_else_made_is_used_as_it_is(with_secrets_of_others: PachydermSettings) -> None:
    written = {name: secret_written(with_secrets_of_others, name) for name in ("dbaccess", "gcsaccess")}
    changes = {change.name: change for change in apply(with_secrets_of_others, POSTGRES, account(service_account()))}
    for name, keys in (("dbaccess", "host, user, password and dbname"), ("gcsaccess", "creds and storage_bucket")):
        assert changes[name].action == "unchanged"
        assert "created by another tool" in changes[name].detail
        assert keys in changes[name].detail
        assert secret_written(with_secrets_of_others, name) == written[name]
    assert changes[LOAD_PIPELINE].action == "created"


def test_the_cron_variant_needs_a_secret_and_takes_one_that_somebody_else_made(
    clean: PachydermSettings, with_secrets_of_others: PachydermSettings
) -> None:
    with pytest.raises(InputError, match="gcsaccess, which does not exist"):
        apply(clean, POSTGRES, BucketSettings(), Options(cron=True, dry_run=True))
    changes = {change.name: change for change in apply(with_secrets_of_others, POSTGRES, BucketSettings(), Options(cron=True))}
    assert changes[ANSWER_PIPELINE].action == "created"
    assert "created by another tool" in changes["gcsaccess"].detail
    # It stays this variant until the other one is asked for.
    assert actions(apply(with_secrets_of_others, POSTGRES, BucketSettings()))[ANSWER_PIPELINE] == "unchanged"
    assert actions(apply(with_secrets_of_others, POSTGRES, BucketSettings(), Options(cron=False)))[ANSWER_PIPELINE] == "updated"


def test_a_dry_run_names_a_secret_that_is_not_there(clean: PachydermSettings) -> None:
    apply(clean, POSTGRES, BucketSettings())
    with session(clean, "taking a secret away") as client:
        client.pps.delete_secret(secret=pps.Secret(name="dbaccess"))
    changes = actions(apply(clean, POSTGRES, BucketSettings(), Options(dry_run=True)))
    assert changes == {**dict.fromkeys(changes, "unchanged"), "dbaccess": "created"}
    with session(clean, "looking") as client:
        assert find_secret(client, "dbaccess") is None


def test_an_update_waits_for_running_jobs_unless_it_is_to_come_now(clean: PachydermSettings) -> None:
    apply(clean, POSTGRES, BucketSettings())
    with session(clean, "opening a commit") as client:
        # While its input is open, a job has not ended.
        commit = client.pfs.start_commit(branch=pfs.Branch.from_uri("questions@master"))
        told: list[str] = []
        update = threading.Thread(target=lambda: apply(clean, POSTGRES, BucketSettings(), Options(tag="v2"), tell=told.append))
        update.start()
        eventually(lambda: told)
        assert commit.id in told[0]
        assert not any(image.endswith(":v2") for image in images(clean))
        client.pfs.finish_commit(commit=commit)
        update.join(4 * LIMIT_SECONDS)
        assert not update.is_alive()
        assert all(image.endswith(":v2") for image in images(clean))
        commit = client.pfs.start_commit(branch=pfs.Branch.from_uri("questions@master"))
        apply(clean, POSTGRES, BucketSettings(), Options(tag="v3", now=True))
        assert all(image.endswith(":v3") for image in images(clean))
        assert client.pps.inspect_job(job=job_of(ANSWER_PIPELINE, commit.id)).state == pps.JobState.JOB_KILLED
        client.pfs.finish_commit(commit=commit)


def test_the_wait_ends_at_its_limit_and_says_what_to_do(clean: PachydermSettings) -> None:
    apply(clean, POSTGRES, BucketSettings())
    with session(clean, "opening a commit") as client:
        commit = client.pfs.start_commit(branch=pfs.Branch.from_uri("questions@master"))
        with pytest.raises(TransientError, match=f"not updated: after 0.01 minutes.*{commit.id}.*pachyderm jobs.*--now"):
            apply(clean, POSTGRES, BucketSettings(), Options(tag="v2", wait_seconds=0.6))
        assert not any(image.endswith(":v2") for image in images(clean))
        client.pfs.finish_commit(commit=commit)


@pytest.mark.parametrize("cron", [True, False])
def test_what_reads_the_bucket_in_the_cluster_knows_who_pays(cron: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QA_BILLING_PROJECT", "billing-project")
    specs = specifications(Options(cron=cron), PostgresSettings(), bucket=BucketSettings())
    paying = [name for name, spec in specs if spec["transform"].get("env", {}).get("QA_BILLING_PROJECT") == "billing-project"]
    assert paying == ([ANSWER_PIPELINE] if cron else [])


def test_a_job_whose_program_does_not_start_is_named_and_not_waited_for(clean: PachydermSettings) -> None:
    with session(clean, "making a pipeline whose program does not start") as client:
        client.pfs.create_repo(repo=pfs.Repo.from_uri("questions"))
        spec = dict(specifications(Options(), POSTGRES, bucket=BucketSettings()))[ANSWER_PIPELINE]
        spec["transform"]["cmd"] = ["sh", "-c", "exit 3"]
        client.pps.create_pipeline_v2(create_pipeline_request_json=json.dumps(spec))
        eventually(lambda: any(job.restart for job in pipelines.running_jobs(client, ANSWER_PIPELINE)))
        told: list[str] = []
        changes = actions(apply(clean, POSTGRES, BucketSettings(), Options(wait_seconds=4 * LIMIT_SECONDS), tell=told.append))
    assert changes[ANSWER_PIPELINE] == "updated"
    assert any("not waiting for job" in line and "its program does not start" in line for line in told), told


def test_no_job_of_a_pipeline_whose_secret_is_gone_is_waited_for(clean: PachydermSettings) -> None:
    apply(clean, POSTGRES, BucketSettings())
    with session(clean, "taking the secret away") as client:
        eventually(lambda: not pipelines.running_jobs(client, LOAD_PIPELINE))
        client.pps.delete_secret(secret=pps.Secret(name="dbaccess"))
        branch = pfs.Branch.from_uri("questions@master")
        with client.pfs.commit(branch=branch) as commit:
            commit.put_file_from_bytes("/f/manifest.json", b"{}")
        eventually(lambda: pipelines.running_jobs(client, LOAD_PIPELINE))

        def crashing() -> bool:
            info = pipelines.find_pipeline(client, LOAD_PIPELINE)
            return bool(info and info.state == pps.PipelineState.PIPELINE_CRASHING and info.reason)

        eventually(crashing)
        told: list[str] = []
        # Not by `apply`, which begins with the secret.
        pipelines._wait_for_jobs(client, LOAD_PIPELINE, 0, told.append)
    assert any("not waiting for job" in line and "the pipeline is crashing: " in line for line in told)


def test_credentials_come_as_base64_text_or_files_and_go_in_deployments_shapes(tmp_path: Path) -> None:
    key = private_key()
    file = tmp_path / "root.pem"
    file.write_text(certificate(key))
    values = database_secret(
        POSTGRES.model_copy(
            update={
                "sslrootcert": SecretStr(str(file)),
                "sslclient_cert": SecretStr(base64.b64encode(certificate(key).encode()).decode()),
                "ssl_client_key": SecretStr(pem_of(key)),
            }
        )
    )
    assert list(values) == ["host", "user", "password", "dbname", "sslrootcert", "sslcert", "sslkey"]
    assert base64.b64decode(values["sslrootcert"]).decode() == file.read_text()
    assert base64.b64decode(values["sslkey"]).decode().strip() == pem_of(key).strip()
    text = service_account()
    file.write_text(text)
    for given in (text, base64.b64encode(text.encode()).decode(), str(file)):
        secret = bucket_secret(account(given))
        assert secret is not None
        assert (base64.b64decode(secret["creds"]).decode(), secret["storage_bucket"]) == (text, "uploads")


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"sslrootcert": "c2VjcmV0"}, "PG_SSLROOTCERT"),
        (
            {"sslrootcert": "-----BEGIN CERTIFICATE-----\nc2VjcmV0\n-----END CERTIFICATE-----"},
            "PG_SSLROOTCERT holds no readable certificate",
        ),
        ({"sslrootcert": "ROOT", "sslclient_cert": "CERT"}, "belong together"),
        ({"sslclient_cert": "CERT", "ssl_client_key": "KEY"}, "PG_SSLROOTCERT is empty"),
        ({"sslrootcert": "ROOT", "sslclient_cert": "CERT", "ssl_client_key": "OTHER"}, "not the key of"),
        ({"sslrootcert": "ROOT", "sslclient_cert": "CERT", "ssl_client_key": "LOCKED"}, "passphrase"),
        ({"sslrootcert": "ROOT", "sslclient_cert": "CERT", "ssl_client_key": "CERT"}, "not a readable private key"),
    ],
)
def test_an_unusable_certificate_is_refused_before_anything_is_sent(given: dict[str, str], problem: str) -> None:
    key = private_key()
    pems = {
        "ROOT": certificate(private_key()),
        "CERT": certificate(key),
        "KEY": pem_of(key),
        "OTHER": pem_of(private_key()),
        "LOCKED": pem_of(key, b"secret"),
    }
    settings = POSTGRES.model_copy(update={name: SecretStr(pems.get(value, value)) for name, value in given.items()})
    with pytest.raises(InputError, match=problem) as refused:
        database_secret(settings)
    assert "c2VjcmV0" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("/nowhere/at/all.json", "neither"),
        (base64.b64encode(b"not json, secret").decode(), "not JSON"),
        ("{broken", "not JSON"),
        ("{}", "not a service account"),
        (service_account(type="authorized_user"), "not a service account"),
        (service_account(private_key="secret"), "private_key in GCS_ACCESS"),
    ],
)
def test_an_unusable_service_account_is_refused_before_anything_is_sent(given: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem) as refused:
        bucket_secret(account(given))
    assert "secret" not in str(refused.value)


def test_the_commands_show_pipelines_jobs_and_logs(clean: PachydermSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACHD_ADDRESS", clean.pachd_address)
    runner = CliRunner()
    nothing = runner.invoke(main, ["pachyderm", "status"])
    assert nothing.exit_code == 1
    assert "pachyderm apply" in nothing.output
    planned = runner.invoke(main, ["pachyderm", "apply", "--dry-run"])
    assert planned.exit_code == 0, planned.output
    assert "pipeline question_answer: would be created" in planned.output
    assert runner.invoke(main, ["pachyderm", "apply", "--tag", "t1"]).exit_code == 0
    status = runner.invoke(main, ["pachyderm", "status"]).output
    assert "qa-platform-question-answer:t1" in status
    jobs = runner.invoke(main, ["pachyderm", "jobs", "--pipeline", LOAD_PIPELINE]).output.splitlines()
    assert jobs[0].split()[0] == "JOB"
    assert LOAD_PIPELINE in jobs[1]
    lines = runner.invoke(main, ["pachyderm", "jobs", "--json"]).output.splitlines()
    assert {json.loads(line)["pipeline"] for line in lines} == {ANSWER_PIPELINE, LOAD_PIPELINE}
    assert all(fits("pachyderm jobs", line) for line in lines)
    lines = runner.invoke(main, ["pachyderm", "status", "--json"]).output.splitlines()
    assert [json.loads(line)["image"].rpartition(":")[2] for line in lines] == ["t1", "t1"]
    assert all(fits("pachyderm status", line) for line in lines)
    assert runner.invoke(main, ["pachyderm", "logs", jobs[1].split()[0]]).exit_code == 0
    unknown = runner.invoke(main, ["pachyderm", "logs", "0" * 32])
    assert unknown.exit_code == 1
    assert "pachyderm jobs" in unknown.output


def failed_until_updated(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    inspect = PpsStub.inspect_pipeline

    def inspected(self: PpsStub, **request: Any) -> pps.PipelineInfo:
        info = inspect(self, **request)
        if info.pipeline.name == name and info.version == 1:
            info.state, info.reason = pps.PipelineState.PIPELINE_FAILURE, "could not update resources after 3 attempts"
        return info

    monkeypatch.setattr(PpsStub, "inspect_pipeline", inspected)


def test_apply_starts_a_failed_pipeline_again(clean: PachydermSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    apply(clean, POSTGRES, BucketSettings())
    failed_until_updated(monkeypatch, ANSWER_PIPELINE)
    again = actions(apply(clean, POSTGRES, BucketSettings()))
    assert (again[ANSWER_PIPELINE], again[LOAD_PIPELINE]) == ("updated", "unchanged")
    assert actions(apply(clean, POSTGRES, BucketSettings()))[ANSWER_PIPELINE] == "unchanged"


def test_no_batch_is_launched_while_a_pipeline_has_failed(clean: PachydermSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    apply(clean, POSTGRES, BucketSettings())
    failed_until_updated(monkeypatch, LOAD_PIPELINE)
    with session(clean, "testing") as client, pytest.raises(TransientError, match=r"could not update resources.*pachyderm apply"):
        refuse_stopped(client)


def test_no_batch_is_launched_while_the_cron_variant_is_deployed(clean: PachydermSettings) -> None:
    bucket = account(base64.b64encode(service_account().encode()).decode())
    apply(clean, POSTGRES, bucket, Options(cron=True))
    with session(clean, "testing") as client:
        with pytest.raises(TransientError, match=r"question_answer is the variant.*apply --no-cron"):
            refuse_stopped(client)
        apply(clean, POSTGRES, bucket, Options(cron=False))
        refuse_stopped(client)


def test_the_cron_variant_keeps_its_interval_if_apply_names_no_variant(clean: PachydermSettings, tmp_path: Path) -> None:
    bucket = account(base64.b64encode(service_account().encode()).decode())
    patch = tmp_path / "patch.json"
    patch.write_text(json.dumps({ANSWER_PIPELINE: {"input": {"cron": {"spec": "@every 300s"}}}}))
    apply(clean, POSTGRES, bucket, Options(cron=True, patch=patch))
    assert actions(apply(clean, POSTGRES, bucket, Options(patch=patch)))[ANSWER_PIPELINE] == "unchanged"
    with pytest.raises(InputError, match="only the cron variant has"):
        apply(clean, POSTGRES, bucket, Options(cron=False, patch=patch))
    patch.write_text(json.dumps({ANSWER_PIPELINE: {"input": None}}))
    with pytest.raises(InputError, match="it changes input, which the platform relies on"):
        apply(clean, POSTGRES, bucket, Options(patch=patch))


def test_status_shows_the_pipelines_of_this_project_only(clean: PachydermSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    staging = pfs.Project(name="staging")
    repo = pfs.Repo(name="in", type="user", project=staging)
    spec = {
        "pipeline": {"name": ANSWER_PIPELINE, "project": {"name": "staging"}},
        "input": {"pfs": {"repo": "in", "project": "staging", "glob": "/*"}},
        "transform": {"image": "theirs:9", "cmd": ["true"]},
    }
    with session(clean, "testing") as client:
        client.pfs.create_project(project=staging)
        client.pfs.create_repo(repo=repo)
        client.pps.create_pipeline_v2(create_pipeline_request_json=json.dumps(spec))
    apply(clean, POSTGRES, BucketSettings())
    monkeypatch.setenv("PACHD_ADDRESS", clean.pachd_address)
    result = CliRunner().invoke(main, ["pachyderm", "status", "--json"])
    with session(clean, "testing") as client:
        client.pps.delete_pipeline(pipeline=pps.Pipeline(name=ANSWER_PIPELINE, project=staging))
        client.pfs.delete_repo(repo=repo)
        client.pfs.delete_project(project=staging)
    assert result.exit_code == 0
    assert "theirs" not in result.output
