"""`qa-platform doctor`: whether everything that the platform needs is there and as it should be; else what is wrong, and how to mend it.

The parts (this installation, bucket, PostgreSQL, Dagster, Pachyderm) are examined side by side, each with a deadline. Within a part
one thing needs the one before: what cannot be looked at is reported as unknown. Nothing is changed anywhere. What is found says where
things are and as whom they are used, never a password, a token or a key.
"""

import enum
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qa_platform.contract import ANSWER_PIPELINE, INCOMING, LOAD_PIPELINE, QUESTIONS_REPO
from qa_platform.deadline import begin
from qa_platform.errors import InputError, QaPlatformError
from qa_platform.settings import BucketSettings, DagsterSettings, PachydermSettings, PostgresSettings, wrong_settings

if TYPE_CHECKING:
    import psycopg
    from pachyderm_sdk import Client
    from pachyderm_sdk.api import pps
    from rich.console import Console

    from qa_platform.pachyderm_apply import Options

# PostgreSQL is given ten seconds to let somebody in, and is then reported with its own words.
DEADLINE_SECONDS = 15.0
_BUCKET_SECONDS = 5
_DISTRIBUTION = "qa-platform"
# CreatePipelineV2, which compares specifications, came with it.
_OLDEST_PACHD = (2, 8)
# What the platform does with objects: it lists, reads, archives (a copy, then a deletion) and reports.
_BUCKET_PERMISSIONS = ("storage.objects.list", "storage.objects.get", "storage.objects.create", "storage.objects.delete")
_TABLES = ("question_answer", "question_answer_reject", "question_file")
_TABLE_PRIVILEGES = ("SELECT", "INSERT", "UPDATE", "DELETE")
_RELEASE = re.compile(r"v?(?P<version>\d+\.\d+(\.\d+)*\S*)")
_STYLES = {"ok": "green", "wrong": "bold red", "unknown": "yellow"}
_IN_THE_STACK = "on a laptop: qa-platform local run -- qa-platform doctor"


class State(enum.StrEnum):
    """``UNKNOWN``: not looked at, since something that it needs is wrong."""

    OK = "ok"
    WRONG = "wrong"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Finding:
    """What one check found. ``mend`` says, where something is wrong, what to do: a command, or a variable to be set."""

    name: str
    state: State
    detail: str
    mend: str = ""


class _Wrong(Exception):
    """Raised by a check whose followers within its part cannot be done."""

    def __init__(self, detail: str, mend: str) -> None:
        super().__init__(detail)
        self.detail = detail
        self.mend = mend


# A check in the making: what was found, in the order of the part's names.
_Found = Iterator[tuple[str, str]]


@dataclass(frozen=True)
class _Part:
    """Checks that depend on each other, by name. ``examine`` yields (detail, mend) for each; an empty mend says that it is well."""

    where: Callable[[], str]
    names: tuple[str, ...]
    examine: Callable[[], _Found]


def examine(deadline: float = DEADLINE_SECONDS) -> list[Finding]:
    """All findings, in the order in which things depend on each other; after ``deadline`` seconds what is not known yet is wrong."""
    parts = _parts()
    over = time.monotonic() + deadline
    running = [_begin(part) for part in parts]
    return [
        finding for part, (found, ended) in zip(parts, running, strict=True) for finding in _findings(part, found, ended, over, deadline)
    ]


def _begin(part: _Part) -> tuple[list[tuple[str, str]], Future[None]]:
    found: list[tuple[str, str]] = []

    def run() -> None:
        # One by one, so that what was found is kept where a later one fails.
        for result in part.examine():
            found.append(result)  # noqa: PERF402

    return found, begin(run, f"doctor-{part.names[0]}")


def _findings(part: _Part, found: list[tuple[str, str]], ended: Future[None], over: float, deadline: float) -> Iterator[Finding]:
    problem: tuple[str, str] | None = None
    try:
        ended.result(max(0.0, over - time.monotonic()))
    except TimeoutError:
        problem = (f"no answer within {deadline:.0f} s from {part.where()}", f"check that it is up, and the network to it; {_IN_THE_STACK}")
    except Exception as error:
        problem = _explained(error)
    # The thread may still be at it, and must not be followed any further.
    known = list(found)
    for name, (detail, mend) in zip(part.names, known, strict=False):
        yield Finding(name, State.WRONG if mend else State.OK, detail, mend)
    left = part.names[len(known) :]
    if left and problem:
        yield Finding(left[0], State.WRONG, *problem)
        left = left[1:]
    for name in left:
        yield Finding(name, State.UNKNOWN, f"not looked at: it needs {part.names[len(known)]}")


