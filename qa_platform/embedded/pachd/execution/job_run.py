"""Runs one job from its first to its last state."""

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence

from qa_platform.embedded.pachd.errors import NotFound
from qa_platform.embedded.pachd.execution.context import JobContext
from qa_platform.embedded.pachd.execution.datums import Source, enumerate_datums
from qa_platform.embedded.pachd.execution.pods import Pods, Task, wait_for
from qa_platform.embedded.pachd.execution.worker import SetError
from qa_platform.embedded.pachd.pfs import BranchKey, Commit, Wait
from qa_platform.embedded.pachd.pps import Datum, DatumState, Job, JobState, Pps
from qa_platform.embedded.pachd.spec import PipelineSpec
from qa_platform.embedded.pachd.storage.trees import TreeError

_LOG = logging.getLogger(__name__)
# Pauses before a job restarts, in seconds.
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 60.0
_PAUSE_GROWS = 1.5
# Between attempts to record the end of a job, in seconds.
_END_PAUSE = 1.0


class JobRun:
    """A thread that runs a job with the pipeline's workers. The workers have started, and it is the job's turn."""

    def __init__(self, pk: int, pps: Pps, pods: Pods, alive: Callable[[], bool]) -> None:
        self._pk = pk
        self._pps = pps
        self._pods = pods
        self._server_alive = alive
        self._cancelled = threading.Event()
        self._context: JobContext | None = None
        self._timer: threading.Timer | None = None
        self._thread = threading.Thread(target=self._run, name=f"job-{pk}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def restart_datums(self, filters: Sequence[str]) -> bool:
        """As `JobContext.restart`. Returns False if no such datum is in progress."""
        return self._context is not None and self._context.restart(filters)

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def cancel(self) -> None:
        """Kill the running processes. The job's state stays as it is."""
        self._cancelled.set()
        if self._context is not None:
            self._context.cancel()
        self._pps.store.metadata.wake()

    def _alive(self) -> bool:
        return not self._cancelled.is_set() and self._server_alive()

    def _run(self) -> None:
        try:
            self._work(self._pps.jobs.by_pk(self._pk))
        except NotFound as error:
            self._end_at_last(JobState.FAILURE, str(error))
        except Exception as error:
            if self._alive():
                _LOG.exception("job %s failed", self._pk)
                self._end_at_last(JobState.FAILURE, f"{type(error).__name__}: {error}")
        finally:
            if self._timer is not None:
                self._timer.cancel()

    def _end(self, state: JobState, reason: str, *, output: str | None = None, meta: str | None = None) -> None:
        with contextlib.suppress(NotFound):
            self._pps.jobs.end(self._pk, state, reason, output=output, meta=meta)

    def _end_at_last(self, state: JobState, reason: str) -> None:
        """End the job as soon as that can be recorded: the disk may be full."""
        while self._alive():
            try:
                self._end(state, reason)
            except Exception as error:
                _LOG.warning("job %s cannot be ended yet: %s", self._pk, error)
                self._cancelled.wait(_END_PAUSE)
            else:
                return

    def _work(self, job: Job) -> None:
        self._pps.jobs.set_state(job.pk, JobState.STARTING)
        spec = self._pods.pipeline.spec
        inputs = self._wait_for_inputs(job)
        if not self._alive():
            return
        if failed := _failed_inputs(spec, inputs):
            self._end(JobState.UNRUNNABLE, f"unrunnable because the following upstream pipelines failed: {', '.join(failed)}")
            return
        self._pps.jobs.set_state(job.pk, JobState.RUNNING)
        self._start_timer(spec)
        self._context = self._make_context(job, inputs)
        if not self._cancelled.is_set():
            self._repeat(self._context, inputs)

    def _wait_for_inputs(self, job: Job) -> list[Commit]:
        for commit in self._pps.pfs.provenance(job.commit):
            self._pps.pfs.wait(commit, Wait.FINISHED, alive=self._alive)
        return self._pps.pfs.provenance(job.commit)

    def _start_timer(self, spec: PipelineSpec) -> None:
        if spec.job_timeout is None:
            return
        reason = f"job exceeded timeout ({spec.job_timeout:g} s)"
        self._timer = threading.Timer(spec.job_timeout, lambda: self._end(JobState.KILLED, reason))
        self._timer.daemon = True
        self._timer.start()

    def _make_context(self, job: Job, inputs: Sequence[Commit]) -> JobContext:
        return JobContext(
            job=job,
            spec=self._pods.pipeline.spec,
            roots={(str(commit.repo), commit.id): commit.root for commit in inputs},
            spec_commit=self._pods.pipeline.spec_commit,
            secrets=self._pods.secrets,
            no_start=self._pods.no_start,
            no_restart=self._pods.no_restart,
        )

    def _repeat(self, context: JobContext, inputs: Sequence[Commit]) -> None:
        """Repeat the job until every datum set could be processed."""
        pause = _FIRST_PAUSE
        while self._alive():
            try:
                self._process(context, inputs)
                return
            except SetError as error:
                if not self._alive():
                    return
                _LOG.info("job %s@%s begins again in %.1f s: %s", context.job.pipeline, context.job.id, pause, error)
                self._pps.jobs.restart(self._pk)
            self._cancelled.wait(pause)
            pause = min(_LONGEST_PAUSE, pause * _PAUSE_GROWS)

    def _process(self, context: JobContext, inputs: Sequence[Commit]) -> None:
        """Process the datums that the base job does not have, without waiting for it. Once it has ended, process the rest."""
        self._enumerate(context.spec, inputs)
        base = self._pps.jobs.base(context.job.commit)
        known: set[str] = set()
        if base is not None:
            self._pps.jobs.wait_enumerated(base.pk, alive=self._alive)
            known = self._pps.datums.ids(base.pk)
        self._do_sets(context, [one for one in self._pending() if one.id not in known])
        if self._alive() and self._pps.datums.first_failed(self._pk) is None:
            self._take_over(context.spec, base)
            self._do_sets(context, self._pending())
        if self._alive():
            with self._pps.store.gate.writing():
                self._finish()

    def _enumerate(self, spec: PipelineSpec, inputs: Sequence[Commit]) -> None:
        by_branch = {BranchKey(commit.repo, commit.branch): commit for commit in inputs}

        def source(branch: BranchKey) -> Source:
            commit = by_branch.get(branch) or next(commit for commit in inputs if commit.repo == branch.repo)
            return Source(commit.id, commit.root, commit.finished)

        self._pps.datums.record(self._pk, enumerate_datums(self._pps.store.trees, spec.input, source, self._pods.pipeline.salt))

    def _pending(self) -> list[Datum]:
        return [one for one in self._pps.datums.own(self._pk) if one.state == DatumState.STARTING]

    def _take_over(self, spec: PipelineSpec, base: Job | None) -> None:
        """Wait for the base job, and take over from it. Raises SetError if it has failed: the restarted job has another base."""
        if base is None:
            return
        self._pps.jobs.wait_over(base.pk, alive=self._alive)
        if not self._alive():
            return
        if self._pps.jobs.state(base.pk) != JobState.SUCCESS:
            raise SetError(f"commit {base.pipeline}.meta@{base.id} finished with an error")
        with self._pps.store.gate.writing():
            self._pps.datums.take_over(self._pk, base, skip=not spec.every_job)

    def _do_sets(self, context: JobContext, datums: list[Datum]) -> None:
        """Process datums in sets. There is at least one set, even if it is empty."""
        if not self._alive():
            return
        job = self._pps.jobs.by_pk(self._pk)
        skipped = job.counts.get(DatumState.SKIPPED, 0)
        sets = _datum_sets(datums, context.spec, job.total - skipped) or [[]]
        tasks: list[Task] = [self._pods.submit(context, one) for one in sets]
        wait_for(tasks)

    def _finish(self) -> None:
        self._pps.jobs.set_state(self._pk, JobState.FINISHING)
        job = self._pps.jobs.by_pk(self._pk)
        listed = self._pps.datums.listed(job)
        meta = self._pps.datums.meta(listed)
        failed = self._pps.datums.first_failed(self._pk)
        try:
            output = self._pps.datums.output(listed)
        except TreeError as error:
            self._end(JobState.FAILURE, str(error), meta=meta)
            return
        if failed is not None:
            self._end(JobState.FAILURE, f"datum {failed} failed", output=output, meta=meta)
        else:
            self._end(JobState.SUCCESS, "" if job.total else "there were no datums to process", output=output, meta=meta)


def _failed_inputs(spec: PipelineSpec, inputs: Sequence[Commit]) -> list[str]:
    bad = {BranchKey(commit.repo, commit.branch) for commit in inputs if commit.error}
    return [leaf.name for leaf in spec.leaves() if leaf.branch_key in bad]


def _datum_sets(datums: Sequence[Datum], spec: PipelineSpec, total: int) -> list[list[Datum]]:
    """The datums in sets. ``total`` is the job's number of datums, which determines the size of a set unless the spec does."""
    most, (_, enough, _) = spec.set_size(total), spec.datum_set
    sets: list[list[Datum]] = []
    held = 0
    for datum in datums:
        if not sets or len(sets[-1]) == most or 0 < enough <= held:
            sets.append([])
            held = 0
        sets[-1].append(datum)
        held += sum(one.size for one in datum.inputs)
    return sets
