"""The command line, ``qa-platform``. Whatever a command needs is imported when it runs: help comes at once."""

import errno
import os
import sys
from pathlib import Path
from typing import Any

import click

from qa_platform.answering.commands import COMMANDS as ANSWERING_COMMANDS
from qa_platform.commands import COMMANDS
from qa_platform.errors import QaPlatformError, TransientError

# What shells report of a command that Ctrl-C ended.
_INTERRUPTED = 130
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Group(click.Group):
    """Shows the platform's own errors as messages, without a traceback, and ends with the statuses that the help names."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except QaPlatformError as error:
            raise (_Away if isinstance(error, TransientError) else click.ClickException)(_harmless(str(error))) from error
        except ValueError as error:
            from qa_platform.settings import wrong_settings

            if message := wrong_settings(error):
                raise click.ClickException(_harmless(message)) from error
            raise
        except OSError as error:
            if error.filename is None and error.errno in _NO_ROOM:
                _give_up_output()
                message = f"what was to be written found no room ({error.strerror}); make room, and give the command again"
                raise click.ClickException(message) from error
            # A file that the command line names. Any other is nothing that a person could mend.
            if error.filename is None or isinstance(error, BrokenPipeError):
                raise
            raise click.ClickException(_harmless(f"{error.filename}: {error.strerror}")) from error
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(_INTERRUPTED)


def _harmless(message: str) -> str:
    """A message with its lines: what it quotes of names and other servers' words is not obeyed by a terminal."""
    from qa_platform.terminal import escaped

    return "\n".join(escaped(line) for line in message.split("\n"))


def _give_up_output() -> None:
    """Drop what standard output still holds and cannot get rid of: Python would try once more at its end, with a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Away(click.ClickException):
    """Something is away for now."""

    exit_code = os.EX_TEMPFAIL


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""
\b
Exit status:
  0    done
  1    it cannot be done, or not all is well: the message says what to do
  2    the command was not understood
  75   something is away for now: trying again may help
  130  ended by Ctrl-C
`local run` ends with the status of its command.

Where everything is comes from the environment (STORAGE_BUCKET, PACHD_ADDRESS, PG_HOST, …); `qa-platform doctor` says what is
wrong with it. On a laptop `qa-platform local run -- qa-platform …` sets it. Colours and progress bars are for terminals only;
NO_COLOR switches colours off.
""",
)
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