def _explained(error: Exception) -> tuple[str, str]:
    if isinstance(error, _Wrong):
        return error.detail, error.mend
    if message := wrong_settings(error):
        return message, "set the variable as docs/configuration.md describes it, or unset it"
    if isinstance(error, QaPlatformError):
        # The platform's messages end with what to do.
        detail, _, advice = str(error).rpartition("; ")
        return (detail, advice) if detail else (advice, "mend that, and look again: qa-platform doctor")
    if isinstance(error, ImportError):
        return f"the package {error.name} is not installed", f"pip install '{_DISTRIBUTION}[platform]'"
    # Its text is not known to be free of secrets.
    return f"an unexpected {type(error).__name__}", "report it, with the version that `qa-platform --version` shows"


def _parts() -> tuple[_Part, ...]:
    return (
        _Part(lambda: "this installation", ("Python", "packages"), _installation),
        _Part(lambda: f"the bucket {BucketSettings().storage_bucket}", ("bucket", "bucket permissions"), _bucket),
        _Part(lambda: _where(PostgresSettings()), ("PostgreSQL", "tables", "table privileges"), _postgres),
        _Part(lambda: "Dagster's storage", ("Dagster home", "Dagster storage"), _dagster),
        _Part(
            lambda: PachydermSettings().pachd_address,
            ("pachd", "repo questions", "secret dbaccess", "secret gcsaccess", f"pipeline {ANSWER_PIPELINE}", f"pipeline {LOAD_PIPELINE}"),
            _pachyderm,
        ),
    )


# This installation


def _installation() -> _Found:
    running = ".".join(map(str, sys.version_info[:3]))
    wanted = metadata.metadata(_DISTRIBUTION)["Requires-Python"]
    from packaging.specifiers import SpecifierSet

    fits = SpecifierSet(wanted).contains(running)
    yield f"{running} at {sys.executable}", "" if fits else f"make the environment anew with Python {wanted}: make setup PYTHON=python3.12"
    wrong = list(_wrong_packages())
    shown = ", ".join(f"{name} {metadata.version(name)}" for name in (_DISTRIBUTION, *_TOLD) if _is_installed(name))
    yield ("; ".join(detail for detail, _ in wrong), f"pip install {' '.join(mend for _, mend in wrong)}") if wrong else (shown, "")


_TOLD = ("dagster", "pachyderm-sdk", "google-cloud-storage", "psycopg", "openvino")


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _wrong_packages() -> Iterator[tuple[str, str]]:
    """What of this project's requirements does not fit, and what to install. Of extras, what is not installed is not asked for."""
    from packaging.requirements import Requirement

    seen = set()
    for line in metadata.requires(_DISTRIBUTION) or ():
        requirement = Requirement(line)
        plain = f"{requirement.name}{requirement.specifier}"
        optional = requirement.marker is not None and "extra" in str(requirement.marker)
        if plain in seen or requirement.name == _DISTRIBUTION:
            continue
        seen.add(plain)
        if not _is_installed(requirement.name):
            if not optional:
                yield f"{requirement.name} is not installed", shlex.quote(plain)
        elif not requirement.specifier.contains(metadata.version(requirement.name), prereleases=True):
            version = metadata.version(requirement.name)
            yield f"{requirement.name} is {version}, and must be {requirement.specifier}", shlex.quote(plain)


# The bucket


