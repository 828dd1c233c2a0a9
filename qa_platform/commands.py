"""The commands that work on files: `upload`, `status`, `answers`, `retry`, and `db upgrade`.

Each connects to whatever the environment names: the embedded stack inside ``qa-platform local run``, or a deployment.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qa_platform.contract import INCOMING, LOAD_PIPELINE, file_id
from qa_platform.errors import InputError
from qa_platform.pachyderm_commands import pachyderm_group

if TYPE_CHECKING:
    from google.cloud import storage
    from rich.table import Table

    from qa_platform.bookkeeping import FileRecord


def _bucket() -> "storage.Bucket":
    from google.cloud import storage

    from qa_platform.bucket import open_bucket
    from qa_platform.settings import BucketSettings

    settings = BucketSettings()
    return open_bucket(storage.Client(project=settings.google_cloud_project), settings.storage_bucket)


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--as", "name", help="Name in the bucket, instead of the file's own. For one file only.")
def upload(files: tuple[Path, ...], name: str | None) -> None:
    """Put CSVs of questions into the bucket, where the platform finds them."""
    from qa_platform import bucket
    from qa_platform.settings import WorkSettings

    if name and len(files) > 1:
        raise click.UsageError("--as names one file, and there are several")
    opened, suffixes = _bucket(), WorkSettings().suffixes
    for path in files:
        target = name or path.name
        if not bucket.is_question_file(INCOMING + target, suffixes):
            raise InputError(f"{target}: the platform answers files that end in {', '.join(suffixes)}; give it such a name with --as")
        with path.open("rb") as source:
            version = bucket.upload(opened, target, source)
        click.echo(f"{path} -> gs://{opened.name}/{INCOMING}{target} (generation {version.generation})")


@click.command()
@click.argument("file", required=False)
@click.option("--limit", default=50, show_default=True, help="Rows shown, newest first.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def status(file: str | None, limit: int, as_json: bool) -> None:
    """What happened to each file, or to every generation of FILE."""
    from rich.console import Console

    from qa_platform import bookkeeping, bucket
    from qa_platform.database import connect
    from qa_platform.settings import PostgresSettings

    with connect(PostgresSettings()) as connection:
        records = bookkeeping.history(connection, name=file, limit=limit)
    if file and not records:
        if bucket.find_incoming(_bucket(), file):
            raise InputError(f"{file}: waits in the bucket; the sensor has not seen it yet")
        raise InputError(f"{file}: no such file was ever uploaded")
    if as_json:
        for record in records:
            click.echo(json.dumps(asdict(record), default=str, ensure_ascii=False))
        return
    # Markup off: file names and messages may hold square brackets.
    Console(width=None if sys.stdout.isatty() else 160, markup=False).print(_status_table(records))


def _status_table(records: "list[FileRecord]") -> "Table":
    from rich.table import Table

    table = Table("file", "status", box=None, pad_edge=False)
    for header in ("rows", "answered", "no answer", "rejected", "seconds", "attempts"):
        table.add_column(header, justify="right")
    table.add_column("note")
    for record in records:
        seconds = f"{(record.loaded_at - record.started_at).total_seconds():.1f}" if record.loaded_at and record.started_at else ""
        counts = ["" if n is None else str(n) for n in (record.rows, record.answered, record.no_answer, record.rejected)]
        table.add_row(record.version.name, str(record.status), *counts, seconds, str(record.attempts or ""), record.error or "")
    return table


@click.command()
@click.argument("file")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Where to write, instead of standard output.")
def answers(file: str, output: Path | None) -> None:
    """The answered CSV of FILE: its rows in their order, with answer, score, offsets, model and error."""
    from qa_platform import bookkeeping, pachd
    from qa_platform.database import connect
    from qa_platform.settings import PachydermSettings, PostgresSettings

    with connect(PostgresSettings()) as connection:
        records = bookkeeping.history(connection, name=file)
    # Also while it is answered once more: what was answered last is still there.
    record = next((r for r in records if r.loaded_at and r.pachyderm_commit), None)
    if record is None:
        raise InputError(f"{file}: is not answered; `qa-platform status` says what there is")
    uri = f"{LOAD_PIPELINE}@{record.pachyderm_commit}:/{file_id(file)}.csv"
    with pachd.session(PachydermSettings(), f"fetching the answers of {file}") as client:
        if output is None:
            pachd.copy_file(client, uri, sys.stdout.buffer)
            return
        partial = output.with_name(output.name + ".partial")
        with partial.open("wb") as target:
            pachd.copy_file(client, uri, target)
        partial.replace(output)


@click.command()
@click.argument("file")
def retry(file: str) -> None:
    """Have FILE answered again: one that failed, that was rejected, or that is to be answered by another model."""
    from qa_platform import bookkeeping
    from qa_platform.database import connect
    from qa_platform.settings import PostgresSettings

    with connect(PostgresSettings()) as connection:
        record = bookkeeping.request_retry(connection, file)
    click.echo(f"{file}: generation {record.version.generation} will be answered again; `qa-platform status {file}` follows it")


@click.group("db")
def db_group() -> None:
    """The tables of the answers."""


@db_group.command("upgrade")
def db_upgrade() -> None:
    """Bring the tables to this version, from nothing, from an older version, or from the original five columns."""
    from qa_platform.loading import migrate
    from qa_platform.settings import PostgresSettings

    migrate.upgrade(PostgresSettings())
    click.echo("the tables are up to date")


COMMANDS: tuple[click.Command, ...] = (upload, status, answers, retry, pachyderm_group, db_group)
