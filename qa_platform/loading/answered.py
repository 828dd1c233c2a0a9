"""One answered file as the answering pipeline leaves it: a folder with the manifest and the shards. The gate before the table."""

import csv
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from qa_platform.contract import (
    ANSWER_COLUMNS,
    MANIFEST,
    SHARD_ANSWERS,
    SHARD_INFO,
    Manifest,
    ModelChoice,
    Rejection,
    RowReason,
    ShardEntry,
    ShardInfo,
    find_columns,
    pass_through_columns,
)
from qa_platform.errors import InputError

# The greatest that `csv` takes everywhere. Cells were capped when the file was read.
_FIELD_LIMIT = 2**31 - 1
_ANSWERED = frozenset(("", RowReason.LOW_SCORE))
_REASONS = frozenset(RowReason)


@dataclass(frozen=True)
class AnsweredShard:
    """A shard that passed the gate. ``answered_at`` is in UTC."""

    entry: ShardEntry
    folder: Path
    answered_by: ModelChoice
    answered: int
    no_answer: int
    rejected: int
    answered_at: datetime

    def rejections(self) -> dict[int, Rejection]:
        """The rows that ingestion rejected, by row number. Read anew each time: raw rows may be large."""
        return {rejection.row: rejection for rejection in _shard_info(self.folder).rejections}


@dataclass(frozen=True)
class AnsweredFile:
    """A file whose shards are all there. ``header`` is that of the answered CSV."""

    manifest: Manifest
    header: tuple[str, ...]
    question_column: int
    context_column: int
    shards: tuple[AnsweredShard, ...]

    @property
    def answered(self) -> int:
        return sum(shard.answered for shard in self.shards)

    @property
    def no_answer(self) -> int:
        return sum(shard.no_answer for shard in self.shards)

    @property
    def rejected(self) -> int:
        return sum(shard.rejected for shard in self.shards)

    @property
    def answered_at(self) -> datetime | None:
        return max((shard.answered_at for shard in self.shards), default=None)

    @property
    def answered_by(self) -> ModelChoice:
        """What answered. Shards that an earlier upload shares may be of an earlier revision: then all are named, in order."""
        if not self.shards:
            return self.manifest.model
        first = self.shards[0].answered_by
        return replace(first, revision=", ".join(dict.fromkeys(shard.answered_by.revision for shard in self.shards)))


def read_answered(folder: Path) -> AnsweredFile:
    """Read a file's folder, and refuse it unless every shard of the manifest is there, answered, and as it was handed out.

    Raises:
        InputError: something is missing or does not fit; the message names all of it.
    """
    try:
        manifest = Manifest.from_json(_text(folder / MANIFEST))
    except InputError as error:
        raise InputError(f"{folder} is no answered file: {error}") from error
    header = (*pass_through_columns(manifest.columns), *ANSWER_COLUMNS)
    try:
        question, context = find_columns(manifest.columns)
    except ValueError as error:
        raise InputError(f"{manifest.name!r}: {folder / MANIFEST}: {error}") from error
    shards, faults = [], []
    for entry in manifest.shards:
        try:
            shards.append(_shard(folder / entry.name, entry, manifest))
        except InputError as error:
            faults.append(f"{entry.name}: {error}")
    faults += _sums(manifest)
    faults += _mixture(shards)
    if faults:
        shown = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
        raise InputError(f"{manifest.name!r} (generation {manifest.generation}) is not loaded, because {shown}; answer it again")
    return AnsweredFile(manifest, header, question, context, tuple(shards))


def read_rows(file: AnsweredFile, shard: AnsweredShard) -> Iterator[tuple[int, list[str]]]:
    """The rows of one shard with their numbers in the file, and the gate on what is in them, after the last one.

    Raises:
        InputError: not as many rows or outcomes as promised, a damaged file, an unknown reason.
    """
    path = shard.folder / SHARD_ANSWERS
    width, counts = len(file.header), {"answered": 0, RowReason.NO_ANSWER: 0, "rejected": 0}
    number = shard.entry.first_row
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            reader = _reader(lines)
            _check_header(next(reader, []), file.header)
            for number, row in enumerate(reader, shard.entry.first_row):
                if len(row) != width:
                    raise InputError(f"{len(row)} cells instead of {width}")
                error = row[-1]
                if error in _ANSWERED:
                    counts["answered"] += 1
                elif error == RowReason.NO_ANSWER:
                    counts[RowReason.NO_ANSWER] += 1
                elif error in _REASONS:
                    counts["rejected"] += 1
                else:
                    raise InputError(f"unknown reason {error[:100]!r}")
                yield number, row
    except (UnicodeDecodeError, csv.Error, InputError) as error:
        raise InputError(f"{file.manifest.name!r}: {path} cannot be read at row {number} of the file: {error}") from error
    if tuple(counts.values()) != (shard.answered, shard.no_answer, shard.rejected):
        raise InputError(
            f"{file.manifest.name!r}: {path} has {_outcome(*counts.values())}, but its {SHARD_INFO} says "
            f"{_outcome(shard.answered, shard.no_answer, shard.rejected)}; answer it again"
        )


