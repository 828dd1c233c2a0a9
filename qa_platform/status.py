"""What `qa-platform status` shows: what is recorded of the files, uploads that no sensor has seen yet, and how far the work is."""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

from rich.text import Text

from qa_platform import bookkeeping
from qa_platform.bookkeeping import FileRecord
from qa_platform.contract import INCOMING, FileStatus, FileVersion, file_id
from qa_platform.database import connect, only_row, transaction
from qa_platform.deadline import within
from qa_platform.errors import InputError, QaPlatformError, TransientError
from qa_platform.settings import BucketSettings, PachydermSettings, PostgresSettings, WorkSettings
from qa_platform.terminal import age, compact, cut, shown, table

# What the state of an upload is called that is not recorded yet.
UPLOADED = "uploaded"
# A listing, or Pachyderm's figures, are left out where they take longer.
_WAIT_SECONDS = 10.0
# What took long, or failed, is not asked for again before so many times as long have passed.
_REST = 10.0
_LEAST_REST_SECONDS = 0.5
_FAILED_REST_SECONDS = 10.0

# After so many looks at the bucket that should have been, a watch that sees nothing happen says where to look.
_LOOKS_MISSED = 3
_LEFT_ALONE = "no sensor has seen these uploads so far: does Dagster's daemon run, and is the sensor incoming_files switched on?"

_IN_WORK = (FileStatus.PENDING, FileStatus.RUNNING, FileStatus.LOADED)
_UNWELL = (FileStatus.FAILED, FileStatus.REJECTED)
_STYLES = {
    FileStatus.RUNNING: "cyan",
    FileStatus.LOADED: "cyan",
    FileStatus.FINISHED: "green",
    FileStatus.UNCHANGED: "green",
    FileStatus.REJECTED: "red",
    FileStatus.FAILED: "bold red",
}
_RIGHT = range(2, 8)

T = TypeVar("T")


@dataclass(frozen=True)
class FileState:
    """One generation of a file. ``record`` is None while no sensor has seen it; ``progress`` is (rows done, rows) while it is known."""

    version: FileVersion
    record: FileRecord | None = None
    progress: tuple[int, int] | None = None

    @property
    def state(self) -> str:
        return str(self.record.status) if self.record else UPLOADED

    @property
    def in_work(self) -> bool:
        return self.record is None or self.record.status in _IN_WORK

    @property
    def unwell(self) -> bool:
        return self.record is not None and self.record.status in _UNWELL

    @property
    def note(self) -> str:
        """What a person has to know of it beyond the figures, on one line."""
        if self.record is None:
            return ""
        error = shown(self.record.error)
        tried = f"attempt {self.record.attempts} failed" if self.record.attempts and self.in_work else ""
        return ": ".join(part for part in (tried, error) if part)

    def json(self) -> str:
        """One line: the record's fields and ``rows_done``, ``rows_total``, which are null where there is nothing to be said."""
        values: dict[str, Any] = asdict(self.record) if self.record else {"version": asdict(self.version), "status": UPLOADED}
        done, total = self.progress or (None, None)
        return json.dumps({**values, "rows_done": done, "rows_total": total}, default=str, ensure_ascii=False)


@dataclass(frozen=True)
class Snapshot:
    """The files as they are at one moment, by PostgreSQL's clock; ``problems`` says what could not be asked."""

    at: datetime
    files: tuple[FileState, ...]
    problems: tuple[str, ...] = ()

    @property
    def in_work(self) -> bool:
        return any(file.in_work for file in self.files)


