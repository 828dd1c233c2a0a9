"""Every environment variable that the platform reads, with its description. No other file reads the environment.

Each class reads its own variables when it is instantiated, so a process needs only the variables of the parts it uses.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from qa_platform.contract import CONTEXT_LIMIT, INCOMING, PROCESSED, QUESTION_LIMIT, REJECTED, ModelChoice, Precision
from qa_platform.errors import InputError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


def _listed(value: object) -> object:
    """The items of a text that is a JSON list or separated by commas. Other values stay as they are."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return json.loads(value)
    return [item.strip() for item in value.split(",") if item.strip()]


def _decoded(value: object) -> object:
    """The value of a JSON text. Other values stay as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        # Without the cause, which would show the value.
        raise ValueError("it must be JSON") from None


# The owners of assets that Dagster accepts.
_OWNER = re.compile(r"[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+\.[A-Za-z]{2,7}|team:.+")

# NoDecode, because the error of pydantic's own decoding does not name the variable.
_Json = (NoDecode, BeforeValidator(_decoded))
# A variable with several values.
Texts = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_listed)]


class _Settings(BaseSettings):
    # Otherwise a validation error would quote the value, even that of a secret.
    model_config = SettingsConfigDict(hide_input_in_errors=True)


class SecretsSettings(_Settings):
    """Where the pipelines' programs find their secrets. Environment variables take precedence over them."""

    model_config = SettingsConfigDict(env_prefix="QA_")

    secrets_root: Path = Field(
        default=Path("/secrets"),
        description="Folder of the mounted secrets `dbaccess` and `gcsaccess`: each is a folder with a file per key. The pipelines mount "
        "them there and do not put them into the environment, since Pachyderm stores the environment of every datum in clear text.",
    )


class _MountedSecret(PydanticBaseSettingsSource):
    """The values of a secret that is mounted as a folder; none if it is not mounted."""

    def __init__(self, settings: type["_SecretSettings"]) -> None:
        super().__init__(settings)
        self._folder = SecretsSettings().secrets_root / settings.secret_name
        self._keys = settings.secret_keys

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        try:
            # A file written by hand ends with a newline, which is not part of the value.
            value = (self._folder / self._keys[field_name]).read_text().rstrip("\r\n")
        except (KeyError, FileNotFoundError, NotADirectoryError):
            value = None
        except OSError as error:
            raise InputError(
                f"the secret {self._folder} cannot be read: {error.strerror}", advice="make it readable for the program's user"
            ) from error
        return value, field_name, False

    def __call__(self) -> dict[str, Any]:
        values = {name: self.get_field_value(field, name)[0] for name, field in self.settings_cls.model_fields.items()}
        return {name: value for name, value in values.items() if value is not None}


class _SecretSettings(_Settings):
    """Settings whose values come from the environment, or from a mounted secret.

    ``secret_keys`` maps the names of settings to the secret's keys.
    """

    secret_name: ClassVar[str]
    secret_keys: ClassVar[dict[str, str]]

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, _MountedSecret(cls)


class PostgresSettings(_SecretSettings):
    """The database of the answers. In the pipelines, the secret ``dbaccess`` provides all of these except the port and the TLS mode."""

    model_config = SettingsConfigDict(env_prefix="PG_")
    secret_name = "dbaccess"
    secret_keys: ClassVar[dict[str, str]] = {
        "host": "host",
        "user": "user",
        "password": "password",
        "dbname": "dbname",
        "sslrootcert": "sslrootcert",
        "sslclient_cert": "sslcert",
        "ssl_client_key": "sslkey",
    }

    host: str = Field(default="localhost", description="Host name, or the folder of a Unix socket.")
    port: int = Field(default=5432, description="Port.")
    user: str = Field(default="postgres", description="User.")
    password: SecretStr = Field(default=SecretStr(""), description="Password.")
    dbname: str = Field(default="postgres", description="Database.")
    sslmode: str = Field(default="", description="TLS mode of libpq. With certificates it is at least verify-ca.")
    sslrootcert: SecretStr = Field(default=SecretStr(""), description="CA certificate: a file, or a PEM in base64.")
    sslclient_cert: SecretStr = Field(default=SecretStr(""), description="Client certificate: a file, or a PEM in base64.")
    ssl_client_key: SecretStr = Field(default=SecretStr(""), description="Client key: a file, or a PEM in base64.")


