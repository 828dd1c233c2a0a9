"""A CSV of any size, answered here, in bounded memory: to a stream, or to a file in a way that can be taken up again."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from qa_platform.answering.engine import Answerer, AnswerOptions
from qa_platform.answering.rows import AskedRow, Counts, answer_cells, answered_rows
from qa_platform.contract import ANSWER_COLUMNS
from qa_platform.ingest import RowReader, csv_line, iter_rows

_CHECKPOINT_SECONDS = 2.0
# With several answers per row, the others stand in a column of their own, as JSON.
ALTERNATIVES = "alternatives"

Report = Callable[[AskedRow], None]


@dataclass(frozen=True)
class _Checkpoint:
    """How far a partial output is good, and from what it was made. Anything else than an equal ``origin`` starts anew."""

    origin: str
    size: int
    answered: int
    no_answer: int
    rejected: int

    @property
    def counts(self) -> Counts:
        return Counts(self.answered, self.no_answer, self.rejected)


def answer_stream(
    answerer: Answerer, source: BinaryIO, target: BinaryIO, options: AnswerOptions, report: Report = lambda row: None
) -> Counts:
    """Answer a CSV into a stream. Damaged rows keep their line, with an ``error``; ``report`` is called after each row.

    Raises:
        FileRejected: the file cannot be read as a CSV of questions, possibly only at its end.
    """
    rows = iter_rows(source)
    target.write(_header(rows, options))
    counts = Counts()
    for line in _answer(answerer, rows, options, counts, report):
        target.write(line)
    return counts


def answer_file(answerer: Answerer, source: Path, target: Path, options: AnswerOptions, report: Report = lambda row: None) -> Counts:
    """Answer a CSV into a file, which appears when it is whole.

    Until then the rows lie in ``<target>.partial``. A run that was cut off goes on there, if input, model and options are the
    same; ``report`` is then called for the rows that were done before, too.

    Raises:
        FileRejected: the file cannot be read as a CSV of questions.
    """
    partial = target.with_name(target.name + ".partial")
    state = target.with_name(target.name + ".partial.json")
    origin = _origin(answerer, source, options)
    done = _read_checkpoint(state, origin) if partial.exists() else None
    with source.open("rb") as lines, partial.open("r+b" if done else "wb") as out:
        rows = iter_rows(lines, size=source.stat().st_size)
        counts = done.counts if done else Counts()
        if done:
            out.truncate(done.size)
            out.seek(done.size)
        else:
            out.write(_header(rows, options))
        # Set in one step after each row: an interrupt may come between counting a row and writing it.
        good = _Checkpoint(origin, out.tell(), **asdict(counts))
        try:
            shown = time.monotonic()
            for line in _answer(answerer, rows, options, counts, report):
                out.write(line)
                good = _Checkpoint(origin, good.size + len(line), counts.answered, counts.no_answer, counts.rejected)
                if time.monotonic() - shown > _CHECKPOINT_SECONDS:
                    _write_checkpoint(state, out, good)
                    shown = time.monotonic()
        except KeyboardInterrupt:
            _write_checkpoint(state, out, good)
            raise
    partial.replace(target)
    state.unlink(missing_ok=True)
    return counts


def _answer(answerer: Answerer, rows: RowReader, options: AnswerOptions, counts: Counts, report: Report) -> Iterator[bytes]:
    """The answered lines after the ``counts.rows`` that are done; keeps ``counts``, line by line."""
    model = answerer.identity.id
    for row, answer in answered_rows(answerer, _asked(rows, counts.rows, report), options):
        cells = [*row.cells, *answer_cells(answer, model)]
        if options.top_k > 1:
            cells.append(json.dumps([asdict(span) for span in answer.alternatives], ensure_ascii=False))
        counts.add(answer)
        yield csv_line(cells)
        report(row)


def _asked(rows: RowReader, done: int, report: Report) -> Iterator[AskedRow]:
    for number, row in enumerate(rows):
        reason = row.rejection.reason if row.rejection else None
        asked = AskedRow(row.cells, row.cells[rows.question], row.cells[rows.context], reason, len(row.raw))
        if number < done:
            report(asked)
        else:
            yield asked


def _header(rows: RowReader, options: AnswerOptions) -> bytes:
    return csv_line([*rows.columns, *ANSWER_COLUMNS, *([ALTERNATIVES] if options.top_k > 1 else [])])


def _origin(answerer: Answerer, source: Path, options: AnswerOptions) -> str:
    found = source.stat()
    return json.dumps([str(source.resolve()), found.st_size, found.st_mtime_ns, asdict(answerer.identity), asdict(options)])


def _read_checkpoint(path: Path, origin: str) -> _Checkpoint | None:
    try:
        found = _Checkpoint(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return found if found.origin == origin else None


def _write_checkpoint(path: Path, out: BinaryIO, checkpoint: _Checkpoint) -> None:
    out.flush()
    written = path.with_name(path.name + ".new")
    written.write_text(json.dumps(asdict(checkpoint)), encoding="utf-8")
    written.replace(path)
