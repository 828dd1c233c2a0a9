"""The command `qa-platform status`."""

import sys
from typing import TYPE_CHECKING

import click

from qa_platform.cli.arguments import FILE_NAME
from qa_platform.errors import InputError

if TYPE_CHECKING:
    from qa_platform.cli.status.observe import Observer
    from qa_platform.cli.status.watch import Watch


@click.command()
@click.argument("file", required=False, type=FILE_NAME)
@click.option("-w", "--watch", is_flag=True, help="Follow the files until none is in progress.")
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="How many recorded files are shown, newest first.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def status(file: str | None, watch: bool, limit: int, as_json: bool) -> None:
    """Show the state of each file, or of every generation of FILE.

    \b
    uploaded    in the bucket, not seen by the sensor yet
    pending     waits for a run, the first one or another attempt
    running     shown as reading, answering or loading if known; ROWS is done/all
    waiting     running, but Pachyderm cannot start its job; the reason is shown
    loaded      the answers are in the table; the source is still to be archived
    finished    loaded and archived
    unchanged   same content as the answered generation
    superseded  a newer version came, or it was deleted, before it was loaded
    rejected    cannot be read as a CSV of questions
    failed      given up after several attempts, until `qa-platform retry`
    forgotten   removed by `qa-platform forget`; upload the file to have it answered

    NONE counts the rows for which the model says that there is no answer. TOOK is the time from the start of the run until the answers
    were in the table. With --watch, a file that is being answered shows ~ and the estimated time left for its batch instead. AGE is the
    time since a pending file was first seen, a running one was started, or any other was loaded (if it never was: archived or started).

    With --watch, a terminal shows a table that is kept up to date. A file or a pipe gets a line (with --json an object) for every change
    of a file in progress, and for every tenth of its rows. The command ends when nothing is in progress, with exit status 1 if a file
    failed or was rejected. It keeps running while services are unavailable.
    """
    from qa_platform.cli.status.observe import Observer, ObserverSettings
    from qa_platform.cli.status.watch import Watch

    observer = Observer(ObserverSettings.from_environment(), file, limit)
    if watch:
        sys.exit(_watch(Watch(observer), as_json=as_json))
    _show(observer, as_json=as_json)


def _show(observer: "Observer", *, as_json: bool) -> None:
    from qa_platform.cli.json_output import echo_json
    from qa_platform.cli.status.line import line_of
    from qa_platform.cli.status.render import details, overview
    from qa_platform.cli.terminal import console

    snapshot = observer.snapshot()
    if observer.name and not snapshot.files:
        raise InputError("; ".join(("no such file was ever uploaded", *snapshot.problems)), where=observer.name)
    if snapshot.is_cut:
        click.echo(f"only the newest {observer.limit} are shown, and those in progress; --limit shows more", err=True)
    if as_json:
        for state in snapshot.files:
            echo_json(line_of(state))
        return
    if not snapshot.files:
        click.echo("no file was uploaded yet", err=True)
    out = console()
    width = out.width if out.is_terminal else None
    for line in (details if observer.name else overview)(snapshot, width=width):
        out.print(line, soft_wrap=True)


def _watch(watch: "Watch", *, as_json: bool) -> int:
    """Show the watched files until nothing is in progress. Returns the exit status."""
    from qa_platform.cli.status.follow import follow
    from qa_platform.cli.status.render import outcome

    follow(watch, as_json=as_json)
    if not as_json:
        click.echo(f"nothing is in progress{': ' if watch.files else ''}{outcome(watch.files)}")
    return 1 if any(file.ended_without_answers for file in watch.files) else 0
