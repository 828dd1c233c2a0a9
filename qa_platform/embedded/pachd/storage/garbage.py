"""Deletes expired file sets, and unreferenced chunks and tree nodes.

Such garbage is left by drops, squashes, clears, expired file sets and killed servers.

The collector works only while there is no writer, and stops at once when one starts. The reason: a writer does not store a chunk that
already exists, so the chunk must not be deleted before the writer refers to it.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from qa_platform.embedded.pachd.storage.chunks import ChunkStore
from qa_platform.embedded.pachd.storage.filesets import FileSets
from qa_platform.embedded.pachd.storage.trees import TreeStore

_LOG = logging.getLogger(__name__)
# A job or an upload is often followed by another, which would interrupt the collector.
QUIET_SECONDS = 5.0
# The same interval as in Pachyderm.
EXPIRY_SECONDS = 60.0
_LOOK_SECONDS = 1.0
_BATCH = 500


class WriteGate:
    """Counts writers, and records that there is garbage.

    A writer stores chunks, then references to them. Whatever drops a reference sets ``garbage``.
    """

    def __init__(self) -> None:
        # An earlier server may have been killed while it wrote.
        self.garbage = threading.Event()
        self.garbage.set()
        self._lock = threading.Lock()
        self._writers = 0
        self._turn = 0
        self._ended = time.monotonic()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep the collector from running. What the block stores is kept if it is referenced by the end of the block."""
        with self._lock:
            self._writers += 1
            self._turn += 1
        try:
            yield
        finally:
            with self._lock:
                self._writers -= 1
                self._ended = time.monotonic()

    def quiet_turn(self, seconds: float) -> int | None:
        """A mark for this moment, if there was no writer for this many seconds; otherwise None."""
        with self._lock:
            return self._turn if not self._writers and time.monotonic() - self._ended >= seconds else None

    @contextmanager
    def unless_written_since(self, turn: int) -> Iterator[bool]:
        """Whether no writer has started since a mark. None can start within the context."""
        with self._lock:
            yield self._turn == turn


class Collector:
    """Collects when there is garbage and there was no writer for ``quiet`` seconds. ``roots`` returns the trees in use.

    Expired file sets are deleted every ``expiry`` seconds; until then they can still be used.
    """

    def __init__(
        self,
        trees: TreeStore,
        filesets: FileSets,
        gate: WriteGate,
        roots: Callable[[], Iterable[str]],
        *,
        quiet: float = QUIET_SECONDS,
        expiry: float = EXPIRY_SECONDS,
    ) -> None:
        self._trees = trees
        self._chunks: ChunkStore = trees.chunks
        self._filesets = filesets
        self._gate = gate
        self._roots = roots
        self._quiet = quiet
        self._expiry = expiry
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="garbage", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._gate.garbage.set()
        self._thread.join(10)

    def _run(self) -> None:
        due = 0.0
        while not self._stopped.is_set():
            # Nothing signals that a file set has expired.
            if time.monotonic() >= due:
                due = time.monotonic() + self._expiry
                if self._filesets.forget_expired():
                    self._gate.garbage.set()
            if not self._gate.garbage.wait(self._expiry) or self._stopped.is_set():
                continue
            self._gate.garbage.clear()
            try:
                if self.collect() is None:
                    self._gate.garbage.set()
                    self._stopped.wait(_LOOK_SECONDS)
            except Exception:
                _LOG.exception("the garbage collection failed; it continues at the next change")

    def collect(self) -> int | None:
        """Delete the garbage, and return the number of chunks and nodes. None if a writer interrupted it."""
        turn = self._gate.quiet_turn(self._quiet)
        if turn is None:
            return None
        chunks = self._filesets.all_chunks()
        nodes: set[str] = set()
        waiting = list(self._roots())
        while waiting:
            if self._stopped.is_set() or self._gate.quiet_turn(0) != turn:
                return None
            if (node := waiting.pop()) not in nodes:
                nodes.add(node)
                below, content = self._trees.links(node)
                waiting += below
                chunks |= content
        freed = 0
        for delete, names in (
            (self._trees.delete, self._trees.all_nodes() - nodes),
            (self._chunks.delete, self._chunks.all_names() - chunks),
        ):
            ordered = list(names)
            for start in range(0, len(ordered), _BATCH):
                with self._gate.unless_written_since(turn) as alone:
                    if not alone or self._stopped.is_set():
                        return None
                    delete(ordered[start : start + _BATCH])
                    freed += len(ordered[start : start + _BATCH])
        return freed
