"""One worker of a pipeline: it takes datum sets and runs the user's code on them, one datum at a time."""

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import qa_platform
from qa_platform.embedded.pachd.errors import PachError
from qa_platform.embedded.pachd.execution.files import clear_folder, download, upload
from qa_platform.embedded.pachd.execution.isolation import PFS, can_isolate, isolated
from qa_platform.embedded.pachd.execution.leftovers import WORKER_FOLDER_VARIABLE
from qa_platform.embedded.pachd.execution.process import Command, UserProcess
from qa_platform.embedded.pachd.pps import Datum, DatumState, Job, Pps
from qa_platform.embedded.pachd.spec import PipelineSpec
from qa_platform.embedded.pachd.storage.chunks import CorruptError
from qa_platform.embedded.pachd.storage.logs import LogLine
from qa_platform.embedded.pachd.storage.store import Store


class DatumError(Exception):
    """An attempt at a datum has failed; the message goes into the log."""


class Cancelled(Exception):
    """The job was stopped while the datum was worked on."""


class Endpoint(Protocol):
    """A served worker API."""

    port: int

    def stop(self) -> None: ...


class _Killable(Protocol):
    def kill(self) -> None: ...


# Serves NextDatum: called with the error of the last datum and whether the caller is still there; returns the environment.
NextDatum = Callable[[str, Callable[[], bool]], list[str]]
ServeWorker = Callable[[NextDatum], Endpoint]


@dataclass(eq=False)
class JobContext:
    """What the workers need to know of a job, and how it is stopped. ``roots`` are the trees of the input commits, by repo and id."""

    job: Job
    spec: PipelineSpec
    salt: str
    roots: Mapping[tuple[str, str], str | None]
    secret_env: Mapping[str, str]
    # Folders with a file per key, by where user code wants them.
    secret_mounts: Mapping[Path, Path]
    spec_commit: str
    cancelled: threading.Event = field(default_factory=threading.Event)
    _processes: set["_Killable"] = field(default_factory=set)
    _working_on: dict[str, tuple[Datum, "_Killable"]] = field(default_factory=dict)
    _restarted: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def cancel(self) -> None:
        self.cancelled.set()
        with self._lock:
            for process in self._processes:
                process.kill()

    def restart(self, filters: Sequence[str]) -> bool:
        """Begins the datums again that are being worked on and whose inputs have all these paths or hashes; False if there is none."""
        with self._lock:
            found = [(datum, process) for datum, process in self._working_on.values() if _has_inputs(datum, filters)]
            self._restarted.update(datum.id for datum, _ in found)
            for _, process in found:
                process.kill()
        return bool(found)

    def was_restarted(self, datum: Datum) -> bool:
        """Whether the datum is to begin again; asked once per restart."""
        with self._lock:
            restarted = datum.id in self._restarted
            self._restarted.discard(datum.id)
            return restarted

    @contextlib.contextmanager
    def working_on(self, datum: Datum, process: "_Killable") -> Iterator[None]:
        """What runs inside is work on the datum, which ends when the process is killed."""
        with self._lock:
            self._working_on[datum.id] = datum, process
        try:
            yield
        finally:
            with self._lock:
                self._working_on.pop(datum.id, None)

    @contextlib.contextmanager
    def tracked(self, process: "_Killable") -> Iterator[None]:
        """What runs inside is killed when the job is cancelled, and in any case at the end."""
        with self._lock:
            self._processes.add(process)
        try:
            if self.cancelled.is_set():
                process.kill()
            yield
        finally:
            process.kill()
            with self._lock:
                self._processes.discard(process)