def _bucket() -> _Found:
    from google.api_core.exceptions import GoogleAPIError, NotFound
    from google.auth.exceptions import DefaultCredentialsError
    from google.cloud import storage

    from qa_platform.bucket import bucket_errors, open_bucket

    settings = BucketSettings()
    name, url = settings.storage_bucket, f"gs://{settings.storage_bucket}"
    listing: list[storage.Blob] | None = None
    try:
        with bucket_errors(f"looking into {url}"):
            bucket = open_bucket(storage.Client(project=settings.google_cloud_project), name)
            # Not `exists()`, which asks for a right that the platform does not need.
            listing = list(bucket.list_blobs(prefix=INCOMING, max_results=1, timeout=_BUCKET_SECONDS, retry=None))
            yield f"{url} can be listed; {'something' if listing else 'nothing'} lies under {INCOMING}", ""
            granted = bucket.test_iam_permissions(list(_BUCKET_PERMISSIONS), timeout=_BUCKET_SECONDS, retry=None)
    except QaPlatformError as error:
        cause = error.__cause__
        if isinstance(cause, NotFound) and listing is None:
            raise _Wrong(f"there is no bucket {url}", f"gcloud storage buckets create {shlex.quote(url)}, or set STORAGE_BUCKET") from error
        if isinstance(cause, DefaultCredentialsError):
            raise _Wrong(
                "Google's client finds no credentials",
                f"gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS to a key file; {_IN_THE_STACK}",
            ) from error
        if isinstance(error, InputError) and isinstance(cause, GoogleAPIError):
            raise _Wrong(str(error), _grant(url)) from error
        raise _Wrong(str(error), f"check the network to the bucket, and STORAGE_EMULATOR_HOST if it is set; {_IN_THE_STACK}") from error
    missing = [permission for permission in _BUCKET_PERMISSIONS if permission not in granted]
    if missing:
        yield f"missing: {', '.join(missing)}", _grant(url)
    else:
        yield "objects can be listed, read, written and deleted", ""


def _grant(url: str) -> str:
    role = "roles/storage.objectAdmin"
    return f"gcloud storage buckets add-iam-policy-binding {shlex.quote(url)} --member=serviceAccount:ACCOUNT --role={role}"


# PostgreSQL


def _postgres() -> _Found:
    from qa_platform.database import connect, only_row, transaction
    from qa_platform.loading import migrate

    settings = PostgresSettings()
    try:
        connection = connect(settings)
    except QaPlatformError as error:
        detail, _, advice = str(error).rpartition("; ")
        trial = f"try it: {_psql(settings)}"
        mend = f"{advice}; {trial}" if isinstance(error, InputError) else f"start it, or set PG_HOST and PG_PORT; {trial}; {_IN_THE_STACK}"
        raise _Wrong(detail or str(error), mend) from error
    with connection:
        with transaction(connection) as cursor:
            version = only_row(cursor.execute("SHOW server_version"))[0]
        yield f"{_where(settings)}, version {version}", ""
        _look_at_revision(connection, settings)
        revision = migrate.current(connection)
        if revision != migrate.HEAD:
            is_older = revision < migrate.HEAD
            raise _Wrong(
                f"the tables are at revision {revision or 'none'}, and this program needs {migrate.HEAD}",
                "qa-platform db upgrade" if is_older else f"this program is older than the tables: pip install --upgrade {_DISTRIBUTION}",
            )
        yield f"at revision {revision}", ""
        missing = _missing_privileges(connection)
    if missing:
        grant = f"GRANT {', '.join(_TABLE_PRIVILEGES)} ON {', '.join(_TABLES)} TO {_identifier(settings.user)}"
        yield f"{settings.user} lacks {', '.join(missing)}", f"as the owner of the tables: psql -c {shlex.quote(grant)}"
    else:
        yield f"{settings.user} may read and write all {len(_TABLES)} tables", ""


def _look_at_revision(connection: "psycopg.Connection", settings: PostgresSettings) -> None:
    """That the table of the revision may be read, without which nothing is known of the others."""
    from qa_platform.loading.migrate import VERSION_TABLE

    query = "SELECT to_regclass(%s) IS NULL OR has_table_privilege(to_regclass(%s), 'SELECT')"
    if connection.execute(query, [VERSION_TABLE, VERSION_TABLE]).fetchone() != (True,):
        grant = f"GRANT SELECT ON {VERSION_TABLE} TO {_identifier(settings.user)}"
        raise _Wrong(
            f"permission denied: {settings.user} may not read {VERSION_TABLE}", f"as the owner of the tables: psql -c {shlex.quote(grant)}"
        )


