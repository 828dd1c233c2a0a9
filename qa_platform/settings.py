"""Every environment variable that the platform reads, named and described once. No other file reads the environment.

Each class reads its own variables when it is made, so that a process needs only those of the parts it uses.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from qa_platform.contract import CONTEXT_LIMIT, QUESTION_LIMIT, ModelChoice, Precision
from qa_platform.errors import InputError


class PostgresSettings(BaseSettings):
    """Where the answers are. The names are those of deployments' ``dbaccess`` secret."""

    model_config = SettingsConfigDict(env_prefix="PG_")

    host: str = Field(default="localhost", description="Host name, or the folder of a Unix socket.")
    port: int = Field(default=5432, description="Port.")
    user: str = Field(default="postgres", description="User.")
    password: SecretStr = Field(default=SecretStr(""), description="Password.")
    dbname: str = Field(default="postgres", description="Database.")
    sslmode: str = Field(default="", description="TLS mode of libpq. With certificates it is at least verify-ca.")
    sslrootcert: SecretStr = Field(default=SecretStr(""), description="CA certificate: a file, or a PEM in base64.")
    sslclient_cert: SecretStr = Field(default=SecretStr(""), description="Client certificate: a file, or a PEM in base64.")
    ssl_client_key: SecretStr = Field(default=SecretStr(""), description="Client key: a file, or a PEM in base64.")


class BucketSettings(BaseSettings):
    """Where CSVs are uploaded. ``STORAGE_EMULATOR_HOST`` and ``GOOGLE_APPLICATION_CREDENTIALS`` are read by Google's client itself."""

    storage_bucket: str = Field(default="questions", description="Name of the bucket.")
    gcs_access: SecretStr = Field(
        default=SecretStr(""), description="Service account of the pipelines, JSON in base64, for the secret `gcsaccess`."
    )
    google_cloud_project: str = Field(default="qa-platform", description="Project that the bucket's client bills.")


class PachydermSettings(BaseSettings):
    """Where Pachyderm is."""

    pachd_address: str = Field(default="grpc://localhost:30650", description="pachd: grpc:// or grpcs://host:port.")
    pach_token: SecretStr = Field(default=SecretStr(""), description="Authentication token of pachd, where it asks for one.")
    pach_ca_bundle: Path | None = Field(default=None, description="PEM file of the CAs that grpcs:// trusts; else the usual public ones.")


class ModelSettings(BaseSettings):
    """What answers."""

    model_config = SettingsConfigDict(env_prefix="QA_")

    model: str = Field(default="bundled", description="`bundled`, a local folder, or a Hugging Face model id.")
    model_revision: str = Field(default="", description="Commit, tag or branch of a Hugging Face model.")
    precision: Literal[Precision, "auto"] = Field(
        default="fp32", description="Arithmetic of the model; `auto` is for commands only, what workers answer in is pinned."
    )

    @property
    def choice(self) -> ModelChoice:
        return ModelChoice(self.model, self.model_revision, self.precision)

    @property
    def pinned(self) -> ModelChoice:
        """The choice as it is handed to workers.

        Raises:
            InputError: the precision is ``auto``. Each worker would ask its own machine what that means, and one job mix what they say.
        """
        if self.precision == "auto":
            raise InputError(
                "QA_PRECISION is auto, which every worker would resolve by itself; set it to the precision that `qa-platform tune` "
                "finds on a machine like the workers'"
            )
        return self.choice


class TuningSettings(BaseSettings):
    """Where the engine remembers what it found out about this machine."""

    model_config = SettingsConfigDict(env_prefix="QA_")

    cache_dir: Path = Field(default=Path("~/.cache/qa-platform"), description="Folder in which `qa-platform tune` keeps what it found.")


class WorkerSettings(BaseSettings):
    """What pipeline workers read."""

    model_config = SettingsConfigDict(env_prefix="QA_")

    pfs_root: Path = Field(default=Path("/pfs"), description="Folder in which a pipeline worker finds its inputs and `out`.")
    threads: int = Field(default=0, ge=0, description="Threads of one answering process; 0 takes every core it may use.")
    grpc_port: int = Field(
        default=1080, validation_alias="PPS_WORKER_GRPC_PORT", description="Port of Pachyderm's worker, which hands out datums."
    )


