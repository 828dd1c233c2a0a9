"""Content-addressed pieces of files. The name of a chunk is its BLAKE2b-256 hash; a chunk that does not match its name is not served."""

import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from qa_platform.embedded.pachd.storage.database import Database

CHUNK_BYTES = 4 * 2**20
# Smaller chunks are in the database: a file for each would cost more than its content.
_INLINE_BYTES = 64 * 2**10
_PENDING_BYTES = 8 * 2**20
# Per stream: enough to hash and store one chunk while the next one arrives.
_PIECES_ON_THE_WAY = 2
_THREADS = 4

SCHEMA = """
CREATE TABLE IF NOT EXISTS chunk (hash TEXT PRIMARY KEY, data BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS node (hash TEXT PRIMARY KEY, data BLOB NOT NULL) WITHOUT ROWID;
"""


class CorruptError(Exception):
    """A stored chunk is missing or does not match its name."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """The name of a chunk, and its size in bytes."""

    hash: str
    size: int


def digest(data: bytes | bytearray | memoryview) -> str:
    """The name of a chunk with this content."""
    return blake2b(data, digest_size=32).hexdigest()


class ChunkStore:
    """Reads and deletes chunks. Writers store them through a `ChunkBatch`."""

    def __init__(self, folder: Path, database: Database) -> None:
        self._folder = folder
        self._database = database
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="chunks")
        folder.mkdir(parents=True, exist_ok=True)

    def batch(self) -> "ChunkBatch":
        """A new batch for one writer."""
        return ChunkBatch(self._folder, self._database, self._threads)

    def all_names(self) -> set[str]:
        """The names of all chunks, and of the temporary files of interrupted writes."""
        return {row["hash"] for row in self._database.rows("SELECT hash FROM chunk")} | {path.name for path in self._folder.glob("*/*")}

    def delete(self, names: Iterable[str]) -> None:
        """Delete chunks and temporary files."""
        names = list(names)
        self._database.execute_many("DELETE FROM chunk WHERE hash = ?", [(name,) for name in names])
        for name in names:
            _file(self._folder, name).unlink(missing_ok=True)

    def close(self) -> None:
        self._threads.shutdown()

    def read(self, chunk: Chunk) -> bytes:
        """The content of a chunk.

        Raises:
            CorruptError: the chunk is missing or damaged.
        """
        data: bytes | None = self._database.value("SELECT data FROM chunk WHERE hash = ?", chunk.hash)
        if data is None:
            try:
                data = _file(self._folder, chunk.hash).read_bytes()
            except FileNotFoundError as error:
                raise CorruptError(f"chunk {chunk.hash} is missing") from error
        if len(data) != chunk.size or digest(data) != chunk.hash:
            raise CorruptError(f"chunk {chunk.hash} is damaged: {len(data)} of {chunk.size} bytes, or other content")
        return data

    def read_all(self, chunks: Iterable[Chunk], *, offset: int = 0) -> Iterator[bytes]:
        """The content of several chunks, after ``offset`` bytes.

        Raises:
            CorruptError: a chunk is missing or damaged.
        """
        for chunk in chunks:
            if offset >= chunk.size:
                offset -= chunk.size
                continue
            data = self.read(chunk)
            yield data[offset:] if offset else data
            offset = 0


class ChunkBatch:
    """Stores the chunks of one writer. Small ones are written together, at the latest by ``flush``."""

    def __init__(self, folder: Path, database: Database, threads: ThreadPoolExecutor) -> None:
        self._folder = folder
        self._database = database
        self._threads = threads
        self._pending: dict[str, bytes] = {}
        self._pending_bytes = 0

    def put(self, data: bytes | bytearray | memoryview) -> Chunk:
        """Store a chunk."""
        if len(data) > _INLINE_BYTES:
            return self._put_file(data)
        name = digest(data)
        if name not in self._pending:
            self._pending[name] = bytes(data)
            self._pending_bytes += len(data)
            if self._pending_bytes > _PENDING_BYTES:
                self.flush()
        return Chunk(name, len(data))

    def put_soon(self, data: bytes | bytearray | memoryview) -> Future[Chunk]:
        """Store a large chunk on another thread. The data must not change until it is stored."""
        return self._threads.submit(self._put_file, data)

    def _put_file(self, data: bytes | bytearray | memoryview) -> Chunk:
        chunk = Chunk(digest(data), len(data))
        path = _file(self._folder, chunk.hash)
        try:
            if path.stat().st_size == chunk.size:
                return chunk
        except FileNotFoundError:
            pass
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f".{chunk.hash}.{uuid.uuid4().hex}")
        with temporary.open("wb") as file:
            file.write(data)
        temporary.replace(path)
        return chunk

    def flush(self) -> None:
        """Write the small chunks that are still in memory."""
        if self._pending:
            self._database.execute_many("INSERT OR IGNORE INTO chunk VALUES (?, ?)", list(self._pending.items()))
        self._pending = {}
        self._pending_bytes = 0


class Chunker:
    """Cuts a stream into chunks of a fixed size, so that equal content has equal chunks, however it arrives."""

    def __init__(self, batch: ChunkBatch) -> None:
        self._batch = batch
        self._buffer = bytearray()
        self._chunks: list[Chunk] = []
        self._on_the_way: deque[Future[Chunk]] = deque()

    def write(self, data: bytes | memoryview) -> None:
        """Add data to the stream."""
        view = memoryview(data)
        if self._buffer:
            room = CHUNK_BYTES - len(self._buffer)
            self._buffer += view[:room]
            view = view[room:]
            if len(self._buffer) == CHUNK_BYTES:
                self._put_soon(self._buffer)
                self._buffer = bytearray()
        while len(view) >= CHUNK_BYTES:
            self._put_soon(view[:CHUNK_BYTES])
            view = view[CHUNK_BYTES:]
        self._buffer += view

    def _put_soon(self, data: bytearray | memoryview) -> None:
        if len(self._on_the_way) == _PIECES_ON_THE_WAY:
            self._chunks.append(self._on_the_way.popleft().result())
        self._on_the_way.append(self._batch.put_soon(data))

    def finish(self) -> tuple[Chunk, ...]:
        """End the stream, and return its chunks. The next data starts a new stream."""
        while self._on_the_way:
            self._chunks.append(self._on_the_way.popleft().result())
        if self._buffer:
            self._chunks.append(self._batch.put(self._buffer))
        chunks, self._chunks, self._buffer = tuple(self._chunks), [], bytearray()
        return chunks


def is_canonical(chunks: tuple[Chunk, ...]) -> bool:
    """Whether a `Chunker` would cut the same chunks."""
    return all(chunk.size == CHUNK_BYTES for chunk in chunks[:-1]) and all(0 < chunk.size <= CHUNK_BYTES for chunk in chunks[-1:])


def _file(folder: Path, name: str) -> Path:
    return folder / name.lstrip(".")[:2] / name
