"""Creates or updates the platform's repo, secrets and pipelines on a Pachyderm cluster. Idempotent.

Updating a pipeline kills its running jobs and creates a new one. Therefore a pipeline with an unchanged specification is not updated,
and an update first waits for running jobs.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
from pachyderm_sdk import Client
from pachyderm_sdk.api import pfs, pps

from qa_platform.clients.pachyderm import IN_PROGRESS, NOT_STARTING, have_workers, is_code, job_of, lists_the_bucket, session
from qa_platform.contract import ANSWER_PIPELINE, LOAD_PIPELINE, QUESTIONS_REPO
from qa_platform.errors import InputError, TransientError
from qa_platform.provisioning.comparison import difference
from qa_platform.provisioning.project_files import project_file
from qa_platform.provisioning.secrets import (
    BUCKET_SECRET,
    DATABASE_SECRET,
    bucket_secret,
    database_secret,
    described,
    find_secret,
    keys_needed,
)
from qa_platform.provisioning.sizing import patched, read_patches
from qa_platform.provisioning.stuck_jobs import StuckJobs
from qa_platform.settings import BucketSettings, PachydermSettings, PostgresSettings

_SPEC_FILES = {
    ANSWER_PIPELINE: "question_answer/pipeline.json",
    LOAD_PIPELINE: "push_answers_to_sql/pipeline.json",
}
_CRON_SPEC_FILE = "question_answer/pipeline_cron.json"

# The parts of an image's name, as registries accept them.
_REGISTRY = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*(:[0-9]+)?(/[A-Za-z0-9._-]+)*/?")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")

_POLL_SECONDS = 2.0
_SHOWN_JOBS = 5


@dataclass(frozen=True)
class Change:
    """An object of the cluster and what was done to it, or would be without a dry run. ``detail``: the difference, or the reason."""

    kind: str
    name: str
    action: str
    detail: str = ""


@dataclass(frozen=True)
class Options:
    """How to apply.

    Args:
        registry: registry and owner of the images; "" keeps those of the deployed pipelines.
        tag: tag of the images; "" keeps that of the deployed pipelines.
        cron: apply the variant whose pipeline lists the bucket itself, without Dagster; None keeps the deployed variant.
        workers: number of workers of the answering pipeline; None keeps that of its specification and the patch.
        patch: file with a JSON merge patch for each pipeline, see `sizing`.
        dry_run: change nothing.
        now: do not wait for running jobs.
        wait_seconds: how long to wait for the running jobs of one pipeline.
    """

    registry: str = ""
    tag: str = ""
    cron: bool | None = None
    workers: int | None = None
    patch: Path | None = None
    dry_run: bool = False
    now: bool = False
    wait_seconds: float = 1800


def apply(
    pachyderm: PachydermSettings,
    postgres: PostgresSettings,
    bucket: BucketSettings,
    options: Options = Options(),
    *,
    tell: Callable[[str], object] = lambda text: None,
) -> list[Change]:
    """Create or update the repo, the secrets and the pipelines, in the order in which they depend on each other.

    Args:
        tell: called with one line of text for each thing that the function waits for.

    Raises:
        InputError: a specification or a credential is unusable, or pachd refused. Specifications and credentials are all read before
            anything is changed.
        TransientError: pachd is unavailable, or jobs still run after ``options.wait_seconds``.
    """
    secrets: dict[str, dict[str, str] | None] = {DATABASE_SECRET: database_secret(postgres), BUCKET_SECRET: bucket_secret(bucket)}
    # Unusable options are refused before pachd is asked.
    for what, value, form in (("registry", options.registry, _REGISTRY), ("tag", options.tag, _TAG)):
        if value and not form.fullmatch(value):
            raise InputError(f"{value!r} is not the {what} of an image", advice="a registry is like docker.io/acme, a tag like v1.2.3")
    _check_options(options, postgres, bucket)
    with session(pachyderm, "applying repos, secrets and pipelines") as client:
        options = _completed(options, deployed_options(find_pipeline(client, name) for name in _SPEC_FILES))
        specs = list(specifications(options, postgres, bucket=bucket))
        if "host" not in postgres.model_fields_set and find_secret(client, DATABASE_SECRET):
            # Keep the secret that exists: the default is localhost, where no worker's pod reaches the database.
            secrets[DATABASE_SECRET] = None
        if options.cron and secrets[BUCKET_SECRET] is None and find_secret(client, BUCKET_SECRET) is None:
            raise InputError(
                f"the cron variant needs the secret {BUCKET_SECRET}, which does not exist",
                advice="set GCS_ACCESS to the service account's JSON, or its file",
            )
        changes = [_apply_repo(client, options)]
        changes += [_apply_secret(client, name, values, options) for name, values in secrets.items()]
        changes += [_apply_pipeline(client, name, spec, options, tell) for name, spec in specs]
    return changes


def _check_options(options: Options, postgres: PostgresSettings, bucket: BucketSettings) -> None:
    """Refuse options that the wanted variant cannot have or, if none is named, neither of the two."""
    try:
        list(specifications(options, postgres, bucket=bucket))
    except InputError:
        if options.cron is not None:
            raise
        list(specifications(replace(options, cron=True), postgres, bucket=bucket))


def specifications(options: Options, postgres: PostgresSettings, *, bucket: BucketSettings) -> Iterator[tuple[str, dict[str, Any]]]:
    """The wanted specifications of the pipelines, by name, in the order in which they depend on each other.

    Raises:
        InputError: a specification's file is missing, or the patch is refused.
    """
    files = _SPEC_FILES | ({ANSWER_PIPELINE: _CRON_SPEC_FILE} if options.cron else {})
    patches = read_patches(options.patch, files) if options.patch else {}
    for name, file in files.items():
        path = project_file("pachyderm") / file
        if not path.exists():
            raise InputError(f"{path} is missing", advice="the specifications are in the project's folder pachyderm/: install it again")
        spec = json.loads(path.read_text())
        transform = spec["transform"]
        image, _, spec_tag = transform["image"].rpartition(":")
        prefix = f"{options.registry.rstrip('/')}/" if options.registry else ""
        transform["image"] = f"{prefix}{image}:{options.tag or spec_tag}"
        secrets = {secret["name"] for secret in transform.get("secrets", ())}
        environment = (_loader_environment(postgres) if DATABASE_SECRET in secrets else {}) | (
            _billing_environment(bucket) if BUCKET_SECRET in secrets else {}
        )
        if environment:
            transform["env"] = {**transform.get("env", {}), **environment}
        if name in patches:
            spec = patched(spec, patches[name], where=f"{options.patch}: {name}")
        if options.workers and name == ANSWER_PIPELINE:
            spec["parallelism_spec"] = {"constant": options.workers}
        yield name, spec


def deployed_options(deployed: Iterable[pps.PipelineInfo | None]) -> Options | None:
    """The options with which the deployed pipelines were applied: registry and tag from the images, the variant from the input.

    None if no pipeline has an image of this project.
    """
    names = _images()
    ours = [info for info in deployed if info and info.details.transform.image.rpartition("/")[2].partition(":")[0] in names]
    if not ours:
        return None
    registry, _, image = ours[0].details.transform.image.rpartition("/")
    cron = any(lists_the_bucket(info) for info in ours)
    return Options(registry=registry, tag=image.partition(":")[2], cron=cron)


def _completed(options: Options, present: Options | None) -> Options:
    """``options``, with the values that they leave open filled in from ``present``."""
    if present is None:
        return options
    cron = present.cron if options.cron is None else options.cron
    return replace(options, registry=options.registry or present.registry, tag=options.tag or present.tag, cron=cron)


def _images() -> set[str]:
    """The names of the images, without registry and tag."""
    specs = specifications(Options(), PostgresSettings(), bucket=BucketSettings())
    return {spec["transform"]["image"].partition(":")[0] for _, spec in specs}


def _loader_environment(postgres: PostgresSettings) -> dict[str, str]:
    """The environment of the loader: the database's port and TLS mode, which the secret does not hold.

    The port is always set: beside a Kubernetes service called `pg`, PG_PORT would otherwise be that service's address.
    """
    return {"PG_PORT": str(postgres.port)} | ({"PG_SSLMODE": postgres.sslmode} if postgres.sslmode else {})


def _billing_environment(bucket: BucketSettings) -> dict[str, str]:
    """The environment of the cron variant: the project that pays for its requests to the bucket, if one is set."""
    return {"QA_BILLING_PROJECT": bucket.billing_project} if bucket.billing_project else {}


def _apply_repo(client: Client, options: Options) -> Change:
    repo = pfs.Repo.from_uri(QUESTIONS_REPO)
    if client.pfs.repo_exists(repo=repo):
        return Change("repo", QUESTIONS_REPO, "unchanged")
    if not options.dry_run:
        try:
            client.pfs.create_repo(repo=repo, description="Batches of uploaded CSVs, cut into shards.")
        except grpc.RpcError as error:
            # gRPC retries a call whose response was lost. The retry is refused because the first call succeeded.
            if not is_code(error, grpc.StatusCode.ALREADY_EXISTS):
                raise
        client.pfs.create_branch(branch=pfs.Branch.from_uri(f"{QUESTIONS_REPO}@master"))
    return Change("repo", QUESTIONS_REPO, "created")


def _apply_secret(client: Client, name: str, values: Mapping[str, str] | None, options: Options) -> Change:
    """Create or replace a secret. Its values cannot be read back and compared, so it is sent each time. Another tool's secret is kept."""
    existing = find_secret(client, name)
    if values is None:
        missing = f"it does not exist: only the cron variant needs it ({keys_needed(name)})"
        unset = "neither PG_HOST nor QA_PIPELINES_PG_HOST is set" if name == DATABASE_SECRET else "GCS_ACCESS is not set"
        return Change("secret", name, "unchanged", f"{unset}; {described(name, existing) if existing else missing}")
    if existing and not existing.is_ours:
        return Change("secret", name, "unchanged", described(name, existing))
    if not options.dry_run:
        if existing:
            _delete_secret(client, name)
        _create_secret(client, name, values)
    keys = ", ".join(f"{key} (empty)" if not value else key for key, value in values.items())
    if existing:
        return Change("secret", name, "sent again", f"its values cannot be read back and compared; keys: {keys}")
    return Change("secret", name, "created", f"keys: {keys}")


