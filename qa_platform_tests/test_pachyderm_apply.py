"""`qa-platform pachyderm apply` and its neighbours, against a pachd of their own."""

import base64
import datetime
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from pachyderm_sdk.api import pfs, pps
from pydantic import SecretStr

from qa_platform import following
from qa_platform.cli import main
from qa_platform.contract import ANSWER_PIPELINE, LOAD_PIPELINE
from qa_platform.errors import InputError
from qa_platform.pachd import session
from qa_platform.pachyderm_apply import Change, Options, apply
from qa_platform.pachyderm_secrets import bucket_secret, database_secret
from qa_platform.settings import BucketSettings, PachydermSettings, PostgresSettings
from qa_platform_tests.pachd_helpers import Server, eventually

POSTGRES = PostgresSettings(host="db.example", user="u", password=SecretStr("p"), dbname="d")


def private_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def pem_of(key: ec.EllipticCurvePrivateKey, password: bytes | None = None) -> str:
    encryption = BestAvailableEncryption(password) if password else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption).decode()


def certificate(key: ec.EllipticCurvePrivateKey) -> str:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + datetime.timedelta(days=1))
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()


def service_account(**changes: object) -> str:
    account = {
        "type": "service_account",
        "client_email": "a@b.example",
        "token_uri": "https://t.example",
        "private_key": pem_of(private_key()),
    }
    return json.dumps({**account, **changes})


def account(text: str) -> BucketSettings:
    return BucketSettings(gcs_access=SecretStr(text), storage_bucket="uploads")


@pytest.fixture(scope="module")
def pachyderm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PachydermSettings]:
    server = Server(tmp_path_factory.mktemp("pachd"))
    yield PachydermSettings(pachd_address=server.address)
    assert server.stop() == 0


@pytest.fixture
def clean(pachyderm: PachydermSettings) -> PachydermSettings:
    """A pachd without anything."""
    with session(pachyderm, "cleaning") as client:
        for name in (LOAD_PIPELINE, ANSWER_PIPELINE):
            client.pps.delete_pipeline(pipeline=following.job_of(name, "").pipeline, force=True)
        client.pfs.delete_repo(repo=pfs.Repo.from_uri("questions"), force=True)
        for info in client.pps.list_secret().secret_info:
            client.pps.delete_secret(secret=info.secret)
    return pachyderm


def actions(changes: list[Change]) -> dict[str, str]:
    return {change.name: change.action for change in changes}


def images(pachyderm: PachydermSettings) -> set[str]:
    with session(pachyderm, "looking") as client:
        return {info.details.transform.image for info in client.pps.list_pipeline(details=True)}


def test_everything_is_created_once_and_then_unchanged(clean: PachydermSettings) -> None:
    bucket = account(base64.b64encode(service_account().encode()).decode())
    assert set(actions(apply(clean, POSTGRES, bucket)).values()) == {"created"}
    again = actions(apply(clean, POSTGRES, bucket))
    assert again == {
        "questions": "unchanged",
        "dbaccess": "updated",
        "gcsaccess": "updated",
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


def test_an_unusual_port_reaches_the_loader_though_the_secret_has_no_place_for_it(clean: PachydermSettings) -> None:
    apply(clean, POSTGRES.model_copy(update={"port": 6432}), BucketSettings())
    with session(clean, "looking") as client:
        info = client.pps.inspect_pipeline(pipeline=following.job_of(LOAD_PIPELINE, "").pipeline, details=True)
    assert info.details.transform.env == {"PG_PORT": "6432"}


def test_what_pipelines_have_in_their_environment_is_not_shown(clean: PachydermSettings) -> None:
    apply(clean, POSTGRES.model_copy(update={"port": 6432}), BucketSettings())
    with session(clean, "writing a secret where none belongs") as client:
        spec = json.loads(client.pps.inspect_pipeline(pipeline=following.job_of(LOAD_PIPELINE, "").pipeline, details=True).user_spec_json)
        spec["transform"]["env"] |= {"PGPASSWORD": "hunter2"}
        client.pps.create_pipeline_v2(create_pipeline_request_json=json.dumps(spec), update=True)
    changes = {c.name: c for c in apply(clean, POSTGRES.model_copy(update={"port": 7432}), BucketSettings(), Options(dry_run=True))}
    lines = [" ".join(line.split()).rstrip(",") for line in changes[LOAD_PIPELINE].detail.splitlines()]
    assert changes[LOAD_PIPELINE].action == "updated"
    assert '- "PGPASSWORD": "***"' in lines
    assert '+ "PG_PORT": "*** (another value)"' in lines
    assert not any(value in changes[LOAD_PIPELINE].detail for value in ("hunter2", "6432", "7432"))


def test_a_secret_without_a_given_value_is_left_as_it_is(clean: PachydermSettings) -> None:
    assert actions(apply(clean, POSTGRES, BucketSettings()))["gcsaccess"] == "unchanged"
    with session(clean, "looking") as client:
        assert [info.secret.name for info in client.pps.list_secret().secret_info] == ["dbaccess"]
        client.pps.create_secret(name="gcsaccess", data={"creds": "mine"})
        created = client.pps.inspect_secret(secret=pps.Secret(name="gcsaccess")).creation_timestamp
    apply(clean, POSTGRES, BucketSettings())
    with session(clean, "looking") as client:
        assert client.pps.inspect_secret(secret=pps.Secret(name="gcsaccess")).creation_timestamp == created


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
        update.join(60)
        assert not update.is_alive()
        assert all(image.endswith(":v2") for image in images(clean))
        commit = client.pfs.start_commit(branch=pfs.Branch.from_uri("questions@master"))
        apply(clean, POSTGRES, BucketSettings(), Options(tag="v3", now=True))
        assert all(image.endswith(":v3") for image in images(clean))
        assert client.pps.inspect_job(job=following.job_of(ANSWER_PIPELINE, commit.id)).state == pps.JobState.JOB_KILLED
        client.pfs.finish_commit(commit=commit)


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
        ({"sslrootcert": "-----BEGIN CERTIFICATE-----\nc2VjcmV0\n-----END CERTIFICATE-----"}, "PG_SSLROOTCERT holds no certificate"),
        ({"sslrootcert": "ROOT", "sslclient_cert": "CERT"}, "belong together"),
        ({"sslclient_cert": "CERT", "ssl_client_key": "KEY"}, "PG_SSLROOTCERT is empty"),
        ({"sslrootcert": "ROOT", "sslclient_cert": "CERT", "ssl_client_key": "OTHER"}, "not the key of"),
        ({"sslrootcert": "ROOT", "sslclient_cert": "CERT", "ssl_client_key": "LOCKED"}, "passphrase"),
        ({"sslrootcert": "ROOT", "sslclient_cert": "CERT", "ssl_client_key": "CERT"}, "no private key"),
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
        ("{}", "no service account"),
        (service_account(type="authorized_user"), "no service account"),
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
    lines = runner.invoke(main, ["pachyderm", "status", "--json"]).output.splitlines()
    assert [json.loads(line)["image"].rpartition(":")[2] for line in lines] == ["t1", "t1"]
    assert runner.invoke(main, ["pachyderm", "logs", jobs[1].split()[0]]).exit_code == 0
    unknown = runner.invoke(main, ["pachyderm", "logs", "0" * 32])
    assert unknown.exit_code == 1
    assert "pachyderm jobs" in unknown.output
