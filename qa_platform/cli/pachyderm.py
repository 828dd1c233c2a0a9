"""`qa-platform pachyderm …`: creates the platform's resources on a cluster, and shows pipelines, jobs and logs without pachctl."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qa_platform.cli.arguments import NAME
from qa_platform.contract import PIPELINES
from qa_platform.errors import InputError
from qa_platform.text import escaped

if TYPE_CHECKING:
    from pachyderm_sdk.api import pps

# The indentation of lines of logs and differences.
_TAB = "\t"
_LONG = ("image", "reason")
_DIFF_STYLES = {"+": "green", "-": "red"}


@dataclass(frozen=True)
class PipelineState:
    """A pipeline, as ``qa-platform pachyderm status --json`` writes it. ``last_job`` and ``reason`` are empty if there is none."""

    pipeline: str
    state: str
    version: int
    running_jobs: int
    last_job: str
    image: str
    reason: str


@dataclass(frozen=True)
class JobState:
    """A job, as ``qa-platform pachyderm jobs --json`` writes it.

    Args:
        started: null until it starts.
        seconds: how long it took; null until it ends.
        datums_done: processed or skipped.
        reason: why it failed or cannot start; otherwise empty.
    """

    job: str
    pipeline: str
    state: str
    started: datetime | None
    seconds: float | None
    datums_done: int
    datums: int
    reason: str


@click.group("pachyderm")
def pachyderm_group() -> None:
    """The platform's repo, secrets, pipelines and jobs in Pachyderm."""


@pachyderm_group.command("apply")
@click.option("--registry", default="", type=NAME, help="Registry and owner of the images, such as docker.io/acme.")
@click.option("--tag", default="", type=NAME, help="Tag of the images.")
@click.option("--cron/--no-cron", default=None, help="Use the variant that lists the bucket itself, for a cluster without Dagster.")
@click.option("--workers", type=click.IntRange(min=1), help="Workers of question_answer, instead of QA_PIPELINES_WORKERS.")
@click.option(
    "--patch",
    type=click.Path(path_type=Path),
    help="JSON file with a merge patch for each pipeline's specification, instead of QA_PIPELINES_PATCH.",
)
@click.option("--dry-run", is_flag=True, help="Only show what would change.")
@click.option("--now", is_flag=True, help="Do not wait for running jobs. An update kills them; their runs launch them again.")
@click.option(
    "--wait-minutes", type=click.FloatRange(min=0), default=30, show_default=True, help="How long to wait for the jobs of one pipeline."
)
def apply_command(
    registry: str, tag: str, cron: bool | None, workers: int | None, patch: Path | None, dry_run: bool, now: bool, wait_minutes: float
) -> None:
    """Create or update the repo, the secrets and the pipelines.

    They are created on the pachd that PACHD_ADDRESS names. Nothing that is up to date is changed. A changed pipeline is updated once its
    running jobs have ended, since an update kills them. Jobs that cannot end, because their workers or programs do not start, are named
    and not waited for. Without --registry, --tag or --cron, pipelines keep their registry, tag and variant.

    The secrets' values come from PG_* and GCS_ACCESS, and the database's host from QA_PIPELINES_PG_HOST if that is set. Certificates and
    the service account may be files. All values are checked before anything is sent, and never shown. Without either host, an existing
    secret dbaccess stays as it is. A secret created by another tool, such as kubectl or Helm, is used as it is.

    The --patch file is a JSON object that maps pipeline names to merge patches (RFC 7396): of requests and limits, node selectors,
    tolerations and datum sets. It cannot change what the platform relies on. To have `qa-platform doctor` expect the same, set
    QA_PIPELINES_WORKERS and QA_PIPELINES_PATCH instead of the options.
    """
    from qa_platform.cli.terminal import console
    from qa_platform.provisioning.pipelines import Options, apply
    from qa_platform.settings import BucketSettings, PachydermSettings, PipelinesSettings, PostgresSettings

    sizes = PipelinesSettings()
    options = Options(
        registry=registry,
        tag=tag,
        cron=cron,
        workers=workers or sizes.workers,
        patch=patch or sizes.patch,
        dry_run=dry_run,
        now=now,
        wait_seconds=wait_minutes * 60,
    )
    changes = apply(
        PachydermSettings(),
        sizes.for_workers(PostgresSettings()),
        BucketSettings(),
        options,
        tell=lambda text: click.echo(escaped(text, keep=_TAB), err=True),
    )
    out = console()
    for change in changes:
        action = f"would be {change.action}" if dry_run and change.action != "unchanged" else change.action
        out.print(f"{change.kind} {change.name}: {action}", soft_wrap=True)
        for line in change.detail.splitlines():
            out.print(f"    {escaped(line, keep=_TAB)}", style=_DIFF_STYLES.get(line[:1], ""), soft_wrap=True)