def _delete_secret(client: Client, name: str) -> None:
    try:
        client.pps.delete_secret(secret=pps.Secret(name=name))
    except grpc.RpcError as error:
        # An earlier attempt of the call may have succeeded.
        if f'secrets "{name}" not found' not in (error.details() or ""):
            raise


def _create_secret(client: Client, name: str, values: Mapping[str, str]) -> None:
    try:
        client.pps.create_secret(name=name, data=dict(values))
    except grpc.RpcError as error:
        if f'secrets "{name}" already exists' not in (error.details() or ""):
            raise
        # Its values may come from an earlier attempt of the call, or from another process.
        _delete_secret(client, name)
        client.pps.create_secret(name=name, data=dict(values))


def _apply_pipeline(client: Client, name: str, spec: dict[str, Any], options: Options, tell: Callable[[str], object]) -> Change:
    text = json.dumps(spec)
    info = find_pipeline(client, name)
    if info is None:
        if not options.dry_run:
            info = _create_pipeline(client, name, text)
        if info is None:
            return Change("pipeline", name, "created", f"image {spec['transform']['image']}")
    changed = difference_from(client, info, spec)
    if not changed and info.state == pps.PipelineState.PIPELINE_FAILURE:
        # Pachyderm has removed its workers, and only an update brings it back.
        changed = f"it had failed: {info.reason or 'no reason given'}"
    if not changed:
        return Change("pipeline", name, "unchanged")
    if not options.dry_run:
        if not options.now:
            _wait_for_jobs(client, name, options.wait_seconds, tell)
        client.pps.create_pipeline_v2(create_pipeline_request_json=text, update=True)
    return Change("pipeline", name, "updated", changed)