@dataclass
class Observer:
    """Takes snapshots, of all files or of those with one name; it remembers what need not be asked twice.

    Args:
        limit: how many of the recorded files are looked at, newest first. A file that is in work is looked at whatever its age.
    """

    name: str | None = None
    limit: int = 50
    _unseen: "_Rarely[list[FileVersion]]" = field(default_factory=lambda: _Rarely("uploads that the sensor has not seen"))
    _progress: "_Rarely[_Progress]" = field(default_factory=lambda: _Rarely("how far the Pachyderm jobs are"))
    _rows: dict[str, dict[str, int]] = field(default_factory=dict)

    def snapshot(self, also: Sequence[FileVersion] = ()) -> Snapshot:
        """The files, newest first: those that no sensor has seen, then the recorded ones.

        Args:
            also: versions that are looked at whatever their age.

        Raises:
            InputError, TransientError: PostgreSQL refuses, or is away. The bucket and pachd may be away: that is a problem of the snapshot.
        """
        listed = self._unseen.ask(self._incoming) or []
        with connect(PostgresSettings()) as connection:
            with transaction(connection) as cursor:
                at = only_row(cursor.execute("SELECT now()"))[0]
            records = bookkeeping.history(connection, name=self.name, limit=self.limit)
            if self.name is None:
                more = {**bookkeeping.records(connection, also), **{_key(r.version): r for r in bookkeeping.in_work(connection)}}
                there = {_key(record.version) for record in records}
                records += [record for key, record in more.items() if key not in there]
            known = bookkeeping.known(connection, listed)
        running = [record for record in records if record.status is FileStatus.RUNNING and record.pachyderm_commit]
        progress = (self._progress.ask(lambda: self._measure(running)) or {}) if running else {}
        files = [FileState(version) for version in listed if _key(version) not in known]
        files += [FileState(r.version, r, progress.get((r.pachyderm_commit, r.version.name))) for r in records]
        return Snapshot(at, tuple(files), tuple(filter(None, (self._unseen.problem, self._progress.problem if running else ""))))

    @property
    def may_overlook_uploads(self) -> bool:
        """Whether the bucket could not be asked, and may be later."""
        return self._unseen.is_away

    def _incoming(self) -> list[FileVersion]:
        # Here, not above: not all that show a state of files have a bucket to ask.
        from google.cloud import storage

        from qa_platform import bucket

        settings, suffixes = BucketSettings(), WorkSettings().suffixes
        with bucket.bucket_errors("looking into the bucket"):
            opened = bucket.open_bucket(storage.Client(project=settings.google_cloud_project), settings.storage_bucket)
            if self.name is None:
                return list(bucket.list_incoming(opened, suffixes))
            found = bucket.find_incoming(opened, self.name) if bucket.is_question_file(INCOMING + self.name, suffixes) else None
            return [found] if found else []

    def _measure(self, running: Sequence[FileRecord]) -> "_Progress":
        """How far files are: rows done and rows, by commit and name."""
        from qa_platform import following
        from qa_platform.pachd import session

        done: dict[str, Mapping[str, int]] = {}
        with session(PachydermSettings(), "asking how far the jobs are") as client:
            for commit in {record.pachyderm_commit for record in running}:
                if commit not in self._rows:
                    self._rows[commit] = following.rows_of_datums(client, commit)
                done[commit] = following.rows_done(client, commit, self._rows[commit])
        found = {}
        for record in running:
            commit, folder = record.pachyderm_commit, file_id(record.version.name)
            if folder in self._rows[commit]:
                found[commit, record.version.name] = (done[commit].get(folder, 0), self._rows[commit][folder])
        return found


# Rows done and rows, by commit and name.
_Progress = dict[tuple[str, str], tuple[int, int]]


def _key(version: FileVersion) -> tuple[str, int]:
    return version.name, version.generation


class _Rarely(Generic[T]):
    """An answer that may be left out: asked for with a deadline, and not again before it is worth its time."""

    def __init__(self, what: str) -> None:
        self.problem = ""
        self.is_away = False
        self._what = what
        self._again = 0.0
        self._last: T | None = None

    def ask(self, call: Callable[[], T]) -> T | None:
        """What the call returns, or what it last returned, or None; never an error."""
        begun = time.monotonic()
        if begun < self._again:
            return self._last
        try:
            self._last, self.problem, self.is_away = within(_WAIT_SECONDS, call, self._what), "", False
            self._again = time.monotonic() + max(_LEAST_REST_SECONDS, _REST * (time.monotonic() - begun))
        except (QaPlatformError, TimeoutError) as error:
            said = shown(str(error)) or f"no answer within {_WAIT_SECONDS:.0f} s"
            self._last, self.problem, self.is_away = None, f"not known: {self._what} ({said})", not isinstance(error, InputError)
            self._again = time.monotonic() + _FAILED_REST_SECONDS
        return self._last


def overview(snapshot: Snapshot, *, width: int | None, height: int | None = None) -> list[Text]:
    """The files as lines, two for each that has something to be said of it.

    Args:
        width: of a line, at most; None cuts nothing.
        height: lines, at most. What is in work comes first, and how much is left out is said.
    """
    files = snapshot.files if height is None else sorted(snapshot.files, key=lambda file: not file.in_work)
    head, *rows = table(("file", *_COLUMNS), [_cells(f, snapshot.at, shown(f.version.name)) for f in files], width=width, right=_RIGHT)
    lines: list[Text] = []
    was_cut = left_out = False
    # The head and the last two lines have places of their own.
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
            lines.append(Text(fits, "red" if file.unwell else "yellow"))
    if was_cut and not left_out:
        lines.append(Text("cut off (…): `qa-platform status FILE` shows the whole of it", "dim"))
    return [head, *lines, *(Text(problem if width is None else cut(problem, width), "yellow") for problem in snapshot.problems)]


_COLUMNS = ("state", "rows", "answered", "none", "rejected", "took", "age")


def _cells(file: FileState, at: datetime, first: str) -> list[str | Text]:
    state = Text(file.state, _STYLES.get(file.record.status, "yellow") if file.record else "yellow")
    record = file.record
    if record is None:
        return [first, state, "", "", "", "", "", ""]
    counts = ["", "", "", ""]
    if record.loaded_at or record.status is FileStatus.UNCHANGED:
        counts = [str(n) for n in (record.rows, record.answered, record.no_answer, record.rejected)]
    if record.status is FileStatus.RUNNING:
        counts = ["/".join(map(compact, file.progress or ())), "", "", ""]
    return [first, state, *counts, _took(record), age(at - _since(record))]


