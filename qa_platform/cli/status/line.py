"""A line of ``qa-platform status --json``."""

import inspect
from dataclasses import dataclass, fields
from typing import Literal

from qa_platform.cli.status.observe import FileState
from qa_platform.contract import FileVersion
from qa_platform.ledger import FileRecord


@dataclass(frozen=True, slots=True)
class RecordedFile(FileRecord):
    """The record of one generation of a file. ``rows_done`` and ``rows_total`` are null while its progress is not known."""

    rows_done: int | None = None
    rows_total: int | None = None


# The JSON schema takes its description from this docstring. It describes the fields of both classes.
RecordedFile.__doc__ = f"{RecordedFile.__doc__}\n\n{inspect.cleandoc(FileRecord.__doc__ or '')}"


@dataclass(frozen=True)
class UnseenFile:
    """An upload that no sensor has seen."""

    version: FileVersion
    status: Literal["uploaded"] = "uploaded"
    rows_done: None = None
    rows_total: None = None


def line_of(file: FileState) -> RecordedFile | UnseenFile:
    """The line for a file."""
    if file.record is None:
        return UnseenFile(file.version)
    done, total = file.progress or (None, None)
    record = {field.name: getattr(file.record, field.name) for field in fields(FileRecord)}
    return RecordedFile(**record, rows_done=done, rows_total=total)