def _create_pipeline(client: Client, name: str, text: str) -> pps.PipelineInfo | None:
    """Create a pipeline. If it exists already, return it: an earlier attempt of the call, or another process, created it."""
    try:
        client.pps.create_pipeline_v2(create_pipeline_request_json=text)
    except grpc.RpcError as error:
        if is_code(error, grpc.StatusCode.ALREADY_EXISTS) and (info := find_pipeline(client, name)):
            return info
        raise
    return None


def find_pipeline(client: Client, name: str) -> pps.PipelineInfo | None:
    """A pipeline with its details, or None."""
    try:
        return client.pps.inspect_pipeline(pipeline=job_of(name, "").pipeline, details=True)
    except grpc.RpcError as error:
        if not is_code(error, grpc.StatusCode.NOT_FOUND):
            raise
        return None


def difference_from(client: Client, info: pps.PipelineInfo, spec: dict[str, Any]) -> str:
    """The changes that an update to ``spec`` would make, as a diff without the values of environment variables; "" for none.

    This is a dry run. Secrets are not compared.

    Raises:
        grpc.RpcError: pachd refuses the specification.
    """
    # pachd fills in its own defaults, which may be set for the cluster.
    planned = client.pps.create_pipeline_v2(create_pipeline_request_json=json.dumps(spec), update=True, dry_run=True)
    has_start = "start" in spec["input"].get("cron", {})
    return difference(info.effective_spec_json, planned.effective_create_pipeline_request_json, with_start=has_start)


