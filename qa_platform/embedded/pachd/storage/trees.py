"""File systems as content-addressed trees: a commit is the name of a root node, and equal folders are stored once.

Keys of a folder's children: ``name`` for a file, ``name/`` for a folder, so that sorted keys give sorted full paths.
A file is a list of parts, one per datum tag, in the order of the tags.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b

from qa_platform.embedded.pachd.storage.chunks import Chunk, Chunker, ChunkStore, is_canonical
from qa_platform.embedded.pachd.storage.database import Database

DEFAULT_TAG = "default"
_CACHED_ENTRIES = 200_000


class TreeError(Exception):
    """Two things cannot be in one tree; the message says which path."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """``digest`` is that of the content alone, in hex."""

    size: int
    digest: str
    parts: tuple[tuple[str, tuple[Chunk, ...]], ...]

    @property
    def chunks(self) -> Iterator[Chunk]:
        return (chunk for _, chunks in self.parts for chunk in chunks)


@dataclass(frozen=True, slots=True)
class DirEntry:
    """``digest`` is made of the children's digests, not of their names, as Pachyderm has it."""

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
        """The folders directly in a folder, by node, and the chunks of its files, by name; past the cache."""
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
        total = blake2b(digest_size=32)
        for _, entry in sorted(children.items()):
            total.update(bytes.fromhex(entry.digest))
        return DirEntry(sum(entry.size for entry in children.values()), total.hexdigest(), node)

    def root(self, node: str | None) -> DirEntry | None:
        """The entry of a root node; None for the empty tree."""
        if not node:
            return None
        children = self.children(node)
        total = blake2b(digest_size=32)
        for _, entry in sorted(children.items()):
            total.update(bytes.fromhex(entry.digest))
        return DirEntry(sum(entry.size for entry in children.values()), total.hexdigest(), node)

    def find(self, node: str | None, path: str) -> Found | None:
        """What lies at a path: a file before a folder; with a trailing slash only a folder."""
        root = self.root(node)
        if root is None:
            return None
        names = [name for name in path.split("/") if name]
        if not names:
            return Found("/", root)
        entry: Entry = root
        for name in names[:-1]:
            child = self.children(entry.node).get(name + "/") if isinstance(entry, DirEntry) else None
            if child is None:
                return None
            entry = child
        assert isinstance(entry, DirEntry)
        children = self.children(entry.node)
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
        """What differs between two files or folders, as (old, new), in the order of the paths: changed folders, then what is in them."""
        before, after = ({part.path[len(top.path) :]: part for part in self.walk(top)} if top else {} for top in (old, new))
        for path in sorted(before.keys() | after.keys()):
            pair = before.get(path), after.get(path)
            if _identity(pair[0]) != _identity(pair[1]):
                yield pair

    def walk(self, found: Found) -> Iterator[Found]:
        """The thing itself and everything below it, in order of the paths."""
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


class _Folder:
    __slots__ = ("children",)

    def __init__(self, children: Mapping[str, "Entry | _Folder"]) -> None:
        self.children: dict[str, Entry | _Folder] = dict(children)


