"""The command line, ``qa-platform``. Whatever a command needs is imported when it runs: help comes at once."""

import sys
from pathlib import Path
from typing import Any

import click

from qa_platform.answering.commands import COMMANDS as ANSWERING_COMMANDS
from qa_platform.commands import COMMANDS
from qa_platform.errors import QaPlatformError


class _Group(click.Group):
    """Shows the platform's own errors as messages, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except QaPlatformError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="qa-platform")
def main() -> None:
    """Questions and contexts in CSV files, answered: from a bucket through Pachyderm into Postgres."""


for _command in (*COMMANDS, *ANSWERING_COMMANDS):
    main.add_command(_command)


@main.group()
def local() -> None:
    """The whole stack on this machine, embedded."""


@local.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option(
    "--state",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(".qa"),
    show_default=True,
    help="Folder of everything that the stack keeps.",
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(state: Path, command: tuple[str, ...]) -> None:
    """Run COMMAND inside an embedded stack, and exit with its status.

    The stack is started and stopped with the command, unless one runs on the same state already, which is then used. The
    command finds everything through its environment: STORAGE_BUCKET, STORAGE_EMULATOR_HOST, PACHD_ADDRESS, PG_HOST, PG_PORT,
    PG_USER, PG_DBNAME, PGHOST and the like for psql, QA_DATABASE_URL, DAGSTER_HOME, DAGSTER_PG_URL.
    """
    from qa_platform.embedded.stack import local_run

    sys.exit(local_run(state, command))


if __name__ == "__main__":
    main()
