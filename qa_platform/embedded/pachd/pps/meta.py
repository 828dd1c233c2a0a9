"""The meta repo. Each datum has ``/meta/<id>/meta``, its outcome, and ``/pfs/<id>/``, everything that its code saw and wrote.

Files and folders that are already in the storage are referenced, not copied.
"""

import base64
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from qa_platform.embedded.pachd.pps.records import Datum, DatumInput, DatumState, Job, MetaEntries, Stats
from qa_platform.embedded.pachd.storage.chunks import ChunkBatch, Chunker
from qa_platform.embedded.pachd.storage.trees import DirEntry, Entry, FileEntry, TreeStore, file_entry

_Folder = dict[str, "Entry | _Folder"]
# The default state, which protojson omits.
_PROCESSED = DatumState.SUCCESS


@dataclass(frozen=True)
class Outcome:
    """The outcome of a datum.

    ``environment`` is the environment of its code, a line per variable. ``roots`` are the trees of the input commits, by repo and id.
    """

    datum: Datum
    state: DatumState
    reason: str
    output: str | None
    stats: Stats
    environment: str
    roots: Mapping[tuple[str, str], str | None]


class MetaWriter:
    """Writes the two folders of each datum in a set. They are stored once ``batch`` is flushed."""

    def __init__(self, trees: TreeStore, batch: ChunkBatch, job: Job, image: str) -> None:
        self._trees = trees
        self._batch = batch
        self._job = job
        self._image = image

    def write(self, outcome: Outcome) -> MetaEntries:
        datum = outcome.datum
        document = json.dumps(_document(self._job, outcome, self._image), separators=(",", ":"))
        meta = self._folder({"meta": self._file(datum.id, document)})
        files: _Folder = {".env": self._file(datum.id, outcome.environment)}
        for one in datum.inputs:
            self._add_input(files, one, outcome.roots.get((str(one.repo), one.commit)))
        if (out := self._trees.root(outcome.output)) is not None:
            files["out/"] = out
        return MetaEntries(meta, self._folder(files))

    def _file(self, tag: str, text: str) -> FileEntry:
        chunker = Chunker(self._batch)
        chunker.write(text.encode(errors="surrogateescape"))
        return file_entry(tag, chunker.finish())

    def _add_input(self, files: _Folder, one: DatumInput, root: str | None) -> None:
        found = None if one.empty_files else self._trees.find(root, one.path)
        if found is None:
            return
        names = [one.name, *(name for name in one.path.split("/") if name)]
        folder = files
        for name in names[:-1]:
            below = folder.setdefault(name + "/", {})
            # The whole folder is already there.
            if not isinstance(below, dict):
                return
            folder = below
        folder[names[-1] + ("/" if found.is_dir else "")] = found.entry

    def _folder(self, children: "_Folder") -> DirEntry:
        return self._trees.write_node({key: self._folder(child) if isinstance(child, dict) else child for key, child in children.items()})


def commit_root(trees: TreeStore, entries: Iterable[tuple[str, MetaEntries]]) -> str | None:
    """The tree of a meta commit with these datums, by id."""
    found = list(entries)
    if not found:
        return None
    meta = trees.write_node({f"{name}/": one.meta for name, one in found})
    files = trees.write_node({f"{name}/": one.files for name, one in found})
    return trees.write_node({"meta/": meta, "pfs/": files}).node


def image_id(image: str) -> str:
    """The image id of a datum. The embedded server has no images, so the digest is zero."""
    return f"docker-pullable://{image}@sha256:{'0' * 64}"


def _document(job: Job, outcome: Outcome, image: str) -> dict[str, object]:
    datum = outcome.datum
    document: dict[str, object] = {
        "job": {"pipeline": {"project": {"name": job.pipeline.project}, "name": job.pipeline.name}, "id": job.id},
        "inputs": [_input(one) for one in datum.inputs],
        "hash": datum.hash,
        "state": "" if outcome.state == _PROCESSED else outcome.state.name,
        "reason": outcome.reason,
        "stats": _stats(outcome.stats),
        "index": str(datum.position or ""),
        "imageId": image_id(image),
    }
    return {key: value for key, value in document.items() if value != ""}


def _input(one: DatumInput) -> dict[str, object]:
    commit = {"repo": {"name": one.repo.name, "type": one.repo.type, "project": {"name": one.repo.project}}, "id": one.commit}
    info: dict[str, object] = {
        "file": {"commit": commit, "path": one.path, **({"datum": one.tag} if one.tag else {})},
        "fileType": "DIR" if one.path.endswith("/") else "FILE",
        **({"committed": _time(one.committed)} if one.committed else {}),
        "sizeBytes": str(one.size),
        "hash": base64.b64encode(bytes.fromhex(one.digest)).decode(),
    }
    return {"fileInfo": info, "name": one.name, "branch": one.branch}


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _stats(stats: Stats) -> dict[str, str]:
    durations = {
        "downloadTime": stats.download_seconds, "processTime": stats.process_seconds, "uploadTime": stats.upload_seconds
    }  # fmt: skip
    sizes = {"downloadBytes": stats.downloaded, "uploadBytes": stats.uploaded}
    return {
        **{key: f"{value:.9f}s" for key, value in durations.items() if value},
        **{key: str(value) for key, value in sizes.items() if value},
    }
