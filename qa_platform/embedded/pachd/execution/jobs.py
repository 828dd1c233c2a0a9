"""Runs the jobs that are unfinished in the metadata, and stops those that are no longer."""

import logging
import shutil
import tempfile
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qa_platform.embedded.pachd.errors import PachError
from qa_platform.embedded.pachd.execution.job_run import JobRun
from qa_platform.embedded.pachd.execution.leftovers import Reaper, kill_leftovers
from qa_platform.embedded.pachd.execution.pods import Pods, PodSettings
from qa_platform.embedded.pachd.execution.worker import ServeWorker
from qa_platform.embedded.pachd.pps import Job, Pipeline, PipelineKey, PipelineState, Pps
from qa_platform.settings import EmbeddedPachdSettings

_LOG = logging.getLogger(__name__)
_MEMORY = Path("/dev/shm")
# After an error, such as that of a full disk, in seconds.
_PAUSE = 1.0


@dataclass(frozen=True)
class _Wanted:
    """The desired state in the metadata: pipelines as (key, version, stopped), unfinished jobs as (key, pipeline, version), oldest first.

    Keys are primary keys.
    """

    pipelines: list[tuple[int, int, int]]
    jobs: list[tuple[int, int, int]]


class Executor:
    """Runs jobs until ``stop``, with one thread per job in progress and one per worker.

    A pipeline works on as many jobs at a time as it has workers.
    """

    def __init__(self, pps: Pps, folder: Path, serve: ServeWorker, options: EmbeddedPachdSettings) -> None:
        kill_leftovers(folder)
        shutil.rmtree(folder, ignore_errors=True)
        # A folder per server: the reaper of a killed server must not kill this one's workers.
        self._folder = folder / uuid.uuid4().hex[:8]
        self._folder.mkdir(parents=True)
        secrets = Path(tempfile.mkdtemp(prefix="qa-pachd-", dir=_MEMORY if _MEMORY.is_dir() else None))
        self._reaper = Reaper(self._folder, remove=secrets)
        self._settings = PodSettings(
            self._folder, secrets, serve, options.pod_seconds, _names(options.no_start), _names(options.no_restart)
        )
        self._pps = pps
        self._stopping = threading.Event()
        self._seen: _Wanted | None = None
        self._runs: dict[int, JobRun] = {}
        self._pods: dict[int, Pods] = {}
        self._threads = [
            threading.Thread(target=self._supervise, name="jobs", daemon=True),
            threading.Thread(target=self._finish_commits, name="commits", daemon=True),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Kill the running processes. Unfinished jobs stay unfinished, and continue at the next start."""
        self._stopping.set()
        self._pps.store.metadata.wake()
        for thread in self._threads:
            thread.join(10)
        for run in list(self._runs.values()):
            run.cancel()
        for run in list(self._runs.values()):
            run.join(10)
        for pods in self._pods.values():
            pods.close()
        self._reaper.close()

    def alive(self) -> bool:
        return not self._stopping.is_set()

    def restart_datum(self, job: Job, filters: Sequence[str]) -> None:
        """Restart the datums that a job is working on and whose inputs have these paths or hashes.

        Raises:
            PachError: there is no such datum.
        """
        run = self._runs.get(job.pk)
        if run is None or not run.restart_datums(filters):
            raise PachError(f"datum matching filter {list(filters)} could not be found for job {job.pipeline}@{job.id}")

    def pods(self, key: PipelineKey) -> list[str]:
        """The names of a pipeline's current workers."""
        return [name for pods in list(self._pods.values()) if pods.pipeline.key == key for name in pods.names]

    def _supervise(self) -> None:
        while self.alive():
            wanted = self._pps.store.metadata.wait_until(self._look, alive=self.alive)
            if wanted is None:
                continue
            try:
                self._reconcile(wanted)
            except Exception:
                _LOG.exception("the pipelines cannot be brought to their state yet")
                self._stopping.wait(_PAUSE)
            else:
                self._seen = wanted

    def _look(self) -> _Wanted | None:
        wanted = _Wanted(self._pps.pipelines.versions(), self._pps.jobs.unfinished())
        if wanted != self._seen or any(pods.startable() for pods in self._pods.values()):
            return wanted
        return None

    def _reconcile(self, wanted: _Wanted) -> None:
        self._cancel_runs({pk for pk, _, _ in wanted.jobs})
        busy = {pipeline for _, pipeline, _ in wanted.jobs}
        for pk, version, stopped in wanted.pipelines:
            found = self._pps.pipelines.by_pk(pk)
            if found is not None and found.version == version:
                needed = not stopped and (pk in busy or not found.spec.autoscaling)
                self._scale(found, needed=needed)
                self._publish(found)
        self._dismiss(self._pods.keys() - {pk for pk, _, _ in wanted.pipelines})
        self._admit(wanted)

    def _cancel_runs(self, unfinished: set[int]) -> None:
        for pk in [pk for pk in self._runs if pk not in unfinished]:
            self._runs.pop(pk).cancel()

    def _scale(self, pipeline: Pipeline, *, needed: bool) -> None:
        """Start or dismiss a pipeline's workers."""
        pods = self._pods.get(pipeline.pk)
        if pods is not None and (not needed or pods.pipeline.version != pipeline.version):
            self._dismiss({pipeline.pk})
            pods = None
        if not needed:
            return
        if pods is None:
            pods = self._pods[pipeline.pk] = Pods(pipeline, self._pps, self._settings, self._pps.store.metadata.wake)
        pods.try_start()

    def _dismiss(self, pipelines: set[int]) -> None:
        for pk in pipelines:
            self._pods.pop(pk).close()

    def _publish(self, pipeline: Pipeline) -> None:
        state, reason = self._state(pipeline)
        if (state, reason) != (pipeline.state, pipeline.reason):
            self._pps.pipelines.set_state(pipeline.pk, pipeline.version, state, reason)

    def _state(self, pipeline: Pipeline) -> tuple[PipelineState, str]:
        pods = self._pods.get(pipeline.pk)
        if pods is None:
            return (PipelineState.PAUSED if pipeline.stopped else PipelineState.STANDBY), ""
        if pods.problem:
            return PipelineState.CRASHING, pods.problem
        starting = not pods.ready and not pipeline.spec.autoscaling
        return (PipelineState.STARTING if starting else PipelineState.RUNNING), ""

    def _admit(self, wanted: _Wanted) -> None:
        """Start the jobs whose turn it is."""
        working: dict[int, int] = {}
        for pk, pipeline, version in wanted.jobs:
            pods = self._pods.get(pipeline)
            if pods is None or not pods.ready or pods.pipeline.version != version:
                continue
            working[pipeline] = working.get(pipeline, 0) + 1
            if working[pipeline] <= pods.pipeline.spec.parallelism and pk not in self._runs:
                run = self._runs[pk] = JobRun(pk, self._pps, pods, self.alive)
                run.start()

    def _finish_commits(self) -> None:
        while self.alive():
            try:
                self._pps.pfs.finish_next(alive=self.alive)
            except Exception:
                _LOG.exception("a commit cannot be finished yet")
                self._stopping.wait(_PAUSE)


def _names(text: str) -> frozenset[str]:
    return frozenset(name.strip() for name in text.split(",") if name.strip())