def _missing_privileges(connection: "psycopg.Connection") -> list[str]:
    query = """
        SELECT p || ' on ' || t FROM unnest(%s::text[]) AS t, unnest(%s::text[]) AS p WHERE NOT has_table_privilege(t, p) ORDER BY t, p
    """
    return [missing for (missing,) in connection.execute(query, [list(_TABLES), list(_TABLE_PRIVILEGES)])]


def _identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _where(settings: PostgresSettings) -> str:
    return f"{settings.user}@{settings.host}:{settings.port}/{settings.dbname}"


def _psql(settings: PostgresSettings) -> str:
    words = ("psql", "-h", settings.host, "-p", str(settings.port), "-U", settings.user, "-d", settings.dbname)
    return shlex.join(words)


# Dagster


def _dagster() -> _Found:
    settings = DagsterSettings()
    home = settings.dagster_home
    if "dagster_home" not in settings.model_fields_set:
        raise _Wrong("DAGSTER_HOME is not set", f"export DAGSTER_HOME=/an/absolute/folder, with a dagster.yaml in it; {_IN_THE_STACK}")
    instance = home / "dagster.yaml"
    if not instance.is_file():
        raise _Wrong(f"there is no {instance}", f"install -D dagster.yaml {shlex.quote(str(instance))}")
    if not os.access(home, os.W_OK):
        raise _Wrong(f"{home} cannot be written", f"chown {os.geteuid()} {shlex.quote(str(home))}")
    yield str(home), ""
    url = settings.dagster_pg_url.get_secret_value()
    if not url and "DAGSTER_PG_URL" in instance.read_text():
        yield f"DAGSTER_PG_URL is not set, and {instance} names it", "export DAGSTER_PG_URL=postgresql://USER:PASSWORD@HOST/DATABASE"
        return
    if url:
        yield _dagster_storage(url, "DAGSTER_PG_URL", "start it, or set DAGSTER_PG_URL to where it is")
    elif found := _storage_address(home):
        yield _dagster_storage(found, str(instance), f"start it, or correct the storage that {instance} names")
    else:
        yield f"{instance} names no PostgreSQL; nothing else was asked", ""


def _storage_address(home: Path) -> str:
    """The address of the PostgreSQL that an instance names, as a chart's `dagster.yaml` does in parts; "" where it names none."""
    # Only here: it takes a second or two to import. The storage itself is not opened, for that would make its tables.
    from dagster._config import process_config
    from dagster._core.instance.ref import InstanceRef
    from dagster_postgres.utils import pg_config, pg_url_from_config

    storage = InstanceRef.from_dir(str(home)).storage_data
    if storage is None or storage.module_name.partition(".")[0] != "dagster_postgres":
        return ""
    resolved = process_config(pg_config(), storage.config_dict)
    if not resolved.success or resolved.value is None:
        # Dagster's words on it may quote the values.
        raise _Wrong(f"the storage in {home / 'dagster.yaml'} cannot be resolved", "set the variables that it names: dagster instance info")
    return pg_url_from_config(resolved.value)


def _dagster_storage(url: str, source: str, mend: str) -> tuple[str, str]:
    import psycopg
    from psycopg import conninfo

    try:
        # Its own message on an address that it does not understand would quote the password.
        values = conninfo.conninfo_to_dict(url)
    except psycopg.Error:
        return f"{source} has no address of a PostgreSQL", "export DAGSTER_PG_URL=postgresql://USER:PASSWORD@HOST/DATABASE"
    where = f"{values.get('user', '')}@{values.get('host', '')}/{values.get('dbname', '')}"
    try:
        with psycopg.connect(url, connect_timeout=5) as connection:
            connection.execute("SELECT 1")
    except psycopg.Error as error:
        said, password = " ".join(str(error).split()), str(values.get("password") or "")
        return f"{where}: {said.replace(password, '***') if password else said}", mend
    return where, ""


# Pachyderm


def _pachyderm() -> _Found:
    from qa_platform.pachd import connect, pachd_errors

    settings = PachydermSettings()
    try:
        client = connect(settings)
    except InputError as error:
        raise _Wrong(str(error), "export PACHD_ADDRESS=grpc://HOST:30650") from error
    except OSError as error:
        raise _Wrong(f"PACH_CA_BUNDLE cannot be read: {error.strerror}", "set PACH_CA_BUNDLE to a PEM file, or unset it") from error
    try:
        with pachd_errors("looking at Pachyderm"):
            yield from _cluster(client, settings)
    finally:
        with suppress(Exception):
            client._channel.close()


