"""One shard: ``questions.csv`` and ``shard.json`` in, ``answers.csv`` and the same ``shard.json``, filled in, out."""

import csv
import itertools
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from qa_platform.answering.engine import Answer, Answerer
from qa_platform.contract import (
    ANSWER_COLUMNS,
    SHARD_ANSWERS,
    SHARD_INFO,
    SHARD_QUESTIONS,
    RowReason,
    ShardInfo,
    find_columns,
)
from qa_platform.errors import InputError
from qa_platform.ingest import csv_line

_log = logging.getLogger(__name__)

_PROGRESS_SECONDS = 5.0
# A score needs no more digits than its precision has.
_SCORE_DIGITS = 6


@dataclass
class Counts:
    """What became of the rows; ``rows`` is always the sum of the three."""

    answered: int = 0
    no_answer: int = 0
    rejected: int = 0

    @property
    def rows(self) -> int:
        return self.answered + self.no_answer + self.rejected

    def add(self, answer: Answer) -> None:
        if answer.error is None or answer.error is RowReason.LOW_SCORE:
            self.answered += 1
        elif answer.error is RowReason.NO_ANSWER:
            self.no_answer += 1
        else:
            self.rejected += 1


def answer_shard(answerer: Answerer, folder_in: Path, folder_out: Path, *, min_score: float = 0.0) -> ShardInfo:
    """Answer one shard, streaming; returns the ``shard.json`` that was written, last, into ``folder_out``.

    A row that ingestion rejected keeps its reason and is not asked; a row that cannot be answered gets one.

    Raises:
        InputError: the shard is not as its ``shard.json`` says. That is a fault of the platform, not of the data.
    """
    info = ShardInfo.from_json((folder_in / SHARD_INFO).read_bytes())
    begun = time.monotonic()
    counts = Counts()
    folder_out.mkdir(parents=True, exist_ok=True)
    source = folder_in / SHARD_QUESTIONS
    with source.open(newline="", encoding="utf-8") as lines, (folder_out / SHARD_ANSWERS).open("wb") as target:
        header, rows = _read(lines, source)
        target.write(csv_line([*header, *ANSWER_COLUMNS]))
        rejected = {rejection.row - info.first_row: rejection.reason for rejection in info.rejections}
        progress = Progress(info.rows)
        for row, answer in answered_rows(answerer, header, rows, rejected=rejected, min_score=min_score):
            target.write(csv_line([*row, *answer_cells(answer, answerer.identity.id)]))
            counts.add(answer)
            progress.show(counts.rows)
    if counts.rows != info.rows:
        raise InputError(f"{source} has {counts.rows} rows, and its {SHARD_INFO} says {info.rows}")
    done = replace(
        info,
        answered_by=answerer.identity,
        answered=counts.answered,
        no_answer=counts.no_answer,
        rejected=counts.rejected,
        answered_at=datetime.now(UTC).replace(tzinfo=None).isoformat(timespec="microseconds"),
        seconds=round(time.monotonic() - begun, 3),
    )
    (folder_out / SHARD_INFO).write_text(done.to_json(), encoding="utf-8")
    return done


def _read(lines: Iterable[str], source: Path) -> tuple[list[str], Iterator[list[str]]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(lines)
    header = next(reader, None)
    if header is None:
        raise InputError(f"{source} has no header")
    return header, _whole(reader, len(header), source)


def _whole(rows: Iterable[list[str]], columns: int, source: Path) -> Iterator[list[str]]:
    for number, row in enumerate(rows, start=1):
        if len(row) != columns:
            raise InputError(f"{source}, row {number}: {len(row)} cells, and the header has {columns}")
        yield row


def answered_rows(
    answerer: Answerer, header: Sequence[str], rows: Iterable[list[str]], *, rejected: dict[int, RowReason], min_score: float = 0.0
) -> Iterator[tuple[list[str], Answer]]:
    """Every row with its answer, in order. ``rejected`` has the reasons of rows that are not asked, by index from 0."""
    question, context = find_columns(header)
    # The engine reads ahead of what it yields, by a bounded number of rows, which tee keeps.
    kept, asked = itertools.tee(rows)
    pairs = (("", "") if index in rejected else (row[question], row[context]) for index, row in enumerate(asked))
    answers = answerer.answer(pairs, min_score=min_score)
    for index, (row, answer) in enumerate(zip(kept, answers, strict=True)):
        yield row, replace(answer, error=rejected[index]) if index in rejected else answer


def answer_cells(answer: Answer, model: str) -> list[str]:
    """The cells of ANSWER_COLUMNS. A row without an answer has only its error."""
    error = answer.error.value if answer.error else ""
    if answer.error is not None and answer.error is not RowReason.LOW_SCORE:
        score = f"{answer.score:.{_SCORE_DIGITS}f}" if answer.error is RowReason.NO_ANSWER else ""
        return ["", score, "", "", model, error]
    return [answer.answer, f"{answer.score:.{_SCORE_DIGITS}f}", str(answer.start), str(answer.end), model, error]


class Progress:
    """Logs rows done and rows per second every few seconds."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._begun = self._shown = time.monotonic()

    def show(self, done: int) -> None:
        now = time.monotonic()
        if now - self._shown >= _PROGRESS_SECONDS:
            self._shown = now
            _log.info("%d of %d rows, %.1f rows/s", done, self._rows, done / (now - self._begun))