class DatumSettings(BaseSettings):
    """What Pachyderm says to the program of a pipeline that does not batch its datums."""

    question_answer: str = Field(default="", description="Path of the answered file to load: the datum of `push-answers-to-sql`.")
    pach_job_id: str = Field(default="", description="Job, which is also the id of the commits that it works on.")
    pach_output_commit_id: str = Field(default="", description="Commit that the program's output goes into.")


class IngestSettings(BaseSettings):
    """How input files are read and cut into shards."""

    model_config = SettingsConfigDict(env_prefix="QA_")

    shard_rows: int = Field(default=2000, ge=1, description="Rows of a shard, at most.")
    shard_bytes: int = Field(default=8 * 2**20, ge=1, description="Bytes of a shard, beyond which no further row is added.")
    question_limit: int = Field(default=QUESTION_LIMIT, ge=1, le=QUESTION_LIMIT, description="Characters of a question, at most.")
    context_limit: int = Field(default=CONTEXT_LIMIT, ge=1, le=CONTEXT_LIMIT, description="Characters of a context, at most.")


class WorkSettings(BaseSettings):
    """How waiting files become runs, and what becomes of them afterwards."""

    model_config = SettingsConfigDict(env_prefix="QA_")

    suffixes: tuple[str, ...] = Field(default=(".csv",), description="Endings of the objects that are files of questions (a JSON list).")
    batch_files: int = Field(default=50, ge=1, description="Files of one run, at most.")
    batch_bytes: int = Field(default=256 * 2**20, ge=1, description="Bytes of one run, beyond which no further file is added.")
    max_attempts: int = Field(default=3, ge=1, description="Failures after which a file is parked as `failed`.")
    retry_first_seconds: float = Field(
        default=30,
        gt=0,
        description="How long a file waits for its next attempt: this, doubled with every attempt, of which a random half is taken off.",
    )
    retry_most_seconds: float = Field(
        default=900,
        gt=0,
        description="What that is doubled up to. What is away, or configured wrongly, is tried again this often, and charges no file "
        "as long as no other is loaded.",
    )
    lease_seconds: int = Field(default=120, ge=10, description="How long a claim holds without being renewed.")
    sensor_seconds: int = Field(default=30, ge=1, description="Least time between two looks at the bucket.")
    reconcile_seconds: int = Field(
        default=600,
        ge=1,
        description="Least time between two looks for what the fast sensor cannot see: lost runs, objects that came back.",
    )
    heartbeat_seconds: int = Field(
        default=300,
        ge=1,
        description="Least time between two materialisations of the heartbeat `incoming_listing`: one for every look would bury Dagster's "
        "event log. It is not fresh after three times as long, which a busy machine or a service that restarts may take.",
    )
    archive: Literal["move", "keep", "delete"] = Field(
        default="move", description="What becomes of an input once its answers are in Postgres."
    )
    partitions_kept: int = Field(
        default=10_000, ge=1, description="Newest partitions that Dagster keeps: its pages show them all. History stays in `question_file`."
    )
    commits_kept_days: int = Field(
        default=30,
        ge=1,
        description="Days that Pachyderm keeps the commits of batches that are done. They hold every upload and its answers once more; "
        "after that `qa-platform answers` rebuilds them from Postgres.",
    )

    @field_validator("suffixes")
    @classmethod
    def _lower(cls, suffixes: tuple[str, ...]) -> tuple[str, ...]:
        # Names are compared in lower case.
        return tuple(suffix.lower() for suffix in suffixes)


class CatalogSettings(BaseSettings):
    """What Dagster's pages say of the assets beyond what they are."""

    model_config = SettingsConfigDict(env_prefix="QA_")

    owners: tuple[str, ...] = Field(
        default=("team:question-answering",), description="Owners of the assets: team:name or e-mail addresses (a JSON list)."
    )
    docs_url: str = Field(default="", description="Address of the folder docs/, for links to it; without one its path is shown.")
    expected_hours: int = Field(
        default=0, ge=0, description="Hours within which a new upload is expected; the uploads count as not fresh beyond. 0: none is."
    )