def _cluster(client: "Client", settings: PachydermSettings) -> _Found:
    from qa_platform.pachyderm_apply import Options, find_pipeline, specifications

    yield _pachd(client, settings)
    deployed = {name: find_pipeline(client, name) for name in (ANSWER_PIPELINE, LOAD_PIPELINE)}
    options = _options_of(deployed)
    apply = _apply_command(options)
    repos = {info.repo.name for info in client.pfs.list_repo()}
    yield ("it is there", "") if QUESTIONS_REPO in repos else (f"there is no repo {QUESTIONS_REPO}", apply)
    specs = dict(specifications(options or Options(), PostgresSettings()))
    compared = {name: _compared(client, info, specs[name]) for name, info in deployed.items() if info}
    yield from _secrets(client, specs, compared, apply)
    for name, info in deployed.items():
        yield _pipeline(info, specs[name], compared.get(name), options) if info else (f"there is no pipeline {name}", apply)


def _pachd(client: "Client", settings: PachydermSettings) -> tuple[str, str]:
    import grpc

    address = settings.pachd_address
    try:
        version = client.get_version()
        # The version is told to everybody; repos only to those with a token, where pachd asks for one.
        list(client.pfs.list_repo())
    except (grpc.RpcError, ConnectionError) as error:
        code = error.code() if isinstance(error, grpc.RpcError) else grpc.StatusCode.UNAVAILABLE
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            given = (
                "does not accept PACH_TOKEN" if settings.pach_token.get_secret_value() else "asks for a token, and PACH_TOKEN is not set"
            )
            raise _Wrong(f"{address} {given}", 'export PACH_TOKEN="$(pachctl auth get-robot-token qa-platform)"') from None
        said = error.details() if isinstance(error, grpc.RpcError) else str(error)
        raise _Wrong(
            f"{address} cannot be reached ({code.name}: {said})",
            f"start it (kubectl get pods -l app=pachd), or set PACHD_ADDRESS; {_IN_THE_STACK}",
        ) from None
    text = f"{address}, version {version.major}.{version.minor}.{version.micro}{version.additional}"
    if (version.major, version.minor) < _OLDEST_PACHD:
        return (
            f"{text} is too old",
            f"upgrade Pachyderm to {'.'.join(map(str, _OLDEST_PACHD))} or later: helm upgrade pachyderm pachyderm/pachyderm",
        )
    return text, ""


def _compared(client: "Client", info: "pps.PipelineInfo", spec: dict[str, Any]) -> tuple[str, str]:
    """What is different in a specification, as a diff, and why pachd would not take it."""
    import grpc

    from qa_platform.pachyderm_apply import difference_from

    try:
        return difference_from(client, info, spec), ""
    except grpc.RpcError as error:
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            raise
        return "", error.details() or error.code().name


def _secrets(client: "Client", specs: dict[str, dict[str, Any]], compared: dict[str, tuple[str, str]], apply: str) -> _Found:
    from qa_platform.pachyderm_secrets import BUCKET_SECRET, DATABASE_SECRET

    there = {info.secret.name: info for info in client.pps.list_secret().secret_info}
    for name, variables in ((DATABASE_SECRET, "PG_HOST, PG_USER, PG_PASSWORD, PG_DBNAME"), (BUCKET_SECRET, "GCS_ACCESS")):
        users = [pipeline for pipeline, spec in specs.items() if any(used["name"] == name for used in spec["transform"].get("secrets", ()))]
        # pachd tells nobody what is in a secret, but refuses a pipeline that names a key which is not.
        refused = next((why for pipeline in users if (why := compared.get(pipeline, ("", ""))[1]) and f'"{name}"' in why), "")
        if name not in there and not users:
            yield "not there; only the cron variant needs it", ""
        elif name not in there:
            yield f"there is no secret {name}, which {' and '.join(users)} needs", f"set {variables}, then: {apply}"
        elif refused:
            yield refused, f"set {variables}, then: {apply}"
        else:
            yield (
                f"written {there[name].creation_timestamp.astimezone(UTC):%Y-%m-%d %H:%M} UTC; pachd misses none of its keys",
                "",
            )


