"""Between a worker's folder and the storage: inputs are written out, and what user code left in ``out`` is taken in."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from qa_platform.embedded.pachd.errors import PachError
from qa_platform.embedded.pachd.pfs import check_path
from qa_platform.embedded.pachd.pps import DatumInput
from qa_platform.embedded.pachd.storage.chunks import Chunker
from qa_platform.embedded.pachd.storage.store import Store
from qa_platform.embedded.pachd.storage.trees import FileEntry, TreeEditor, file_entry

_READ_BYTES = 2**20
_DEEPEST = 100


def clear_folder(folder: Path) -> None:
    """Leaves an empty folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            Path(entry.path).unlink()


def download(store: Store, root: str | None, one: DatumInput, folder: Path) -> int:
    """Writes the matched item, file or folder, below ``folder``, at its path in the repo. Returns the bytes written."""
    folder.mkdir(parents=True, exist_ok=True)
    found = store.trees.find(root, one.path)
    if found is None:
        raise PachError(f"file {one.path} not found in repo {one.repo} at commit {one.commit}")
    written = 0
    for part in store.trees.walk(found):
        target = folder / part.path.strip("/")
        if not isinstance(part.entry, FileEntry):
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            for data in () if one.empty_files else store.chunks.read_all(part.entry.chunks):
                file.write(data)
                written += len(data)
    return written


def upload(store: Store, pfs: Path, seen_as: Path, tag: str) -> tuple[str | None, int]:
    """Stores the folder ``out`` below ``pfs`` as a tree, symbolic links as what they point to.

    ``seen_as`` is where user code sees ``pfs``: links that it made lead there. Returns the root (None: nothing) and the bytes.

    Raises:
        PachError: a name is none that Pachyderm takes, a link leads nowhere, or links go round in circles.
    """
    editor = TreeEditor(store.trees, None)
    batch = store.chunks.batch()
    total = 0
    for path, source in _files(pfs / "out", pfs, seen_as, "", 0):
        chunker = Chunker(batch)
        with source.open("rb") as file:
            while data := file.read(_READ_BYTES):
                chunker.write(data)
                total += len(data)
        editor.put(check_path(path), file_entry(tag, chunker.finish()))
    batch.flush()
    root = editor.write()
    return (root.node if root else None), total


def _files(folder: Path, pfs: Path, seen_as: Path, prefix: str, depth: int) -> Iterator[tuple[str, Path]]:
    if depth > _DEEPEST:
        raise PachError(f"out{prefix} is nested too deeply: do its links go round in circles?")
    for entry in os.scandir(folder):
        path, source = f"{prefix}/{entry.name}", Path(entry.path)
        for _ in range(_DEEPEST):
            if not source.is_symlink():
                break
            target = source.parent / source.readlink()
            source = pfs / target.relative_to(seen_as) if target.is_relative_to(seen_as) else target
        if source.is_dir():
            yield from _files(source, pfs, seen_as, path, depth + 1)
        elif source.is_file():
            yield path, source
        else:
            raise PachError(f"out{path} is neither a file nor a folder, nor a link to one")
