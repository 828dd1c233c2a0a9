"""Enumerates a job's datums from the pipeline's input and the commits that it reads."""

import itertools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import blake2b

from qa_platform.embedded.pachd.pfs import BranchKey
from qa_platform.embedded.pachd.pps import Datum, DatumInput
from qa_platform.embedded.pachd.spec import Combination, CronInput, Input, PfsInput
from qa_platform.embedded.pachd.storage import globs
from qa_platform.embedded.pachd.storage.trees import FileEntry, TreeStore


@dataclass(frozen=True)
class Source:
    """The commit that an input reads: its id, the root of its tree, and when it finished."""

    commit: str
    root: str | None
    finished: float | None


Sources = Callable[[BranchKey], Source]
_Items = list[tuple[DatumInput, ...]]


def enumerate_datums(trees: TreeStore, node: Input, source: Sources, salt: str) -> list[Datum]:
    """All datums, in the order of the globs."""
    seen: dict[str, Datum] = {}
    for inputs in _items(trees, node, source):
        name = datum_id(inputs)
        if name not in seen:
            seen[name] = Datum(id=name, hash=datum_hash(name, inputs, salt), position=len(seen), inputs=inputs)
    return list(seen.values())


def datum_id(inputs: Iterable[DatumInput]) -> str:
    """BLAKE2b-256 over name, repo, branch and path of every input, each followed by its length as a big-endian int64."""
    total = blake2b(digest_size=32)
    for one in inputs:
        for text in (one.name, one.repo.name, one.branch, one.path):
            data = text.encode()
            total.update(data + len(data).to_bytes(8, "big"))
    return total.hexdigest()


def datum_hash(name: str, inputs: Iterable[DatumInput], salt: str) -> str:
    """BLAKE2b-256 over the id, the content of the inputs and the pipeline's salt. Image, command and environment do not matter."""
    total = blake2b(name.encode(), digest_size=32)
    for one in inputs:
        total.update(bytes.fromhex(one.digest))
    total.update(salt.encode())
    return total.hexdigest()


def _items(trees: TreeStore, node: Input, source: Sources) -> _Items:
    if isinstance(node, CronInput):
        node = node.as_pfs
    if isinstance(node, PfsInput):
        return [(item,) for item in _matches(trees, node, source)]
    if node.kind == "union":
        return [item for child in node.inputs for item in _items(trees, child, source)]
    if node.kind == "cross":
        parts = [_items(trees, child, source) for child in node.inputs]
        return [tuple(itertools.chain(*combination)) for combination in itertools.product(*parts)]
    return _keyed(trees, node, source)


def _matches(trees: TreeStore, node: PfsInput, source: Sources) -> list[DatumInput]:
    read = source(node.branch_key)
    return [
        DatumInput(
            node.name, node.repo, node.branch, read.commit, found.path, found.entry.digest, found.entry.size, node.empty_files,
            tag=found.entry.parts[0][0] if isinstance(found.entry, FileEntry) else "", committed=read.finished,
        )
        for found in globs.match(trees, read.root, node.glob)
    ]  # fmt: skip


def _keyed(trees: TreeStore, node: Combination, source: Sources) -> _Items:
    """The items of a join or a group: those whose glob captures expand to the same key belong together."""
    children = [child for child in node.inputs if isinstance(child, PfsInput)]
    by_key: dict[str, list[list[DatumInput]]] = {}
    for number, child in enumerate(children):
        pattern = globs.translate(globs.clean(child.glob))
        template = child.join_on if node.kind == "join" else child.group_by
        for item in _matches(trees, child, source):
            found = pattern.fullmatch(item.path.rstrip("/") or "/")
            key = re.sub(r"\$(\d+)", lambda number, found=found: found[int(number[1])] or "", template) if found else ""  # type: ignore[misc]
            by_key.setdefault(key, [[] for _ in children])[number].append(item)
    result: _Items = []
    for _, groups in sorted(by_key.items()):
        if node.kind == "group":
            result.append(tuple(itertools.chain(*groups)))
        elif all(group or not child.outer_join for group, child in zip(groups, children, strict=True)) and all(groups):
            result.extend(itertools.product(*groups))
        elif any(group and child.outer_join for group, child in zip(groups, children, strict=True)):
            result.extend(itertools.product(*(group for group in groups if group)))
    return result
