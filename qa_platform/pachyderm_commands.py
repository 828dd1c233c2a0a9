"""`qa-platform pachyderm …`: bring the cluster to what the platform needs, and look at it without pachctl."""

import sys
from typing import TYPE_CHECKING

import click

from qa_platform.contract import ANSWER_PIPELINE, LOAD_PIPELINE
from qa_platform.errors import InputError

if TYPE_CHECKING:
    from pachyderm_sdk.api import pps
    from rich.table import Table

_PIPELINES = (ANSWER_PIPELINE, LOAD_PIPELINE)


@click.group("pachyderm")
def pachyderm_group() -> None:
    """Pachyderm: what the platform has there."""


@pachyderm_group.command("apply")
@click.option("--registry", default="", help="Registry and owner of the images, such as docker.io/acme.")
@click.option("--tag", default="", help="Tag of the images.")
@click.option("--cron", is_flag=True, help="The pipeline that looks into the bucket by itself, for a cluster without Dagster.")
@click.option("--dry-run", is_flag=True, help="Only show what would change.")
@click.option("--now", is_flag=True, help="Do not wait for running jobs. An update kills them; their runs launch them again.")
def apply_command(registry: str, tag: str, cron: bool, dry_run: bool, now: bool) -> None:
    """Create or update the repo, the secrets and the pipelines on the pachd that PACHD_ADDRESS names.

    The secrets' values come from PG_* and GCS_ACCESS, where certificates and the service account may be files. They are
    checked before anything is sent, and never shown.
    """
    from qa_platform.pachyderm_apply import Options, apply
    from qa_platform.settings import BucketSettings, PachydermSettings, PostgresSettings

    options = Options(registry=registry, tag=tag, cron=cron, dry_run=dry_run, now=now)
    for change in apply(PachydermSettings(), PostgresSettings(), BucketSettings(), options, tell=lambda text: click.echo(text, err=True)):
        action = f"would be {change.action}" if dry_run and change.action != "unchanged" else change.action
        click.echo(f"{change.kind} {change.name}: {action}")
        for line in change.detail.splitlines():
            click.echo(f"    {line}")


@pachyderm_group.command("status")
def status_command() -> None:
    """The pipelines: their states, images, and what they are at."""
    from pachyderm_sdk.api import pps

    from qa_platform.following import IN_PROGRESS, state_name
    from qa_platform.pachd import session
    from qa_platform.settings import PachydermSettings

    table = _table("pipeline", "state", "version", "running jobs", "last job", "image", "reason")
    with session(PachydermSettings(), "asking for the pipelines") as client:
        infos = {info.pipeline.name: info for info in client.pps.list_pipeline(details=True)}
        if missing := [name for name in _PIPELINES if name not in infos]:
            raise InputError(f"pachd has no pipeline {' and no '.join(missing)}; `qa-platform pachyderm apply` creates what is missing")
        for name in _PIPELINES:
            info = infos[name]
            running = sum(job.state in IN_PROGRESS for job in client.pps.list_job(pipeline=info.pipeline))
            state = pps.PipelineState(info.state).name.removeprefix("PIPELINE_").lower()
            last = state_name(info.last_job_state) if info.last_job_state else ""
            table.add_row(name, state, str(info.version), str(running), last, info.details.transform.image, info.reason)
    _print(table)


@pachyderm_group.command("jobs")
@click.option("--pipeline", type=click.Choice(_PIPELINES), help="Of this pipeline only.")
@click.option("--limit", default=20, show_default=True, help="Jobs shown, newest first.")
def jobs_command(pipeline: str | None, limit: int) -> None:
    """The newest jobs of the pipelines."""
    from itertools import islice

    from qa_platform.following import job_of, state_name
    from qa_platform.pachd import session
    from qa_platform.settings import PachydermSettings

    table = _table("job", "pipeline", "state", "started", "seconds", "datums", "reason")
    with session(PachydermSettings(), "asking for the jobs") as client:
        found: list[pps.JobInfo] = []
        for name in (pipeline,) if pipeline else _PIPELINES:
            found += islice(client.pps.list_job(pipeline=job_of(name, "").pipeline), limit)
        for info in sorted(found, key=lambda info: info.created, reverse=True)[:limit]:
            begun, ended = info.started.timestamp(), info.finished.timestamp()
            table.add_row(
                info.job.id,
                info.job.pipeline.name,
                state_name(info.state),
                f"{info.started:%Y-%m-%d %H:%M:%S}" if begun > 0 else "",
                f"{ended - begun:.1f}" if ended > 0 and begun > 0 else "",
                f"{info.data_processed + info.data_skipped} of {info.data_total}",
                info.reason,
            )
    _print(table)


@pachyderm_group.command("logs")
@click.argument("job")
@click.option("--pipeline", type=click.Choice(_PIPELINES), help="Of this pipeline only.")
def logs_command(job: str, pipeline: str | None) -> None:
    """What the programs of the pipelines wrote in JOB."""
    import grpc

    from qa_platform.following import job_of, user_lines
    from qa_platform.pachd import is_code, session
    from qa_platform.settings import PachydermSettings

    known = False
    with session(PachydermSettings(), f"asking for the logs of job {job}") as client:
        for name in (pipeline,) if pipeline else _PIPELINES:
            wanted = job_of(name, job)
            try:
                client.pps.inspect_job(job=wanted)
            except grpc.RpcError as error:
                if not is_code(error, grpc.StatusCode.NOT_FOUND):
                    raise
                continue
            known = True
            for line in user_lines(client.pps.get_logs(pipeline=wanted.pipeline, job=wanted)):
                click.echo(f"{name} | {line}")
    if not known:
        raise InputError(f"no job {job!r}; `qa-platform pachyderm jobs` lists them")


def _table(*headers: str) -> "Table":
    from rich.table import Table

    return Table(*headers, box=None, pad_edge=False)


def _print(table: "Table") -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 200, markup=False).print(table)
