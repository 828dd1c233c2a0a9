"""File systems as content-addressed trees: their entries, and storing and reading them. `tree_editor` changes them.

A commit is the name of a root node, and equal folders are stored once.

The keys of a folder's children are ``name`` for a file and ``name/`` for a folder, so that sorted keys give sorted full paths.
A file is a list of parts, one per datum tag, ordered by tag.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from hashlib import blake2b

from qa_platform.embedded.pachd.storage.chunks import Chunk, ChunkStore
from qa_platform.embedded.pachd.storage.database import Database

DEFAULT_TAG = "default"
_CACHED_ENTRIES = 200_000


class TreeError(Exception):
    """Two entries conflict, or a node is missing or damaged. The message names the path or the node."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file. ``digest`` is computed from the content alone, in hex."""

    size: int
    digest: str
    parts: tuple[tuple[str, tuple[Chunk, ...]], ...]

    @property
    def chunks(self) -> Iterator[Chunk]:
        return (chunk for _, chunks in self.parts for chunk in chunks)


@dataclass(frozen=True, slots=True)
class DirEntry:
    """A folder. As in Pachyderm, ``digest`` is computed from the children's digests, not from their names."""

    size: int
    digest: str
    node: str


Entry = FileEntry | DirEntry
Children = Mapping[str, Entry]


@dataclass(frozen=True, slots=True)
class Found:
    """An entry and its path: ``/a/b`` for a file, ``/a/`` for a folder, ``/`` for the root."""

    path: str
    entry: Entry

    @property
    def is_dir(self) -> bool:
        return isinstance(self.entry, DirEntry)


class TreeStore:
    """Reads and writes nodes, with a bounded cache."""

    def __init__(self, database: Database, chunks: ChunkStore) -> None:
        self._database = database
        self.chunks = chunks
        self._cache: OrderedDict[str, Children] = OrderedDict()
        self._cached = 0
        self._lock = threading.Lock()

    def transaction(self) -> AbstractContextManager[None]:
        """Write everything in the block to disk together."""
        return self._database.transaction()

    def children(self, node: str) -> Children:
        with self._lock:
            if node in self._cache:
                self._cache.move_to_end(node)
                return self._cache[node]
        children = {key: _decode(values) for key, *values in json.loads(self._data(node))}
        self._remember(node, children)
        return children

    def _data(self, node: str) -> bytes:
        data: bytes | None = self._database.value("SELECT data FROM node WHERE hash = ?", node)
        if data is None or _hash(data) != node:
            raise TreeError(f"folder {node} is missing or damaged in the storage")
        return data

    def links(self, node: str) -> tuple[set[str], set[str]]:
        """The nodes of a folder's subfolders, and the names of its files' chunks. It bypasses the cache."""
        folders: set[str] = set()
        chunks: set[str] = set()
        for _, _, _, rest in json.loads(self._data(node)):
            if isinstance(rest, str):
                folders.add(rest)
            else:
                chunks.update(name for _, pieces in rest for name, _ in pieces)
        return folders, chunks

    def all_nodes(self) -> set[str]:
        return {row["hash"] for row in self._database.rows("SELECT hash FROM node")}

    def delete(self, nodes: Iterable[str]) -> None:
        self._database.execute_many("DELETE FROM node WHERE hash = ?", [(node,) for node in nodes])

    def write_node(self, children: Children) -> DirEntry:
        data = json.dumps([[key, *_encode(entry)] for key, entry in sorted(children.items())], separators=(",", ":")).encode()
        node = _hash(data)
        self._database.execute("INSERT OR IGNORE INTO node VALUES (?, ?)", node, data)
        return _dir_entry(children, node)

    def root(self, node: str | None) -> DirEntry | None:
        """The entry of a root node; None for the empty tree."""
        if not node:
            return None
        return _dir_entry(self.children(node), node)

    def find(self, node: str | None, path: str) -> Found | None:
        """The entry at a path. A file takes precedence over a folder; with a trailing slash, only a folder matches."""
        names = [name for name in path.split("/") if name]
        if not node or not names:
            root = self.root(node)
            return Found("/", root) if root and not names else None
        children = self.children(node)
        for name in names[:-1]:
            child = children.get(name + "/")
            if not isinstance(child, DirEntry):
                return None
            children = self.children(child.node)
        full = "/" + "/".join(names)
        if not path.endswith("/") and names[-1] in children:
            return Found(full, children[names[-1]])
        if names[-1] + "/" in children:
            return Found(full + "/", children[names[-1] + "/"])
        return None

    def list(self, found: Found) -> Iterator[Found]:
        """The immediate children of a folder, in order."""
        if isinstance(found.entry, DirEntry):
            for key, entry in self.children(found.entry.node).items():
                yield Found(found.path + key, entry)

    def differences(self, old: Found | None, new: Found | None) -> Iterator[tuple[Found | None, Found | None]]:
        """The differences between two files or folders, as (old, new), ordered by path: changed folders before their contents."""
        before, after = ({part.path[len(top.path) :]: part for part in self.walk(top)} if top else {} for top in (old, new))
        for path in sorted(before.keys() | after.keys()):
            pair = before.get(path), after.get(path)
            if _identity(pair[0]) != _identity(pair[1]):
                yield pair

    def walk(self, found: Found) -> Iterator[Found]:
        """An entry and everything below it, ordered by path."""
        yield found
        for child in self.list(found):
            yield from self.walk(child)

    def _remember(self, node: str, children: Children) -> None:
        with self._lock:
            self._cache[node] = children
            self._cached += len(children)
            while self._cached > _CACHED_ENTRIES and len(self._cache) > 1:
                _, dropped = self._cache.popitem(last=False)
                self._cached -= len(dropped)


def _identity(found: Found | None) -> str | None:
    # The digest of a folder does not depend on its children's names.
    return None if found is None else found.entry.node if isinstance(found.entry, DirEntry) else found.entry.digest


def entry_of_parts(parts: Mapping[str, tuple[Chunk, ...]]) -> FileEntry:
    """A file with these parts, by tag."""
    ordered = tuple(sorted(parts.items()))
    total = blake2b(digest_size=32)
    size = 0
    for _, chunks in ordered:
        for chunk in chunks:
            total.update(bytes.fromhex(chunk.hash))
            size += chunk.size
    return FileEntry(size, total.hexdigest(), ordered)


def file_entry(tag: str, chunks: Iterable[Chunk]) -> FileEntry:
    """A file with one part."""
    return entry_of_parts({tag: tuple(chunks)})


def _encode(entry: Entry) -> list[object]:
    if isinstance(entry, DirEntry):
        return [entry.size, entry.digest, entry.node]
    return [entry.size, entry.digest, [[tag, [[chunk.hash, chunk.size] for chunk in chunks]] for tag, chunks in entry.parts]]


def _decode(values: list[object]) -> Entry:
    size, total, rest = values
    assert isinstance(size, int)
    assert isinstance(total, str)
    if isinstance(rest, str):
        return DirEntry(size, total, rest)
    assert isinstance(rest, list)
    return FileEntry(size, total, tuple((tag, tuple(Chunk(name, length) for name, length in chunks)) for tag, chunks in rest))


def _dir_entry(children: Children, node: str) -> DirEntry:
    total = blake2b(digest_size=32)
    for _, entry in sorted(children.items()):
        total.update(bytes.fromhex(entry.digest))
    return DirEntry(sum(entry.size for entry in children.values()), total.hexdigest(), node)


def _hash(data: bytes) -> str:
    return blake2b(data, digest_size=32).hexdigest()
