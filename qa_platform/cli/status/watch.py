"""Follows files over many snapshots, for ``qa-platform status --watch``."""

import time
from collections import defaultdict
from dataclasses import replace
from datetime import timedelta

from qa_platform.batches.pace import Pace
from qa_platform.cli.status.observe import ANSWERING, FileState, Observer, Snapshot, key_of
from qa_platform.cli.terminal import one_line
from qa_platform.errors import TransientError

# If the uploads are still unseen after this many sensor intervals, the watch suggests what to check.
_LOOKS_MISSED = 3
_OVERLOOKED = "no sensor has seen these uploads yet: does Dagster's daemon run, and is the sensor incoming_files switched on?"


def facts(file: FileState) -> tuple[object, ...]:
    """The facts of a file whose change is worth a log line. Progress counts in tenths."""
    done, total = file.progress or (0, 0)
    record = file.record
    return (file.stage, record and (record.attempts, record.error, record.load_id), 10 * done // total if total else None)


class Watch:
    """Follows files over many snapshots until none is in progress, and reports each change once."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._patience = _LOOKS_MISSED * observer.settings.work.sensor_seconds
        self._told: dict[tuple[str, int], tuple[object, ...]] = {}
        self._files: dict[tuple[str, int], FileState] = {}
        self._paces: defaultdict[str, Pace] = defaultdict(Pace)
        self._started = time.monotonic()
        self.snapshot = observer.snapshot()
        self.over = False

    def look(self) -> list[FileState]:
        """Take a snapshot, and return the changed files.

        If the observer observes all files, only those that are or were in progress count. While PostgreSQL is unavailable, nothing has
        changed, and the snapshot has a problem.

        Raises:
            InputError: PostgreSQL refuses.
        """
        try:
            last = [file.version for file in self._files.values() if file.in_progress]
            self.snapshot = self._with_time_left(self._observer.snapshot(last))
        except TransientError as error:
            self.snapshot = replace(self.snapshot, problems=(one_line(str(error)),))
            return []
        changed = []
        for file in reversed(self.snapshot.files):
            key = key_of(file.version)
            if not file.in_progress and key not in self._files and self._observer.observes_all:
                continue
            self._files[key] = file
            if self._told.get(key) != facts(file):
                self._told[key] = facts(file)
                changed.append(file)
        if self._is_overlooked:
            self.snapshot = replace(self.snapshot, problems=(*self.snapshot.problems, _OVERLOOKED))
        self.over = not self.snapshot.in_progress and not self._observer.may_overlook_uploads
        return changed

    def _with_time_left(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with the time left of the files that are being answered, if it can be estimated."""
        files = []
        commits = {file.record.pachyderm_commit for file in snapshot.files if file.record and file.in_progress}
        for ended in self._paces.keys() - commits:
            del self._paces[ended]
        for file in snapshot.files:
            if file.stage == ANSWERING and file.record and file.batch:
                seconds = self._paces[file.record.pachyderm_commit].seconds_left(*file.batch, at=snapshot.at.timestamp())
                file = replace(file, left=None if seconds is None else timedelta(seconds=seconds))
            files.append(file)
        return replace(snapshot, files=tuple(files))

    @property
    def _is_overlooked(self) -> bool:
        """Whether the sensor should have seen the uploads by now, and has seen none of them."""
        waited = time.monotonic() - self._started > self._patience
        return waited and all(file.record is None for file in self._files.values()) and self.snapshot.in_progress

    @property
    def files(self) -> tuple[FileState, ...]:
        """The newest generation of each watched name."""
        return tuple({name: file for (name, _), file in sorted(self._files.items())}.values())