def running_jobs(client: Client, name: str) -> list[pps.JobInfo]:
    """The jobs of a pipeline's current version that have not ended."""
    return [info for info in client.pps.list_job(pipeline=job_of(name, "").pipeline) if info.state in IN_PROGRESS]


def _wait_for_jobs(client: Client, name: str, seconds: float, tell: Callable[[str], object]) -> None:
    """Wait for those running jobs of a pipeline that can end.

    Raises:
        TransientError: some still run after that many seconds.
    """
    stuck_jobs, told, deadline = StuckJobs(), set[str](), time.monotonic() + seconds
    while True:
        running, stuck = _look_at_jobs(client, name, stuck_jobs)
        waited = sorted(running - stuck.keys())
        news = {job: f"pipeline {name}: not waiting for job {job}: {reason}" for job, reason in sorted(stuck.items())}
        if waited:
            news["waiting for " + " ".join(waited)] = f"pipeline {name}: waiting for {_count(waited)}, which an update would kill"
        for key in news.keys() - told:
            tell(news[key])
        told |= news.keys()
        if not waited:
            return
        left = deadline - time.monotonic()
        if left <= 0:
            raise TransientError(
                f"pipeline {name} is not updated: after {seconds / 60:g} minutes there are still {_count(waited)}",
                advice="see `qa-platform pachyderm jobs`, then apply again; --now kills them, and their runs launch them again",
            )
        time.sleep(min(_POLL_SECONDS, left))


def _look_at_jobs(client: Client, name: str, stuck_jobs: StuckJobs) -> tuple[set[str], dict[str, str]]:
    """The ids of a pipeline's running jobs, and those that cannot end, with their reasons."""
    running: list[pps.JobInfo] = []
    stuck: dict[str, str] = {}
    # In this order: a job of the second pipeline waits for that of the first.
    for pipeline in _SPEC_FILES:
        if info := find_pipeline(client, pipeline):
            running = running_jobs(client, pipeline)
            has_workers = info.state in NOT_STARTING and have_workers(client, running)
            stuck = stuck_jobs.stuck(info, running, stuck, has_workers=has_workers)
        if pipeline == name:
            break
    return {job.job.id for job in running}, stuck


def _count(jobs: Sequence[str]) -> str:
    listed = ", ".join(jobs[:_SHOWN_JOBS]) + (", …" if len(jobs) > _SHOWN_JOBS else "")
    return f"{len(jobs)} running {'job' if len(jobs) == 1 else 'jobs'} ({listed})"