@pachyderm_group.command("status")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def status_command(as_json: bool) -> None:
    """The pipelines: state, version, image, and running jobs."""
    from qa_platform.clients.pachyderm import job_of, pipeline_state, session, state_name
    from qa_platform.provisioning.pipelines import running_jobs
    from qa_platform.settings import PachydermSettings

    states = []
    with session(PachydermSettings(), "asking for the pipelines") as client:
        default = job_of("", "").pipeline.project
        infos = {info.pipeline.name: info for info in client.pps.list_pipeline(details=True, projects=[default])}
        if missing := [name for name in PIPELINES if name not in infos]:
            raise InputError(
                f"pachd has no pipeline {' and no '.join(missing)}", advice="`qa-platform pachyderm apply` creates what is missing"
            )
        for name in PIPELINES:
            info = infos[name]
            states.append(
                PipelineState(
                    pipeline=name,
                    state=pipeline_state(info),
                    version=info.version,
                    running_jobs=len(running_jobs(client, name)),
                    last_job=state_name(info.last_job_state) if info.last_job_state else "",
                    image=info.details.transform.image,
                    reason=info.reason,
                )
            )
    if as_json:
        _print_json(states)
    else:
        _print([asdict(state) for state in states])


@pachyderm_group.command("jobs")
@click.option("--pipeline", type=click.Choice(PIPELINES), help="Only jobs of this pipeline.")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="Jobs shown, newest first.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def jobs_command(pipeline: str | None, limit: int, as_json: bool) -> None:
    """The newest jobs of the pipelines.

    The two jobs of one batch have the same id; `qa-platform pachyderm logs` takes it.
    """
    from itertools import islice

    from qa_platform.clients.pachyderm import job_of, session
    from qa_platform.settings import PachydermSettings

    with session(PachydermSettings(), "asking for the jobs") as client:
        infos: list[pps.JobInfo] = []
        for name in (pipeline,) if pipeline else PIPELINES:
            infos += islice(client.pps.list_job(pipeline=job_of(name, "").pipeline), limit)
    infos.sort(key=lambda info: info.created, reverse=True)
    if as_json:
        _print_json([_job(info) for info in infos[:limit]])
    else:
        _print([_job_row(info) for info in infos[:limit]])


def _job(info: "pps.JobInfo") -> JobState:
    from qa_platform.clients.pachyderm import IN_PROGRESS, state_name
    from qa_platform.provisioning.stuck_jobs import RESTARTS_OF_A_STUCK_JOB, restarted

    # The SDK represents an unset time as the epoch, not None.
    has_started, has_ended = info.started.timestamp() > 0, info.finished.timestamp() > 0
    seconds = round((info.finished - info.started).total_seconds(), 1) if has_started and has_ended else None
    return JobState(
        job=info.job.id,
        pipeline=info.job.pipeline.name,
        state=state_name(info.state),
        started=info.started if has_started else None,
        seconds=seconds,
        datums_done=info.data_processed + info.data_skipped,
        datums=info.data_total,
        reason=restarted(info) if info.state in IN_PROGRESS and info.restart >= RESTARTS_OF_A_STUCK_JOB else info.reason,
    )


