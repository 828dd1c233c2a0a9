"""Settings from a mounted secret, as in a pipeline's program, and variables with several values."""

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
from dagster._core.definitions.utils import is_valid_owner
from pydantic import ValidationError
from pydantic_settings import BaseSettings

import qa_platform.settings
from qa_platform.errors import InputError
from qa_platform.settings import (
    BucketSettings,
    CatalogSettings,
    ExecutionSettings,
    NotificationSettings,
    PachydermSettings,
    PostgresSettings,
    WorkSettings,
    settings_errors,
    wrong_settings,
)


@pytest.fixture
def secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the secrets, with one of each; the environment says nothing of what is in them."""
    for variable in ("PG_HOST", "PG_USER", "PG_PASSWORD", "PG_DBNAME", "PG_PORT", "STORAGE_BUCKET", "GCS_ACCESS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("QA_SECRETS_ROOT", str(tmp_path))
    database = {"host": "db.example", "user": "qa", "password": "pass word\n", "dbname": "answers", "sslcert": "CERT", "sslkey": "KEY"}
    for name, values in {"dbaccess": database, "gcsaccess": {"creds": "e30=", "storage_bucket": "uploads"}}.items():
        (tmp_path / name).mkdir()
        for key, value in values.items():
            (tmp_path / name / key).write_text(value)
    return tmp_path


def test_a_mounted_secret_gives_the_values_by_its_keys(secrets: Path) -> None:
    postgres, bucket = PostgresSettings(), BucketSettings()
    assert (postgres.host, postgres.user, postgres.dbname, postgres.port) == ("db.example", "qa", "answers", 5432)
    assert postgres.password.get_secret_value() == "pass word", "a line end is the file's, not the password's"
    assert (postgres.sslclient_cert.get_secret_value(), postgres.ssl_client_key.get_secret_value()) == ("CERT", "KEY")
    assert postgres.sslrootcert.get_secret_value() == "", "a key that is missing has the setting's default"
    assert (bucket.storage_bucket, bucket.gcs_access.get_secret_value()) == ("uploads", "e30=")


def test_the_environment_wins_as_specifications_of_the_original_shape_need(secrets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PG_HOST", "elsewhere")
    assert (PostgresSettings().host, PostgresSettings().user) == ("elsewhere", "qa")


def test_without_a_mounted_secret_the_environment_and_the_defaults_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QA_SECRETS_ROOT", str(tmp_path / "nowhere"))
    monkeypatch.setenv("PG_USER", "me")
    monkeypatch.delenv("PG_HOST", raising=False)
    assert (PostgresSettings().host, PostgresSettings().user) == ("localhost", "me")


def test_a_secret_that_cannot_be_read_is_named_without_its_value(secrets: Path) -> None:
    (secrets / "dbaccess" / "password").unlink()
    (secrets / "dbaccess" / "password").mkdir()
    with pytest.raises(InputError, match=r"dbaccess cannot be read: .*make it readable for the program's user"):
        PostgresSettings()


@pytest.mark.parametrize("value", [".csv,.CSV.gz", " .csv , .csv.gz,", '[".csv", ".csv.gz"]'])
def test_several_values_are_separated_by_commas_or_a_json_list(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QA_SUFFIXES", value)
    assert WorkSettings().suffixes == (".csv", ".csv.gz")


def test_a_variable_with_several_values_may_be_empty_where_none_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QA_EMAIL_TO", "")
    assert NotificationSettings().email_to == ()


@pytest.mark.parametrize("value", ["", "csv", ".csv;csv, .txt,gz", '[".csv"', "[1]"])
def test_suffixes_that_cannot_be_used_are_refused_by_the_name_of_the_variable(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QA_SUFFIXES", value)
    with pytest.raises(ValidationError) as caught:
        WorkSettings()
    assert wrong_settings(caught.value).startswith("the environment cannot be used: QA_SUFFIXES: ")


def test_a_port_that_kubernetes_made_of_a_services_name_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    # What a pod is given beside a service called `pg`, unless its specification sets the variable.
    monkeypatch.setenv("PG_PORT", "tcp://10.0.0.7:5432")
    with pytest.raises(ValidationError) as refused:
        PostgresSettings()
    message = wrong_settings(refused.value)
    assert "PG_PORT: " in message
    assert "10.0.0.7" not in message


@pytest.mark.parametrize(
    ("settings", "name", "value", "why"),
    [
        (WorkSettings, "QA_ANSWERED_PREFIX", "answered", "it must end with a slash, such as answered/, and must not be below incoming/"),
        (WorkSettings, "QA_ANSWERED_PREFIX", "incoming/a/", "it must end with a slash, such as answered/, and must not be below incoming/"),
        (WorkSettings, "QA_SUFFIXES", "csv", "each suffix must begin with a dot"),
        (WorkSettings, "QA_SUFFIXES", "", "it must name at least one suffix"),
        (CatalogSettings, "QA_OWNERS", "bob", "each owner must be an e-mail address or team:NAME"),
        (CatalogSettings, "QA_OWNERS", "a@example.com,team:", "each owner must be an e-mail address or team:NAME"),
    ],
)
def test_a_variable_that_breaks_a_rule_is_named_with_the_rule(
    settings: type[BaseSettings], name: str, value: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=re.escape(f"the environment cannot be used: {name}: {why}")) as refused, settings_errors():
        settings()
    assert refused.value.advice


@pytest.mark.parametrize(("name", "settings"), [("QA_NOTIFY_URLS", NotificationSettings), ("QA_STEP_RESOURCES", ExecutionSettings)])
def test_json_that_is_none_is_refused_by_the_name_of_the_variable_and_not_shown(
    name: str, settings: type[BaseSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "slack://s3cr3t")
    with pytest.raises(InputError, match=f"{name}: it must be JSON") as refused, settings_errors():
        settings()
    assert "s3cr3t" not in str(refused.value)


def test_the_end_of_a_file_is_no_part_of_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACH_TOKEN", "t0k3n\n")
    assert PachydermSettings().pach_token.get_secret_value() == "t0k3n"
    for unfit in ("t0k3n\nx", "tök3n"):
        monkeypatch.setenv("PACH_TOKEN", unfit)
        with pytest.raises(InputError, match="PACH_TOKEN: it must be one line of ASCII") as refused, settings_errors():
            PachydermSettings()
        assert unfit not in str(refused.value)


@pytest.mark.parametrize("owner", ["a.b+c@mail.example.com", "team:x", "bob", "team:", "bob@example", "a b@example.com", "a@b.museums"])
def test_an_owner_is_accepted_as_dagster_accepts_it(owner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QA_OWNERS", owner)
    with nullcontext() if is_valid_owner(owner) else pytest.raises(ValidationError):
        CatalogSettings()


def test_no_error_of_a_setting_quotes_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("PACH_TOKEN", "PG_PORT", "QA_BATCH_FILES", "QA_SENSOR_SECONDS"):
        monkeypatch.setenv(variable, "\ufeffnot-shown")
    public = [value for name, value in vars(qa_platform.settings).items() if name.endswith("Settings") and not name.startswith("_")]
    said = []
    for settings in public:
        try:
            settings()
        except ValidationError as error:
            said.append(str(error))
    assert len(said) == 3
    assert not any("not-shown" in text for text in said)
