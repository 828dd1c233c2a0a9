"""Frees the chunks and folders that nothing refers to any more: what was dropped, squashed or cleared, and what a killed server left.

It works only while nobody writes, and gives way at once to whoever begins to: a piece that is written a second time is not written
again, so it must not go away between that and the moment when something refers to it.
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
# A job or an upload is seldom alone: what follows it soon would only interrupt the work.
QUIET_SECONDS = 5.0
_LOOK_SECONDS = 1.0
_BATCH = 500


class WriteGate:
    """Counts those who store pieces and make something refer to them. ``garbage`` is set by whoever gives something up."""

    def __init__(self) -> None:
        # The server before this one may have been killed while it wrote.
        self.garbage = threading.Event()
        self.garbage.set()
        self._lock = threading.Lock()
        self._writers = 0
        self._turn = 0
        self._ended = time.monotonic()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """What is stored inside, and referred to before the end of it, is kept."""
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
        """A mark of this moment, if nobody has written for so long."""
        with self._lock:
            return self._turn if not self._writers and time.monotonic() - self._ended >= seconds else None

    @contextmanager
    def unless_written_since(self, turn: int) -> Iterator[bool]:
        """True if nobody has begun to write since that turn; nobody does before the end of what runs inside."""
        with self._lock:
            yield self._turn == turn


class Collector:
    """Collects when there is garbage, as soon as it is quiet. ``roots`` are the trees that are in use."""

    def __init__(
        self, trees: TreeStore, filesets: FileSets, gate: WriteGate, roots: Callable[[], Iterable[str]], *, quiet: float = QUIET_SECONDS
    ) -> None:
        self._trees = trees
        self._chunks: ChunkStore = trees.chunks
        self._filesets = filesets
        self._gate = gate
        self._roots = roots
        self._quiet = quiet
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="garbage", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._gate.garbage.set()
        self._thread.join(10)

    def _run(self) -> None:
        while self._gate.garbage.wait() and not self._stopped.is_set():
            self._gate.garbage.clear()
            try:
                if self.collect() is None:
                    self._gate.garbage.set()
                    self._stopped.wait(_LOOK_SECONDS)
            except Exception:
                _LOG.exception("nothing more is freed for now")

    def collect(self) -> int | None:
        """Frees what it can: the number of pieces; None if others have written meanwhile, so that some may be left."""
        turn = self._gate.quiet_turn(self._quiet)
        if turn is None:
            return None
        self._filesets.forget_expired()
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
