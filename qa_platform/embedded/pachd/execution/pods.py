"""The workers of a pipeline. Like the pods of a cluster, they take a while to start, and read their secrets when they start."""

import logging
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from qa_platform.embedded.pachd.errors import PachError
from qa_platform.embedded.pachd.execution.context import JobContext, PodSecrets
from qa_platform.embedded.pachd.execution.isolation import can_isolate
from qa_platform.embedded.pachd.execution.worker import ServeWorker, SetError, Worker
from qa_platform.embedded.pachd.pps import Datum, Pipeline, Pps
from qa_platform.embedded.pachd.spec import PipelineSpec, SecretUse

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class PodSettings:
    """Settings of all workers.

    Args:
        folder: has the workers' folders.
        secrets: a folder in memory, if the machine has one.
        serve: serves the worker API.
        seconds: how long workers take to start.
        no_start, no_restart: names of pipelines, see `JobContext`.
    """

    folder: Path
    secrets: Path
    serve: ServeWorker
    seconds: float = 0.0
    no_start: frozenset[str] = frozenset()
    no_restart: frozenset[str] = frozenset()


class Task:
    """A submitted datum set. When it is done, ``problem`` says why it could not be processed, if so."""

    def __init__(self, context: JobContext, datums: list[Datum]) -> None:
        self.context = context
        self.datums = datums
        self.done = threading.Event()
        self.problem: str | None = None


class Pods:
    """The workers of one version of a pipeline. They process the datum sets of all its jobs, in order.

    ``problem`` says why they cannot start. Every ``try_start`` updates it.
    """

    def __init__(self, pipeline: Pipeline, pps: Pps, settings: PodSettings, wake: Callable[[], None]) -> None:
        self.pipeline = pipeline
        self.problem = ""
        self.names: list[str] = []
        self.secrets = PodSecrets()
        self._pps = pps
        self._settings = settings
        self._queue: SimpleQueue[Task | None] = SimpleQueue()
        self._due = time.monotonic() + settings.seconds
        self._secrets_folder = settings.secrets / uuid.uuid4().hex
        self._running = 0
        self._lock = threading.Lock()
        if settings.seconds:
            timer = threading.Timer(settings.seconds, wake)
            timer.daemon = True
            timer.start()

    @property
    def ready(self) -> bool:
        return bool(self.names)

    @property
    def no_start(self) -> bool:
        return self.pipeline.key.name in self._settings.no_start

    @property
    def no_restart(self) -> bool:
        return self.pipeline.key.name in self._settings.no_restart

    def startable(self) -> bool:
        """Whether ``try_start`` would change anything."""
        if self.ready or time.monotonic() < self._due:
            return False
        missing = self._missing()
        return missing is None or missing != self.problem

    def try_start(self) -> None:
        """Start the workers if it is time and all their secrets exist."""
        if self.ready or time.monotonic() < self._due:
            return
        try:
            self.problem = self._missing() or ""
            if not self.problem:
                self.secrets = self._read_secrets(self.pipeline.spec)
                self._start()
        except PachError as error:
            self.problem = f"CreateContainerConfigError: {error}"

    def _missing(self) -> str | None:
        for use in self.pipeline.spec.secrets:
            if self._pps.pipelines.missing_secret(use) is not None:
                key = f' key "{use.key}"' if use.key else ""
                return f'CreateContainerConfigError: secret "{use.name}"{key} not found'
        return None

    def _start(self) -> None:
        spec = self.pipeline.spec
        prefix = f"{spec.project}-{spec.name}-v{self.pipeline.version}"
        names = [f"{prefix}-{uuid.uuid4().hex[:5]}" for _ in range(spec.parallelism)]
        self._running = len(names)
        for name in names:
            worker = Worker(name, self._settings.folder / name, self._pps.store, self._pps, self._settings.serve)
            threading.Thread(target=self._loop, args=(worker,), name=f"worker-{name}", daemon=True).start()
        self.names = names

    def submit(self, context: JobContext, datums: list[Datum]) -> Task:
        task = Task(context, datums)
        self._queue.put(task)
        return task

    def close(self) -> None:
        """Let the workers end once the queue is empty."""
        for _ in self.names:
            self._queue.put(None)

    def _loop(self, worker: Worker) -> None:
        while (task := self._queue.get()) is not None:
            try:
                if not task.context.cancelled.is_set():
                    worker.work(task.context, task.datums)
            except SetError as error:
                task.problem = str(error)
            except Exception as error:
                if not task.context.cancelled.is_set():
                    _LOG.exception("a datum set of %s@%s failed", task.context.job.pipeline, task.context.job.id)
                task.problem = f"{type(error).__name__}: {error}"
            finally:
                task.done.set()
        worker.close()
        with self._lock:
            self._running -= 1
            if not self._running:
                shutil.rmtree(self._secrets_folder, ignore_errors=True)

    def _read_secrets(self, spec: PipelineSpec) -> PodSecrets:
        """Read the secrets. Raises PachError if one is missing."""
        environment = {use.env_var: self._value(use) for use in spec.secrets if use.env_var}
        folders = {use.mount_path: self._write(use) for use in spec.secrets if use.mount_path}
        if not folders:
            return PodSecrets(environment)
        if can_isolate():
            return PodSecrets(environment, {Path(path): folder for path, folder in folders.items()})
        return PodSecrets(environment, root=self._secrets_folder)

    def _value(self, use: SecretUse) -> str:
        return self._pps.secrets.values(use.name)[use.key].decode()

    def _write(self, use: SecretUse) -> Path:
        """Write a secret to a folder with a file per key, at its mount path below the workers' root. Only the owner can read it."""
        folder = self._secrets_folder
        for part in ("", *use.mount_path.strip("/").split("/")):
            folder = folder / part
            folder.mkdir(mode=0o700, exist_ok=True)
        for key, value in self._pps.secrets.values(use.name).items():
            file = folder / key
            file.touch(0o600)
            file.write_bytes(value)
        return folder


def wait_for(tasks: list[Task]) -> None:
    """Wait until all tasks are done.

    Raises:
        SetError: one of them could not be processed.
    """
    for task in tasks:
        task.done.wait()
    problems = [task.problem for task in tasks if task.problem is not None]
    if problems:
        raise SetError(problems[0])
