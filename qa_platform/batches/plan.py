"""Decides what to do, given the objects in the bucket and their records. Pure: no clock, no cursor, no connection.

All of the sensor's decisions are made here, so that they can be tested on any history of uploads, crashes and retries.
"""

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from qa_platform.contract import FileVersion
from qa_platform.ledger.states import DONE, Known


@dataclass(frozen=True)
class Limits:
    """How much goes into one batch, and how many batches one plan holds."""

    files: int
    bytes: int
    batches: int


@dataclass(frozen=True)
class Batch:
    """Files that are answered by one run, in order. ``id`` names the Pachyderm commit that holds them."""

    id: str
    versions: tuple[FileVersion, ...]


@dataclass(frozen=True)
class Plan:
    """The decisions after one look at the bucket.

    Args:
        waiting: the number of files to be answered, in a batch of this plan or later.
        alike: those of them with the size and checksum of the answered version, if no MD5 tells whether they are equal.
    """

    batches: tuple[Batch, ...] = ()
    unchanged: tuple[FileVersion, ...] = ()
    waiting: int = 0
    alike: tuple[FileVersion, ...] = ()


def plan(
    listing: Iterable[FileVersion],
    recorded: Mapping[tuple[str, int], Known],
    claimed: Collection[str],
    limits: Limits,
    *,
    answered: Mapping[str, FileVersion] | None = None,
) -> Plan:
    """Decide what to do with every object under ``incoming/``.

    Args:
        listing: the live objects, at most one generation of each name.
        recorded: the recorded states, by (name, generation); an object without one is new.
        claimed: names under a live claim. They are left alone, whatever their generation.
        limits: the size of a batch and the number of batches.
        answered: per name, the newest version whose answers by the wanted model are in the table. A new upload that equals it in
            size, checksum and MD5 is unchanged. One without an MD5, such as a composed object, is answered.

    Returns:
        Batches of four kinds, in turn, so that no kind waits for all of another: those that a vanished run left behind, under their old id;
        files that failed before, each alone; new uploads; and files to be answered again. Each kind is in order of age, oldest first
        (generations grow with time).
    """
    answered = answered or {}
    todo, unchanged, alike, later = [], [], [], 0
    for version in listing:
        if version.name in claimed:
            continue
        known = recorded.get((version.name, version.generation))
        if known and known.status in DONE:
            continue
        before = answered.get(version.name) if known is None or known.load_id == 1 else None
        same = is_same(version, before)
        if same:
            unchanged.append(version)
            continue
        if same is None:
            alike.append(version)
        if known and not known.due:
            later += 1
        else:
            todo.append(version)
    batches = tuple(_batches(sorted(todo, key=_age), recorded, limits))
    return Plan(batches[: limits.batches], tuple(unchanged), len(todo) + later, tuple(alike))


def is_same(version: FileVersion, answered: FileVersion | None) -> bool | None:
    """Whether an upload has the same content as the answered version; None if size and checksum agree but an MD5 is missing."""
    if answered is None or not version.crc32c or answered.generation == version.generation:
        return False
    if (answered.size, answered.crc32c) != (version.size, version.crc32c):
        return False
    return answered.md5 == version.md5 if answered.md5 and version.md5 else None


def _batches(todo: Sequence[FileVersion], recorded: Mapping[tuple[str, int], Known], limits: Limits) -> Iterator[Batch]:
    resumed: dict[str, list[FileVersion]] = defaultdict(list)
    charged, again, new = list[FileVersion](), list[FileVersion](), list[FileVersion]()
    for version in todo:
        known = recorded.get((version.name, version.generation))
        if known and known.batch_id:
            resumed[known.batch_id].append(version)
        elif known and known.attempts:
            charged.append(version)
        else:
            (again if known and known.load_id > 1 else new).append(version)

    def batch_of(group: Sequence[FileVersion]) -> Batch:
        return Batch(batch_id((version, _load_id(recorded, version)) for version in group), tuple(group))

    kinds = (
        (Batch(batch, tuple(versions)) for batch, versions in resumed.items()),
        (batch_of([version]) for version in charged),
        map(batch_of, _cut(new, limits)),
        map(batch_of, _cut(again, limits)),
    )
    yield from (batch for turn in zip_longest(*kinds) for batch in turn if batch)


def _age(version: FileVersion) -> tuple[int, str]:
    return version.generation, version.name


def _cut(versions: Sequence[FileVersion], limits: Limits) -> Iterator[list[FileVersion]]:
    group: list[FileVersion] = []
    size = 0
    for version in versions:
        if group and (len(group) == limits.files or size + version.size > limits.bytes):
            yield group
            group, size = [], 0
        group.append(version)
        size += version.size
    if group:
        yield group


def _load_id(recorded: Mapping[tuple[str, int], Known], version: FileVersion) -> int:
    known = recorded.get((version.name, version.generation))
    return known.load_id if known else 1


def batch_id(files: Iterable[tuple[FileVersion, int]]) -> str:
    """The id of a batch of (version, load id): the same files give the same id, in whatever order, on every retry."""
    lines = sorted(f"{version.name}\0{version.generation}\0{load_id}" for version, load_id in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]
