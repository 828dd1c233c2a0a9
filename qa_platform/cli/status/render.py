"""Renders a snapshot of the files as text: an overview, the details of one file, and lines for a log."""

from collections.abc import Iterable
from datetime import UTC, datetime

from rich.text import Text

from qa_platform.cli.status.observe import FileState, Snapshot
from qa_platform.cli.terminal import age, compact, cut, table
from qa_platform.contract import FileStatus
from qa_platform.ledger.records import FileRecord
from qa_platform.text import as_argument, escaped

_STYLES = {
    FileStatus.RUNNING: "cyan",
    FileStatus.LOADED: "cyan",
    FileStatus.FINISHED: "green",
    FileStatus.UNCHANGED: "green",
    FileStatus.REJECTED: "red",
    FileStatus.FAILED: "bold red",
}
_RIGHT = range(2, 8)


def overview(snapshot: Snapshot, *, width: int | None, height: int | None = None) -> list[Text]:
    """The files as lines: one per file, and a second one for its note.

    Args:
        width: the longest line; None for no limit.
        height: the most lines; None for no limit. Files in progress come first, and the last line counts the files that are left out.
    """
    files = snapshot.files if height is None else sorted(snapshot.files, key=lambda file: not file.in_progress)
    head, *rows = table(("file", *_COLUMNS), [_cells(f, snapshot.at, f.version.shown) for f in files], width=width, right=_RIGHT)
    lines: list[Text] = []
    was_cut = left_out = False
    # Leave room for the header and the last two lines.
    room = None if height is None else max(1, height - 3 - len(snapshot.problems))
    for number, (file, row) in enumerate(zip(files, rows, strict=True)):
        note = f"  {file.note}" if file.note else ""
        if room is not None and len(lines) + 1 + bool(note) > room:
            lines.append(Text(f"… and {len(files) - number} more", "dim"))
            left_out = True
            break
        lines.append(row)
        if note:
            fits = note if width is None else _cut_end(note, width)
            was_cut |= fits != note
            lines.append(Text(fits, "red" if file.ended_without_answers else "yellow"))
    if was_cut and not left_out:
        lines.append(Text("notes are cut (…): `qa-platform status FILE` shows them in full", "dim"))
    return [head, *lines, *(Text(problem if width is None else cut(problem, width), "yellow") for problem in snapshot.problems)]


_COLUMNS = ("state", "rows", "answered", "none", "rejected", "took", "age")


def _cells(file: FileState, at: datetime, first: str) -> list[str | Text]:
    state = Text(file.stage, _STYLES.get(file.record.status, "yellow") if file.record and not file.is_waiting else "yellow")
    record = file.record
    if record is None:
        return [first, state, "", "", "", "", "", ""]
    counts = ["", "", "", ""]
    if record.loaded_at or record.status is FileStatus.UNCHANGED:
        counts = [str(n) for n in (record.rows, record.answered, record.no_answer, record.rejected)]
    if record.status is FileStatus.RUNNING:
        counts = ["/".join(map(compact, file.progress or ())), "", "", ""]
    return [first, state, *counts, _took(file, record), age(at - _since(record))]


def _took(file: FileState, record: FileRecord) -> str:
    if file.left is not None:
        return f"~{age(file.left)}"
    # A file that is being answered again was loaded before it started.
    if record.loaded_at is None or record.started_at is None or record.loaded_at < record.started_at:
        return ""
    return f"{(record.loaded_at - record.started_at).total_seconds():.1f}s"


def _since(record: FileRecord) -> datetime:
    """When a file entered its state, as far as that is recorded."""
    match record.status:
        case FileStatus.PENDING:
            return record.created_at
        case FileStatus.RUNNING:
            return record.started_at or record.created_at
    return record.loaded_at or record.archived_at or record.started_at or record.created_at


def _cut_end(text: str, width: int) -> str:
    # Not `cut`, which removes the middle: the beginning of a message matters most.
    shorter = Text(text)
    shorter.truncate(width, overflow="ellipsis")
    return shorter.plain


def details(snapshot: Snapshot, *, width: int | None) -> list[Text]:
    """The generations of one file as a table, then all facts about the newest.

    Args:
        width: the longest line of the table; None for no limit.
    """
    rows = [_cells(file, snapshot.at, str(file.version.generation)) for file in snapshot.files]
    lines = table(("generation", *_COLUMNS), rows, width=width, right=_RIGHT)
    newest = snapshot.files[0]
    facts = {"note": newest.note if newest.record else "it is in the bucket; the sensor has not seen it yet"}
    if record := newest.record:
        model = " ".join(filter(None, (record.model, record.model_revision, record.model_precision)))
        facts |= {
            "model": escaped(model),
            "source": escaped(record.place) or "deleted",
            "Pachyderm job": record.pachyderm_job,
            "its log": f"qa-platform pachyderm logs {record.pachyderm_job}" if record.pachyderm_job else "",
            "Dagster run": record.dagster_run,
            "blank rows, skipped": str(record.blank or ""),
            "rejected rows": f"qa-platform answers --rejected {as_argument(record.version.name)}" if record.rejected else "",
        }
    lines += [
        Text(f"{name}: {fact}", "red" if name == "note" and newest.ended_without_answers else "") for name, fact in facts.items() if fact
    ]
    return [*lines, *(Text(problem, "yellow") for problem in snapshot.problems)]


def change_line(file: FileState, at: datetime) -> str:
    """A log line for a change of a file: time, name, stage, and figures or the reason."""
    figures = ""
    if file.progress:
        left = "" if file.left is None else f", about {age(file.left)} left"
        figures = ", {} of {} rows".format(*file.progress) + left
    elif file.record and file.record.loaded_at and not file.in_progress:
        r = file.record
        figures = f", {r.rows} rows, {r.answered} answered, {r.no_answer} without answer, {r.rejected} rejected"
    note = f": {file.note}" if file.note else ""
    return f"{at.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ} {file.version.shown}: {file.stage}{figures}{note}"


def outcome(files: Iterable[FileState]) -> str:
    """The number of files in each state, in words."""
    counts: dict[str, int] = {}
    for file in files:
        counts[file.state] = counts.get(file.state, 0) + 1
    return ", ".join(f"{count} {state}" for state, count in counts.items())