class BucketSettings(_SecretSettings):
    """The bucket of the uploads. Google's client also reads ``GOOGLE_APPLICATION_CREDENTIALS``, and ``API_ENDPOINT_OVERRIDE`` for a
    bucket outside Google Cloud.
    """

    secret_name = "gcsaccess"
    secret_keys: ClassVar[dict[str, str]] = {"storage_bucket": "storage_bucket", "gcs_access": "creds"}

    storage_bucket: str = Field(default="questions", description="Name of the bucket.")
    gcs_access: SecretStr = Field(
        default=SecretStr(""), description="Service account of the pipelines, JSON in base64, for the secret `gcsaccess`."
    )
    google_cloud_project: str = Field(
        default="qa-platform", description="Project of the bucket's client. Nothing is billed to it; see `QA_BILLING_PROJECT`."
    )
    billing_project: str = Field(
        default="",
        validation_alias="QA_BILLING_PROJECT",
        description="Project that pays for the requests to the bucket, if the bucket is a requester-pays bucket. It is sent as "
        "`userProject`, and the account needs `roles/serviceusage.serviceUsageConsumer` on it.",
    )


class PachydermSettings(_Settings):
    """How to reach Pachyderm, and how long to wait for it."""

    pachd_address: str = Field(default="grpc://localhost:30650", description="pachd: grpc:// or grpcs://host:port.")
    pach_token: SecretStr = Field(default=SecretStr(""), description="Authentication token for pachd, if authentication is on.")
    pach_ca_bundle: Path | None = Field(default=None, description="PEM file of the CAs that grpcs:// trusts, instead of the public ones.")
    start_seconds: float = Field(
        default=900,
        gt=0,
        validation_alias="QA_START_SECONDS",
        description="Seconds after which a job that cannot start is stopped, for example because its image, a secret or room on the nodes "
        "is missing. The image of a large model takes minutes to pull.",
    )

    @field_validator("pach_token", mode="before")
    @classmethod
    def _fit_for_a_header(cls, token: object) -> object:
        if not isinstance(token, str):
            return token
        # A file written by hand ends with a line break, and so does a secret made from it.
        token = token.strip()
        if not (token.isascii() and token.isprintable()):
            raise ValueError("it must be one line of ASCII")
        return token

    @field_validator("pach_ca_bundle", mode="before")
    @classmethod
    def _none_if_empty(cls, bundle: object) -> object:
        return bundle or None


class PipelinesSettings(_Settings):
    """Size and placement of the pipelines' workers, for `qa-platform pachyderm apply` and `qa-platform doctor`."""

    model_config = SettingsConfigDict(env_prefix="QA_PIPELINES_")

    workers: int | None = Field(
        default=None, ge=1, description="Workers of the pipeline `question_answer`. If unset, its specification and the patch decide."
    )
    patch: Path | None = Field(
        default=None,
        description="JSON file with merge patches (RFC 7396) for the pipelines' specifications: an object keyed by pipeline name.",
    )
    pg_host: str = Field(
        default="", description="Host at which the workers reach PostgreSQL, for the secret `dbaccess`. If unset, `PG_HOST`."
    )

    def for_workers(self, postgres: PostgresSettings) -> PostgresSettings:
        """The database as the workers reach it."""
        return postgres.model_copy(update={"host": self.pg_host}) if self.pg_host else postgres


class ModelSettings(_Settings):
    """The model that answers."""

    model_config = SettingsConfigDict(env_prefix="QA_")

    model: str = Field(default="bundled", description="`bundled`, a local folder, or a Hugging Face model id.")
    model_revision: str = Field(default="", description="Commit, tag or branch of a Hugging Face model.")
    precision: Literal[Precision, "auto"] = Field(
        default="fp32", description="Arithmetic of the model. `auto` is for commands only; workers need a fixed precision."
    )

    align_to_words: bool = Field(
        default=True, description="Widen answers to whole words. Set it to `false` for languages without spaces between words."
    )

    no_answer_threshold: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="Lets the model say that a context has no answer, if the log probability of that exceeds the best answer's by more "
        "than this. `qa-platform evaluate` finds a value on a gold set. If unset, the model always gives an answer.",
    )

    @property
    def choice(self) -> ModelChoice:
        return ModelChoice(self.model, self.model_revision, self.precision, self.no_answer_threshold)

    @property
    def pinned(self) -> ModelChoice:
        """The choice for workers.

        Raises:
            InputError: the precision is ``auto``. Each worker would resolve it for its own machine, and one job would mix precisions.
        """
        if self.precision == "auto":
            raise InputError(
                "QA_PRECISION is auto, which every worker would resolve for itself",
                advice="set it to the precision that `qa-platform tune` finds on a machine like the workers'",
            )
        return self.choice


