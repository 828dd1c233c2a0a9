"""Shows the progress of a watch, for `qa-platform status --watch` and `qa-platform upload --wait`."""

import math
import time
from collections.abc import Iterator

import click
from rich.console import Console, Group
from rich.live import Live

from qa_platform.cli.json_output import echo_json
from qa_platform.cli.status.line import line_of
from qa_platform.cli.status.observe import FileState
from qa_platform.cli.status.render import change_line, overview
from qa_platform.cli.status.watch import Watch
from qa_platform.cli.terminal import console, one_line

# The interval between snapshots. The observer asks the bucket and Pachyderm less often if they are slow.
_WATCH_SECONDS = 1.0


def follow(watch: Watch, *, as_json: bool = False, seconds: float = math.inf) -> None:
    """Show the watched files until nothing is in progress, or this many seconds have passed.

    A terminal shows a table that is kept up to date. Other outputs, and JSON, get a line for every change.
    """
    out = console()
    if out.is_terminal and not as_json:
        _keep_table(watch, out, seconds)
    else:
        _write_changes(watch, seconds, as_json=as_json)


def _looks(watch: Watch, seconds: float) -> Iterator[list[FileState]]:
    """Look repeatedly, and yield the changed files."""
    end = time.monotonic() + seconds
    while True:
        yield watch.look()
        left = end - time.monotonic()
        if watch.over or left <= 0:
            return
        time.sleep(min(_WATCH_SECONDS, left))


def _keep_table(watch: Watch, out: Console, seconds: float) -> None:
    """Show a table on the terminal, and keep it up to date."""
    with Live(console=out, auto_refresh=False, redirect_stdout=False) as live:
        for _ in _looks(watch, seconds):
            lines = overview(watch.snapshot, width=out.width, height=out.height)
            for line in lines:
                line.no_wrap = True
            live.update(Group(*lines), refresh=True)


def _write_changes(watch: Watch, seconds: float, *, as_json: bool) -> None:
    """Write a line for every change to standard output, and each new problem to standard error."""
    told: tuple[str, ...] = ()
    for changed in _looks(watch, seconds):
        for file in changed:
            if as_json:
                echo_json(line_of(file))
            else:
                click.echo(change_line(file, watch.snapshot.at))
        for problem in watch.snapshot.problems:
            if problem not in told:
                click.echo(one_line(problem), err=True)
        told = watch.snapshot.problems
