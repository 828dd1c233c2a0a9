"""Arguments of commands that are names: of files in the bucket, of jobs, of images."""

import re
from contextlib import suppress
from typing import Any

import click
from click.shell_completion import CompletionItem

from qa_platform.text import escaped

# Completion is silent where the ledger does not answer in this time, and looks through so many of the newest records.
_COMPLETION_SECONDS = 1.0
_COMPLETION_RECORDS = 1_000
# A shell puts a completed name into the command line as it is. Uploaders choose names: one with `;` or `$(` would be a command.
_PLAIN = re.compile(r"\w[\w./+-]*")


class _Name(click.ParamType):
    """A name in UTF-8. Python turns other bytes of an argument into lone surrogates, which nothing can store."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if not is_text(text):
            self.fail(f"'{escaped(text)}' is not UTF-8, so nothing can have that name; `qa-platform status` lists the files", param, ctx)
        return text


class _FileName(_Name):
    """The name of a file. A shell completes those that the ledger knows, as far as they are plain."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from qa_platform.cli.deadline import within

        # Whatever is wrong, it is not told in the middle of a command line.
        with suppress(Exception):
            names = within(_COMPLETION_SECONDS, _known_names, "the names of files")
            return [CompletionItem(name) for name in names if name.startswith(incomplete) and _PLAIN.fullmatch(name)]
        return []


NAME = _Name()
FILE_NAME = _FileName()


def _known_names() -> list[str]:
    """The names of the newest records, newest first."""
    from qa_platform.ledger import Ledger
    from qa_platform.settings import PostgresSettings

    with Ledger(PostgresSettings()) as ledger:
        return list(dict.fromkeys(record.version.name for record in ledger.history(limit=_COMPLETION_RECORDS)))


def is_text(name: str) -> bool:
    """Whether a name from the command line, or of a file on this machine, can be encoded in UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
