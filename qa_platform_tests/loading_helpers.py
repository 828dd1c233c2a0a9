"""Answered files like those of the answering pipeline, made without a model."""

import csv
import hashlib
import io
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import psycopg
from psycopg import sql

from qa_platform.contract import (
    ANSWER_COLUMNS,
    MANIFEST,
    SHARD_ANSWERS,
    SHARD_INFO,
    SHARD_QUESTIONS,
    FileVersion,
    Manifest,
    ModelChoice,
    Rejection,
    RowReason,
    ShardEntry,
    ShardInfo,
    find_columns,
    pass_through_columns,
    shard_name,
)
from qa_platform.embedded import postgres_access
from qa_platform.ingest import split
from qa_platform.loading import migrate
from qa_platform.settings import IngestSettings, PostgresSettings

BUNDLED = ModelChoice("bundled")
ANSWERED_BY = ModelChoice("minilm-squad", "0a1b2c", "fp32")
# The size and checksum of the upload behind an `AnsweredUpload`.
SIZE, CRC32C = 1000, "AAAAAA=="


@dataclass(frozen=True)
class AnsweredRow:
    """A row of an answered file. By default its answer is the context's first word."""

    question: str
    context: str
    error: str = ""
    end: int | None = None
    extra: tuple[str, ...] = ()
    score: str = "0.5"

    @property
    def answered(self) -> bool:
        return self.error in ("", RowReason.LOW_SCORE)

    @property
    def answer(self) -> str:
        return self.context[: self._end] if self.answered else ""

    @property
    def _end(self) -> int:
        return len(self.context.split(" ")[0]) if self.end is None else self.end

    def cells(self, model: ModelChoice) -> list[str]:
        answer = [self.answer, self.score, "0", str(self._end)] if self.answered else [""] * 4
        return [self.question, self.context, *self.extra, *answer, model.id, self.error]


@dataclass(frozen=True)
class AnsweredUpload:
    """An answered file. ``write`` writes it as a folder."""

    rows: Sequence[AnsweredRow]
    name: str = "history.csv"
    generation: int = 1
    load_id: int = 1
    columns: tuple[str, ...] = ("question", "context")
    shard_rows: int = 3
    wanted: ModelChoice = BUNDLED
    answered_by: ModelChoice = ANSWERED_BY
    answered_at: str = "2026-03-01T10:00:00"
    rejections: dict[int, Rejection] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        entries = []
        for index, start in enumerate(range(0, len(self.rows), self.shard_rows)):
            entries.append(self._write_shard(folder / shard_name(index), start))
        manifest = Manifest(
            name=self.name,
            generation=self.generation,
            size=SIZE,
            crc32c=CRC32C,
            load_id=self.load_id,
            model=self.wanted,
            columns=pass_through_columns(self.columns),
            rows=len(self.rows),
            rejected=len(self.rejections),
            shards=tuple(entries),
        )
        (folder / MANIFEST).write_text(manifest.to_json())
        return folder

    def again(self, **changes: object) -> "AnsweredUpload":
        return replace(self, **changes)  # type: ignore[arg-type]

    def _write_shard(self, folder: Path, start: int) -> ShardEntry:
        rows = self.rows[start : start + self.shard_rows]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\r\n")
        writer.writerow([*pass_through_columns(self.columns), *ANSWER_COLUMNS])
        writer.writerows(row.cells(self.answered_by) for row in rows)
        folder.mkdir()
        (folder / SHARD_ANSWERS).write_text(text.getvalue(), encoding="utf-8", newline="")
        mine = tuple(self.rejections[n] for n in range(start + 1, start + 1 + len(rows)) if n in self.rejections)
        digest = hashlib.sha256("\n".join(row.question for row in rows).encode("utf-8", "replace")).hexdigest()
        info = ShardInfo(
            first_row=start + 1,
            rows=len(rows),
            sha256=digest,
            model=self.wanted,
            rejections=mine,
            answered_by=self.answered_by,
            answered=sum(row.answered for row in rows),
            no_answer=sum(row.error == RowReason.NO_ANSWER for row in rows),
            rejected=sum(not row.answered and row.error != RowReason.NO_ANSWER for row in rows),
            answered_at=self.answered_at,
            seconds=1.0,
        )
        (folder / SHARD_INFO).write_text(info.to_json())
        return ShardEntry(folder.name, start + 1, len(rows), len(mine), digest)


def ingested(data: bytes, folder: Path, *, name: str = "history.csv", limits: IngestSettings | None = None) -> Path:
    """The folder of a CSV that was ingested, then answered with the first word of each context."""

    def write(path: str, chunks: Iterable[bytes]) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"".join(chunks))

    version = FileVersion(name, 1, size=len(data))
    manifest = split(io.BytesIO(data), version=version, load_id=1, model=BUNDLED, settings=limits or IngestSettings(), write=write)
    for entry in manifest.shards:
        _answer_shard(folder / entry.name)
    (folder / shard_name(0) / MANIFEST).rename(folder / MANIFEST)
    return folder


def _answer_shard(folder: Path) -> None:
    info = ShardInfo.from_json((folder / SHARD_INFO).read_text())
    reasons = {found.row: found.reason for found in info.rejections}
    with (folder / SHARD_QUESTIONS).open(encoding="utf-8", newline="") as source:
        header, *rows = csv.reader(source)
    context = find_columns(header)[1]
    with (folder / SHARD_ANSWERS).open("w", encoding="utf-8", newline="") as target:
        writer = csv.writer(target, lineterminator="\r\n")
        writer.writerow([*header, *ANSWER_COLUMNS])
        for number, cells in enumerate(rows, info.first_row):
            row = AnsweredRow("", cells[context], error=reasons.get(number, ""))
            writer.writerow([*cells, *row.cells(ANSWERED_BY)[2:]])
    answered = info.rows - len(reasons)
    done = replace(info, answered_by=ANSWERED_BY, answered=answered, rejected=len(reasons), answered_at="2026-03-01T10:00:00")
    (folder / SHARD_INFO).write_text(done.to_json())


def migrated_database(socket_folder: str) -> PostgresSettings:
    """A new database with the platform's tables, which lasts as long as its server."""
    name = f"loading_{uuid.uuid4().hex}"
    with psycopg.connect(postgres_access.database_url(socket_folder, "postgres"), autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(sql.Identifier(name)))
    settings = PostgresSettings(host=socket_folder, port=postgres_access.PORT, user=postgres_access.USER, dbname=name)
    migrate.upgrade(settings)
    return settings


def empty_tables(connection: psycopg.Connection) -> None:
    # On small tables faster than TRUNCATE, which creates new files.
    for name in ("question_answer", "question_answer_reject", "question_file"):
        connection.execute(f"DELETE FROM {name}")  # noqa: S608


def answered_rows(count: int, *, context: str = "Turing broke the code.") -> list[AnsweredRow]:
    return [AnsweredRow(f"Who was number {n}?", context) for n in range(1, count + 1)]