class CheckSettings(BaseSettings):
    """When the checks of a loaded file warn. They never hold it back."""

    model_config = SettingsConfigDict(env_prefix="QA_")

    low_score: float = Field(default=0.1, ge=0, le=1, description="Answers with a score below this deserve a look.")
    review_share: float = Field(
        default=0.25, ge=0, le=1, description="Share of a file's rows without an answer or with a low score, above which its check warns."
    )
    drift_files: int = Field(default=20, ge=5, description="Earlier files with whose scores those of a new one are compared.")
    drift_deviations: float = Field(default=3.0, gt=0, description="Standard deviations from their mean beyond which the check warns.")
    gold_prefix: str = Field(
        default="gold/", min_length=1, description="Files below incoming/ whose names begin so, and have a column `answers`, are gold sets."
    )
    gold_exact_match: float = Field(default=50.0, ge=0, le=100, description="Exact match on gold sets, in percent, below which it warns.")
    gold_f1: float = Field(default=60.0, ge=0, le=100, description="F1 on gold sets, in percent, below which it warns.")


class NotificationSettings(BaseSettings):
    """Who is told of failed runs and failed checks. Nobody, unless a webhook or a receiver is set."""

    model_config = SettingsConfigDict(env_prefix="QA_")

    slack_webhook: SecretStr = Field(default=SecretStr(""), description="Address of a Slack webhook. It is a secret: who has it can post.")
    email_to: tuple[str, ...] = Field(default=(), description="Receivers of e-mail (a JSON list).")
    email_from: str = Field(default="qa-platform@localhost", description="Sender of e-mail.")
    smtp_host: str = Field(default="localhost", description="Mail server.")
    smtp_port: int = Field(default=587, ge=1, le=65535, description="Its port.")
    smtp_tls: Literal["starttls", "ssl", "none"] = Field(default="starttls", description="How the connection to it is encrypted.")
    smtp_user: str = Field(default="", description="User at the mail server; without one there is no log-in.")
    smtp_password: SecretStr = Field(default=SecretStr(""), description="Password at the mail server.")
    dagster_url: str = Field(default="", description="Address of Dagster's UI, for links to runs.")


class ExecutionSettings(BaseSettings):
    """Where the steps of Dagster's runs work, and how often they are tried. What is Dagster's own is in ``dagster.yaml``, with reasons."""

    model_config = SettingsConfigDict(env_prefix="QA_")

    executor: Literal["in_process", "kubernetes"] = Field(
        default="in_process",
        description="Where a step works: in the run's own process, or in a pod of its own.",
    )
    step_resources: dict[Literal["requests", "limits"], dict[str, str]] = Field(
        default={},
        description="Size of a step's own pod: a JSON object with Kubernetes' `requests` and `limits`; without it, the run's.",
    )
    step_retries: int = Field(
        default=2,
        ge=0,
        description="Further tries of a step while a service is away for longer than its client waits. After them the sensor takes over.",
    )
    step_retry_seconds: float = Field(default=10, ge=0, description="Pause before each of them: services that restart take about as long.")


class DagsterSettings(BaseSettings):
    """Where Dagster keeps what is its own. Dagster reads these itself; `dagster.yaml` names ``DAGSTER_PG_URL``."""

    dagster_home: Path = Field(default=Path(".qa/dagster"), description="Folder with `dagster.yaml`. Dagster itself has no default.")
    dagster_pg_url: SecretStr = Field(default=SecretStr(""), description="PostgreSQL URL of Dagster's own storage.")


def wrong_settings(error: Exception) -> str:
    """What is wrong with which variables, where an error comes of making one of these classes, else "". Values are not in it."""
    if isinstance(error, SettingsError):
        return f"the environment cannot be used: {error}"
    owner = globals().get(error.title) if isinstance(error, ValidationError) else None
    if owner is None or not isinstance(error, ValidationError):
        return ""
    prefix = owner.model_config.get("env_prefix", "")
    wrong = [f"{prefix}{found['loc'][0]}".upper() + f": {found['msg']}" for found in error.errors()]
    return f"the environment cannot be used: {'; '.join(wrong)}"
