"""The gate before the tables: checks one answered file, the folder with manifest and shards that the answering pipeline writes."""

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
from qa_platform.ingest.dialect import CsvError, csv_reader

_ANSWERED = frozenset(("", RowReason.LOW_SCORE))
_REASONS = frozenset(RowReason)


@dataclass(frozen=True)
class AnsweredShard:
    """A shard that passed the gate.

    Args:
        answered_at: in UTC.
    """

    entry: ShardEntry
    folder: Path
    answered_by: ModelChoice
    answered: int
    no_answer: int
    rejected: int
    answered_at: datetime

    def rejections(self) -> dict[int, Rejection]:
        """The rows that ingestion rejected, by row number. Read from disk each time, since raw rows may be large."""
        return {rejection.row: rejection for rejection in _shard_info(self.folder).rejections}


@dataclass(frozen=True)
class AnsweredFile:
    """A file whose shards are all there.

    Args:
        header: the header of the answered CSV.
        question_column: the position of the question in the header; ``context_column`` likewise.
    """

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
        """The model that answered.

        Shards that are shared with an earlier upload may have been answered by an earlier revision. Then all revisions are named, in order.
        """
        if not self.shards:
            return self.manifest.model
        first = self.shards[0].answered_by
        return replace(first, revision=", ".join(dict.fromkeys(shard.answered_by.revision for shard in self.shards)))


class MissingShards(InputError):
    """The manifest or some of its shards are missing. Pachyderm may report success without output, so the file is not to blame."""

    blameless = True


def read_answered(folder: Path) -> AnsweredFile:
    """Read a file's folder. It is refused unless every shard of the manifest is there, is answered, and has the rows that ingestion wrote.

    Raises:
        MissingShards: the manifest or shards are missing, and nothing else is wrong.
        InputError: something does not match; the message names the first faults.
    """
    manifest = _manifest(folder)
    try:
        question, context = find_columns(manifest.columns)
    except ValueError as error:
        raise InputError(f"{folder / MANIFEST}: {error}", where=repr(manifest.name)) from error
    header = (*pass_through_columns(manifest.columns), *ANSWER_COLUMNS)
    return AnsweredFile(manifest, header, question, context, _shards(folder, manifest))


def _manifest(folder: Path) -> Manifest:
    if not (folder / MANIFEST).exists():
        # The manifest comes with the first shard.
        raise MissingShards(f"{folder} is not an answered file: {MANIFEST} is missing", advice="answer it again")
    try:
        return Manifest.from_json(_text(folder / MANIFEST))
    except InputError as error:
        raise InputError(f"{folder} is not an answered file: {error}") from error


def _shards(folder: Path, manifest: Manifest) -> tuple[AnsweredShard, ...]:
    shards, faults, missing = list[AnsweredShard](), list[str](), list[str]()
    for entry in manifest.shards:
        if not (folder / entry.name).is_dir():
            missing.append(f"{entry.name} is missing")
            continue
        try:
            shards.append(_shard(folder / entry.name, entry, manifest))
        except InputError as error:
            faults.append(f"{entry.name}: {error}")
    faults += _numbering_faults(manifest)
    faults += _mixed_models(shards)
    if wrong := faults + missing:
        shown = "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        kind = InputError if faults else MissingShards
        raise kind(f"{manifest.name!r} (generation {manifest.generation}) is not loaded, because {shown}", advice="answer it again")
    return tuple(shards)


def read_rows(file: AnsweredFile, shard: AnsweredShard) -> Iterator[tuple[int, list[str]]]:
    """The rows of one shard, with their numbers in the file. After the last row their counts are compared with the shard's.

    Raises:
        InputError: the counts differ, the file is damaged, or a reason is unknown.
    """
    path = shard.folder / SHARD_ANSWERS
    width, counts = len(file.header), {"answered": 0, RowReason.NO_ANSWER: 0, "rejected": 0}
    number = shard.entry.first_row
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            reader = csv_reader(lines)
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
    except (UnicodeDecodeError, CsvError, InputError) as error:
        raise InputError(f"{path} cannot be read at row {number} of the file: {error}", where=repr(file.manifest.name)) from error
    if tuple(counts.values()) != (shard.answered, shard.no_answer, shard.rejected):
        raise InputError(
            f"{path} has {_outcome(*counts.values())}, but its {SHARD_INFO} says "
            f"{_outcome(shard.answered, shard.no_answer, shard.rejected)}",
            where=repr(file.manifest.name),
            advice="answer it again",
        )


def write_csv(file: AnsweredFile, path: Path) -> None:
    """Write the whole answered file: one header, then all shards in order, byte for byte."""
    with path.open("wb") as target:
        for number, shard in enumerate(file.shards):
            with (shard.folder / SHARD_ANSWERS).open("rb") as source:
                source.seek(_after_header(source) if number else 0)
                shutil.copyfileobj(source, target, 2**20)


def _shard(folder: Path, entry: ShardEntry, manifest: Manifest) -> AnsweredShard:
    info = _shard_info(folder)
    if not (folder / SHARD_ANSWERS).is_file():
        raise InputError(f"{SHARD_ANSWERS} is missing")
    for what, actual, wanted in (
        ("first row", info.first_row, entry.first_row),
        ("rows", info.rows, entry.rows),
        ("sha256 of the questions", info.sha256, entry.sha256),
        ("wanted model", info.model, manifest.model),
        ("rows rejected when the file was read", len(info.rejections), entry.rejected),
    ):
        if actual != wanted:
            raise InputError(f"{what}: {actual} instead of {wanted}")
    if not info.answered_by or not info.answered_at:
        raise InputError("it has not been answered")
    if info.answered + info.no_answer + info.rejected != info.rows:
        raise InputError(f"{info.rows} rows, but {_outcome(info.answered, info.no_answer, info.rejected)}")
    return AnsweredShard(entry, folder, info.answered_by, info.answered, info.no_answer, info.rejected, _utc(info.answered_at))


def _numbering_faults(manifest: Manifest) -> list[str]:
    following = 1
    for entry in manifest.shards:
        if entry.first_row != following:
            return [f"{entry.name} begins with row {entry.first_row} instead of {following}"]
        following += entry.rows
    return [] if following - 1 == manifest.rows else [f"the shards have {following - 1} rows, the file {manifest.rows}"]


def _mixed_models(shards: Sequence[AnsweredShard]) -> list[str]:
    """The fault of shards that were not answered by one model in one precision: the scores of a file must be comparable."""
    first_by_model: dict[str, str] = {}
    for shard in shards:
        first_by_model.setdefault(f"{shard.answered_by.id} in {shard.answered_by.precision}", shard.entry.name)
    if len(first_by_model) < 2:
        return []
    shown = ", ".join(f"{name} by {model}" for model, name in first_by_model.items())
    return [f"its shards were answered by different models or precisions ({shown}): set QA_PRECISION to one precision"]


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


def _check_header(header: list[str], wanted: tuple[str, ...]) -> None:
    if tuple(header) != wanted:
        raise InputError(f"header {json.dumps(header)[:500]} instead of {json.dumps(wanted)[:500]}")


def _after_header(file: IO[bytes]) -> int:
    """The offset of the first data row. Column names may contain line breaks."""
    offset = 0

    def lines() -> Iterator[str]:
        nonlocal offset
        for line in file:
            offset += len(line)
            yield line.decode()

    next(csv_reader(lines()), None)
    return offset


def _outcome(answered: int, no_answer: int, rejected: int) -> str:
    return f"{answered} answered, {no_answer} without an answer and {rejected} rejected rows"