class TreeEditor:
    """Changes to a tree; only the folders that change are loaded and written."""

    def __init__(self, store: TreeStore, node: str | None) -> None:
        self._store = store
        self._root = _Folder(store.children(node) if node else {})

    def add(self, path: str, tag: str, chunks: tuple[Chunk, ...]) -> None:
        """Appends to the (path, tag), or makes it."""
        folder, name = self._descend(path)
        old = folder.children.get(name)
        parts = dict(old.parts) if isinstance(old, FileEntry) else {}
        parts[tag] = parts.get(tag, ()) + chunks
        folder.children[name] = _file_entry(parts)

    def put(self, path: str, entry: FileEntry) -> None:
        """Sets a file that is not there yet.

        Raises:
            TreeError: the path is taken.
        """
        folder, name = self._descend(path)
        if name in folder.children:
            raise TreeError(path)
        folder.children[name] = entry

    def delete(self, path: str, tag: str) -> None:
        """Deletes the tag's part of a file, or, with a trailing slash, of everything in a folder. A miss is no error."""
        names = [name for name in path.split("/") if name]
        if not names:
            self._delete_in(self._root, tag)
            return
        folder: _Folder | None = self._root
        for name in names[:-1]:
            folder = self._open(folder, name + "/") if folder else None
        if folder is None:
            return
        key = names[-1] + ("/" if path.endswith("/") else "")
        self._delete_key(folder, key, tag)

    def merge(self, node: str) -> None:
        """Adds all of another tree.

        Raises:
            TreeError: a path is in both.
        """
        self._merge(self._root, node, "/")

    def write(self) -> DirEntry | None:
        """Stores what changed and returns the root, None where nothing is left.

        Raises:
            TreeError: a path is both file and folder.
        """
        return self._write(self._root, "/")

    def _descend(self, path: str) -> tuple[_Folder, str]:
        *folders, name = [name for name in path.split("/") if name]
        folder = self._root
        for part in folders:
            child = self._open(folder, part + "/")
            if child is None:
                child = folder.children[part + "/"] = _Folder({})
            folder = child
        return folder, name

    def _open(self, folder: _Folder, key: str) -> _Folder | None:
        child = folder.children.get(key)
        if isinstance(child, DirEntry):
            child = folder.children[key] = _Folder(self._store.children(child.node))
        return child if isinstance(child, _Folder) else None

    def _delete_in(self, folder: _Folder, tag: str) -> None:
        for key in list(folder.children):
            self._delete_key(folder, key, tag)

    def _delete_key(self, folder: _Folder, key: str, tag: str) -> None:
        child = folder.children.get(key)
        if isinstance(child, FileEntry):
            parts = {name: chunks for name, chunks in child.parts if name != tag}
            if parts:
                folder.children[key] = _file_entry(parts)
            else:
                del folder.children[key]
        elif child is not None:
            opened = self._open(folder, key)
            assert opened is not None
            self._delete_in(opened, tag)
            if not opened.children:
                del folder.children[key]

    def _merge(self, folder: _Folder, node: str, path: str) -> None:
        for key, entry in self._store.children(node).items():
            if key not in folder.children:
                folder.children[key] = entry
            elif isinstance(entry, DirEntry):
                opened = self._open(folder, key)
                assert opened is not None
                self._merge(opened, entry.node, path + key)
            else:
                raise TreeError(path + key)

    def _write(self, folder: _Folder, path: str) -> DirEntry | None:
        children: dict[str, Entry] = {}
        for key, child in folder.children.items():
            if isinstance(child, _Folder):
                written = self._write(child, path + key)
                if written is not None:
                    children[key] = written
            elif isinstance(child, FileEntry):
                children[key] = self._canonical(child)
            else:
                children[key] = child
        for key in children:
            if key.endswith("/") and key[:-1] in children:
                raise TreeError(f"file / directory path collision ({path}{key[:-1]})")
        return self._store.write_node(children) if children else None

    def _canonical(self, entry: FileEntry) -> FileEntry:
        if all(is_canonical(chunks) for _, chunks in entry.parts):
            return entry
        batch = self._store.chunks.batch()
        parts = {}
        for tag, chunks in entry.parts:
            chunker = Chunker(batch)
            for data in self._store.chunks.read_all(chunks):
                chunker.write(data)
            parts[tag] = chunker.finish()
        batch.flush()
        return _file_entry(parts)


def _identity(found: Found | None) -> str | None:
    # The digest of a folder does not know its children's names.
    return None if found is None else found.entry.node if isinstance(found.entry, DirEntry) else found.entry.digest


def _file_entry(parts: Mapping[str, tuple[Chunk, ...]]) -> FileEntry:
    ordered = tuple(sorted(parts.items()))
    total = blake2b(digest_size=32)
    size = 0
    for _, chunks in ordered:
        for chunk in chunks:
            total.update(bytes.fromhex(chunk.hash))
            size += chunk.size
    return FileEntry(size, total.hexdigest(), ordered)


def file_entry(tag: str, chunks: Iterable[Chunk]) -> FileEntry:
    """A file of one part."""
    return _file_entry({tag: tuple(chunks)})


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


def _hash(data: bytes) -> str:
    return blake2b(data, digest_size=32).hexdigest()
