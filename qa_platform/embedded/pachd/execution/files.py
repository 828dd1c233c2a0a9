"""Copies files between a worker's folder and the storage: the inputs before user code runs, the folder ``out`` after it."""

import os
from collections.abc import Iterator
from pathlib import Path

from qa_platform.embedded.pachd.errors import PachError
from qa_platform.embedded.pachd.pfs import check_path
from qa_platform.embedded.pachd.pps import DatumInput
from qa_platform.embedded.pachd.storage.chunks import ChunkBatch, Chunker
from qa_platform.embedded.pachd.storage.store import Store
from qa_platform.embedded.pachd.storage.tree_editor import TreeEditor
from qa_platform.embedded.pachd.storage.trees import FileEntry, TreeError, file_entry

_READ_BYTES = 2**20


class UploadError(Exception):
    """The files in ``out`` cannot be uploaded. A retry would not help, so the whole datum set fails."""


def clear_folder(folder: Path) -> None:
    """Empty a folder, or create it."""
    folder.mkdir(parents=True, exist_ok=True)
    _clear(str(folder))


def _clear(folder: str) -> None:
    # Much faster than shutil.rmtree, which guards against concurrent changes.
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _clear(entry.path)
                Path(entry.path).rmdir()
            else:
                Path(entry.path).unlink()


def download(store: Store, root: str | None, one: DatumInput, folder: Path) -> int:
    """Write the matched file or folder below ``folder``, at its path in the repo. Returns the number of bytes written."""
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
        if not target.parent.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            for data in () if one.empty_files else store.chunks.read_all(part.entry.chunks):
                file.write(data)
                written += len(data)
    return written


def upload(store: Store, batch: ChunkBatch, pfs: Path, seen_as: Path, tag: str) -> tuple[str | None, int]:
    """Store the folder ``out`` below ``pfs`` as a tree. Links are stored as the files that they point to.

    ``seen_as`` is the path at which user code sees ``pfs``: links created by user code point there. Returns the tree's root (None if empty)
    and its bytes.

    Raises:
        UploadError: Pachyderm does not accept a name, or a link is relative, points into ``out``, or is broken.
    """
    editor = TreeEditor(store.trees, None)
    total = 0
    try:
        for path, source in _files(pfs / "out", "", pfs, seen_as):
            chunker = Chunker(batch)
            with source.open("rb") as file:
                while data := file.read(_READ_BYTES):
                    chunker.write(data)
                    total += len(data)
            editor.put(check_path(path), file_entry(tag, chunker.finish()))
        root = editor.write()
    except (PachError, TreeError, OSError) as error:
        raise UploadError(f"cannot upload the files that the user code produced: {error}") from error
    return (root.node if root else None), total


def _files(folder: Path, prefix: str, pfs: Path, seen_as: Path) -> Iterator[tuple[str, Path]]:
    for entry in os.scandir(folder):
        path, source = f"{prefix}/{entry.name}", Path(entry.path)
        if entry.is_symlink():
            yield from _linked(path, source.readlink(), pfs, seen_as)
        elif entry.is_dir():
            yield from _files(source, path, pfs, seen_as)
        elif entry.is_file():
            yield path, source
        else:
            raise UploadError(f"out{path} is neither a file nor a folder, nor a link to one")


def _linked(path: str, target: Path, pfs: Path, seen_as: Path) -> Iterator[tuple[str, Path]]:
    """The file, or the files below the folder, that a link at ``path`` points to."""
    if not target.is_absolute():
        raise UploadError(f"stat {target}: no such file or directory (out{path} is a relative link)")
    if target.is_relative_to(seen_as / "out"):
        raise UploadError(f'could not find input "out" (out{path} is a link into out)')
    source = pfs / target.relative_to(seen_as) if target.is_relative_to(seen_as) else target
    if source.is_file():
        yield path, source
    elif source.is_dir():
        for parent, _, names in os.walk(source):
            for name in names:
                yield f"{path}/{Path(parent, name).relative_to(source)}", Path(parent, name)
    else:
        raise UploadError(f"stat {target}: no such file or directory (the target of the link out{path})")