def _pipeline(
    info: "pps.PipelineInfo", spec: dict[str, Any], compared: tuple[str, str] | None, options: "Options | None"
) -> tuple[str, str]:
    """Image, specification and state, the first that is wrong."""
    from pachyderm_sdk.api import pps

    name, image = info.pipeline.name, info.details.transform.image
    base, _, tag = image.rpartition(":")
    own_base = spec["transform"]["image"].rpartition(":")[0]
    difference, refused = compared or ("", "")
    apply, ours = _apply_command(options), metadata.version(_DISTRIBUTION)
    release = _RELEASE.fullmatch(tag)
    if base != own_base:
        return f"its image {image} is not this project's, which is called {own_base.rpartition('/')[2]}", apply
    if release and release["version"] != ours:
        right = _apply_command(replace(options, tag=tag.replace(release["version"], ours))) if options else apply
        return f"its image {image} is not of this version, {ours}", right
    if refused:
        return f"pachd would not take its specification: {refused}", apply
    if difference:
        changed = [line for line in difference.splitlines() if line[:1] in "+-" and line[:3] not in ("---", "+++")]
        return f"its specification is not this version's: {'; '.join(' '.join(line.split()) for line in changed[:4])}", apply
    # The SDK leaves numbers where the protocol has enums.
    state = pps.PipelineState(info.state)
    text = f"{str(state.name).removeprefix('PIPELINE_').lower()}, version {info.version}, image {image}"
    reason = f": {info.reason}" if info.reason else ""
    if info.stopped or state == pps.PipelineState.PIPELINE_PAUSED:
        return f"{text}: it is stopped", f"pachctl start pipeline {name}"
    if state in (pps.PipelineState.PIPELINE_CRASHING, pps.PipelineState.PIPELINE_FAILURE):
        return (
            f"{text}{reason}",
            f"kubectl describe pods -l pipelineName={name} says why its workers do not start; mend that, then: {apply}",
        )
    return text, ""


def _options_of(deployed: dict[str, "pps.PipelineInfo | None"]) -> "Options | None":
    """How what is deployed was applied: registry and tag from the images, the variant from the input. None where nothing is ours."""
    from qa_platform.pachyderm_apply import Options, specifications

    own = {name: spec["transform"]["image"].rpartition(":")[0] for name, spec in specifications(Options(), PostgresSettings())}
    for name, info in deployed.items():
        base, _, tag = info.details.transform.image.rpartition(":") if info else ("", "", "")
        registry, _, image = base.rpartition("/")
        if info and image == own[name]:
            answering = deployed[ANSWER_PIPELINE]
            return Options(registry=registry, tag=tag, cron=bool(answering and answering.details.input.cron.name))
    return None


def _apply_command(options: "Options | None") -> str:
    words = ["qa-platform", "pachyderm", "apply"]
    if options and options.registry:
        words += ["--registry", options.registry]
    if options and options.tag not in ("", "latest"):
        words += ["--tag", options.tag]
    return shlex.join(words + (["--cron"] if options and options.cron else []))


def show(findings: Sequence[Finding], out: "Console") -> None:
    """Print what was found: a line each, and below what is wrong how to mend it. A terminal wraps them where words end."""
    from rich.table import Table
    from rich.text import Text

    from qa_platform.terminal import shown

    rows: list[tuple[Text, str]] = []
    for finding in findings:
        rows.append((Text(finding.state, _STYLES[finding.state]), shown(f"{finding.name}: {finding.detail}")))
        if finding.mend:
            rows.append((Text(""), f"mend: {shown(finding.mend)}"))
    if out.is_terminal:
        grid = Table.grid(padding=(0, 2, 0, 0))
        for row in rows:
            grid.add_row(*row)
        out.print(grid)
    else:
        for state, text in rows:
            out.print(f"{state.plain:9}{text}", soft_wrap=True)
    wrong = [finding.name for finding in findings if finding.state is State.WRONG]
    out.print(f"wrong: {', '.join(wrong)}" if wrong else "all is well", style=_STYLES[State.WRONG if wrong else State.OK], soft_wrap=True)
