"""Detects jobs that cannot start."""

import time
from collections.abc import Callable

from pachyderm_sdk import Client
from pachyderm_sdk.api import pps

from qa_platform.batches.log_lines import LogLines
from qa_platform.clients.pachyderm import IN_PROGRESS, NOT_STARTING, pipeline_state

# How often a job may restart because its program does not start, before it is stopped.
RESTARTS = 5
_PIPELINE_SECONDS = 5.0
# How many jobs of a pipeline are searched for one that blocks the others.
_JOBS = 50


class CannotStart(Exception):
    """A job could not start for too long. The message is the reason."""


def waits_for(client: Client, info: pps.JobInfo) -> str:
    """Why a job's workers do not run, according to its pipeline; "" if nothing is known to be wrong."""
    pipeline = client.pps.inspect_pipeline(pipeline=info.job.pipeline)
    if pps.PipelineState(pipeline.state) not in NOT_STARTING:
        return ""
    state = pipeline_state(pipeline)
    return f"the workers of pipeline {info.job.pipeline.name} do not start ({state}): {pipeline.reason or 'no reason given'}"


class Start:
    """Watches whether a job can start.

    Args:
        patience: seconds for which its workers may be unable to start.
        waiting: called with what it waits for, "" when it continues.
    """

    def __init__(self, client: Client, job: pps.Job, *, patience: float, waiting: Callable[[str], object]) -> None:
        self._client = client
        self._job = job
        self._patience = patience
        self._waiting = waiting
        self._done = -1
        self._restarts = 0
        self._others: dict[str, int] = {}
        self._reason = ""
        self._since = self._next = time.monotonic()

    def look(self, info: pps.JobInfo, lines: LogLines) -> None:
        """Check the job, which has not ended.

        Raises:
            CannotStart: it could not start for too long.
        """
        if (done := info.data_processed + info.data_skipped) > self._done:
            # An adopted job may have restarted before and still done its work.
            self._restarts = info.restart if done else 0
            self._done = done
        if info.restart - self._restarts >= RESTARTS:
            last_line = f"; last log line: {lines.last}" if lines.last else ""
            raise CannotStart(f"{self._no_start}: the job restarted {info.restart} times{last_line}")
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _PIPELINE_SECONDS
        if info.state == pps.JobState.JOB_CREATED and (before := self._job_that_cannot_start()):
            raise CannotStart(f"{self._no_start}: job {before}, which this one waits for, keeps restarting")
        self._tell(waits_for(self._client, info))
        if self._reason and time.monotonic() - self._since > self._patience:
            raise CannotStart(self._reason)

    def is_over(self) -> None:
        """Note that the job has ended."""
        self._tell("")

    @property
    def _no_start(self) -> str:
        return f"the program of pipeline {self._job.pipeline.name} does not start"

    def _job_that_cannot_start(self) -> str:
        """The id of another job of the pipeline that keeps restarting and blocks this one; "" if there is none."""
        for other in self._client.pps.list_job(pipeline=self._job.pipeline, number=_JOBS):
            if other.job.id != self._job.id and other.state in IN_PROGRESS and not other.data_processed:
                first = self._others.setdefault(other.job.id, other.restart)
                if other.restart >= RESTARTS and other.restart > first:
                    return str(other.job.id)
        return ""

    def _tell(self, reason: str) -> None:
        if bool(reason) != bool(self._reason):
            self._since = time.monotonic()
        if reason != self._reason:
            self._reason = reason
            self._waiting(reason)
