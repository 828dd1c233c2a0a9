"""The command `qa-platform restore`."""

import sys
from typing import TYPE_CHECKING

import click

from qa_platform.cli.arguments import FILE_NAME
from qa_platform.text import escaped

if TYPE_CHECKING:
    from qa_platform.batches.restore import Restored


@click.command()
@click.argument("files", nargs=-1, type=FILE_NAME)
@click.option("--dry-run", is_flag=True, help="Only show what is missing and where it would come from.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line: name, generation, state, source, detail.")
def restore(files: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Bring back answered files that are missing from the tables.

    Files are missing after PostgreSQL was restored from an older backup. Without FILES, all files are compared.

    \b
    requested  answered again by the next runs, from the copy under processed/
    loaded     loaded from Pachyderm's commit, since the bucket has no copy
    coming     already waiting or being answered; nothing was done
    missing    with --dry-run: it would be requested or loaded
    lost       neither the bucket nor Pachyderm has all of it

    The command may be repeated: it does nothing twice. The exit status is 1 while a file is missing, and 0 once every file is in the
    tables. So it is 1 if files were requested: follow them with `qa-platform status --watch`, then repeat the command.
    """
    from qa_platform.batches.restore import Restoration, RestoreState
    from qa_platform.cli.json_output import echo_json
    from qa_platform.clients.services import Services
    from qa_platform.ledger import Ledger

    services = Services.from_environment()
    absent = 0
    with Ledger(services.postgres) as ledger:
        for restored in Restoration(services, ledger, tuple(dict.fromkeys(files)), dry_run).restore():
            absent += restored.state is not RestoreState.LOADED
            if as_json:
                echo_json(restored)
            else:
                click.echo(_line(restored))
    if absent:
        click.echo(f"{absent} files are not in the tables; repeat the command when `qa-platform status --watch` has ended", err=True)
        sys.exit(1)
    if not as_json:
        click.echo("every file that was answered is in the tables", err=True)


def _line(restored: "Restored") -> str:
    version = f", generation {restored.generation}" if restored.generation else ""
    source = f" from {restored.source}" if restored.source else ""
    detail = f": {restored.detail}" if restored.detail else ""
    return escaped(f"{restored.state:9} {restored.name}{version}{source}{detail}")


COMMANDS: tuple[click.Command, ...] = (restore,)
