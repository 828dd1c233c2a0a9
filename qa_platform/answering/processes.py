"""Several processes that answer on one GPU.

One process, with its one interpreter lock, prepares and reads a few thousand questions a second; a GPU answers several times as many. So
a few processes hold the model on the same device, and each is given whole chunks of rows, a few ahead.
"""

import collections
import contextlib
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, TypeVar

from qa_platform.answering.chunks import ChunkSize
from qa_platform.answering.runtimes.select import available_cores
from qa_platform.errors import DeviceFailed, QaPlatformError, TransientError

if TYPE_CHECKING:
    from qa_platform.answering.engine import Answer, LoadedModel, Wanted

_Result = TypeVar("_Result")
_Pairs = list[tuple[str, str]]

# The maximum processes on a device, and the cores that each of them needs.
_MOST, _CORES = 4, 4
# Chunks in flight per process: the one that it answers, and the next.
_AHEAD = 2


def processes_for(device: str) -> int:
    """The number of processes for a device: one for a CPU, which the model keeps busy; for a GPU one per four cores, at most four."""
    return max(1, min(_MOST, available_cores() // _CORES)) if device.split(":")[0] == "cuda" else 1


class Processes:
    """Processes that each hold a model. They end with this object, and with this process.

    Args:
        make: loads a process's model, in that process.
        count: how many processes.
        device: the device that they answer on, for messages.
        threads: threads that tokenise, in each.

    Raises:
        InputError: the model cannot be loaded.
        TransientError: the device has no memory for it, or failed.
    """

    # Small enough that every process gets a part of a shard, which has 2,000 rows.
    chunk = ChunkSize(rows=512, characters=2**19)

    def __init__(self, make: "Callable[[], LoadedModel]", count: int, device: str, *, threads: int) -> None:
        self._make = make
        self._count = count
        self._device = device
        self._threads = threads
        # Whether the device failed under these processes, which then cannot use it again.
        self._failed = False
        self._lock = threading.Lock()
        self._pool = self._started()
        names = [self._result(future) for future in [self._submit(_name) for _ in range(count)]]
        self.name = f"{names[0]}, in {count} processes"

    def answers(self, chunks: Iterator[_Pairs], wanted: "Wanted") -> "Iterator[Answer]":
        """The answers to the rows of all chunks, in order. Chunks are read in another thread. Equal rows of a chunk are asked once.

        Raises:
            TransientError: a process died, or the device failed (the next call starts new processes), or a new one cannot load the model.
        """
        reading = ThreadPoolExecutor(1, "qa-read")
        underway: collections.deque[Future[Future[list[Answer]] | None]] = collections.deque()

        def give() -> "Future[list[Answer]] | None":
            chunk = next(chunks, None)
            return None if chunk is None else self._submit(_answers, chunk, wanted, self._device)

        try:
            while True:
                while len(underway) < _AHEAD * self._count:
                    underway.append(reading.submit(give))
                given = underway.popleft().result()
                if given is None:
                    return
                yield from self._result(given)
        finally:
            reading.shutdown(wait=True, cancel_futures=True)
            for reader in underway:
                if not reader.cancelled() and reader.exception() is None and (left := reader.result()) is not None:
                    left.cancel()

    def _started(self) -> ProcessPoolExecutor:
        # CUDA does not work in a forked process.
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(self._count, context, initializer=_start, initargs=(self._make, self._threads))

    def _submit(self, work: Callable[..., _Result], *args: object) -> Future[_Result]:
        with self._lock:
            if self._failed:
                self._pool.shutdown(wait=False)
                self._pool, self._failed = self._started(), False
            try:
                return self._pool.submit(work, *args)
            except BrokenProcessPool:
                self._pool = self._started()
                return self._pool.submit(work, *args)

    def _result(self, future: Future[_Result]) -> _Result:
        try:
            return future.result()
        except DeviceFailed:
            self._failed = True
            raise
        except BrokenProcessPool as error:
            advice = "if it ran out of memory, give it more; if it did not start, see standard error"
            # The traceback holds this frame, the frame the future, and the future the error: the cycle would keep this object alive.
            cause = error.with_traceback(None)
            raise TransientError("an answering process died", where=f"device {self._device}", advice=advice) from cause


# Everything below runs in those processes.

_make: "Callable[[], LoadedModel]"


def _start(make: "Callable[[], LoadedModel]", threads: int) -> None:
    global _make
    _make = make
    # On an interrupt from the terminal, the process ends at once, without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@functools.cache
def _model() -> "LoadedModel":
    return _make()


def _name() -> str:
    with _only_own_errors():
        return _model().name


def _answers(pairs: _Pairs, wanted: "Wanted", device: str) -> "list[Answer]":
    with _only_own_errors():
        try:
            model = _model()
        except DeviceFailed:
            raise
        except QaPlatformError as error:
            # It was loaded before, so the request is right: the device or the model's folder is at fault.
            raise TransientError(f"the model cannot be loaded again: {error}", where=f"device {device}") from error
        return list(model.answers(iter([pairs]), wanted))


@contextlib.contextmanager
def _only_own_errors() -> Iterator[None]:
    """Replace other errors: they may fail to unpickle, which would end all processes."""
    try:
        yield
    except QaPlatformError:
        raise
    except Exception as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
