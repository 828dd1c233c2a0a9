"""What a pipeline's workers share about one job: its inputs and secrets, the datums in progress, and how to stop it."""

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from qa_platform.embedded.pachd.pps import Datum, Job
from qa_platform.embedded.pachd.spec import PipelineSpec


class _Killable(Protocol):
    def kill(self) -> None: ...


@dataclass(frozen=True)
class PodSecrets:
    """The secrets of a pipeline's workers, read when the workers started.

    ``mounts`` are folders with a file per key, by their mount path in user code. If nothing can be mounted, ``root`` is a folder that
    stands for the root of the file system.
    """

    environment: Mapping[str, str] = field(default_factory=dict)
    mounts: Mapping[Path, Path] = field(default_factory=dict)
    root: Path | None = None


@dataclass(eq=False)
class JobContext:
    """What the workers need to know about a job, and how to stop it. ``roots`` are the trees of the input commits, by repo and id.

    ``no_start`` makes the program fail to start; ``no_restart`` makes it fail to start again after a failure.
    """

    job: Job
    spec: PipelineSpec
    roots: Mapping[tuple[str, str], str | None]
    spec_commit: str
    secrets: PodSecrets = PodSecrets()
    no_start: bool = False
    no_restart: bool = False
    cancelled: threading.Event = field(default_factory=threading.Event)
    _processes: set["_Killable"] = field(default_factory=set)
    _working_on: dict[str, tuple[Datum, "_Killable"]] = field(default_factory=dict)
    _restarted: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def cancel(self) -> None:
        self.cancelled.set()
        with self._lock:
            processes = list(self._processes)
        for process in processes:
            process.kill()

    def restart(self, filters: Sequence[str]) -> bool:
        """Restart the datums in progress whose inputs have all these paths or hashes. Returns False if there are none."""
        with self._lock:
            found = [(datum, process) for datum, process in self._working_on.values() if _has_inputs(datum, filters)]
            self._restarted.update(datum.id for datum, _ in found)
            for _, process in found:
                process.kill()
        return bool(found)

    def was_restarted(self, datum: Datum) -> bool:
        """Whether the datum must be restarted. Clears the request."""
        with self._lock:
            restarted = datum.id in self._restarted
            self._restarted.discard(datum.id)
            return restarted

    @contextlib.contextmanager
    def working_on(self, datum: Datum, process: "_Killable") -> Iterator[None]:
        """Mark the datum as in progress during the block. Killing the process ends this work."""
        with self._lock:
            self._working_on[datum.id] = datum, process
        try:
            yield
        finally:
            with self._lock:
                self._working_on.pop(datum.id, None)

    @contextlib.contextmanager
    def tracked(self, process: "_Killable") -> Iterator[None]:
        """Kill the process if the job is cancelled during the block, and in any case at its end."""
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


def _has_inputs(datum: Datum, filters: Sequence[str]) -> bool:
    names = {name for one in datum.inputs for name in (one.path, one.path.rstrip("/"), one.digest)}
    return all(wanted in names for wanted in filters)
