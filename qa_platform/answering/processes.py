"""Several processes that answer on one GPU.

One process prepares and reads some thousand questions a second, under one interpreter lock; a GPU answers several times as many. So a few
processes have the model on the same device, and each is given whole chunks of rows, a few ahead.
"""

import collections
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from qa_platform.answering.chunks import ChunkSize
from qa_platform.answering.runtimes.select import available_cores
from qa_platform.errors import TransientError

if TYPE_CHECKING:
    from qa_platform.answering.engine import Answer, Answerer, AnswerOptions

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")
_Pairs = list[tuple[str, str]]

# Processes on a device, at most, and the cores that each of them needs.
_MOST, _CORES = 4, 4
# Chunks under way for each process: the one that it answers, and the next.
_AHEAD = 2


def processes_for(device: str) -> int:
    """How many processes a device needs: one for a CPU, whose time is the model's; one for every four cores beside a GPU, at most four."""
    return max(1, min(_MOST, available_cores() // _CORES)) if device.split(":")[0] == "cuda" else 1


class Processes:
    """Processes that each have an `Answerer`. They end when this object does, and when this process does.

    Args:
        make: makes a process's own `Answerer`, for this process alone.
        count: how many processes.
        device: what they answer on, for messages.
    """

    # A file's shard has 2,000 rows: all processes get a part of it.
    chunk = ChunkSize(rows=512, characters=2**19)

    def __init__(self, make: "Callable[[], Answerer]", count: int, device: str) -> None:
        self._make = make
        self._count = count
        self._device = device
        self._pool = self._started()
        self._lock = threading.Lock()

    def runtime(self) -> str:
        """The library that runs the model in these processes, with its version. Loads the model in all of them.

        Raises:
            InputError: it cannot be loaded.
            TransientError: the device has no memory for it.
        """
        names = [self._result(future) for future in [self._submit(_runtime) for _ in range(self._count)]]
        return f"{names[0]}, in {self._count} processes"

    def answers(self, chunks: Iterator[_Pairs], options: "AnswerOptions") -> "Iterator[Answer]":
        """The answers to the rows of all chunks, in order. Chunks are read in another thread. Equal rows of a chunk are asked once.

        Raises:
            TransientError: a process died. The next call starts new ones.
        """
        reading = ThreadPoolExecutor(1, "qa-read")
        underway: collections.deque[Future[Future[list[Answer]] | None]] = collections.deque()

        def give() -> "Future[list[Answer]] | None":
            chunk = next(chunks, None)
            return None if chunk is None else self._submit(_answers, chunk, options)

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
        # The CUDA of a forked process does not work.
        context = multiprocessing.get_context("spawn")
        threads = max(1, available_cores() // self._count)
        return ProcessPoolExecutor(self._count, context, initializer=_start, initargs=(self._make, threads))

    def _submit(self, work: Callable[_Given, _Result], *args: _Given.args, **kwargs: _Given.kwargs) -> Future[_Result]:
        with self._lock:
            try:
                return self._pool.submit(work, *args, **kwargs)
            except BrokenProcessPool:
                self._pool = self._started()
                return self._pool.submit(work, *args, **kwargs)

    def _result(self, future: Future[_Result]) -> _Result:
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise TransientError(
                "a process that answers on it died", where=f"device {self._device}", advice="if it was killed for memory, give it more"
            ) from error


# What follows runs in those processes. Each has one `Answerer`, made when its first work comes.
_made: dict[str, Any] = {}


def _start(make: "Callable[[], Answerer]", threads: int) -> None:
    # An interrupt is for the process that gives the work.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _made["make"] = make


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _answerer() -> "Answerer":
    if "answerer" not in _made:
        answerer = _made["make"]()
        answerer.warm_up()
        _made["answerer"] = answerer
    return _made["answerer"]


def _runtime() -> str:
    return _answerer().runtime


def _answers(pairs: _Pairs, options: "AnswerOptions") -> "list[Answer]":
    return list(_answerer().answer(pairs, options))
