"""Cutting an input file into shards and a manifest."""

import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from qa_platform.contract import (
    MANIFEST,
    SHARD_INFO,
    SHARD_QUESTIONS,
    FileVersion,
    Manifest,
    ModelChoice,
    Rejection,
    ShardEntry,
    ShardInfo,
    shard_name,
)
from qa_platform.ingest.buffer import ByteSource
from qa_platform.ingest.dialect import csv_line
from qa_platform.ingest.reading import Row, RowReader
from qa_platform.ingest.rules import TextLimits
from qa_platform.settings import IngestSettings

_log = logging.getLogger(__name__)

# Bytes that are handed over at once: few compared with the 20 MiB of a message to Pachyderm.
_CHUNK = 2**20
# Every shard repeats the header. So a shard's rows have at least one part in this many of the header's bytes, unless the file ends.
_LEAST_PART_OF_HEADER = 16

Write = Callable[[str, Iterable[bytes]], None]


class OnRead(Protocol):
    """Called once a file has been read, with the number of blank rows that were skipped and the delimiter."""

    def __call__(self, *, blank: int, delimiter: str) -> object: ...


def split(
    source: ByteSource,
    *,
    version: FileVersion,
    load_id: int,
    model: ModelChoice,
    settings: IngestSettings,
    write: Write,
    align_to_words: bool = True,
    repeated_shards: Collection[str] = (),
    launch_id: str = "",
    answers_version: str = "",
    on_read: OnRead = lambda *, blank, delimiter: None,
    log: logging.Logger | logging.LoggerAdapter = _log,
) -> Manifest:
    """Cut a CSV into shards, reading it once, and hand each file to ``write(path, chunks)``, the manifest last.

    Paths are relative to the file's folder: ``part-00000/questions.csv``, ``part-00000/shard.json``, …, ``part-00000/manifest.json``.
    The first shard carries the manifest. ``chunks`` are at most 1 MiB each. One shard is in memory at a time. If this raises, the caller
    must discard everything that was written.

    Args:
        align_to_words: whether the workers widen answers to whole words.
        repeated_shards: names of shards that are answered again, although Pachyderm counts them as done.
        launch_id: a text that differs with every launch and makes new datums of ``repeated_shards``. If the first shard, which carries
            the manifest, is among them, the file is loaded again too.
        answers_version: a text that makes new datums of shards that another version answered.
        on_read: called with what the manifest leaves out, since older loaders refuse fields that they do not know.

    Raises:
        FileRejected: the file is damaged. That may be found only at its end.
        TransientError: the stream ended before ``version.size`` bytes.
    """
    reader = RowReader(source, limits=TextLimits.of(settings), size=version.size)
    header = csv_line(reader.columns)
    entries: list[ShardEntry] = []
    for shard in _shards(reader, settings, least=len(header) // _LEAST_PART_OF_HEADER):
        name, body = shard_name(len(entries)), b"".join([header, *shard.records])
        launch = " ".join(filter(None, [answers_version, launch_id if name in repeated_shards else ""]))
        info = shard.info(body, model, align_to_words=align_to_words, launch=launch)
        write(f"{name}/{SHARD_QUESTIONS}", _chunks(body))
        write(f"{name}/{SHARD_INFO}", _chunks(info.to_json().encode()))
        entries.append(ShardEntry(name, info.first_row, info.rows, len(info.rejections), info.sha256))
    manifest = Manifest(
        name=version.name,
        generation=version.generation,
        size=version.size,
        crc32c=version.crc32c,
        load_id=load_id,
        model=model,
        columns=reader.columns,
        rows=sum(entry.rows for entry in entries),
        rejected=sum(entry.rejected for entry in entries),
        shards=tuple(entries),
        launch=launch_id if shard_name(0) in repeated_shards else "",
    )
    write(f"{shard_name(0)}/{MANIFEST}", _chunks(manifest.to_json().encode()))
    on_read(blank=reader.blank, delimiter=reader.delimiter)
    counts = (manifest.rows, manifest.rejected, reader.blank, len(entries))
    log.info("%s: %d rows, %d rejected, %d blank ones skipped, %d shards", version.shown, *counts)
    return manifest


@dataclass
class _Shard:
    """A shard being filled. ``size`` counts its bytes, and those of the raw text of its rejected rows."""

    first_row: int
    size: int = 0
    records: list[bytes] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)

    def add(self, row: Row) -> None:
        self.records.append(row.raw)
        self.size += len(row.raw)
        if row.rejection:
            self.rejections.append(row.rejection)
            self.size += len(row.rejection.raw)

    def info(self, body: bytes, model: ModelChoice, *, align_to_words: bool, launch: str) -> ShardInfo:
        """The shard's ``shard.json``; ``body`` is its ``questions.csv``."""
        return ShardInfo(
            first_row=self.first_row,
            rows=len(self.records),
            sha256=hashlib.sha256(body).hexdigest(),
            model=model,
            rejections=tuple(self.rejections),
            align_to_words=align_to_words,
            launch=launch,
        )


def _shards(rows: Iterable[Row], settings: IngestSettings, *, least: int) -> Iterator[_Shard]:
    """Shards that end when they reach the rows or the bytes of the settings. A shard of less than ``least`` bytes takes more rows."""
    shard = _Shard(first_row=1)
    for row in rows:
        shard.add(row)
        if (len(shard.records) >= settings.shard_rows and shard.size >= least) or shard.size >= settings.shard_bytes:
            yield shard
            shard = _Shard(first_row=row.row + 1)
    if shard.records:
        yield shard


def _chunks(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), _CHUNK):
        yield data[start : start + _CHUNK]
