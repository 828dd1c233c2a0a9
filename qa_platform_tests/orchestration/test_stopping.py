"""The code location is stopped, as by Compose, during a run: the run is asked to end, or is found to be gone."""

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import pytest
import yaml  # type: ignore[import-untyped]
from dagster._core.test_utils import create_run_for_test, create_test_daemon_workspace_context
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import GrpcServerTarget
from dagster._daemon.monitoring.run_monitoring import execute_run_monitoring_iteration
from pachyderm_sdk.api import pps

from qa_platform.contract import ANSWER_PIPELINE, FileStatus
from qa_platform.embedded.stack import Stack
from qa_platform_tests.batches.test_run import ROWS, go, jobs_in_progress, running_job, some_rows, states
from qa_platform_tests.flow import Flow, flow, let_the_claim_run_out, wait_until

__all__ = ["flow", "go"]

# Three starts of the code location and two runs take minutes on a busy machine.
pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(600)]

PROJECT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((PROJECT / "deploy" / "compose.yaml").read_text())
SERVICE = COMPOSE["services"]["code-location"]
GRACE_SECONDS = 60 * int(SERVICE["stop_grace_period"].removesuffix("m"))


@dataclass
class CodeLocation:
    """Compose's code location: its command, on a port of the test's own, in a process group of its own, as an init process starts it."""

    process: "subprocess.Popen[bytes]"

    def stop(self) -> int:
        """Send SIGTERM to whom the container's init process sends it; the exit status."""
        if COMPOSE["x-platform"]["init"] and COMPOSE["x-platform"]["environment"].get("TINI_KILL_PROCESS_GROUP"):
            os.killpg(self.process.pid, signal.SIGTERM)
        else:
            self.process.terminate()
        return self.process.wait(GRACE_SECONDS)

    def kill(self) -> None:
        """End all processes at once, as when the grace period is over, or the machine loses power."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class Deployment:
    """A Dagster whose runs are processes of the code location, configured by the project's dagster.yaml."""

    instance: dg.DagsterInstance
    environment: dict[str, str]
    port: int

    @contextmanager
    def code_location(self) -> Iterator[CodeLocation]:
        words = [word.replace("0.0.0.0", "127.0.0.1").replace("3030", str(self.port)) for word in SERVICE["command"]]
        command = [sys.executable, "-m", *words]
        location = CodeLocation(subprocess.Popen(command, env=self.environment, start_new_session=True))
        try:
            yield location
        finally:
            location.kill()

    @contextmanager
    def workspace(self) -> Iterator[WorkspaceProcessContext]:
        """What Dagster's daemon knows of the code location, once it answers."""
        target = GrpcServerTarget(host="127.0.0.1", port=self.port, socket=None, location_name="qa-platform")
        wait_until(self._answers, "the code location answers")
        with create_test_daemon_workspace_context(target, self.instance) as workspace:
            yield workspace

    def _answers(self) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    def launch(self) -> str:
        """Start a run in the code location; its id."""
        with self.workspace() as process:
            workspace = process.create_request_context()
            repository = next(iter(workspace.get_code_location("qa-platform").get_repositories().values()))
            job = repository.get_full_job("answer_pending_files")
            run = create_run_for_test(
                self.instance, job.name, remote_job_origin=job.get_remote_origin(), job_code_origin=job.get_python_origin()
            )
            return self.instance.launch_run(run.run_id, workspace).run_id

    def monitor(self) -> None:
        """One look at all runs, as run monitoring takes it."""
        with self.workspace() as workspace:
            errors = list(execute_run_monitoring_iteration(workspace, logging.getLogger(__name__)))
        assert not any(errors)

    def status(self, run_id: str) -> dg.DagsterRunStatus:
        run = self.instance.get_run_by_id(run_id)
        assert run
        return run.status


@pytest.fixture
def deployment(flow: Flow, stack: Stack) -> Iterator[Deployment]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # An instance reads the environment's DAGSTER_PG_URL, which `flow` sets.
    with dg.DagsterInstance.from_config(stack.variables["DAGSTER_HOME"]) as instance:
        yield Deployment(instance, {**stack.environment, "QA_LEASE_SECONDS": "10"}, port)


def test_a_run_in_a_stopped_code_location_is_told_and_in_a_killed_one_is_found(deployment: Deployment, flow: Flow, go: Path) -> None:
    version = flow.upload("stopped.csv", some_rows("Ort"))
    with deployment.code_location() as location:
        told = deployment.launch()
        job_id = wait_until(lambda: running_job(version), "the job runs")
        deployment.monitor()
        assert deployment.status(told) is dg.DagsterRunStatus.STARTED
        assert location.stop() == 0
    assert deployment.status(told) is dg.DagsterRunStatus.FAILURE
    assert (jobs_in_progress(), states(job_id)[ANSWER_PIPELINE]) == ([], pps.JobState.JOB_KILLED)
    record = flow.record(version)
    assert (record.status, record.claim_owner, record.attempts) == (FileStatus.PENDING, "", 0)

    with deployment.code_location() as location:
        lost = deployment.launch()
        job_id = wait_until(lambda: running_job(version), "its job runs")
        location.kill()
    assert deployment.status(lost) is dg.DagsterRunStatus.STARTED
    with deployment.code_location():
        deployment.monitor()
    assert deployment.status(lost) is dg.DagsterRunStatus.FAILURE
    assert states(job_id)[ANSWER_PIPELINE] == pps.JobState.JOB_RUNNING, "it is adopted by the next run"
    # The job waits for the file until then: one that ended before the claim did would need no run.
    let_the_claim_run_out(version)
    (request,) = flow.tick()
    go.touch()
    assert flow.run(request).success
    assert (flow.record(version).pachyderm_job, len(flow.rows(version.name))) == (job_id, ROWS)
