"""The command `qa-platform forget`."""

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import click

from qa_platform.cli.arguments import FILE_NAME
from qa_platform.text import escaped

if TYPE_CHECKING:
    from qa_platform.batches.forget import History, Trace

_OUT_OF_REACH = """\
out of reach of this command:
  backups of PostgreSQL and of the bucket: repeat the command if an earlier one is restored
  what Pachyderm stores of removed commits, until it collects its garbage
  logs of pods, and logs, configurations, tags and ticks of runs in Dagster: they contain the file's name, and what rejections quote
  results of the check scores_are_as_usual of other files: they contain the file's name and mean score
  answered CSVs in the bucket that were written while QA_ANSWERED_PREFIX had another value than now
  notifications that were sent, and copies that other programs made"""


@click.command()
@click.argument("file", type=FILE_NAME)
@click.option("--generation", type=click.IntRange(min=1), help="Forget only this version. Default: all.")
@click.option("--dry-run", is_flag=True, help="Only show what would be removed.")
@click.option("--no-dagster", is_flag=True, help="Do not look for a history in Dagster: this platform has never run with it.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line: service, what, count, state, detail.")
def forget(file: str, generation: int | None, dry_run: bool, no_dagster: bool, as_json: bool) -> None:
    """Remove FILE for good, wherever it is.

    It removes the file's rows, its records, its objects in the bucket, the Pachyderm commits that hold it, and its partition and events
    in Dagster. There is no confirmation: use --dry-run first to see what would be removed. Answers of other files stay in the tables.

    \b
    found    with --dry-run: it would be removed
    removed  it is gone
    left     it is still there; the reason is beside it
    kept     a soft-deleted object, which the bucket itself removes later

    A record of the name and the generation stays, so that nothing brings the file back. FILE may be uploaded again, as a new version.
    A file that a run is working on is refused. The command may be repeated. The exit status is 1 if anything is left.
    """
    from qa_platform.batches.forget import Forgetting, NoHistory, TraceState
    from qa_platform.cli.json_output import echo_json
    from qa_platform.clients.services import Services
    from qa_platform.ledger import Ledger

    services = Services.from_environment()
    left = 0
    with nullcontext(NoHistory()) if no_dagster else _dagster_history() as history, Ledger(services.postgres) as ledger:
        forgetting = Forgetting(services, ledger, history, file, generation)
        for trace in forgetting.find() if dry_run else forgetting.forget():
            left += trace.state is TraceState.LEFT
            if as_json:
                echo_json(trace)
            else:
                click.echo(_line(trace))
    if not as_json:
        click.echo(_OUT_OF_REACH, err=True)
    if left:
        click.echo(f"{left} things are left; the reasons are above", err=True)
        sys.exit(1)
    if not as_json:
        click.echo("nothing was changed" if dry_run else "nothing of it is left where this command looks", err=True)


def _dagster_history() -> "AbstractContextManager[History]":
    # Imported here: Dagster is not installed everywhere.
    from qa_platform.orchestration.forget import dagster_history
    from qa_platform.settings import CheckSettings

    return dagster_history(CheckSettings().gold_prefix)


def _line(trace: "Trace") -> str:
    detail = f": {trace.detail}" if trace.detail else ""
    return escaped(f"{trace.state:8} {trace.service:10}  {trace.count} {trace.what}{detail}")


COMMANDS: tuple[click.Command, ...] = (forget,)
