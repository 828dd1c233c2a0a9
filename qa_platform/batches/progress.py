"""The progress of a job."""

import time
from collections.abc import Collection
from dataclasses import dataclass

from pachyderm_sdk import Client
from pachyderm_sdk.api import pps

from qa_platform.batches.contents import Contents, done_paths
from qa_platform.batches.pace import Pace
from qa_platform.clients.pachyderm import state_name

# The minimum seconds between two readings, and the pause after a reading as a multiple of its duration.
_PROGRESS_SECONDS = 1.0
_PROGRESS_REST = 20.0


@dataclass(frozen=True)
class Progress:
    """The progress of a job. ``seconds_left`` is None while it cannot be estimated.

    ``rows`` counts the datums that are done and the shards that are answered according to the job's log.
    """

    pipeline: str
    job_id: str
    state: str
    datums: int
    datums_total: int
    rows: int
    rows_total: int
    seconds_left: float | None

    def __str__(self) -> str:
        left = "" if self.seconds_left is None else f", about {self.seconds_left:.0f} s left"
        rows = f", {self.rows} of {self.rows_total} rows" if self.rows_total else ""
        return f"{self.pipeline}: {self.state}, {self.datums} of {self.datums_total} datums done{rows}{left}"


class Meter:
    """Turns Pachyderm's information about a job into `Progress`. The speed is measured on the rows done while it watches."""

    def __init__(self, client: Client, contents: Contents) -> None:
        self._client = client
        self._contents = contents
        self._pace = Pace()
        self._last: tuple[object, ...] = ()
        self._next = 0.0

    def read(self, info: pps.JobInfo, logged: Collection[str]) -> Progress | None:
        """The progress, or None if nothing changed or it was read a moment ago. A change of state is always returned.

        Args:
            logged: the shards that are answered according to the job's log. Pachyderm counts datums as done only when their whole set is.
        """
        state, datums = state_name(info.state), info.data_processed + info.data_skipped
        now, seen = time.monotonic(), (info.state, datums, info.data_total, len(logged))
        if seen == self._last or (now < self._next and self._last[:1] == (info.state,)):
            return None
        rows = self._rows(info, logged)
        self._last, self._next = seen, time.monotonic() + max(_PROGRESS_SECONDS, _PROGRESS_REST * (time.monotonic() - now))
        running = info.state == pps.JobState.JOB_RUNNING
        left = self._pace.seconds_left(rows, self._contents.total_rows, at=time.monotonic()) if running else None
        return Progress(info.job.pipeline.name, info.job.id, state, datums, info.data_total, rows, self._contents.total_rows, left)

    def _rows(self, info: pps.JobInfo, logged: Collection[str]) -> int:
        if info.state == pps.JobState.JOB_SUCCESS:
            return self._contents.total_rows
        done = set(logged)
        if info.data_processed + info.data_skipped:
            done.update(done_paths(self._client, info))
        return sum(map(self._contents.rows, done))
