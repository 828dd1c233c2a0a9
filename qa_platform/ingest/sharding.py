"""One input file in, its shards and manifest out."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

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
from qa_platform.ingest.reading import ByteSource, Row, csv_line, iter_rows
from qa_platform.settings import IngestSettings

log = logging.getLogger(__name__)

# What is handed over at once: small against the 20 MiB that a message to Pachyderm may have.
_CHUNK = 2**20

Write = Callable[[str, Iterable[bytes]], None]


def split(
    source: ByteSource,
    *,
    version: FileVersion,
    load_id: int,
    model: ModelChoice,
    settings: IngestSettings,
    write: Write,
    run_id: str = "",
) -> Manifest:
    """Cut a CSV into shards, reading it once, and hand each file to ``write(path, chunks)``, the manifest last.

    Paths are relative to the file's folder: ``part-00000/questions.csv``, ``part-00000/shard.json``, …, ``manifest.json``. ``chunks``
    are at most 1 MiB each. One shard is in memory at a time. When this raises, what was written so far must be thrown away.

    Raises:
        FileRejected: the file is damaged, which may turn out at its very end.
        TransientError: the stream ended before ``version.size`` bytes.
    """
    reader = iter_rows(source, settings=settings, size=version.size)
    header = csv_line(reader.columns)
    entries: list[ShardEntry] = []
    for shard in _shards(reader, settings):
        body = b"".join([header, *shard.records])
        info = ShardInfo(
            first_row=shard.first_row,
            rows=len(shard.records),
            sha256=hashlib.sha256(body).hexdigest(),
            model=model,
            rejections=tuple(shard.rejections),
        )
        name = shard_name(len(entries))
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
        run_id=run_id,
    )
    write(MANIFEST, _chunks(manifest.to_json().encode()))
    log.info("%r: %d rows, %d rejected, %d shards", version.name, manifest.rows, manifest.rejected, len(entries))
    return manifest


@dataclass
class _Shard:
    """A shard being filled. ``size`` counts its bytes, and those that are kept of its rejected rows."""

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


def _shards(rows: Iterable[Row], settings: IngestSettings) -> Iterator[_Shard]:
    shard = _Shard(first_row=1)
    for row in rows:
        shard.add(row)
        if len(shard.records) >= settings.shard_rows or shard.size >= settings.shard_bytes:
            yield shard
            shard = _Shard(first_row=row.row + 1)
    if shard.records:
        yield shard


def _chunks(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), _CHUNK):
        yield data[start : start + _CHUNK]
