"""Observes the files: the records in PostgreSQL, the uploads that no sensor has seen yet, and the progress of the Pachyderm jobs."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Generic, TypeVar

from qa_platform.cli.terminal import one_line
from qa_platform.clients.deadline import within
from qa_platform.contract import INCOMING, FileStatus, FileVersion, file_id
from qa_platform.errors import InputError, QaPlatformError
from qa_platform.ledger import FileRecord, Ledger
from qa_platform.settings import BucketSettings, PachydermSettings, PostgresSettings, WorkSettings

# States that no record has: an upload that is not recorded yet, and a running file whose Pachyderm job cannot make progress.
UPLOADED = "uploaded"
WAITING = "waiting"
# The stages of a running file: its CSV is read, its batch is answered, its batch is loaded.
READING, ANSWERING, LOADING = "reading", "answering", "loading"
_GONE = "it was overwritten or deleted before a sensor saw it"
# A listing, or the progress of the jobs, is left out of the snapshot if it takes longer.
_TIMEOUT_SECONDS = 10.0
# Back off for this many times the duration of the last call, at least this long; after a failure, for a fixed time.
_BACKOFF_FACTOR = 10.0
_LEAST_BACKOFF_SECONDS = 0.5
_FAILED_BACKOFF_SECONDS = 10.0

_IN_PROGRESS = (FileStatus.PENDING, FileStatus.RUNNING, FileStatus.LOADED)
_ENDED_WITHOUT_ANSWERS = (FileStatus.FAILED, FileStatus.REJECTED)

if TYPE_CHECKING:
    from qa_platform.batches.contents import Contents

T = TypeVar("T")


@dataclass(frozen=True)
class FileState:
    """One generation of a file.

    Args:
        record: None until a sensor has seen it.
        progress: rows done and rows in total, while that is known.
        batch: the same for its whole batch, which is answered and loaded as one.
        left: the estimated time until its batch is answered; None if it cannot be estimated.
        is_gone: it left the bucket before any sensor saw it.
    """

    version: FileVersion
    record: FileRecord | None = None
    progress: tuple[int, int] | None = None
    batch: tuple[int, int] | None = None
    left: timedelta | None = None
    is_gone: bool = False

    @property
    def state(self) -> str:
        if self.record is None:
            return FileStatus.SUPERSEDED if self.is_gone else UPLOADED
        return WAITING if self.is_waiting else str(self.record.status)

    @property
    def stage(self) -> str:
        """The stage of a running file, while that is known; otherwise its state."""
        if self.state != FileStatus.RUNNING or self.record is None:
            return self.state
        if not self.record.pachyderm_commit:
            return READING
        if self.batch is None:
            return self.state
        done, rows = self.batch
        return ANSWERING if done < rows else LOADING

    @property
    def is_waiting(self) -> bool:
        """Whether its Pachyderm job cannot make progress. The reason is in ``note``."""
        return self.record is not None and self.record.status is FileStatus.RUNNING and bool(self.record.error)

    @property
    def in_progress(self) -> bool:
        # A file that cannot be archived stays as it is until the cause is fixed.
        if self.record is None:
            return not self.is_gone
        return self.record.status in _IN_PROGRESS and not self.record.archive_error

    @property
    def ended_without_answers(self) -> bool:
        """Whether it failed or was rejected."""
        return self.record is not None and self.record.status in _ENDED_WITHOUT_ANSWERS

    @property
    def note(self) -> str:
        """The reason for its state, on one line; "" if there is nothing to add."""
        if self.record is None:
            return _GONE if self.is_gone else ""
        error = one_line(self.record.error)
        if self.is_waiting:
            return f"waiting for Pachyderm: {error}"
        tried = f"attempt {self.record.attempts} failed" if self.record.attempts and self.in_progress else ""
        kept = f"its source stays in {INCOMING} for now: {one_line(self.record.archive_error)}" if self.record.archive_error else ""
        unwritten = f"its answered CSV is not in the bucket yet: {one_line(self.record.csv_error)}" if self.record.csv_error else ""
        return "; ".join(filter(None, (": ".join(part for part in (tried, error) if part), kept, unwritten)))


@dataclass(frozen=True)
class Snapshot:
    """The files at one moment, by PostgreSQL's clock.

    Args:
        problems: messages about what could not be observed.
        is_cut: there are more records than the observer's limit.
    """

    at: datetime
    files: tuple[FileState, ...]
    problems: tuple[str, ...] = ()
    is_cut: bool = False

    @property
    def in_progress(self) -> bool:
        return any(file.in_progress for file in self.files)


@dataclass(frozen=True)
class ObserverSettings:
    """How an observer reaches the bucket and Pachyderm."""

    bucket: BucketSettings
    pachyderm: PachydermSettings
    work: WorkSettings

    @staticmethod
    def from_environment() -> "ObserverSettings":
        return ObserverSettings(BucketSettings(), PachydermSettings(), WorkSettings())


@dataclass
class Observer:
    """Takes snapshots of all files, or of those with one name. It caches the results of slow calls.

    Args:
        name: the name to observe; None observes all files.
        limit: how many recorded files are observed, newest first. Files in progress are always observed.
        versions: observe these, and nothing else.
        settings: how to reach the bucket and Pachyderm.
    """

    settings: "ObserverSettings"
    name: str | None = None
    limit: int = 50
    versions: tuple[FileVersion, ...] = ()
    _unseen: "_Cached[list[FileVersion]]" = field(default_factory=lambda: _Cached("uploads that the sensor has not seen"))
    _progress: "_Cached[_Progress]" = field(default_factory=lambda: _Cached("the progress of the Pachyderm jobs"))
    _contents: dict[str, "Contents"] = field(default_factory=dict)

    def snapshot(self, also: Sequence[FileVersion] = ()) -> Snapshot:
        """The files, newest first: uploads that no sensor has seen, then the recorded files. All of ``versions`` are always included.

        Args:
            also: versions that are observed whatever their age.

        Raises:
            InputError: PostgreSQL refuses.
            TransientError: PostgreSQL is unavailable. An unavailable bucket or pachd is only a problem of the snapshot.
        """
        # The bucket before the ledger: a file leaves `incoming/` only once it is recorded.
        listed = self._unseen.ask(self._incoming)
        with Ledger(PostgresSettings()) as ledger:
            at = ledger.now()
            records, is_cut = self._records(ledger, also)
            known = {key_of(r.version) for r in records} | ledger.known([] if self.versions else listed or []).keys()
        running = [record for record in records if record.status is FileStatus.RUNNING and record.pachyderm_commit]
        progress = (self._progress.ask(lambda: self._measure(running)) or {}) if running else {}
        there = None if listed is None else {key_of(version) for version in listed}
        unseen = [version for version in self.versions or listed or [] if key_of(version) not in known]
        files = [FileState(version, is_gone=there is not None and key_of(version) not in there) for version in unseen]
        files += [FileState(r.version, r, *progress.get((r.pachyderm_commit, r.version.name), ())) for r in records]
        problems = tuple(filter(None, (self._unseen.problem, self._progress.problem if running else "")))
        return Snapshot(at, tuple(files), problems, is_cut)

    def _records(self, ledger: Ledger, also: Sequence[FileVersion]) -> tuple[list[FileRecord], bool]:
        """The recorded files, newest first, and whether older ones are left out."""
        if self.versions:
            return list(ledger.records(self.versions).values()), False
        # One more than is shown, to know whether records are left out.
        records = ledger.history(name=self.name, limit=self.limit + 1)
        is_cut = len(records) > self.limit
        records = records[: self.limit]
        if self.name is None:
            more = {**ledger.records(also), **{key_of(r.version): r for r in ledger.unfinished()}}
            there = {key_of(record.version) for record in records}
            others = (record for key, record in more.items() if key not in there)
            records += sorted(others, key=lambda record: record.created_at, reverse=True)
        return records, is_cut

    @property
    def observes_all(self) -> bool:
        return self.name is None and not self.versions

    @property
    def may_overlook_uploads(self) -> bool:
        """Whether a snapshot may lack uploads because the bucket is temporarily unavailable."""
        return self._unseen.is_unavailable and not self.versions

    def _incoming(self) -> list[FileVersion]:
        # Imported here: not every program that shows the state of files has a bucket.
        from qa_platform.clients import bucket
        from qa_platform.clients.refusals import bucket_errors

        settings, suffixes = self.settings.bucket, self.settings.work.suffixes
        with bucket_errors("looking into the bucket"):
            gcs_bucket = bucket.open_bucket(settings)
            if self.name is None:
                return list(bucket.list_incoming(gcs_bucket, suffixes))
            is_question_file = bucket.is_question_file(INCOMING + self.name, suffixes)
            version = bucket.find_incoming(gcs_bucket, self.name) if is_question_file else None
            return [version] if version else []

    def _measure(self, running: Sequence[FileRecord]) -> "_Progress":
        """The progress of the running files."""
        from qa_platform.batches.contents import contents, rows_done
        from qa_platform.clients.pachyderm import session

        done: dict[str, Mapping[str, int]] = {}
        with session(self.settings.pachyderm, "asking for the progress of the jobs") as client:
            commits = {record.pachyderm_commit for record in running}
            # Only these: a watch may last for weeks.
            self._contents = {commit: self._contents.get(commit) or contents(client, commit) for commit in commits}
            for commit in commits:
                done[commit] = rows_done(client, commit, self._contents[commit])
        progress = {}
        for record in running:
            commit, folder = record.pachyderm_commit, file_id(record.version.name)
            if rows := self._contents[commit].rows(folder):
                batch = sum(done[commit].values()), self._contents[commit].total_rows
                progress[commit, record.version.name] = (done[commit].get(folder, 0), rows), batch
        return progress


# (rows done, rows in total) of a file and of its batch, by commit and name.
_Progress = dict[tuple[str, str], tuple[tuple[int, int], tuple[int, int]]]


def key_of(version: FileVersion) -> tuple[str, int]:
    """The name and the generation, which identify a version."""
    return version.name, version.generation


class _Cached(Generic[T]):
    """An optional call: it has a deadline, and is repeated only after a multiple of its duration."""

    def __init__(self, what: str) -> None:
        self.problem = ""
        self.is_unavailable = False
        self._what = what
        self._next = 0.0
        self._last: T | None = None

    def ask(self, call: Callable[[], T]) -> T | None:
        """The result of the call, or the cached one; None after a failure of the platform or a timeout, which ``problem`` explains."""
        started = time.monotonic()
        if started < self._next:
            return self._last
        try:
            self._last, self.problem, self.is_unavailable = within(_TIMEOUT_SECONDS, call, self._what), "", False
            self._next = time.monotonic() + max(_LEAST_BACKOFF_SECONDS, _BACKOFF_FACTOR * (time.monotonic() - started))
        except (QaPlatformError, TimeoutError) as error:
            reason = one_line(str(error)) or f"no answer within {_TIMEOUT_SECONDS:.0f} s"
            self._last, self.problem, self.is_unavailable = None, f"not known: {self._what} ({reason})", not isinstance(error, InputError)
            self._next = time.monotonic() + _FAILED_BACKOFF_SECONDS
        return self._last
