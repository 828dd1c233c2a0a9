"""Answering one shard: reads ``questions.csv`` and ``shard.json``, writes ``answers.csv`` and the completed ``shard.json``."""

import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from qa_platform.answering.engine import Answerer, AnswerOptions
from qa_platform.answering.rows import AskedRow, Counts, answer_cells, answered_rows
from qa_platform.contract import ANSWER_COLUMNS, SHARD_ANSWERS, SHARD_INFO, SHARD_QUESTIONS, ShardInfo, find_columns
from qa_platform.errors import InputError
from qa_platform.ingest.dialect import csv_line, csv_reader

_log = logging.getLogger(__name__)

_PROGRESS_SECONDS = 5.0


def answer_shard(answerer: Answerer, folder_in: Path, folder_out: Path) -> ShardInfo:
    """Answer one shard, row by row. Writes ``shard.json`` into ``folder_out`` last, and returns it.

    A row that ingestion rejected is not asked, and keeps its reason. A row that cannot be answered gets a reason.

    Raises:
        InputError: the shard does not match its ``shard.json``. That is a fault of the platform, not of the data.
    """
    info = ShardInfo.from_json((folder_in / SHARD_INFO).read_bytes())
    begun = time.monotonic()
    folder_out.mkdir(parents=True, exist_ok=True)
    counts = _answer_rows(answerer, info, folder_in / SHARD_QUESTIONS, folder_out / SHARD_ANSWERS)
    if counts.rows != info.rows:
        raise InputError(f"{counts.rows} rows, but its {SHARD_INFO} says {info.rows}", where=str(folder_in / SHARD_QUESTIONS))
    done = replace(
        info,
        answered_by=answerer.identity,
        runtime=answerer.runtime,
        answered=counts.answered,
        no_answer=counts.no_answer,
        rejected=counts.rejected,
        answered_at=datetime.now(UTC).replace(tzinfo=None).isoformat(timespec="microseconds"),
        seconds=round(time.monotonic() - begun, 3),
    )
    (folder_out / SHARD_INFO).write_text(done.to_json(), encoding="utf-8")
    return done


def _answer_rows(answerer: Answerer, info: ShardInfo, source: Path, target: Path) -> Counts:
    counts, progress, model = Counts(), _Progress(source.parent, info.rows), answerer.identity.id
    options = AnswerOptions(align_to_words=info.align_to_words)
    with source.open(newline="", encoding="utf-8") as lines, target.open("wb") as out:
        reader = csv_reader(lines)
        header = next(reader, None)
        if header is None:
            raise InputError("it has no header", where=str(source))
        out.write(csv_line([*header, *ANSWER_COLUMNS]))
        for row, answer in answered_rows(answerer, _asked(reader, header, info, source), options):
            out.write(csv_line([*row.cells, *answer_cells(answer, model)]))
            counts.add(answer)
            progress.show(counts.rows)
    return counts


def _asked(rows: Iterator[list[str]], header: list[str], info: ShardInfo, source: Path) -> Iterator[AskedRow]:
    question, context = find_columns(header)
    reasons = {rejection.row: rejection.reason for rejection in info.rejections}
    for number, cells in enumerate(rows, start=info.first_row):
        if len(cells) != len(header):
            raise InputError(f"{len(cells)} cells, but the header has {len(header)}", where=f"{source}, row {number} of the file")
        yield AskedRow(cells, cells[question], cells[context], reasons.get(number))


class _Progress:
    """Logs the rows done, and rows per second, every few seconds."""

    def __init__(self, shard: Path, rows: int) -> None:
        self._shard = f"{shard.parent.name}/{shard.name}"
        self._rows = rows
        self._begun = self._shown = time.monotonic()

    def show(self, done: int) -> None:
        now = time.monotonic()
        if now - self._shown >= _PROGRESS_SECONDS:
            self._shown = now
            _log.info("%s: %d of %d rows, %.1f rows/s", self._shard, done, self._rows, done / (now - self._begun))
