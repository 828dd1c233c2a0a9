"""Edits a stored tree: files are added, deleted and merged in memory, and the changed folders are written at the end."""

from collections.abc import Mapping

from qa_platform.embedded.pachd.storage.chunks import Chunk, Chunker, is_canonical
from qa_platform.embedded.pachd.storage.trees import DirEntry, Entry, FileEntry, TreeError, TreeStore, entry_of_parts


class _Folder:
    __slots__ = ("children",)

    def __init__(self, children: Mapping[str, "Entry | _Folder"]) -> None:
        self.children: dict[str, Entry | _Folder] = dict(children)


class TreeEditor:
    """Edits a tree. Only the folders that change are loaded and written."""

    def __init__(self, store: TreeStore, node: str | None) -> None:
        self._store = store
        self._root = _Folder(store.children(node) if node else {})

    def add(self, path: str, tag: str, chunks: tuple[Chunk, ...]) -> None:
        """Append to a path's part with a tag, or create it."""
        folder, name = self._descend(path)
        old = folder.children.get(name)
        parts = dict(old.parts) if isinstance(old, FileEntry) else {}
        parts[tag] = parts.get(tag, ()) + chunks
        folder.children[name] = entry_of_parts(parts)

    def put(self, path: str, entry: FileEntry) -> None:
        """Add a new file.

        Raises:
            TreeError: the path exists.
        """
        folder, name = self._descend(path)
        if name in folder.children:
            raise TreeError(path)
        folder.children[name] = entry

    def delete(self, path: str, tag: str) -> None:
        """Delete the tag's part of a file or, with a trailing slash, of everything in a folder. A missing path is no error."""
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
        """Add all files of another tree.

        Raises:
            TreeError: a path is in both.
        """
        self._merge(self._root, node, "/")

    def write(self) -> DirEntry | None:
        """Store the changed folders, and return the root. None if nothing is left.

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
                folder.children[key] = entry_of_parts(parts)
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
        return entry_of_parts(parts)