class Worker:
    """Runs in the thread of whoever calls ``work``."""

    def __init__(self, name: str, folder: Path, store: Store, pps: Pps, serve: ServeWorker) -> None:
        self.name = name
        self._folder = folder
        self._pfs = folder / "pfs"
        self._store = store
        self._pps = pps
        self._serve = serve
        self._endpoint: Endpoint | None = None
        self._session: _Session | None = None
        shutil.rmtree(folder, ignore_errors=True)
        self._pfs.mkdir(parents=True)
        # Where user code finds its files.
        self._visible_pfs = PFS if can_isolate() else self._pfs

    def close(self) -> None:
        if self._endpoint is not None:
            self._endpoint.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def work(self, context: JobContext, datums: Sequence[Datum]) -> None:
        """Does a datum set and records each datum. Returns early when the job is cancelled."""
        with contextlib.suppress(Cancelled), self._store.gate.writing():
            if context.spec.datum_batching:
                self._work_batch(context, datums)
            else:
                for datum in datums:
                    self._attempts(context, datum, lambda datum=datum: self._run_once(context, datum))  # type: ignore[misc]

    def _attempts(self, context: JobContext, datum: Datum, attempt: Callable[[], tuple[str | None, int, int]]) -> None:
        """Tries a datum as often as the pipeline allows. ``attempt`` returns the output, bytes in and bytes out."""
        began = time.monotonic()
        recovered = False
        number = 1
        while number <= context.spec.datum_tries:
            if context.cancelled.is_set():
                raise Cancelled
            self._log(context, datum, "started process datum")
            try:
                output, downloaded, uploaded = attempt()
            except (DatumError, PachError, CorruptError, OSError) as error:
                if context.cancelled.is_set():
                    raise Cancelled from error
                if context.was_restarted(datum):
                    self._log(context, datum, "datum is restarted")
                    continue
                self._log(context, datum, f"failed processing datum, attempt {number} of {context.spec.datum_tries}: {error}")
                recovered = self._run_err_cmd(context, datum)
                number += 1
                continue
            self._log(context, datum, "finished process datum")
            self._pps.end_datum(
                context.job.pk,
                datum.id,
                DatumState.SUCCESS,
                output=output,
                seconds=time.monotonic() - began,
                downloaded=downloaded,
                uploaded=uploaded,
            )
            return
        state = DatumState.RECOVERED if recovered else DatumState.FAILED
        self._pps.end_datum(context.job.pk, datum.id, state, seconds=time.monotonic() - began)

    def _prepare(self, context: JobContext, datum: Datum) -> int:
        clear_folder(self._pfs)
        (self._pfs / "out").mkdir()
        return sum(download(self._store, context.roots[str(one.repo), one.commit], one, self._pfs / one.name) for one in datum.inputs)

    def _run_once(self, context: JobContext, datum: Datum) -> tuple[str | None, int, int]:
        downloaded = self._prepare(context, datum)
        env = {**self._environment(context), **self._datum_environment(context, datum)}
        self._run(context, datum, context.spec.cmd, context.spec.stdin, env)
        output, uploaded = upload(self._store, self._pfs, self._visible_pfs, datum.id)
        return output, downloaded, uploaded

    def _run(self, context: JobContext, datum: Datum, argv: Sequence[str], stdin: Sequence[str], env: Mapping[str, str]) -> None:
        changed = threading.Condition()

        def wake() -> None:
            with changed:
                changed.notify_all()

        process = self._start(context, argv, stdin, env, on_line=lambda line: self._log(context, datum, line, user=True), on_change=wake)
        with context.tracked(process), context.working_on(datum, process), changed:
            if not changed.wait_for(lambda: process.exit_status is not None, context.spec.datum_timeout):
                process.kill()
                changed.wait_for(lambda: process.exit_status is not None)
                raise DatumError(f"datum timed out after {context.spec.datum_timeout:g} s")
        if process.exit_status != 0 and process.exit_status not in context.spec.accept_return_code:
            raise DatumError(f"error running user code: {_status(process.exit_status)}")

    def _run_err_cmd(self, context: JobContext, datum: Datum) -> bool:
        """Whether there is a command for failed attempts and it has succeeded."""
        if not context.spec.err_cmd:
            return False
        env = {**self._environment(context), **self._datum_environment(context, datum)}
        try:
            self._run(context, datum, context.spec.err_cmd, context.spec.err_stdin, env)
        except (DatumError, OSError) as error:
            self._log(context, datum, f"err_cmd failed: {error}")
            return False
        return True

    def _work_batch(self, context: JobContext, datums: Sequence[Datum]) -> None:
        if self._endpoint is None:
            self._endpoint = self._serve(self._next_datum)
        session = self._session = _Session(
            start=lambda session: self._start(
                context, context.spec.cmd, context.spec.stdin, self._environment(context), on_line=session.line, on_change=session.wake
            ),
            on_line=lambda current, line: self._log(context, current, line, user=True),
        )
        with context.tracked(session):
            if not datums:
                clear_folder(self._pfs)
                (self._pfs / "out").mkdir()
                with contextlib.suppress(DatumError, OSError):
                    session.start()
            for datum in datums:
                self._attempts(context, datum, lambda datum=datum: self._batch_once(context, session, datum))  # type: ignore[misc]
        self._session = None

    def _batch_once(self, context: JobContext, session: "_Session", datum: Datum) -> tuple[str | None, int, int]:
        downloaded = self._prepare(context, datum)
        values = self._datum_environment(context, datum)
        (self._pfs / ".env").write_text("".join(f"{key}={value}\n" for key, value in values.items()))
        with context.working_on(datum, session.start()):
            session.process_datum(datum, [f"{key}={value}" for key, value in values.items()], context.spec.datum_timeout)
        output, uploaded = upload(self._store, self._pfs, self._visible_pfs, datum.id)
        return output, downloaded, uploaded

    def _next_datum(self, error: str, alive: Callable[[], bool]) -> list[str]:
        session = self._session
        if session is None:
            raise PachError("no datum set is being processed")
        return session.next_datum(error, alive)

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
        if not argv:
            raise DatumError("the pipeline's transform has no cmd")
        folder = context.spec.working_dir
        if can_isolate():
            mounts = {PFS: self._pfs, **context.secret_mounts}
            return UserProcess(Command(isolated(argv, mounts, folder), stdin, env, None), on_line=on_line, on_change=on_change)
        return UserProcess(Command(argv, stdin, env, folder or None), on_line=on_line, on_change=on_change)

    def _environment(self, context: JobContext) -> dict[str, str]:
        spec = context.spec
        # Pipelines of this project run with the interpreter and the code of this server.
        code = Path(qa_platform.__file__).parent.parent
        python_path = [str(code)] if code.name != "site-packages" else []
        python_path += filter(None, [os.environ.get("PYTHONPATH")])
        return {
            **os.environ,
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
            **dict(spec.env),
            **context.secret_env,
        }

    def _datum_environment(self, context: JobContext, datum: Datum) -> dict[str, str]:
        env = {"PACH_DATUM_ID": datum.id, "PACH_JOB_ID": context.job.id, "PACH_OUTPUT_COMMIT_ID": context.job.id}
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


