"""The command line, ``qa-platform``. A command imports what it needs when it runs, so that ``--help`` is fast."""

import errno
import io
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from qa_platform.cli import admin, answering, files, forget, restore
from qa_platform.cli.extras import how_to_install
from qa_platform.cli.metrics.command import metrics
from qa_platform.cli.pachyderm import pachyderm_group
from qa_platform.cli.status.command import status
from qa_platform.errors import QaPlatformError, TransientError
from qa_platform.text import escaped

# The exit status that shells report after Ctrl-C.
_INTERRUPTED = 130
# Commands that need no service, or start their own.
_WITHOUT_SERVICES = ("answer", "evaluate", "local", "tune")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Group(click.Group):
    """Shows the platform's own errors as messages, without a traceback, and exits with the documented statuses."""

    def main(self, *args: Any, **options: Any) -> Any:
        for name in ("stdout", "stderr"):
            # A stream is None if the caller closed it, as with `>&-`. Messages are then dropped; `rows_out` refuses to drop rows.
            if getattr(sys, name) is None:
                setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  # until the process ends
            # Names and messages have characters that a terminal's encoding may lack. Data is written as bytes.
            if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        with _cleaned_up_when_terminated():
            return super().main(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except QaPlatformError as error:
            message = _harmless(str(error)) + ("" if ctx.invoked_subcommand in _WITHOUT_SERVICES else _hint(error))
            raise (_Unavailable if isinstance(error, TransientError) else click.ClickException)(message) from error
        except ModuleNotFoundError as error:
            if not (command := how_to_install(error.name or "")):
                raise
            raise click.ClickException(f"this command needs {error.name}, which is not installed; {command}") from error
        except ValueError as error:
            from qa_platform.settings import wrong_settings

            if message := wrong_settings(error):
                raise click.ClickException(_harmless(message)) from error
            raise
        except OSError as error:
            if error.filename is None and error.errno in _NO_ROOM:
                _give_up_output()
                message = f"there is no space for the output or for temporary files ({error.strerror}); free some, and repeat the command"
                raise click.ClickException(message) from error
            # The user can only fix an error of a file that the command line names.
            if error.filename is None or isinstance(error, BrokenPipeError):
                raise
            raise click.ClickException(_harmless(f"{error.filename}: {error.strerror}")) from error
        except MemoryError as error:
            raise click.ClickException("there is not enough memory; raise this process's limit, or use fewer --threads") from error
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(_INTERRUPTED)


@contextmanager
def _cleaned_up_when_terminated() -> Iterator[None]:
    """End by an exception on SIGTERM, and when the terminal is closed, so that no unfinished file stays."""

    def end(number: int, _: object) -> None:
        sys.exit(128 + number)

    # Ignored signals stay ignored, as under nohup.
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _hint(error: QaPlatformError) -> str:
    """A hint for people who forgot that their stack is an embedded one: a service is unavailable, and nothing says where it is."""
    from qa_platform.settings import PachydermSettings, PostgresSettings

    if not isinstance(error, TransientError) or PachydermSettings().model_fields_set or PostgresSettings().model_fields_set:
        return ""
    return "; on a laptop: qa-platform local run -- " + escaped(shlex.join(["qa-platform", *sys.argv[1:]]))


def _harmless(message: str) -> str:
    """A message with its line breaks, but no other control characters: it may quote names and messages of other servers."""
    return escaped(message, keep="\n\t")


def _give_up_output() -> None:
    """Discard the unwritable buffer of standard output. Otherwise Python retries at exit, and shows a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Unavailable(click.ClickException):
    """A service is temporarily unavailable."""

    exit_code = os.EX_TEMPFAIL


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""
\b
Exit status:
  0    done
  1    it cannot be done, or something is wrong: the message says what to do
  2    the command was not understood
  75   a service is unavailable for now: try again
  130  ended by Ctrl-C
`local run` ends with the status of its command.

Environment variables name the services (STORAGE_BUCKET, PACHD_ADDRESS, PG_HOST, …); `qa-platform doctor` checks them. On a
laptop, `qa-platform local run -- qa-platform …` sets them. Colours and progress bars are for terminals only; NO_COLOR switches
colours off.
""",
)
@click.version_option(package_name="qa-platform")
def main() -> None:
    """Answer the questions of CSV files: from a bucket, through Pachyderm, into PostgreSQL."""


_COMMANDS = (*files.COMMANDS, *restore.COMMANDS, *forget.COMMANDS, status, metrics, pachyderm_group, *admin.COMMANDS, *answering.COMMANDS)
for _command in _COMMANDS:
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
    help="Folder of the stack's state.",
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(state: Path, command: tuple[str, ...]) -> None:
    """Run COMMAND inside an embedded stack, and exit with its status.

    The stack starts and stops with the command, unless a stack already runs on the same state: then that one is used, and stays until the
    last command that uses it has ended. The command gets addresses and credentials from its environment: STORAGE_BUCKET,
    API_ENDPOINT_OVERRIDE, GOOGLE_APPLICATION_CREDENTIALS, PACHD_ADDRESS, PACH_TOKEN, PG_HOST, PG_PORT, PG_USER, PG_PASSWORD, PG_DBNAME,
    PGHOST and the like for psql, QA_DATABASE_URL, DAGSTER_HOME, DAGSTER_PG_URL. Other users of the machine have no access.
    """
    from qa_platform.embedded.stack import local_run

    if not (state / "stack.lock").exists():
        click.echo(f"a new stack in {escaped(str(state.resolve()))} (--state names another)", err=True)
    sys.exit(local_run(state, command))


if __name__ == "__main__":
    main()
