"""Between a worker's folder and the storage: inputs are written out, and what user code left in ``out`` is taken in."""

import os
import shutil
from pathlib import Path

from qa_platform.embedded.pachd.errors import PachError
from qa_platform.embedded.pachd.pfs import check_path
from qa_platform.embedded.pachd.pps import DatumInput
from qa_platform.embedded.pachd.storage.chunks import Chunker
from qa_platform.embedded.pachd.storage.store import Store
from qa_platform.embedded.pachd.storage.trees import FileEntry, TreeEditor, file_entry

_READ_BYTES = 2**20


def clear_folder(folder: Path) -> None:
    """Leaves an empty folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


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


def upload(store: Store, folder: Path, tag: str) -> tuple[str | None, int]:
    """Stores a folder as a tree, symbolic links as what they point to. Returns the root (None: nothing) and the bytes."""
    editor = TreeEditor(store.trees, None)
    batch = store.chunks.batch()
    total = 0
    for place, _, names in os.walk(folder, followlinks=True):
        for name in names:
            source = Path(place, name)
            path = check_path("/" + source.relative_to(folder).as_posix())
            chunker = Chunker(batch)
            with source.open("rb") as file:
                while data := file.read(_READ_BYTES):
                    chunker.write(data)
                    total += len(data)
            editor.put(path, file_entry(tag, chunker.finish()))
    batch.flush()
    root = editor.write()
    return (root.node if root else None), total
