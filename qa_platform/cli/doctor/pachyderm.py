"""Pachyderm: pachd and its version, and the platform's roles, repo, secrets and pipelines there."""

import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from typing import TYPE_CHECKING, Any

from qa_platform.cli.doctor import workers
from qa_platform.cli.doctor.findings import DISTRIBUTION, IN_THE_STACK, Part, Result, Wrong, ok, unknown, wrong
from qa_platform.contract import ANSWER_PIPELINE, EMBEDDED_PACHD, LOAD_PIPELINE, PIPELINES, QUESTIONS_REPO
from qa_platform.errors import InputError
from qa_platform.settings import BucketSettings, PachydermSettings, PipelinesSettings, PostgresSettings

if TYPE_CHECKING:
    from pachyderm_sdk import Client
    from pachyderm_sdk.api import pps

    from qa_platform.provisioning.pipelines import Options

# The first version with CreatePipelineV2, which compares specifications.
_OLDEST_VERSION = (2, 8)
_SUPPORTED_VERSION = (2, 12)
_RELEASE_TAG = re.compile(r"v?(?P<version>\d+\.\d+(\.\d+)*\S*)")
_SHOWN_DIFFERENCES = 4
_NAMES = (
    *("pachd", "Pachyderm roles", f"repo {QUESTIONS_REPO}", "secret dbaccess", "secret gcsaccess"),
    *(f"pipeline {ANSWER_PIPELINE}", f"pipeline {LOAD_PIPELINE}", "worker memory", "worker database"),
)


def _examine() -> Iterator[Result]:
    from qa_platform.clients.pachyderm import connect, pachd_errors

    settings = PachydermSettings()
    try:
        client = connect(settings)
    except InputError as error:
        raise Wrong(error.cause, error.advice) from error
    try:
        with pachd_errors("looking at Pachyderm"):
            yield from _cluster(client, settings)
    finally:
        with suppress(Exception):
            client._channel.close()


def _cluster(client: "Client", settings: PachydermSettings) -> Iterator[Result]:
    from qa_platform.provisioning.pipelines import Options, deployed_options, find_pipeline, specifications

    yield _pachd(client, settings)
    roles, lacking = _roles(client)
    yield roles
    deployed = {name: find_pipeline(client, name) for name in PIPELINES}
    options = deployed_options(deployed.values())
    # The options for the `apply` commands in the fixes. The embedded pachd needs no images.
    is_embedded = client.get_version().additional == EMBEDDED_PACHD
    named = options or (None if is_embedded else Options(registry="REGISTRY", tag="TAG"))
    yield _repo(client, fix=_apply_command(named))
    sizes = PipelinesSettings()
    wanted = replace(options or Options(), workers=sizes.workers, patch=sizes.patch)
    specs = dict(specifications(wanted, PostgresSettings(), bucket=BucketSettings()))
    yield from _secrets(client, specs, lacking, fix=_apply_command(named))
    for name, info in deployed.items():
        yield _pipeline(client, name, info, specs[name], options=named)
    yield workers.memory(deployed[ANSWER_PIPELINE])
    yield workers.reach(client)


def _pachd(client: "Client", settings: PachydermSettings) -> Result:
    import grpc

    address = settings.pachd_address
    try:
        version = client.get_version()
        # Reading the version needs no token. Listing repos does, if authentication is on.
        list(client.pfs.list_repo())
    except grpc.RpcError as error:
        code = error.code()
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            refused = settings.pach_token.get_secret_value()
            reason = "does not accept PACH_TOKEN" if refused else "asks for a token, and PACH_TOKEN is not set"
            raise Wrong(f"{address} {reason}", 'export PACH_TOKEN="$(pachctl auth get-robot-token --quiet qa-platform)"') from None
        raise Wrong(
            f"{address} cannot be reached ({code.name}: {error.details()})",
            f"start it (kubectl get pods -l app=pachd), or set PACHD_ADDRESS; {IN_THE_STACK}",
        ) from None
    text = f"{address}, version {version.major}.{version.minor}.{version.micro}{version.additional}"
    supported = ".".join(map(str, (*_SUPPORTED_VERSION, "x")))
    if (version.major, version.minor) < _OLDEST_VERSION:
        return wrong(f"{text} is too old", f"upgrade Pachyderm to {supported}: helm upgrade pachyderm pachyderm/pachyderm")
    is_supported = (version.major, version.minor) == _SUPPORTED_VERSION
    return ok(text if is_supported else f"{text}; only {supported} is supported and tested")


def _roles(client: "Client") -> tuple[Result, set[str]]:
    """Whether the token's user has every role that the platform needs, and the missing roles."""
    from qa_platform.provisioning.roles import ROLES, grant_commands, lacking_roles

    lack = lacking_roles(client)
    if lack is None:
        return ok("authentication is off: everybody may do everything"), set()
    user, lacking = lack
    if not lacking:
        return ok(f"{user} has every role that the platform needs"), set()
    missing = ", ".join(f"{role.name} on the {role.where} ({role.purpose})" for role in ROLES if role.name in lacking)
    fix = f"as an administrator: {grant_commands(user, lacking)}; this replaces its other roles there"
    return wrong(f"{user} lacks {missing}", fix), lacking


def _repo(client: "Client", *, fix: str) -> Result:
    from pachyderm_sdk.api import pfs

    # Not `list_repo`, which omits repos that this user may not see.
    exists = client.pfs.repo_exists(repo=pfs.Repo.from_uri(QUESTIONS_REPO))
    return ok("it exists") if exists else wrong(f"there is no repo {QUESTIONS_REPO}", fix)