def write_csv(file: AnsweredFile, path: Path) -> None:
    """Write the whole answered file: one header, then all shards in order, byte by byte as they are."""
    with path.open("wb") as target:
        csv_header = ""
        for shard in file.shards:
            with (shard.folder / SHARD_ANSWERS).open("rb") as source:
                start = _after_header(source)
                if not csv_header:
                    source.seek(0)
                    csv_header = source.read(start).decode()
                    target.write(csv_header.encode())
                source.seek(start)
                shutil.copyfileobj(source, target, 2**20)


def _shard(folder: Path, entry: ShardEntry, manifest: Manifest) -> AnsweredShard:
    info = _shard_info(folder)
    if not (folder / SHARD_ANSWERS).is_file():
        raise InputError(f"{SHARD_ANSWERS} is missing")
    for what, found, wanted in (
        ("first row", info.first_row, entry.first_row),
        ("rows", info.rows, entry.rows),
        ("sha256 of the questions", info.sha256, entry.sha256),
        ("wanted model", info.model, manifest.model),
        ("rows rejected when the file was read", len(info.rejections), entry.rejected),
    ):
        if found != wanted:
            raise InputError(f"{what}: {found} instead of {wanted}")
    if not info.answered_by or not info.answered_at:
        raise InputError("it has not been answered")
    if info.answered + info.no_answer + info.rejected != info.rows:
        raise InputError(f"{info.rows} rows, but {_outcome(info.answered, info.no_answer, info.rejected)}")
    return AnsweredShard(entry, folder, info.answered_by, info.answered, info.no_answer, info.rejected, _utc(info.answered_at))


def _sums(manifest: Manifest) -> list[str]:
    following = 1
    for entry in manifest.shards:
        if entry.first_row != following:
            return [f"{entry.name} begins with row {entry.first_row} instead of {following}"]
        following += entry.rows
    return [] if following - 1 == manifest.rows else [f"the shards have {following - 1} rows, the file {manifest.rows}"]


def _mixture(shards: Sequence[AnsweredShard]) -> list[str]:
    """A file has answers of one model in one precision, so that its scores can be compared."""
    found: dict[str, str] = {}
    for shard in shards:
        found.setdefault(f"{shard.answered_by.id} in {shard.answered_by.precision}", shard.entry.name)
    if len(found) < 2:
        return []
    shown = ", ".join(f"{name} by {by}" for by, name in found.items())
    return [f"its shards were not answered alike ({shown}): set QA_PRECISION to one precision"]


def _shard_info(folder: Path) -> ShardInfo:
    return ShardInfo.from_json(_text(folder / SHARD_INFO))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path.name} is missing") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def _utc(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise InputError(f"answered_at: {error}") from error
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def _check_header(found: list[str], wanted: tuple[str, ...]) -> None:
    if tuple(found) != wanted:
        raise InputError(f"header {json.dumps(found)[:500]} instead of {json.dumps(wanted)[:500]}")


def _reader(lines: Iterator[str]) -> Iterator[list[str]]:
    csv.field_size_limit(_FIELD_LIMIT)
    return csv.reader(lines, strict=True)


def _after_header(file: IO[bytes]) -> int:
    """Where the first data row begins: a column's name may hold line ends."""
    offset = 0

    def lines() -> Iterator[str]:
        nonlocal offset
        for line in file:
            offset += len(line)
            yield line.decode()

    next(_reader(lines()), None)
    return offset


def _outcome(answered: int, no_answer: int, rejected: int) -> str:
    return f"{answered} answered, {no_answer} without an answer and {rejected} rejected rows"
