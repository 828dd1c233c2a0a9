"""The commands that work on files: `upload`, `status`, `answers`, `retry`; and `doctor` and `db upgrade`.

Each connects to whatever the environment names: the embedded stack inside ``qa-platform local run``, or a deployment.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO

import click

from qa_platform.contract import INCOMING, LOAD_PIPELINE, file_id
from qa_platform.errors import InputError
from qa_platform.pachyderm_commands import pachyderm_group

if TYPE_CHECKING:
    from google.cloud import storage

    from qa_platform.status import Watch

# How often a watch looks. What it asks of the bucket and of Pachyderm is asked less often where it takes long.
_WATCH_SECONDS = 1.0


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
    """Put CSVs of questions into the bucket.

    The platform finds them there by itself. A file with the name of an earlier one takes its place: its answers replace the
    earlier ones.
    """
    from qa_platform import bucket
    from qa_platform.settings import WorkSettings
    from qa_platform.terminal import escaped

    if name and len(files) > 1:
        raise click.UsageError("--as names one file, and there are several")
    targets = {path: name or path.name for path in files}
    if twice := [target for target, count in Counter(targets.values()).items() if count > 1]:
        raise click.UsageError(f"several files would be called {', '.join(twice)} in the bucket; upload them one by one, with --as")
    suffixes = WorkSettings().suffixes
    for target in targets.values():
        if not bucket.is_question_file(INCOMING + target, suffixes):
            raise InputError(f"{target}: the platform answers files that end in {', '.join(suffixes)}; give it such a name with --as")
    for path, target in targets.items():
        with bucket.bucket_errors(f"uploading {path}"), path.open("rb") as source, _bar(source, target) as counted:
            opened = _bucket()
            version = bucket.upload(opened, target, counted)
        click.echo(escaped(f"{path} -> gs://{opened.name}/{INCOMING}{target} (generation {version.generation})"))
    click.echo("`qa-platform status --watch` follows what becomes of it", err=True)


@contextmanager
def _bar(source: BinaryIO, name: str) -> Iterator[BinaryIO]:
    """A file whose reading is shown on standard error, where that is a terminal."""
    if not sys.stderr.isatty():
        yield source
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from qa_platform.terminal import console, cut, shown

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    # Standard output is not for the bar's console to take over: it may be a file.
    with Progress(*columns, console=console(stderr=True), transient=True, redirect_stdout=False) as bar:
        yield bar.wrap_file(source, total=Path(source.name).stat().st_size, description=cut(shown(name), 24))


@click.command()
@click.argument("file", required=False)
@click.option("-w", "--watch", is_flag=True, help="Go on showing it until nothing is in work any more.")
@click.option("--limit", default=50, show_default=True, help="Recorded files that are shown, newest first.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def status(file: str | None, watch: bool, limit: int, as_json: bool) -> None:
    """What happened to each file, or to every generation of FILE.

    \b
    uploaded    in the bucket, not seen by the sensor yet
    pending     waits for a run, the first one or another attempt
    running     is answered or loaded; ROWS is done/all
    loaded      the answers are in the table; the source is still to be archived
    finished    all of that is done
    unchanged   the content is that of the answered generation
    superseded  overwritten or deleted before it was read
    rejected    cannot be read as a CSV of questions
    failed      given up after several attempts, until `qa-platform retry`

    NONE are rows for which the model says that there is no answer.

    With --watch a terminal shows a table that keeps up; into a file or a pipe goes a line (with --json an object) for every change
    of a file that is in work, and for every tenth of its rows. It ends when nothing is in work, with exit status 1 if one of the
    files failed or was rejected; it also survives services that are away for a while.
    """
    from qa_platform import status as view
    from qa_platform.terminal import console

    observer = view.Observer(file, limit)
    if watch:
        sys.exit(_watch(view.Watch(observer), as_json=as_json))
    snapshot = observer.snapshot()
    if file and not snapshot.files:
        raise InputError("; ".join((f"{file}: no such file was ever uploaded", *snapshot.problems)))
    if as_json:
        for state in snapshot.files:
            click.echo(state.json())
        return
    if not snapshot.files:
        click.echo("no file was uploaded yet", err=True)
    out = console()
    width = out.width if out.is_terminal else None
    lines = view.details(snapshot, width=width) if file else view.overview(snapshot, width=width)
    for line in lines:
        out.print(line, soft_wrap=True)


def _watch(watch: "Watch", *, as_json: bool) -> int:
    """Show what is watched until nothing is in work; the exit status."""
    from qa_platform import status as view
    from qa_platform.terminal import console, shown

    out = console()
    if out.is_terminal and not as_json:
        from rich.console import Group
        from rich.live import Live

        def screen() -> Group:
            lines = view.overview(watch.snapshot, width=out.width, height=out.height)
            for line in lines:
                line.no_wrap = True
            return Group(*lines)

        with Live(console=out, auto_refresh=False, redirect_stdout=False) as live:
            while not watch.over:
                watch.look()
                live.update(screen(), refresh=True)
                _until_next_look(watch)
    else:
        told: tuple[str, ...] = ()
        while not watch.over:
            for file in watch.look():
                click.echo(file.json() if as_json else view.change_line(file, watch.snapshot.at))
            for problem in watch.snapshot.problems:
                if problem not in told:
                    click.echo(shown(problem), err=True)
            told = watch.snapshot.problems
            _until_next_look(watch)
    if not as_json:
        click.echo(f"nothing is in work{': ' if watch.files else ''}{view.outcome(watch.files)}")
    return 1 if any(file.unwell for file in watch.files) else 0


def _until_next_look(watch: "Watch") -> None:
    if not watch.over:
        time.sleep(_WATCH_SECONDS)


@click.command()
@click.argument("file")
@click.option("--rejected", is_flag=True, help="Instead, a CSV of what was rejected: line, row, column, reason, what to do.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Where to write, instead of standard output.")
def answers(file: str, rejected: bool, output: Path | None) -> None:
    """The answered CSV of FILE.

    Its rows in their order, with answer, score, offsets, model and error.
    """
    if output is None:
        _write_answers(file, sys.stdout.buffer, rejected=rejected)
        sys.stdout.buffer.flush()
        return
    partial = output.with_name(output.name + ".partial")
    try:
        with partial.open("wb") as target:
            _write_answers(file, target, rejected=rejected)
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)


def _write_answers(file: str, target: IO[bytes], *, rejected: bool) -> None:
    from qa_platform import bookkeeping
    from qa_platform.database import connect
    from qa_platform.settings import PachydermSettings, PostgresSettings

    if rejected:
        from qa_platform.loading.rejected import rejected_report

        with connect(PostgresSettings()) as connection:
            target.writelines(rejected_report(connection, file))
        return
    from qa_platform import pachd

    with connect(PostgresSettings()) as connection:
        records = bookkeeping.history(connection, name=file)
    # Also while it is answered once more: what was answered last is still there.
    record = next((r for r in records if r.loaded_at and r.pachyderm_commit), None)
    if record is None:
        raise InputError(f"{file}: is not answered; `qa-platform status` says what there is")
    uri = f"{LOAD_PIPELINE}@{record.pachyderm_commit}:/{file_id(file)}.csv"
    try:
        with pachd.session(PachydermSettings(), f"fetching the answers of {file}") as client:
            pachd.copy_file(client, uri, target)
    except pachd.NotThere:
        from qa_platform.rebuilding import rebuilt_csv

        click.echo(
            "Pachyderm has them no more (QA_COMMITS_KEPT_DAYS), so they come from Postgres, without the upload's other columns", err=True
        )
        with connect(PostgresSettings()) as connection:
            target.writelines(rebuilt_csv(connection, record))


@click.command()
@click.argument("files", nargs=-1, required=True)
def retry(files: tuple[str, ...]) -> None:
    """Have files answered again, all of them or none.

    For files that failed, that were rejected, or that are to be answered by another model. The newest generation of each is taken.
    """
    from qa_platform import bookkeeping
    from qa_platform.database import connect
    from qa_platform.settings import PostgresSettings
    from qa_platform.terminal import shown

    with connect(PostgresSettings()) as connection:
        records = bookkeeping.request_retries(connection, list(dict.fromkeys(files)))
    for record in records:
        click.echo(f"{shown(record.version.name)}: generation {record.version.generation} will be answered again")
    click.echo("`qa-platform status --watch` follows it", err=True)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document: `ok`, and `findings` with name, state, detail and mend.")
def doctor(as_json: bool) -> None:
    """Check everything, and say how to mend it.

    This installation, the bucket, PostgreSQL and its tables, Dagster's home and storage, pachd, its secrets and its pipelines, as the
    environment names them. Everything is looked at, whatever else is wrong, and within seconds; nothing is changed. The exit status is
    1 if anything is wrong. No password, token or key is shown.
    """
    from dataclasses import asdict

    from qa_platform import doctor as examination
    from qa_platform.terminal import console

    findings = examination.examine()
    well = all(finding.state is examination.State.OK for finding in findings)
    if as_json:
        click.echo(json.dumps({"ok": well, "findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        examination.show(findings, console())
    if not well:
        sys.exit(1)


@click.group("db")
def db_group() -> None:
    """The tables of the answers."""


@db_group.command("upgrade")
def db_upgrade() -> None:
    """Bring the tables to this version.

    From nothing, from an older version, or from the original five columns with their rows.
    """
    from qa_platform.loading import migrate
    from qa_platform.settings import PostgresSettings

    migrate.upgrade(PostgresSettings())
    click.echo("the tables are up to date")


COMMANDS: tuple[click.Command, ...] = (upload, status, answers, retry, doctor, pachyderm_group, db_group)
