"""The run launcher for a single server or a laptop, where runs are processes of the code location."""

import dagster as dg
from dagster._core.errors import DagsterUserCodeUnreachableError
from dagster._core.launcher import CheckRunHealthResult, DefaultRunLauncher, WorkerStatus
from dagster._grpc.types import GetCurrentRunsResult


class CodeLocationRunLauncher(DefaultRunLauncher):
    """Dagster's own launcher, which also knows whether a run is still alive.

    If a process is killed together with its code location, its run stays "started". Run monitoring asks this launcher, marks such a run
    as failed and has it run again.
    """

    @property
    def supports_check_run_worker_health(self) -> bool:
        return True

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """Whether the code location that started the run still works on it. While it cannot be reached, the run counts as running."""
        client = self._get_grpc_client_for_termination(run.run_id)
        if client is None:
            return CheckRunHealthResult(WorkerStatus.RUNNING, "the run has ended, or no code location started it")
        try:
            found = dg.deserialize_value(client.get_current_runs(), GetCurrentRunsResult)
        except DagsterUserCodeUnreachableError:
            return CheckRunHealthResult(WorkerStatus.RUNNING, "the code location cannot be reached")
        if run.run_id in found.current_runs:
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        return CheckRunHealthResult(WorkerStatus.NOT_FOUND, "the code location was restarted, and its process is gone")