class TuningSettings(_Settings):
    """Where results measured on this machine are stored."""

    model_config = SettingsConfigDict(env_prefix="QA_")

    cache_dir: Path = Field(default=Path("~/.cache/qa-platform"), description="Folder in which `qa-platform tune` stores its results.")


class WorkerSettings(_Settings):
    """The settings of the pipelines' workers."""

    model_config = SettingsConfigDict(env_prefix="QA_")

    pfs_root: Path = Field(default=Path("/pfs"), description="Folder in which a pipeline worker finds its inputs and `out`.")
    threads: int = Field(
        default=0, ge=0, description="Threads of one answering process; 0 divides the available cores among a worker's processes."
    )
    device: str = Field(
        default="cpu",
        description="Device of an answering process: `cpu`, or a GPU by its torch name, such as `cuda`. Without that GPU, nothing is "
        "answered.",
    )
    grpc_port: int = Field(
        default=1080, validation_alias="PPS_WORKER_GRPC_PORT", description="Port of Pachyderm's worker, which assigns datums."
    )


class DatumSettings(_Settings):
    """What Pachyderm tells a pipeline's program about a datum: with each datum, or in the environment if datums are not batched."""

    question_answer: str = Field(default="", description="Path of the answered file to load: the datum of `push-answers-to-sql`.")
    pach_job_id: str = Field(default="", description="Id of the job. The commits that it works on have the same id.")
    pach_output_commit_id: str = Field(default="", description="Id of the commit of the program's output.")


class IngestSettings(_Settings):
    """How input files are read and cut into shards."""

    model_config = SettingsConfigDict(env_prefix="QA_")

    shard_rows: int = Field(default=2000, ge=1, description="Maximum rows of a shard. Shards with a very long header may have more.")
    shard_bytes: int = Field(default=8 * 2**20, ge=1, description="Bytes at which a shard is full: no further row is added.")
    question_limit: int = Field(default=QUESTION_LIMIT, ge=1, le=QUESTION_LIMIT, description="Maximum characters of a question in a CSV.")
    context_limit: int = Field(default=CONTEXT_LIMIT, ge=1, le=CONTEXT_LIMIT, description="Maximum characters of a context in a CSV.")


class WorkSettings(_Settings):
    """How waiting files become runs, and what happens to them afterwards."""

    model_config = SettingsConfigDict(env_prefix="QA_")

    suffixes: Texts = Field(
        default=(".csv", ".csv.gz"),
        description="Suffixes of the names of question files in the bucket, separated by commas.",
    )
    empty_seconds: float = Field(
        default=60,
        ge=0,
        description="Seconds to wait for the content of an empty upload, as a new generation, before the upload is rejected as empty.",
    )
    batch_files: int = Field(
        default=300, ge=1, description="Maximum files per run. Each run costs the start of a Dagster run and of two Pachyderm jobs."
    )
    batch_bytes: int = Field(default=256 * 2**20, ge=1, description="Maximum bytes per run. A larger file gets a run of its own.")
    max_attempts: int = Field(default=3, ge=1, description="Failures after which a file is parked as `failed`.")
    retry_first_seconds: float = Field(
        default=30,
        gt=0,
        description="Seconds before a file's second attempt. The wait doubles with every attempt. Up to half is subtracted at random.",
    )
    retry_most_seconds: float = Field(
        default=900,
        gt=0,
        description="Longest wait between attempts, in seconds. While a service is unavailable or misconfigured, files are retried this "
        "often, and none is charged as long as no other file is loaded.",
    )
    lease_seconds: int = Field(default=120, ge=10, description="Seconds that a claim lasts without being renewed.")
    sensor_seconds: int = Field(default=30, ge=1, description="Minimum seconds between two listings of the bucket.")
    reconcile_seconds: int = Field(
        default=600,
        ge=1,
        description="Minimum seconds between two searches for what the fast sensor cannot see: lost runs, objects that came back.",
    )
    heartbeat_seconds: int = Field(
        default=300,
        ge=1,
        description="Minimum seconds between two materialisations of the heartbeat `incoming_listing`: one per listing would fill "
        "Dagster's event log. The asset is no longer fresh after three times the larger of this and `QA_SENSOR_SECONDS`, which leaves time "
        "for a busy machine or a restart. Also the minimum between two checks whether the asset `platform_status` has changed.",
    )
    archive: Literal["move", "keep", "delete"] = Field(
        default="move", description="What happens to an upload once its answers are in PostgreSQL."
    )
    answered_prefix: str = Field(
        default="",
        description="Prefix in the bucket for the answered CSVs of files that finish from now on. With `answered/`, the answered CSV of "
        "NAME is `answered/NAME`. It must end with a slash, and must not be below `incoming/`, `processed/` or `rejected/`. Empty, the "
        "default, writes none: they are another copy of every upload, which only you can remove.",
    )
    partitions_kept: int = Field(
        default=10_000,
        ge=1,
        description="Number of newest partitions that Dagster keeps, since its pages show all of them. The history stays in "
        "`question_file`.",
    )
    commits_kept_days: int = Field(
        default=30,
        ge=1,
        le=36_500,
        description="Days that Pachyderm keeps the commits of finished batches. They hold a copy of every upload and its answers. After "
        "that `qa-platform answers` rebuilds answers from PostgreSQL.",
    )

    @property
    def heartbeat_fails_after(self) -> float:
        """Seconds after which the heartbeat is no longer fresh. A busy machine or a restarting service may miss a beat."""
        return 3.0 * max(self.heartbeat_seconds, self.sensor_seconds)

    @field_validator("answered_prefix")
    @classmethod
    def _apart(cls, prefix: str) -> str:
        # An answered CSV under `incoming/` would be answered again, and one in the archive would be taken for a source.
        if prefix and (not prefix.endswith("/") or prefix.startswith((INCOMING, PROCESSED, REJECTED))):
            raise ValueError(f"it must end with a slash, such as answered/, and must not be below {INCOMING}, {PROCESSED} or {REJECTED}")
        return prefix

    @field_validator("suffixes")
    @classmethod
    def _lower(cls, suffixes: tuple[str, ...]) -> tuple[str, ...]:
        if not suffixes:
            raise ValueError("it must name at least one suffix, such as .csv")
        if not all(suffix.startswith(".") for suffix in suffixes):
            raise ValueError("each suffix must begin with a dot; several are separated by commas, as in .csv,.csv.gz")
        # Names are compared in lower case.
        return tuple(suffix.lower() for suffix in suffixes)


