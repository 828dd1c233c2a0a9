"""Does the jobs that the metadata says are to be done, and stops those that it says are over."""

import contextlib
import logging
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from queue import SimpleQueue

from qa_platform.embedded.pachd.errors import NotFound, PachError
from qa_platform.embedded.pachd.execution.datums import enumerate_datums
from qa_platform.embedded.pachd.execution.isolation import can_isolate
from qa_platform.embedded.pachd.execution.leftovers import Reaper, kill_leftovers
from qa_platform.embedded.pachd.execution.worker import JobContext, ServeWorker, Worker
from qa_platform.embedded.pachd.pfs import BranchKey, Wait
from qa_platform.embedded.pachd.pps import Datum, DatumState, Job, JobState, Pipeline, PipelineKey, Pps
from qa_platform.embedded.pachd.spec import PipelineSpec
from qa_platform.embedded.pachd.storage.trees import TreeError

_LOG = logging.getLogger(__name__)
_MEMORY = Path("/dev/shm")
_DONE = (DatumState.SUCCESS, DatumState.SKIPPED)


class Executor:
    """Runs until ``stop``. One thread per job that is on its way, one per worker."""

    def __init__(self, pps: Pps, folder: Path, serve: ServeWorker) -> None:
        kill_leftovers(folder)
        shutil.rmtree(folder, ignore_errors=True)
        # A folder of this server's own: the reaper of one that was killed must not take this one's workers.
        self._folder = folder / uuid.uuid4().hex[:8]
        self._folder.mkdir(parents=True)
        self._secrets = Path(tempfile.mkdtemp(prefix="qa-pachd-", dir=_MEMORY if _MEMORY.is_dir() else None))
        self._reaper = Reaper(self._folder, remove=self._secrets)
        self._pps = pps
        self._serve = serve
        self._stopping = threading.Event()
        self._runs: dict[int, _JobRun] = {}
        self._pools: dict[PipelineKey, _Pool] = {}
        self._pools_lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._supervise, name="jobs", daemon=True),
            threading.Thread(target=self._finish_commits, name="commits", daemon=True),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Kills what runs. Jobs that are not over stay so, and go on at the next start."""
        self._stopping.set()
        self._pps.store.metadata.wake()
        for thread in self._threads:
            thread.join(10)
        for run in list(self._runs.values()):
            run.context_cancel()
        for run in list(self._runs.values()):
            run.join(10)
        for pool in self._pools.values():
            pool.close()
        self._reaper.close()

    def alive(self) -> bool:
        return not self._stopping.is_set()

    def restart_datum(self, job: Job, filters: Sequence[str]) -> None:
        """Begins the datums again that a job works on and whose inputs have these paths or hashes.

        Raises:
            PachError: there is none.
        """
        run = self._runs.get(job.pk)
        if run is None or not run.restart(filters):
            raise PachError(f"datum matching filter {list(filters)} could not be found for job {job.pipeline}@{job.id}")

    def secret_mounts(self, spec: PipelineSpec) -> dict[Path, Path]:
        """The folders of the secrets that a pipeline mounts, by where it wants them. They lie in memory and go with the server.

        Raises:
            PachError: this machine does not permit mounts, or the secret is missing.
        """
        mounts = {}
        for use in spec.secrets:
            if not use.mount_path:
                continue
            if not can_isolate():
                raise PachError(f"secret {use.name} cannot be mounted at {use.mount_path} on this machine: use env_var and key")
            folder = self._secrets / uuid.uuid4().hex
            folder.mkdir(parents=True)
            for key, value in self._pps.secrets.values(use.name).items():
                (folder / key).write_bytes(value)
            mounts[Path(use.mount_path)] = folder
        return mounts

    def pool(self, pipeline: Pipeline) -> "_Pool":
        """The workers of a pipeline's version; those of an older one are dismissed."""
        with self._pools_lock:
            pool = self._pools.get(pipeline.key)
            if pool is None or pool.version != (pipeline.pk, pipeline.version):
                if pool is not None:
                    pool.close()
                pool = self._pools[pipeline.key] = _Pool(pipeline, self._pps, self._folder, self._serve)
            return pool

    def _supervise(self) -> None:
        def look() -> set[int] | None:
            wanted = set(self._pps.unfinished_jobs())
            running = {pk for pk, run in self._runs.items() if not run.cancelled}
            return wanted if wanted != running else None

        while self.alive():
            wanted = self._pps.store.metadata.wait_until(lambda: _Some(look()), alive=self.alive)
            if wanted is None or wanted.value is None:
                continue
            for pk in [pk for pk in self._runs if pk not in wanted.value]:
                self._runs.pop(pk).context_cancel()
            for pk in sorted(wanted.value - self._runs.keys()):
                run = self._runs[pk] = _JobRun(pk, self._pps, self)
                run.start()

    def _finish_commits(self) -> None:
        while self.alive():
            try:
                self._pps.pfs.finish_next(alive=self.alive)
            except Exception:
                _LOG.exception("a commit could not be finished")


