"""The commands that maintain the platform itself: `doctor`, `db upgrade` and `completion`."""

import sys

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document: `ok`, and `findings` with name, state, detail and fix.")
def doctor(as_json: bool) -> None:
    """Check everything, and show how to fix what is wrong.

    It checks this installation, the services that the environment names (the bucket, PostgreSQL and its tables, Dagster's home and
    storage, pachd with its secrets and pipelines), and that every answered file is in the tables. All parts are checked within seconds,
    even if some fail. Nothing is changed.
    The exit status is 1 if anything is wrong. No password, token or key is shown.
    """
    from qa_platform.cli.doctor.examine import examine
    from qa_platform.cli.doctor.findings import Report, State
    from qa_platform.cli.doctor.show import show
    from qa_platform.cli.json_output import json_document
    from qa_platform.cli.terminal import console

    findings = examine()
    is_well = all(finding.state is State.OK for finding in findings)
    if as_json:
        click.echo(json_document(Report(is_well, tuple(findings))))
    else:
        show(findings, console())
    if not is_well:
        sys.exit(1)


@click.group("db")
def db_group() -> None:
    """The tables of the answers."""


@db_group.command("upgrade")
def db_upgrade() -> None:
    """Migrate the tables to this version.

    The tables may be missing, of an older version, or the original table with five columns. All rows are kept.
    """
    from qa_platform.loading import migrate
    from qa_platform.settings import PostgresSettings

    migrate.upgrade(PostgresSettings())
    click.echo("the tables are up to date")


@click.command()
def completion() -> None:
    """Show how to set up completion in bash, zsh and fish.

    It completes commands and names of files. The names come from the records in PostgreSQL, if it answers within a second. Names that
    need quotes are left out.
    """
    for shell, file, line in _COMPLETION:
        click.echo(f"{shell}: put this line into {file}\n    {line}")


_COMPLETION = (
    ("bash", "~/.bashrc", 'eval "$(_QA_PLATFORM_COMPLETE=bash_source qa-platform)"'),
    ("zsh", "~/.zshrc, after compinit", 'eval "$(_QA_PLATFORM_COMPLETE=zsh_source qa-platform)"'),
    ("fish", "~/.config/fish/completions/qa-platform.fish", "_QA_PLATFORM_COMPLETE=fish_source qa-platform | source"),
)

COMMANDS: tuple[click.Command, ...] = (doctor, db_group, completion)