class CatalogSettings(_Settings):
    """What Dagster shows with the assets."""

    model_config = SettingsConfigDict(env_prefix="QA_")

    owners: Texts = Field(
        default=("team:question-answering",),
        description="Owners of the assets: team:name or e-mail addresses, separated by commas.",
    )
    docs_url: str = Field(default="", description="Address of the folder docs/, for links to its pages. If unset, their paths are shown.")
    expected_hours: int = Field(
        default=0,
        ge=0,
        description="Hours within which a new upload is expected; after that, the uploads are not fresh. 0 expects none.",
    )

    @field_validator("owners")
    @classmethod
    def _known_to_dagster(cls, owners: tuple[str, ...]) -> tuple[str, ...]:
        if not all(_OWNER.fullmatch(owner) for owner in owners):
            raise ValueError("each owner must be an e-mail address or team:NAME; several are separated by commas")
        return owners


class CheckSettings(_Settings):
    """The limits at which the checks of a loaded file warn. A check never holds a file back."""

    model_config = SettingsConfigDict(env_prefix="QA_")

    low_score: float = Field(default=0.1, ge=0, le=1, description="Score below which an answer should be looked at.")
    review_share: float = Field(
        default=0.25, ge=0, le=1, description="Share of a file's rows without an answer or with a low score, above which its check warns."
    )
    drift_files: int = Field(default=20, ge=5, description="Number of earlier files whose scores are compared with those of a new file.")
    drift_deviations: float = Field(
        default=3.0, gt=0, description="Standard deviations from the mean score of those files, beyond which the check warns."
    )
    gold_prefix: str = Field(
        default="gold/",
        min_length=1,
        description="Files below incoming/ whose names begin with this are gold sets. They need a column `answers`.",
    )
    gold_exact_match: float = Field(
        default=50.0, ge=0, le=100, description="Exact match on gold sets, in percent, below which the check warns."
    )
    gold_f1: float = Field(default=60.0, ge=0, le=100, description="F1 on gold sets, in percent, below which the check warns.")


class NotificationSettings(_Settings):
    """Who is notified of failed runs and failed checks. Nobody is, unless a webhook, a recipient or a service is set."""

    model_config = SettingsConfigDict(env_prefix="QA_")

    slack_webhook: SecretStr = Field(
        default=SecretStr(""), description="Address of a Slack webhook. It is a secret: whoever has it can post."
    )
    email_to: Texts = Field(default=(), description="Recipients of e-mail, separated by commas.")
    email_from: str = Field(default="qa-platform@localhost", description="Sender of e-mail.")
    smtp_host: str = Field(default="localhost", description="Mail server.")
    smtp_port: int = Field(default=587, ge=1, le=65535, description="Port of the mail server.")
    smtp_tls: Literal["starttls", "ssl", "none"] = Field(default="starttls", description="Encryption of the connection to the mail server.")
    smtp_user: str = Field(default="", description="User at the mail server. If unset, there is no log-in.")
    smtp_password: SecretStr = Field(default=SecretStr(""), description="Password at the mail server.")
    notify_urls: Annotated[tuple[SecretStr, ...], *_Json] = Field(
        default=(), description="Addresses of other services, as apprise writes them (a JSON list): `msteams://…`, `pagerduty://…`."
    )
    dagster_url: str = Field(default="", description="Address of Dagster's UI, for links to runs.")