def _took(record: FileRecord) -> str:
    # A file that is answered again was loaded before it was started.
    if record.loaded_at is None or record.started_at is None or record.loaded_at < record.started_at:
        return ""
    return f"{(record.loaded_at - record.started_at).total_seconds():.1f}s"


def _since(record: FileRecord) -> datetime:
    """When a file came into the state that it is in, as far as that is recorded."""
    match record.status:
        case FileStatus.PENDING:
            return record.created_at
        case FileStatus.RUNNING:
            return record.started_at or record.created_at
    return record.loaded_at or record.archived_at or record.started_at or record.created_at


def _cut_end(text: str, width: int) -> str:
    # Of a message the beginning matters: the cut in the middle is for names.
    shorter = Text(text)
    shorter.truncate(width, overflow="ellipsis")
    return shorter.plain


def details(snapshot: Snapshot, *, width: int | None) -> list[Text]:
    """Every generation of one file, and all that is known of the newest."""
    rows = [_cells(file, snapshot.at, str(file.version.generation)) for file in snapshot.files]
    lines = table(("generation", *_COLUMNS), rows, width=width, right=_RIGHT)
    newest = snapshot.files[0]
    facts = {"note": newest.note if newest.record else "it waits in the bucket; the sensor has not seen it yet"}
    if record := newest.record:
        model = " ".join(filter(None, (record.model, record.model_revision, record.model_precision)))
        facts |= {
            "model": shown(model),
            "source": shown(record.place) or "deleted",
            "Pachyderm job": record.pachyderm_job,
            "its log": f"qa-platform pachyderm logs {record.pachyderm_job}" if record.pachyderm_job else "",
            "Dagster run": record.dagster_run,
            "rejected rows": f"qa-platform answers {shown(record.version.name)} --rejected" if record.rejected else "",
        }
    lines += [Text(f"{name}: {fact}", "red" if name == "note" and newest.unwell else "") for name, fact in facts.items() if fact]
    return [*lines, *(Text(problem, "yellow") for problem in snapshot.problems)]


def change_line(file: FileState, at: datetime) -> str:
    """What a file has come to, for a log: time, name, state, and figures or the reason."""
    figures = ""
    if file.progress:
        figures = ", {} of {} rows".format(*file.progress)
    elif file.record and file.record.loaded_at and not file.in_work:
        r = file.record
        figures = f", {r.rows} rows, {r.answered} answered, {r.no_answer} without answer, {r.rejected} rejected"
    note = f": {file.note}" if file.note else ""
    return f"{at.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ} {shown(file.version.name)}: {file.state}{figures}{note}"


def stage(file: FileState) -> tuple[object, ...]:
    """What makes a line for a log worth writing when it changes; the progress counts by tenths."""
    done, total = file.progress or (0, 0)
    record = file.record
    return (file.state, record and (record.attempts, record.error, record.load_id), 10 * done // total if total else None)


def outcome(files: Iterable[FileState]) -> str:
    """How many files are in which state, in words."""
    counts: dict[str, int] = {}
    for file in files:
        counts[file.state] = counts.get(file.state, 0) + 1
    return ", ".join(f"{count} {state}" for state, count in counts.items())


class Watch:
    """Remembers, over many snapshots, the files that were in work, and what of them was told already."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._told: dict[tuple[str, int], tuple[object, ...]] = {}
        self._files: dict[tuple[str, int], FileState] = {}
        self._begun = time.monotonic()
        self.snapshot = observer.snapshot()
        self.over = False

    def look(self) -> list[FileState]:
        """Look once more: what has changed of the files that are, or were, in work; with a name, of all that have it.

        PostgreSQL may be away meanwhile: then nothing has changed, and that is a problem of the snapshot.

        Raises:
            InputError: PostgreSQL refuses.
        """
        try:
            self.snapshot = self._observer.snapshot([file.version for file in self._files.values()])
        except TransientError as error:
            self.snapshot = replace(self.snapshot, problems=(shown(str(error)),))
            return []
        changed = []
        for file in reversed(self.snapshot.files):
            key = _key(file.version)
            if not file.in_work and key not in self._files and self._observer.name is None:
                continue
            self._files[key] = file
            if self._told.get(key) != stage(file):
                self._told[key] = stage(file)
                changed.append(file)
        if self._is_left_alone:
            self.snapshot = replace(self.snapshot, problems=(*self.snapshot.problems, _LEFT_ALONE))
        self.over = not self.snapshot.in_work and not self._observer.may_overlook_uploads
        return changed

    @property
    def _is_left_alone(self) -> bool:
        """Whether nothing but uploads waits, and a sensor would have seen them by now."""
        waited = time.monotonic() - self._begun > _LOOKS_MISSED * WorkSettings().sensor_seconds
        return waited and all(file.record is None for file in self._files.values()) and self.snapshot.in_work

    @property
    def files(self) -> tuple[FileState, ...]:
        """What was watched: of each name the newest generation."""
        return tuple({name: file for (name, _), file in sorted(self._files.items())}.values())
