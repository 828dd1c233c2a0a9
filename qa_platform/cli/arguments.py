"""Arguments of commands that are names, of files in the bucket, of jobs, of images, and the files that commands write."""

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from qa_platform.errors import InputError
from qa_platform.text import escaped

# Completion is silent where the ledger does not answer in this time, and looks through so many of the newest records.
_COMPLETION_SECONDS = 1.0
_COMPLETION_RECORDS = 1_000
# A shell puts a completed name into the command line as it is. Uploaders choose names: one with `;` or `$(` would be a command.
_PLAIN = re.compile(r"\w[\w./+-]*")


class _Name(click.ParamType):
    """A name in UTF-8. Python turns other bytes of an argument into lone surrogates, which nothing can store.

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
    """The name of a file. A shell completes those that the ledger knows, as far as they are plain."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from qa_platform.cli.deadline import within

        # Whatever is wrong, it is not told in the middle of a command line.
        with suppress(Exception):
            names = within(_COMPLETION_SECONDS, _known_names, "the names of files")
            return [CompletionItem(name) for name in names if name.startswith(incomplete) and _PLAIN.fullmatch(name)]
        return []


class _Output(click.Path):
    """A file to be written, in a folder that there is. ``-`` is standard output, as is no file: None."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, allow_dash=True, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if path == STDIO:
            return None
        folder = path.resolve().parent
        if not folder.is_dir():
            raise InputError(f"the folder {folder} does not exist", where=str(path), advice="create it, or name another output")
        # A device or a pipe is written to as it is; beside a file another one is written first.
        if not os.access(folder, os.W_OK | os.X_OK) and (path.is_file() or not path.exists()):
            raise InputError(f"the folder {folder} cannot be written", where=str(path), advice="name another output")
        return path


# What a command line calls standard input, or standard output.
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
    """Whether a name from the command line, or of a file on this machine, can be encoded in UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