class _Some:
    """Keeps an empty set apart from no answer."""

    def __init__(self, value: set[int] | None) -> None:
        self.value = value

    def __bool__(self) -> bool:
        return self.value is not None


class _Task:
    def __init__(self, context: JobContext, datums: list[Datum]) -> None:
        self.context = context
        self.datums = datums
        self.done = threading.Event()


class _Pool:
    """A pipeline's workers: they take datum sets in order, of all its jobs."""

    def __init__(self, pipeline: Pipeline, pps: Pps, folder: Path, serve: ServeWorker) -> None:
        # A pipeline that was deleted and made again begins with version 1 once more.
        self.version = (pipeline.pk, pipeline.version)
        self._queue: SimpleQueue[_Task | None] = SimpleQueue()
        spec = pipeline.spec
        self._size = spec.parallelism
        for number in range(self._size):
            name = f"{spec.project}-{spec.name}-v{pipeline.version}-{uuid.uuid4().hex[:5]}"
            worker = Worker(name, folder / name, pps.store, pps, serve)
            threading.Thread(target=self._loop, args=(worker,), name=f"worker-{number}", daemon=True).start()

    def submit(self, context: JobContext, datums: list[Datum]) -> _Task:
        task = _Task(context, datums)
        self._queue.put(task)
        return task

    def close(self) -> None:
        for _ in range(self._size):
            self._queue.put(None)

    def _loop(self, worker: Worker) -> None:
        while (task := self._queue.get()) is not None:
            try:
                if not task.context.cancelled.is_set():
                    worker.work(task.context, task.datums)
            except Exception:
                _LOG.exception("a datum set of %s@%s failed", task.context.job.pipeline, task.context.job.id)
            finally:
                task.done.set()
        worker.close()