def _secrets(client: "Client", specs: dict[str, dict[str, Any]], lacking: set[str], *, fix: str) -> Iterator[Result]:
    from qa_platform.provisioning.roles import SECRET_ADMIN
    from qa_platform.provisioning.secrets import BUCKET_SECRET, DATABASE_SECRET, described, find_secret

    for name, variables in ((DATABASE_SECRET, "PG_HOST, PG_USER, PG_PASSWORD, PG_DBNAME"), (BUCKET_SECRET, "GCS_ACCESS")):
        users = [pipeline for pipeline, spec in specs.items() if any(used["name"] == name for used in spec["transform"].get("secrets", ()))]
        if SECRET_ADMIN in lacking:
            yield unknown(f"not permitted to look for it: {SECRET_ADMIN} is missing")
        elif secret := find_secret(client, name):
            yield ok(described(name, secret))
        elif users:
            yield wrong(f"there is no secret {name}, which {' and '.join(users)} needs", f"set {variables}, then: {fix}")
        else:
            yield ok("it does not exist; only the cron variant needs it")


def _pipeline(
    client: "Client",
    name: str,
    info: "pps.PipelineInfo | None",
    spec: dict[str, Any],
    *,
    options: "Options | None",
) -> Result:
    """The first problem with the image, the specification or the state."""
    apply = _apply_command(options)
    if info is None:
        return wrong(f"there is no pipeline {name}", apply)
    return _image(info, spec, options) or _specification(client, info, spec, fix=apply) or _workers(client, info, fix=apply)


def _image(info: "pps.PipelineInfo", spec: dict[str, Any], options: "Options | None") -> Result | None:
    """What is wrong with a pipeline's image, or None."""
    image, version = info.details.transform.image, metadata.version(DISTRIBUTION)
    base, _, tag = image.rpartition(":")
    own_base = spec["transform"]["image"].rpartition(":")[0]
    release = _RELEASE_TAG.fullmatch(tag)
    if base != own_base:
        return wrong(f"its image {image} is not this project's image {own_base.rpartition('/')[2]}", _apply_command(options))
    if release and release["version"] != version:
        right = replace(options, tag=tag.replace(release["version"], version)) if options else options
        return wrong(f"its image {image} is not of this version ({version})", _apply_command(right))
    return None


def _specification(client: "Client", info: "pps.PipelineInfo", spec: dict[str, Any], *, fix: str) -> Result | None:
    """How a pipeline's specification differs, or why pachd refuses the new one; else None."""
    import grpc

    from qa_platform.provisioning.pipelines import difference_from

    try:
        difference = difference_from(client, info, spec)
    except grpc.RpcError as error:
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            raise
        return wrong(f"pachd refuses its specification: {error.details() or error.code().name}", fix)
    if not difference:
        return None
    changed = [line for line in difference.splitlines() if line[:1] in "+-" and line[:3] not in ("---", "+++")]
    lines = "; ".join(" ".join(line.split()) for line in changed[:_SHOWN_DIFFERENCES])
    return wrong(f"its specification is not this version's: {lines}", fix)


def _workers(client: "Client", info: "pps.PipelineInfo", *, fix: str) -> Result:
    """Whether a pipeline works, or why not."""
    from pachyderm_sdk.api import pps

    from qa_platform.clients.pachyderm import NOT_STARTING, pipeline_state
    from qa_platform.provisioning.stuck_jobs import restarted

    name = info.pipeline.name
    text = f"{pipeline_state(info)}, version {info.version}, image {info.details.transform.image}"
    if info.stopped or info.state == pps.PipelineState.PIPELINE_PAUSED:
        return wrong(f"{text}: it is stopped", f"pachctl start pipeline {name}")
    if info.state == pps.PipelineState.PIPELINE_FAILURE:
        return wrong(f"{text}: {info.reason or 'no reason given'}", f"fix that, then: {fix} (only an update starts it again)")
    if info.state in NOT_STARTING:
        reason = f": {info.reason}" if info.reason else ""
        return wrong(
            f"{text}{reason}", f"kubectl describe pods -l pipelineName={name} says why its workers do not start; fix that, then: {fix}"
        )
    if job := _job_that_does_not_start(client, name):
        return wrong(
            f"{text}: job {job.job.id}: {restarted(job)}", f"qa-platform pachyderm logs {job.job.id} says why; fix that, then: {fix}"
        )
    return ok(text)


def _job_that_does_not_start(client: "Client", name: str) -> "pps.JobInfo | None":
    import grpc

    from qa_platform.provisioning.pipelines import running_jobs
    from qa_platform.provisioning.stuck_jobs import RESTARTS_OF_A_STUCK_JOB

    try:
        # A job that has processed something did start eventually.
        return next((job for job in running_jobs(client, name) if job.restart >= RESTARTS_OF_A_STUCK_JOB and not job.data_processed), None)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.PERMISSION_DENIED:
            raise
        return None


def _apply_command(options: "Options | None") -> str:
    words = ["qa-platform", "pachyderm", "apply"]
    if options and options.registry:
        words += ["--registry", options.registry]
    if options and options.tag not in ("", "latest"):
        words += ["--tag", options.tag]
    return shlex.join(words + (["--cron"] if options and options.cron else []))


PART = Part(_NAMES, _examine, lambda: PachydermSettings().pachd_address)
