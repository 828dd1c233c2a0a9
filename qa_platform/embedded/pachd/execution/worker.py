"""One worker of a pipeline: it takes datum sets and runs the user's code on them, one datum at a time."""

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import qa_platform
from qa_platform.embedded.environment import inherited
from qa_platform.embedded.pachd.errors import PachError
from qa_platform.embedded.pachd.execution.batching import BatchProcess, Cancelled, DatumError, Process, duration_text, exit_text
from qa_platform.embedded.pachd.execution.context import JobContext
from qa_platform.embedded.pachd.execution.files import UploadError, clear_folder, download, upload
from qa_platform.embedded.pachd.execution.isolation import PFS, can_isolate, isolated
from qa_platform.embedded.pachd.execution.leftovers import WORKER_FOLDER_VARIABLE
from qa_platform.embedded.pachd.execution.process import Command, UserProcess
from qa_platform.embedded.pachd.pps import Datum, DatumState, Pps, Stats
from qa_platform.embedded.pachd.pps.meta import Outcome
from qa_platform.embedded.pachd.storage.chunks import ChunkBatch, CorruptError
from qa_platform.embedded.pachd.storage.logs import LogLine
from qa_platform.embedded.pachd.storage.store import Store

# Simulates a program that does not start.
_NO_START = ("sh", "-c", "exit 1")
_TASK = "process datum set task"
_NO_STATS = Stats()


class SetError(Exception):
    """A datum set could not be processed. Nothing of it is recorded, and its job restarts."""


class Endpoint(Protocol):
    """A served worker API."""

    port: int

    def stop(self) -> None: ...


# Serves NextDatum. Takes the error of the last datum, and a function that says whether the caller still waits; returns the environment.
NextDatum = Callable[[str, Callable[[], bool]], list[str]]
ServeWorker = Callable[[NextDatum], Endpoint]


# Runs user code on a datum, with its environment.
_Run = Callable[[Datum, Mapping[str, str]], None]


@dataclass
class _Attempt:
    """The results of an attempt so far."""

    stats: Stats = _NO_STATS
    output: str | None = None