class _JobRun:
    """The way of one job from its first to its last state."""

    def __init__(self, pk: int, pps: Pps, executor: Executor) -> None:
        self._pk = pk
        self._pps = pps
        self._executor = executor
        self._cancelled = threading.Event()
        self._context: JobContext | None = None
        self._timer: threading.Timer | None = None
        self._thread = threading.Thread(target=self._run, name=f"job-{pk}", daemon=True)

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def start(self) -> None:
        self._thread.start()

    def restart(self, filters: Sequence[str]) -> bool:
        return self._context is not None and self._context.restart(filters)

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def context_cancel(self) -> None:
        self._cancelled.set()
        if self._context is not None:
            self._context.cancel()
        self._pps.store.metadata.wake()

    def _alive(self) -> bool:
        return not self._cancelled.is_set() and self._executor.alive()

    def _run(self) -> None:
        try:
            self._work(self._pps.job_by_pk(self._pk))
        except NotFound as error:
            self._end(JobState.FAILURE, str(error))
        except Exception as error:
            if self._alive():
                _LOG.exception("job %s failed", self._pk)
                self._end(JobState.FAILURE, f"{type(error).__name__}: {error}")
        finally:
            if self._timer is not None:
                self._timer.cancel()

    def _end(self, state: JobState, reason: str, root: str | None = None) -> None:
        with contextlib.suppress(NotFound):
            self._pps.end_job(self._pk, state, root, reason)

    def _work(self, job: Job) -> None:
        pfs = self._pps.pfs
        inputs = pfs.provenance(job.commit)
        for commit in inputs:
            pfs.wait(commit, Wait.FINISHED, alive=self._alive)
        if not self._alive():
            return
        inputs = pfs.provenance(job.commit)
        if bad := [commit for commit in inputs if commit.error]:
            names = ", ".join(sorted({commit.repo.name for commit in bad}))
            self._end(JobState.UNRUNNABLE, f"unrunnable because the following upstream pipelines failed: {names}")
            return
        self._pps.set_state(job.pk, JobState.STARTING)
        pipeline = self._pps.pipeline(job.pipeline, job.version)
        spec = pipeline.spec
        if spec.job_timeout is not None:
            timer = threading.Timer(spec.job_timeout, lambda: self._end(JobState.KILLED, f"job exceeded timeout ({spec.job_timeout:g} s)"))
            timer.daemon = True
            timer.start()
            self._timer = timer
        by_branch = {BranchKey(commit.repo, commit.branch): commit for commit in inputs}

        def source(branch: BranchKey) -> tuple[str, str | None]:
            commit = by_branch.get(branch)
            if commit is None:
                commit = next(commit for commit in inputs if commit.repo == branch.repo)
            return commit.id, commit.root

        self._pps.record_datums(job.pk, enumerate_datums(self._pps.store.trees, spec.input, source, pipeline.salt))
        self._pps.set_state(job.pk, JobState.RUNNING)
        context = JobContext(
            job=job,
            spec=spec,
            salt=pipeline.salt,
            roots={(str(commit.repo), commit.id): commit.root for commit in inputs},
            secret_env=self._secret_environment(spec),
            secret_mounts=self._executor.secret_mounts(spec),
            spec_commit=pipeline.spec_commit,
        )
        self._context = context
        if self._cancelled.is_set():
            return
        self._process(context, self._executor.pool(pipeline))
        if self._alive():
            with self._pps.store.gate.writing():
                self._finish()

    def _secret_environment(self, spec: PipelineSpec) -> dict[str, str]:
        env = {}
        for use in spec.secrets:
            if use.env_var:
                values = self._pps.secrets.values(use.name)
                if use.key not in values:
                    raise PachError(f'missing key "{use.key}" in Kubernetes secret "{use.name}"')
                env[use.env_var] = values[use.key].decode()
        return env

    def _process(self, context: JobContext, pool: _Pool) -> None:
        """Runs what no earlier job has done: at once what the base job does not have, the rest when that job is over."""
        tasks: list[_Task] = []
        todo = {datum.id: datum for datum in self._pps.datums(self._pk) if datum.state not in _DONE}
        while todo and self._alive():
            base = None if context.spec.every_job else self._pps.base_job(context.job.commit)
            if base is None:
                tasks += self._submit(context, pool, todo.values())
                break
            self._pps.wait_enumerated(base.pk, alive=self._alive)
            known = {datum.id: datum for datum in self._pps.datums(base.pk)}
            tasks += self._submit(context, pool, [datum for name, datum in todo.items() if name not in known])
            todo = {name: datum for name, datum in todo.items() if name in known}
            self._pps.wait_over(base.pk, alive=self._alive)
            if not self._alive():
                break
            if self._state(base.pk) != JobState.SUCCESS:
                continue
            with self._pps.store.gate.writing():
                known = {datum.id: datum for datum in self._pps.datums(base.pk) if datum.state in _DONE}
                same = {name for name, datum in todo.items() if name in known and known[name].hash == datum.hash}
                self._pps.skip_datums(self._pk, [(name, known[name].output) for name in same])
            tasks += self._submit(context, pool, [datum for name, datum in todo.items() if name not in same])
            break
        if not tasks and context.spec.datum_batching and self._alive():
            tasks.append(pool.submit(context, []))
        for task in tasks:
            task.done.wait()

    def _submit(self, context: JobContext, pool: _Pool, datums: Iterable[Datum]) -> list[_Task]:
        ordered = sorted(datums, key=lambda datum: datum.position)
        most, (_, enough, _) = context.spec.set_size(len(ordered)), context.spec.datum_set
        sets: list[list[Datum]] = []
        held = 0
        for datum in ordered:
            if not sets or len(sets[-1]) == most or 0 < enough <= held:
                sets.append([])
                held = 0
            sets[-1].append(datum)
            held += sum(one.size for one in datum.inputs)
        return [pool.submit(context, one) for one in sets]

    def _state(self, pk: int) -> JobState | None:
        try:
            return self._pps.job_by_pk(pk).state
        except NotFound:
            return None

    def _finish(self) -> None:
        self._pps.set_state(self._pk, JobState.FINISHING)
        failed = [datum.id for datum in self._pps.datums(self._pk) if datum.state in (DatumState.FAILED, DatumState.STARTING)]
        try:
            root = self._pps.merged_output(self._pk)
        except TreeError as error:
            self._end(JobState.FAILURE, str(error))
            return
        if failed:
            self._end(JobState.FAILURE, f"datum {failed[0]} failed", root)
        else:
            self._end(JobState.SUCCESS, "", root)
