"""The parameter types of the commands: names of files, jobs and images, and the files that commands write."""

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from qa_platform.errors import InputError
from qa_platform.text import escaped

# Completion offers nothing if the ledger takes longer. It searches this many of the newest records.
_COMPLETION_SECONDS = 1.0
_COMPLETION_RECORDS = 1_000
# A shell inserts a completed name unquoted. Uploaders choose the names, and one with `;` or `$(` would run a command.
_PLAIN = re.compile(r"\w[\w./+-]*")


class _Name(click.ParamType):
    """A name in UTF-8. Python turns other bytes of an argument into lone surrogates, which no service can store.

    An empty name is refused, unless it is the option's default.
    """

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if not text and not (param and param.default == text):
            self.fail("a name must not be empty", param, ctx)
        if not is_text(text):
            self.fail(f"'{escaped(text)}' is not UTF-8, so nothing can have that name; `qa-platform status` lists the files", param, ctx)
        return text


class _FileName(_Name):
    """The name of a file. A shell completes names that the ledger knows and that need no quotes."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from qa_platform.clients.deadline import within

        # An error message would end up in the middle of the command line.
        with suppress(Exception):
            names = within(_COMPLETION_SECONDS, _known_names, "the names of files")
            return [CompletionItem(name) for name in names if name.startswith(incomplete) and _PLAIN.fullmatch(name)]
        return []


class _Output(click.Path):
    """A file to be written, in an existing folder. ``-`` becomes None, which means standard output."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, allow_dash=True, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if path == STDIO:
            return None
        folder = path.resolve().parent
        if not folder.is_dir():
            raise InputError(f"the folder {folder} does not exist", where=str(path), advice="create it, or name another output")
        # A file is replaced by a temporary one from the same folder; a device or a pipe is written directly.
        if not os.access(folder, os.W_OK | os.X_OK) and (path.is_file() or not path.exists()):
            raise InputError(f"the folder {folder} cannot be written", where=str(path), advice="name another output")
        return path


# Standard input or standard output, on a command line.
STDIO = Path("-")
NAME = _Name()
OUTPUT = _Output()
FILE_NAME = _FileName()


def _known_names() -> list[str]:
    """The names of the newest records, newest first."""
    from qa_platform.ledger import Ledger
    from qa_platform.settings import PostgresSettings

    with Ledger(PostgresSettings()) as ledger:
        return list(dict.fromkeys(record.version.name for record in ledger.history(limit=_COMPLETION_RECORDS)))


def is_text(name: str) -> bool:
    """Whether a name (from the command line, or of a local file) can be encoded in UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
