"""`qa-platform pachyderm …`: bring the cluster to what the platform needs, and look at it without pachctl."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from qa_platform.contract import ANSWER_PIPELINE, LOAD_PIPELINE
from qa_platform.errors import InputError

if TYPE_CHECKING:
    from pachyderm_sdk.api import pps

_PIPELINES = (ANSWER_PIPELINE, LOAD_PIPELINE)
_LONG = ("image", "reason")
_DIFF_STYLES = {"+": "green", "-": "red"}


@click.group("pachyderm")
def pachyderm_group() -> None:
    """What the platform has in Pachyderm."""


@pachyderm_group.command("apply")
@click.option("--registry", default="", help="Registry and owner of the images, such as docker.io/acme.")
@click.option("--tag", default="", help="Tag of the images.")
@click.option("--cron", is_flag=True, help="The pipeline that looks into the bucket by itself, for a cluster without Dagster.")
@click.option("--dry-run", is_flag=True, help="Only show what would change.")
@click.option("--now", is_flag=True, help="Do not wait for running jobs. An update kills them; their runs launch them again.")
def apply_command(registry: str, tag: str, cron: bool, dry_run: bool, now: bool) -> None:
    """Create or update repo, secrets and pipelines.

    On the pachd that PACHD_ADDRESS names. What is as it should be stays as it is; a changed pipeline is updated when its running jobs
    have ended, since an update kills them.

    The secrets' values come from PG_* and GCS_ACCESS, where certificates and the service account may be files. They are
    checked before anything is sent, and never shown.
    """
    from qa_platform.pachyderm_apply import Options, apply
    from qa_platform.settings import BucketSettings, PachydermSettings, PostgresSettings
    from qa_platform.terminal import console, escaped

    options = Options(registry=registry, tag=tag, cron=cron, dry_run=dry_run, now=now)
    changes = apply(
        PachydermSettings(), PostgresSettings(), BucketSettings(), options, tell=lambda text: click.echo(escaped(text), err=True)
    )
    out = console()
    for change in changes:
        action = f"would be {change.action}" if dry_run and change.action != "unchanged" else change.action
        out.print(f"{change.kind} {change.name}: {action}", soft_wrap=True)
        for line in change.detail.splitlines():
            out.print(f"    {escaped(line)}", style=_DIFF_STYLES.get(line[:1], ""), soft_wrap=True)


@pachyderm_group.command("status")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def status_command(as_json: bool) -> None:
    """The pipelines: state, image, and what they are at."""
    from pachyderm_sdk.api import pps

    from qa_platform.following import IN_PROGRESS, state_name
    from qa_platform.pachd import session
    from qa_platform.settings import PachydermSettings

    rows = []
    with session(PachydermSettings(), "asking for the pipelines") as client:
        infos = {info.pipeline.name: info for info in client.pps.list_pipeline(details=True)}
        if missing := [name for name in _PIPELINES if name not in infos]:
            raise InputError(f"pachd has no pipeline {' and no '.join(missing)}; `qa-platform pachyderm apply` creates what is missing")
        for name in _PIPELINES:
            info = infos[name]
            rows.append(
                {
                    "pipeline": name,
                    "state": pps.PipelineState(info.state).name.removeprefix("PIPELINE_").lower(),
                    "version": info.version,
                    "running_jobs": sum(job.state in IN_PROGRESS for job in client.pps.list_job(pipeline=info.pipeline)),
                    "last_job": state_name(info.last_job_state) if info.last_job_state else "",
                    "image": info.details.transform.image,
                    "reason": info.reason,
                }
            )
    _print(rows, flexible="pipeline", as_json=as_json)


@pachyderm_group.command("jobs")
@click.option("--pipeline", type=click.Choice(_PIPELINES), help="Of this pipeline only.")
@click.option("--limit", default=20, show_default=True, help="Jobs shown, newest first.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def jobs_command(pipeline: str | None, limit: int, as_json: bool) -> None:
    """The newest jobs of the pipelines.

    The two jobs of one batch have the same id; `qa-platform pachyderm logs` takes it.
    """
    from itertools import islice

    from qa_platform.following import job_of
    from qa_platform.pachd import session
    from qa_platform.settings import PachydermSettings

    with session(PachydermSettings(), "asking for the jobs") as client:
        found: list[pps.JobInfo] = []
        for name in (pipeline,) if pipeline else _PIPELINES:
            found += islice(client.pps.list_job(pipeline=job_of(name, "").pipeline), limit)
    found.sort(key=lambda info: info.created, reverse=True)
    _print([_job_row(info, as_json=as_json) for info in found[:limit]], flexible="pipeline", as_json=as_json)


def _job_row(info: "pps.JobInfo", *, as_json: bool) -> dict[str, str | int | float | None]:
    from datetime import UTC, datetime

    from qa_platform.following import state_name
    from qa_platform.terminal import age

    # A time that is not set is the epoch to the SDK, not None.
    begun, ended = info.started.timestamp() > 0, info.finished.timestamp() > 0
    seconds = round((info.finished - info.started).total_seconds(), 1) if begun and ended else None
    row: dict[str, str | int | float | None] = {"job": info.job.id, "pipeline": info.job.pipeline.name, "state": state_name(info.state)}
    done = info.data_processed + info.data_skipped
    if as_json:
        started = info.started.isoformat() if begun else None
        return {**row, "started": started, "seconds": seconds, "datums_done": done, "datums": info.data_total, "reason": info.reason}
    passed = age(datetime.now(UTC) - info.created)
    return {
        **row,
        "datums": f"{done}/{info.data_total}",
        "took": f"{seconds}s" if seconds is not None else "",
        "age": passed,
        "reason": info.reason,
    }


@pachyderm_group.command("logs")
@click.argument("job")
@click.option("--pipeline", type=click.Choice(_PIPELINES), help="Of this pipeline only.")
def logs_command(job: str, pipeline: str | None) -> None:
    """What the programs of the pipelines wrote in JOB."""
    import grpc

    from qa_platform.following import job_of, user_lines
    from qa_platform.pachd import is_code, session
    from qa_platform.settings import PachydermSettings
    from qa_platform.terminal import escaped

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
                click.echo(f"{name} | {escaped(line)}")
    if not known:
        raise InputError(f"no job {job!r}; `qa-platform pachyderm jobs` lists them")


def _print(rows: Sequence[Mapping[str, str | int | float | None]], *, flexible: str, as_json: bool) -> None:
    """Rows of the same keys, as a table or as JSON, one object per line. What is long has a line of its own in the table."""
    if as_json:
        for row in rows:
            click.echo(json.dumps(row, ensure_ascii=False))
        return
    from qa_platform.terminal import console, shown, table

    if not rows:
        click.echo("none", err=True)
        return
    out = console()
    columns = [key for key in rows[0] if key not in _LONG]
    cells = [[shown(str(row[key])) for key in columns] for row in rows]
    headers = [column.replace("_", " ") for column in columns]
    head, *lines = table(headers, cells, width=out.width if out.is_terminal else None, flexible=columns.index(flexible))
    out.print(head, soft_wrap=True)
    for row, line in zip(rows, lines, strict=True):
        out.print(line, soft_wrap=True)
        for key in _LONG:
            if row.get(key):
                out.print(f"  {key}: {shown(str(row[key]))}", style="yellow" if key == "reason" else "dim", soft_wrap=True)