class _Session:
    """The conversation with a batching process, and with its successors when it fails: the worker offers datums, the process asks."""

    def __init__(self, *, start: Callable[["_Session"], UserProcess], on_line: Callable[[Datum | None, str], None]) -> None:
        self._start = start
        self._on_line = on_line
        self._changed = threading.Condition()
        self._process: UserProcess | None = None
        # A call that an earlier process left behind must not take what is meant for its successor.
        self._generation = 0
        self._datum: Datum | None = None
        self._offer: list[str] | None = None
        self._taken = False
        self._result: str | None = None
        self._killed = False

    def line(self, text: str) -> None:
        self._on_line(self._datum, text)

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def start(self) -> UserProcess:
        """The process, started if there is none."""
        with self._changed:
            if self._process is None:
                self._process = self._start(self)
                if self._killed:
                    self._process.kill()
            return self._process

    def process_datum(self, datum: Datum, env: list[str], timeout: float | None) -> None:
        """Offers a datum and returns when the process has asked for the next one.

        Raises:
            DatumError: it reported an error, has ended, or took too long. It is gone then.
        """
        process = self.start()
        with self._changed:
            self._datum, self._offer, self._taken, self._result = datum, env, False, None
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: self._result is not None or process.exit_status is not None, timeout)
            result, self._offer, self._taken, self._result = self._result, None, False, None
            if result == "":
                return
            # Before its call is let go, which it must not see.
            process.kill()
            self._process = None
            self._generation += 1
            self._changed.notify_all()
        if not done:
            raise DatumError(f"datum timed out after {timeout:g} s")
        if result is None:
            raise DatumError(f"user code exited prematurely: {_status(process.exit_status)}")
        raise DatumError(f"error running user code: {result}")

    def next_datum(self, error: str, alive: Callable[[], bool]) -> list[str]:
        """What the process calls: ends the datum that it had, and blocks until there is another."""
        with self._changed:
            generation = self._generation
            if self._taken:
                self._taken = False
                self._result = error
                self._changed.notify_all()
            while self._offer is None and generation == self._generation and not self._killed and alive():
                self._changed.wait(1.0)
            if self._offer is None or generation != self._generation or not alive():
                raise PachError("there is no further datum for this process")
            env, self._offer, self._taken = self._offer, None, True
            return env

    def kill(self) -> None:
        with self._changed:
            # Before its call is let go: the last NextDatum never returns.
            if self._process is not None:
                self._process.kill()
            self._killed = True
            self._generation += 1
            self._changed.notify_all()


def _has_inputs(datum: Datum, filters: Sequence[str]) -> bool:
    names = {name for one in datum.inputs for name in (one.path, one.path.rstrip("/"), one.digest)}
    return all(wanted in names for wanted in filters)


def _status(status: int | None) -> str:
    if status is not None and status < 0:
        return f"signal {-status}"
    return f"exit status {status}"