class Worker:
    """A worker. It runs in the thread that calls ``work``."""

    def __init__(self, name: str, folder: Path, store: Store, pps: Pps, serve: ServeWorker) -> None:
        self.name = name
        self._folder = folder
        self._pfs = folder / "pfs"
        self._store = store
        self._pps = pps
        self._serve = serve
        self._endpoint: Endpoint | None = None
        self._process: BatchProcess | None = None
        shutil.rmtree(folder, ignore_errors=True)
        self._pfs.mkdir(parents=True)
        # The path at which user code finds its files.
        self._visible_pfs = PFS if can_isolate() else self._pfs

    def close(self) -> None:
        if self._endpoint is not None:
            self._endpoint.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def work(self, context: JobContext, datums: Sequence[Datum]) -> None:
        """Process a datum set, and record all its datums at once. Returns early if the job is cancelled.

        Raises:
            SetError: the set could not be processed. Nothing is recorded.
        """
        with contextlib.suppress(Cancelled), self._store.gate.writing():
            self._log(context, None, f"started {_TASK}")
            try:
                self._work(context, datums)
            except (SetError, OSError) as error:
                self._log(context, None, f"errored {_TASK}: {error}")
                raise SetError(str(error)) from error
            self._log(context, None, f"finished {_TASK}")

    def _work(self, context: JobContext, datums: Sequence[Datum]) -> None:
        batch = self._store.chunks.batch()
        if context.spec.datum_batching:
            outcomes = self._work_batch(context, datums, batch)
        else:
            environment = self._environment(context)
            outcomes = [self._outcome(context, one, environment, batch, self._runner(context)) for one in datums]
        self._pps.datums.end_set(context.job, context.spec.image, outcomes, batch)

    def _outcome(self, context: JobContext, datum: Datum, base: Mapping[str, str], batch: ChunkBatch, run: _Run) -> Outcome:
        """Process a datum, with as many attempts as the pipeline allows."""
        environment = {**base, **self._datum_environment(datum)}
        text = "".join(f"{key}={value}\n" for key, value in environment.items())
        outcome = Outcome(datum, DatumState.SUCCESS, "", None, Stats(), text, context.roots)
        state, number = DatumState.FAILED, 1
        while True:
            if context.cancelled.is_set():
                raise Cancelled
            attempt = _Attempt()
            try:
                self._try(context, datum, environment, text, batch, run, attempt)
                return replace(outcome, output=attempt.output, stats=attempt.stats)
            except UploadError as error:
                if number >= context.spec.datum_tries:
                    raise SetError(str(error)) from error
            except (DatumError, PachError, CorruptError, OSError) as error:
                if context.cancelled.is_set():
                    raise Cancelled from error
                if context.was_restarted(datum):
                    continue
                if self._run_err_cmd(context, datum, environment):
                    state = DatumState.RECOVERED
                if number >= context.spec.datum_tries:
                    reason = str(error) if state == DatumState.FAILED else ""
                    return replace(outcome, state=state, reason=reason, output=self._left(datum, batch), stats=attempt.stats)
            number += 1

    def _try(
        self, context: JobContext, datum: Datum, environment: Mapping[str, str], text: str, batch: ChunkBatch, run: _Run, attempt: _Attempt
    ) -> None:
        """Make one attempt, and keep ``attempt`` up to date."""
        began = time.monotonic()
        downloaded = self._prepare(context, datum, text)
        prepared = time.monotonic()
        attempt.stats = Stats(download_seconds=prepared - began, downloaded=downloaded)
        try:
            run(datum, environment)
        finally:
            ran = time.monotonic()
            attempt.stats = replace(attempt.stats, process_seconds=ran - prepared)
        attempt.output, uploaded = upload(self._store, batch, self._pfs, self._visible_pfs, datum.id)
        attempt.stats = replace(attempt.stats, upload_seconds=time.monotonic() - ran, uploaded=uploaded)

    def _left(self, datum: Datum, batch: ChunkBatch) -> str | None:
        """The tree of what a failed datum left in ``out``. Only the meta repo shows it."""
        with contextlib.suppress(UploadError):
            return upload(self._store, batch, self._pfs, self._visible_pfs, datum.id)[0]
        return None

    def _prepare(self, context: JobContext, datum: Datum, environment: str) -> int:
        clear_folder(self._pfs)
        (self._pfs / "out").mkdir()
        (self._pfs / ".env").write_text(environment, errors="surrogateescape")
        return sum(download(self._store, context.roots[str(one.repo), one.commit], one, self._pfs / one.name) for one in datum.inputs)

    def _runner(self, context: JobContext) -> _Run:
        spec = context.spec
        argv = _NO_START if context.no_start else spec.cmd
        return lambda datum, environment: self._run(context, datum, argv, spec.stdin, environment)

    def _run(self, context: JobContext, datum: Datum, argv: Sequence[str], stdin: Sequence[str], env: Mapping[str, str]) -> None:
        self._log(context, datum, "beginning to run user code")
        began = time.monotonic()
        try:
            self._run_to_end(context, datum, argv, stdin, env)
        except DatumError as error:
            self._log(context, datum, f"errored running user code after {duration_text(time.monotonic() - began)}: {error}")
            raise
        self._log(context, datum, f"finished running user code after {duration_text(time.monotonic() - began)}")

    def _run_to_end(self, context: JobContext, datum: Datum, argv: Sequence[str], stdin: Sequence[str], env: Mapping[str, str]) -> None:
        changed = threading.Condition()

        def wake() -> None:
            with changed:
                changed.notify_all()

        process = self._start(context, argv, stdin, env, on_line=lambda line: self._log(context, datum, line, user=True), on_change=wake)
        with context.tracked(process), context.working_on(datum, process), changed:
            if not changed.wait_for(lambda: process.exit_status is not None, context.spec.datum_timeout):
                process.kill()
                changed.wait_for(lambda: process.exit_status is not None)
        if process.exit_status != 0 and process.exit_status not in context.spec.accept_return_code:
            raise DatumError(exit_text(process.exit_status))

    def _run_err_cmd(self, context: JobContext, datum: Datum, environment: Mapping[str, str]) -> bool:
        """Run the pipeline's error handling command. Returns whether there is one and it succeeded."""
        if not context.spec.err_cmd:
            return False
        try:
            self._run_to_end(context, datum, context.spec.err_cmd, context.spec.err_stdin, environment)
        except (DatumError, OSError) as error:
            self._log(context, datum, f"errored running user error handling code: {error}")
            return False
        return True

    def _work_batch(self, context: JobContext, datums: Sequence[Datum], batch: ChunkBatch) -> list[Outcome]:
        if self._endpoint is None:
            self._endpoint = self._serve(self._next_datum)
        environment = self._environment(context)
        clear_folder(self._pfs)
        (self._pfs / "out").mkdir()
        process = self._process = self._batch_process(context, environment)
        with context.tracked(process):
            try:
                process.start()
            except DatumError as error:
                raise SetError(f"error starting user code: {error}") from error

            def run(datum: Datum, values: Mapping[str, str]) -> None:
                with context.working_on(datum, process.process):
                    process.process_datum([f"{key}={value}" for key, value in values.items()], context.spec.datum_timeout)

            outcomes = [self._outcome(context, one, environment, batch, run) for one in datums]
        self._process = None
        return outcomes

    def _batch_process(self, context: JobContext, environment: Mapping[str, str]) -> BatchProcess:
        def launch(process: BatchProcess, again: bool) -> Process:
            failing = context.no_start or (again and context.no_restart)
            argv = _NO_START if failing else context.spec.cmd
            return self._start(
                context, argv, context.spec.stdin, environment,
                on_line=lambda line: self._log(context, None, line, user=True), on_change=process.wake,
            )  # fmt: skip

        return BatchProcess(launch=launch, note=lambda text: self._log(context, None, text))

    def _next_datum(self, error: str, alive: Callable[[], bool]) -> list[str]:
        process = self._process
        if process is None:
            raise PachError("datum batching not enabled")
        return process.next_datum(error, alive)

    def _start(
        self,
        context: JobContext,
        argv: Sequence[str],
        stdin: Sequence[str],
        env: Mapping[str, str],
        *,
        on_line: Callable[[str], None],
        on_change: Callable[[], None],
    ) -> UserProcess:
        """Start a process. Raises DatumError if the program does not exist."""
        if not argv:
            raise DatumError("invalid pipeline transform, no command specified")
        if "/" not in argv[0] and shutil.which(argv[0], path=env["PATH"]) is None:
            raise DatumError(f'exec: "{argv[0]}": executable file not found in $PATH')
        folder = context.spec.working_dir
        if can_isolate():
            mounts = {PFS: self._pfs, **context.secrets.mounts}
            command = Command(isolated(argv, mounts, folder), stdin, env, None)
        else:
            command = Command(argv, stdin, env, folder or None)
        try:
            return UserProcess(command, on_line=on_line, on_change=on_change)
        except OSError as error:
            raise DatumError(f"fork/exec {argv[0]}: {(error.strerror or str(error)).lower()}") from error

    def _environment(self, context: JobContext) -> dict[str, str]:
        """The environment of user code, without the variables of a datum."""
        spec = context.spec
        # The project's own pipelines run with this server's interpreter and code.
        code = Path(qa_platform.__file__).parent.parent
        python_path = [str(code)] if code.name != "site-packages" else []
        python_path += filter(None, [os.environ.get("PYTHONPATH")])
        root = context.secrets.root
        return {
            **inherited(os.environ),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
            **({"PYTHONPATH": os.pathsep.join(python_path)} if python_path else {}),
            "PYTHONUNBUFFERED": "1",
            WORKER_FOLDER_VARIABLE: str(self._folder),
            "PPS_PIPELINE_NAME": spec.name,
            "PPS_PROJECT_NAME": spec.project,
            "PPS_SPEC_COMMIT": context.spec_commit,
            "PPS_POD_NAME": self.name,
            "PPS_WORKER_IP": "127.0.0.1",
            "PPS_WORKER_GRPC_PORT": str(self._endpoint.port if self._endpoint else 1080),
            "PACH_IN_WORKER": "true",
            "QA_PFS_ROOT": str(self._visible_pfs),
            **({"QA_SECRETS_ROOT": str(root / "secrets")} if root else {}),
            **dict(spec.env),
            **context.secrets.environment,
            "PACH_JOB_ID": context.job.id,
            "PACH_OUTPUT_COMMIT_ID": context.job.id,
        }

    def _datum_environment(self, datum: Datum) -> dict[str, str]:
        env = {"PACH_DATUM_ID": datum.id}
        for one in datum.inputs:
            env[one.name] = str(self._visible_pfs / one.name / one.path.strip("/"))
            env[f"{one.name}_COMMIT"] = one.commit
        return env

    def _log(self, context: JobContext, datum: Datum | None, message: str, *, user: bool = False) -> None:
        line = LogLine(
            project=context.spec.project,
            pipeline=context.spec.name,
            job=context.job.id,
            worker=self.name,
            datum=datum.id if datum else "",
            data=tuple((one.path, one.digest) for one in datum.inputs) if datum else (),
            user=user,
            master=False,
            time=time.time(),
            message=message,
        )
        self._store.logs.append(line)
