"""Bring a Pachyderm cluster to what the platform needs: the repo, the two secrets, the two pipelines. Idempotent.

An update of a pipeline kills its running jobs and makes a new one, so a pipeline whose specification is what it should be is
left alone, and another's running jobs are waited for.
"""

import difflib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from pachyderm_sdk import Client
from pachyderm_sdk.api import pfs, pps

from qa_platform.contract import ANSWER_PIPELINE, LOAD_PIPELINE, QUESTIONS_REPO
from qa_platform.errors import InputError
from qa_platform.following import IN_PROGRESS, job_of
from qa_platform.pachd import is_code, session
from qa_platform.pachyderm_secrets import BUCKET_SECRET, DATABASE_SECRET, bucket_secret, database_secret
from qa_platform.project_files import project_file
from qa_platform.settings import BucketSettings, PachydermSettings, PostgresSettings

_SPEC_FILES = {
    ANSWER_PIPELINE: "question_answer/pipeline.json",
    LOAD_PIPELINE: "push_answers_to_sql/pipeline.json",
}
_CRON_SPEC_FILE = "question_answer/pipeline_cron.json"

# Of a request, what says how it is to be applied, not what.
_NOT_OF_THE_SPEC = ("update", "reprocess", "dryRun", "dry_run")
_WAIT_SECONDS = 2.0


@dataclass(frozen=True)
class Change:
    """One thing that was, or with a dry run would be, done. ``detail`` says what will be different, or why nothing is."""

    kind: str
    name: str
    action: str
    detail: str = ""


@dataclass(frozen=True)
class Options:
    """How to apply.

    ``registry`` is put before the images' names, and ``tag`` behind them; "" leaves the specifications'. ``cron`` takes the
    pipeline that looks into the bucket by itself. ``dry_run`` changes nothing; ``now`` does not wait for running jobs.
    """

    registry: str = ""
    tag: str = ""
    cron: bool = False
    dry_run: bool = False
    now: bool = False


def apply(
    pachyderm: PachydermSettings,
    postgres: PostgresSettings,
    bucket: BucketSettings,
    options: Options = Options(),
    *,
    tell: Callable[[str], object] = lambda text: None,
) -> list[Change]:
    """Create or update everything, in the order in which it depends on each other.

    Args:
        tell: is told, a line at a time, what is waited for.

    Raises:
        InputError: a specification or a credential is unusable, with its name; or pachd refused. Nothing is changed before all
            of them are read.
        TransientError: pachd is away.
    """
    secrets = {DATABASE_SECRET: database_secret(postgres), BUCKET_SECRET: bucket_secret(bucket)}
    specs = list(specifications(options, postgres))
    with session(pachyderm, "applying repos, secrets and pipelines") as client:
        if options.cron and secrets[BUCKET_SECRET] is None and not _has_secret(client, BUCKET_SECRET):
            raise InputError(
                f"the cron variant needs the secret {BUCKET_SECRET}: set GCS_ACCESS to the service account's JSON, or its file"
            )
        changes = [_apply_repo(client, options)]
        changes += [_apply_secret(client, name, values, options) for name, values in secrets.items()]
        changes += [_apply_pipeline(client, name, spec, options, tell) for name, spec in specs]
    return changes


def specifications(options: Options, postgres: PostgresSettings) -> Iterator[tuple[str, dict[str, Any]]]:
    """The pipelines as they are to be, by name, in the order in which they depend on each other.

    Raises:
        InputError: a specification's file is missing.
    """
    files = _SPEC_FILES | ({ANSWER_PIPELINE: _CRON_SPEC_FILE} if options.cron else {})
    for name, file in files.items():
        path = project_file("pachyderm") / file
        if not path.exists():
            raise InputError(f"{path} is missing: the pipelines' specifications lie beside the package, in the project's folder pachyderm/")
        spec = json.loads(path.read_text())
        transform = spec["transform"]
        image, _, spec_tag = transform["image"].rpartition(":")
        prefix = f"{options.registry.rstrip('/')}/" if options.registry else ""
        transform["image"] = f"{prefix}{image}:{options.tag or spec_tag}"
        if any(secret["name"] == DATABASE_SECRET for secret in transform.get("secrets", ())) and (environment := _not_secret(postgres)):
            transform["env"] = environment
        yield name, spec


def _not_secret(postgres: PostgresSettings) -> dict[str, str]:
    """What a worker must know of the database that has no place in the secret, where it is not the usual."""
    values = {"PG_PORT": str(postgres.port), "PG_SSLMODE": postgres.sslmode}
    usual = {"PG_PORT": str(PostgresSettings.model_fields["port"].default), "PG_SSLMODE": ""}
    return {name: value for name, value in values.items() if value != usual[name]}