class ExecutionSettings(_Settings):
    """Where the steps of Dagster's runs are executed, and how often they are retried. Dagster's own settings are in ``dagster.yaml``."""

    model_config = SettingsConfigDict(env_prefix="QA_")

    executor: Literal["in_process", "kubernetes"] = Field(
        default="in_process",
        description="Where a step is executed: in the run's process, or in a pod of its own.",
    )
    step_resources: Annotated[dict[Literal["requests", "limits"], dict[str, str]], *_Json] = Field(
        default={},
        description="Resources of a step's pod: a JSON object with Kubernetes' `requests` and `limits`. If unset, those of the run's pod.",
    )
    step_retries: int = Field(
        default=2,
        ge=0,
        description="Retries of a step if a service is unavailable for longer than its client waits. After that, the sensor takes over.",
    )
    step_retry_seconds: float = Field(
        default=10, ge=0, description="Seconds before each retry: about as long as a service takes to restart."
    )


class DagsterSettings(_Settings):
    """Dagster's own storage. Dagster reads these variables itself; `dagster.yaml` names ``DAGSTER_PG_URL``."""

    dagster_home: Path = Field(default=Path(".qa/dagster"), description="Folder with `dagster.yaml`. Dagster itself has no default.")
    dagster_pg_url: SecretStr = Field(default=SecretStr(""), description="PostgreSQL URL of Dagster's own storage.")


class EmbeddedPachdSettings(_Settings):
    """How the embedded pachd behaves where clusters differ. The defaults are quick; tests make it as slow and strict as a cluster."""

    model_config = SettingsConfigDict(env_prefix="QA_PACHD_", frozen=True)

    file_set_seconds: float = Field(default=600, gt=0, description="Seconds that a new file set lives.")
    file_set_most_seconds: int = Field(default=1800, ge=1, description="Maximum seconds that a file set may live after a renewal.")
    finish_seconds: float = Field(default=0, ge=0, description="Seconds that a commit stays in the state FINISHING.")
    tokens: Path | None = Field(
        default=None,
        description="JSON file that turns authentication on. It maps each token to an object with the name of a `robot` and a list of its "
        "`roles` (`projectWriter`, `secretAdmin`, `repoWriter`).",
    )
    loki: bool = Field(
        default=True,
        description="Whether all log lines are kept. If not, only those of a pipeline's present workers can be read, and an idle pipeline "
        "with autoscaling has none.",
    )
    log_seconds: float = Field(default=0, ge=0, description="Seconds until a log line can be read.")
    pod_seconds: float = Field(default=0, ge=0, description="Seconds that a pipeline's workers take to start.")
    no_start: str = Field(default="", description="Pipelines whose program does not start: names, separated by commas.")
    no_restart: str = Field(
        default="",
        description="Pipelines with datum batching whose program starts once, but not again after it failed: names, separated by commas.",
    )


@contextmanager
def settings_errors() -> Iterator[None]:
    """Turn the validation error of a variable into the platform's own error, which shows no values.

    Raises:
        InputError: a variable is invalid; the message names it.
    """
    try:
        yield
    except ValueError as error:
        if message := wrong_settings(error):
            # Without the cause, which would show values.
            raise InputError(message, advice=SETTINGS_ADVICE) from None
        raise


SETTINGS_ADVICE = "set the variable as docs/configuration.md describes it, or unset it"


def wrong_settings(error: Exception) -> str:
    """Which variables are invalid and why, without their values; "" if the error does not come from one of the classes here."""
    owner = globals().get(error.title) if isinstance(error, ValidationError) else None
    if owner is None or not isinstance(error, ValidationError):
        return ""
    prefix = owner.model_config.get("env_prefix", "")
    wrong = [f"{prefix}{problem['loc'][0]}".upper() + f": {_fault(problem)}" for problem in error.errors()]
    return f"the environment cannot be used: {'; '.join(wrong)}"


def _fault(problem: "ErrorDetails") -> str:
    """What is wrong with a variable, without the prefix that pydantic puts before a validator's message."""
    return str(problem["ctx"]["error"]) if problem["type"] == "value_error" else problem["msg"]