def _job_row(info: "pps.JobInfo") -> dict[str, str]:
    from qa_platform.cli.terminal import age

    job = _job(info)
    return {
        "job": job.job,
        "pipeline": job.pipeline,
        "state": job.state,
        "datums": f"{job.datums_done}/{job.datums}",
        "took": f"{job.seconds}s" if job.seconds is not None else "",
        "age": age(datetime.now(UTC) - info.created),
        "reason": job.reason,
    }


@pachyderm_group.command("logs")
@click.argument("job", type=NAME)
@click.option("--pipeline", type=click.Choice(PIPELINES), help="Only lines of this pipeline.")
def logs_command(job: str, pipeline: str | None) -> None:
    """The lines that the pipelines' programs wrote in JOB.

    Without Loki, Pachyderm keeps lines only while the pods that wrote them exist.
    """
    import grpc

    from qa_platform.clients.pachyderm import is_code, job_of, session, user_lines
    from qa_platform.settings import PachydermSettings

    known = False
    with session(PachydermSettings(), f"asking for the logs of job {job}") as client:
        for name in (pipeline,) if pipeline else PIPELINES:
            wanted = job_of(name, job)
            try:
                client.pps.inspect_job(job=wanted)
                known = True
                for line in user_lines(client.pps.get_logs(pipeline=wanted.pipeline, job=wanted)):
                    click.echo(f"{name} | {escaped(line, keep=_TAB)}")
            except grpc.RpcError as error:
                if is_code(error, grpc.StatusCode.NOT_FOUND):
                    continue
                if "no pods" not in (error.details() or ""):
                    raise
                click.echo(f"{name}: its pods are gone with their log lines; Loki would keep them", err=True)
    if not known:
        raise InputError(f"there is no job {job!r}", advice="`qa-platform pachyderm jobs` lists them")


@pachyderm_group.command("squash")
def squash_command() -> None:
    """Remove old commits of batches and ticks.

    Those whose files are done and that are older than QA_COMMITS_KEPT_DAYS. Dagster does this every night. Without Dagster, run it every
    day: the cron variant makes commits at every tick. The answers stay in PostgreSQL.
    """
    from qa_platform.batches.squash import squash_old
    from qa_platform.settings import PachydermSettings, PostgresSettings, WorkSettings

    before = datetime.now(UTC) - timedelta(days=WorkSettings().commits_kept_days)
    removed = 0
    while (squashed := squash_old(PachydermSettings(), PostgresSettings(), before)).removed:
        removed += squashed.removed
    click.echo(f"{removed} old commits were removed; {squashed.kept} are kept: in use, or Pachyderm needs them")
    if squashed.denied:
        raise InputError(f"Pachyderm denies permission to remove commits: {squashed.denied}", advice="docs/deploying.md, Roles")


def _print_json(values: Sequence[object]) -> None:
    from qa_platform.cli.json_output import echo_json

    for value in values:
        echo_json(value)


def _print(rows: Sequence[Mapping[str, object]]) -> None:
    """Print rows with the same keys as a table. Long values get their own lines."""
    from qa_platform.cli.terminal import console, one_line, table

    if not rows:
        click.echo("none", err=True)
        return
    out = console()
    columns = [key for key in rows[0] if key not in _LONG]
    cells = [[one_line(str(row[key])) for key in columns] for row in rows]
    headers = [column.replace("_", " ") for column in columns]
    head, *lines = table(headers, cells, width=out.width if out.is_terminal else None, flexible=columns.index("pipeline"))
    out.print(head, soft_wrap=True)
    for row, line in zip(rows, lines, strict=True):
        out.print(line, soft_wrap=True)
        for key in _LONG:
            if row.get(key):
                out.print(f"  {key}: {one_line(str(row[key]))}", style="yellow" if key == "reason" else "dim", soft_wrap=True)