def _apply_repo(client: Client, options: Options) -> Change:
    repo = pfs.Repo.from_uri(QUESTIONS_REPO)
    if client.pfs.repo_exists(repo=repo):
        return Change("repo", QUESTIONS_REPO, "unchanged")
    if not options.dry_run:
        client.pfs.create_repo(repo=repo, description="Batches of uploaded CSVs, cut into shards.")
        client.pfs.create_branch(branch=pfs.Branch.from_uri(f"{QUESTIONS_REPO}@master"))
    return Change("repo", QUESTIONS_REPO, "created")


def _apply_secret(client: Client, name: str, values: Mapping[str, str] | None, options: Options) -> Change:
    """Put a secret in place. Its values cannot be read back, so it is written anew each time there are any."""
    there = _has_secret(client, name)
    if values is None:
        missing = "" if there else "it is not there; only the cron variant needs it"
        return Change("secret", name, "unchanged", f"GCS_ACCESS is not set{'; ' if missing else ''}{missing}")
    if not options.dry_run:
        if there:
            client.pps.delete_secret(secret=pps.Secret(name=name))
        client.pps.create_secret(name=name, data=dict(values))
    keys = ", ".join(f"{key} (empty)" if not value else key for key, value in values.items())
    return Change("secret", name, "updated" if there else "created", f"keys: {keys}")


def _has_secret(client: Client, name: str) -> bool:
    return any(info.secret.name == name for info in client.pps.list_secret().secret_info)


def _apply_pipeline(client: Client, name: str, spec: dict[str, Any], options: Options, tell: Callable[[str], object]) -> Change:
    text = json.dumps(spec)
    info = find_pipeline(client, name)
    if info is None:
        if not options.dry_run:
            client.pps.create_pipeline_v2(create_pipeline_request_json=text)
        return Change("pipeline", name, "created", f"image {spec['transform']['image']}")
    try:
        difference = difference_from(client, info, spec)
    except grpc.RpcError as error:
        # Of secrets that a dry run does not create.
        if not options.dry_run or "missing" not in (error.details() or ""):
            raise
        return Change("pipeline", name, "compared", f"once its secrets are there: {error.details()}")
    if not difference:
        return Change("pipeline", name, "unchanged")
    if not options.dry_run:
        if not options.now:
            _wait_for_jobs(client, info.pipeline, tell)
        client.pps.create_pipeline_v2(create_pipeline_request_json=text, update=True)
    return Change("pipeline", name, "updated", difference)


def find_pipeline(client: Client, name: str) -> pps.PipelineInfo | None:
    """A pipeline with its details, or None."""
    try:
        return client.pps.inspect_pipeline(pipeline=job_of(name, "").pipeline, details=True)
    except grpc.RpcError as error:
        if not is_code(error, grpc.StatusCode.NOT_FOUND):
            raise
        return None


def difference_from(client: Client, info: pps.PipelineInfo, spec: dict[str, Any]) -> str:
    """What an update to a specification would change of a pipeline, as a diff without the values of environment variables;
    "" if nothing. Nothing is changed.

    Raises:
        grpc.RpcError: pachd does not take the specification, or a secret that it names, or a key in it, is missing.
    """
    # What is compared is what pachd makes of a specification: with the cluster's defaults, in its own spelling.
    planned = client.pps.create_pipeline_v2(create_pipeline_request_json=json.dumps(spec), update=True, dry_run=True)
    has_start = "start" in spec["input"].get("cron", {})
    texts = (info.effective_spec_json, planned.effective_create_pipeline_request_json)
    old, new = (_comparable(text, with_start=has_start) for text in texts)
    _hide_variables(old, new)
    return "\n".join(difflib.unified_diff(_lines(old), _lines(new), "now", "then", n=1, lineterm=""))


def _comparable(spec_json: str, *, with_start: bool) -> dict[str, Any]:
    spec = json.loads(spec_json or "{}")
    if not with_start:
        # A cron input that names no start begins when pachd is told of it: that is no difference.
        spec.get("input", {}).get("cron", {}).pop("start", None)
    return {key: value for key, value in spec.items() if key not in _NOT_OF_THE_SPEC}


def _hide_variables(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Take the values out of both environments, which may hold a password that somebody wrote there; that they differ stays seen."""
    before, after = (spec.get("transform", {}).get("env", {}) for spec in (old, new))
    changed = {name for name in before.keys() & after.keys() if before[name] != after[name]}
    before.update(dict.fromkeys(before, "***"))
    after.update({name: "*** (another value)" if name in changed else "***" for name in after})


def _lines(spec: dict[str, Any]) -> list[str]:
    return json.dumps(spec, indent=2, sort_keys=True).splitlines()


def _wait_for_jobs(client: Client, pipeline: pps.Pipeline, tell: Callable[[str], object]) -> None:
    told = None
    while running := sorted(info.job.id for info in client.pps.list_job(pipeline=pipeline) if info.state in IN_PROGRESS):
        if running != told:
            tell(f"pipeline {pipeline.name}: waiting for {len(running)} running jobs, which an update would kill: {', '.join(running[:5])}")
            told = running
        time.sleep(_WAIT_SECONDS)
