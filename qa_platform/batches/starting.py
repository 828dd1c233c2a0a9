"""Detects jobs that cannot start."""

import time
from collections.abc import Callable, Sequence
from datetime import datetime

from pachyderm_sdk import Client
from pachyderm_sdk.api import pps

from qa_platform.batches.log_lines import LogLines
from qa_platform.clients.pachyderm import IN_PROGRESS, NOT_STARTING, have_workers, pipeline_state
from qa_platform.text import escaped

# How often a job may restart because its program does not start, before it is stopped.
RESTARTS_BEFORE_STOP = 5
_PIPELINE_SECONDS = 5.0
# How many jobs of a pipeline are searched for one that blocks the others.
_JOBS = 50
# How long a job may wait for its workers before people are told.
_QUIET_SECONDS = 60.0


class CannotStart(Exception):
    """A job could not start for too long. The message is the reason."""


class WorkerKilled(CannotStart):
    """A job's workers are killed again and again while they work on the same datum.

    Args:
        path: the path of the datum.
        has_worked: other datums of the job were processed.
    """

    def __init__(self, message: str, *, path: str, has_worked: bool) -> None:
        super().__init__(message)
        self.path = path
        self.has_worked = has_worked


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
        self._restarts = self._seen_restart = 0
        self._others: dict[str, int] = {}
        # When workers began with each datum since the last progress.
        self._begun: dict[str, set[datetime]] = {}
        self._reason = ""
        self._since = self._next = self._idle_since = self._restarted_since = time.monotonic()

    def look(self, info: pps.JobInfo, lines: LogLines) -> None:
        """Check the job, which has not ended.

        Raises:
            CannotStart: it could not start for too long.
        """
        if (done := info.data_processed + info.data_skipped) > self._done:
            # An adopted job may have restarted before and still done its work.
            self._restarts = info.restart if done else 0
            self._done = done
            self._begun.clear()
        if info.restart == self._restarts:
            self._restarted_since = time.monotonic()
        # The program has processed datums, so it can start. The restarts have a passing cause, such as Kubernetes, the storage or a
        # sidecar.
        has_worked = self._done > 0 and time.monotonic() - self._restarted_since <= self._patience
        if info.restart - self._restarts >= RESTARTS_BEFORE_STOP and not has_worked:
            last_line = f"; last log line: {lines.last}" if lines.last else ""
            raise CannotStart(f"{self._no_start}: the job restarted {info.restart} times{last_line}")
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _PIPELINE_SECONDS
        others = self._other_jobs()
        if info.state == pps.JobState.JOB_CREATED and (before := self._one_that_cannot_start(others)):
            raise CannotStart(f"{self._no_start}: job {before}, which this one waits for, keeps restarting")
        if info.state == pps.JobState.JOB_RUNNING:
            self._look_for_killed_workers(info)
        jobs = [info, *others]
        self._tell(self._reason_of_pipeline(jobs) or self._reason_of_hang(jobs))
        if self._reason and time.monotonic() - self._since > self._patience:
            raise CannotStart(self._reason)

    def end(self) -> None:
        """Note that the job has ended."""
        self._tell("")

    @property
    def _no_start(self) -> str:
        return f"the program of pipeline {self._job.pipeline.name} does not start"

    def _reason_of_pipeline(self, jobs: Sequence[pps.JobInfo]) -> str:
        """Why the workers do not run, according to the pipeline; "" if nothing is known to be wrong."""
        pipeline = self._client.pps.inspect_pipeline(pipeline=self._job.pipeline)
        if pps.PipelineState(pipeline.state) not in NOT_STARTING or have_workers(self._client, jobs):
            return ""
        reason = pipeline.reason or "no reason given"
        return f"the workers of pipeline {self._job.pipeline.name} do not start ({pipeline_state(pipeline)}): {reason}"

    def _reason_of_hang(self, jobs: Sequence[pps.JobInfo]) -> str:
        """Why no job of the pipeline has begun for long; "" if one has.

        Volumes that cannot be mounted and containers that crash in a loop do not change the pipeline's state.
        """
        now = time.monotonic()
        if any(job.state != pps.JobState.JOB_CREATED for job in jobs):
            self._idle_since = now
        if now - self._idle_since <= min(_QUIET_SECONDS, self._patience / 2):
            return ""
        name = self._job.pipeline.name
        return f"no job of pipeline {name} has started; `kubectl describe pods -l pipelineName={name}` may say why"

    def _look_for_killed_workers(self, info: pps.JobInfo) -> None:
        """Count how often the workers have begun with each datum since the last progress.

        Kubernetes kills all of a container that exceeds its memory, and starts it again. Pachyderm counts neither an attempt nor a restart.

        Raises:
            WorkerKilled: they began with one more often than Pachyderm attempts it.
        """
        if info.restart != self._seen_restart:
            self._seen_restart = info.restart
            self._begun.clear()
        details = self._client.pps.inspect_job(job=self._job, details=True).details
        for worker in details.worker_status:
            for file in worker.datum_status.data[:1]:
                begun = self._begun.setdefault(file.path, set())
                begun.add(worker.datum_status.started)
                if len(begun) > max(RESTARTS_BEFORE_STOP, details.datum_tries):
                    name = self._job.pipeline.name
                    raise WorkerKilled(
                        f"the workers of pipeline {name} began {len(begun)} times with {escaped(file.path)} and did not end; if they lack "
                        f"memory, raise resource_limits (`kubectl describe pods -l pipelineName={name}`)",
                        path=file.path,
                        has_worked=self._done > 0,
                    )

    def _other_jobs(self) -> list[pps.JobInfo]:
        """The other jobs of the pipeline that have not ended."""
        jobs = self._client.pps.list_job(pipeline=self._job.pipeline, number=_JOBS)
        return [other for other in jobs if other.job.id != self._job.id and other.state in IN_PROGRESS]

    def _one_that_cannot_start(self, others: Sequence[pps.JobInfo]) -> str:
        """The id of a job that keeps restarting and blocks this one; "" if there is none."""
        for other in others:
            if not other.data_processed:
                first = self._others.setdefault(other.job.id, other.restart)
                if other.restart >= RESTARTS_BEFORE_STOP and other.restart > first:
                    return str(other.job.id)
        return ""

    def _tell(self, reason: str) -> None:
        if bool(reason) != bool(self._reason):
            self._since = time.monotonic()
        if reason != self._reason:
            self._reason = reason
            self._waiting(reason)
