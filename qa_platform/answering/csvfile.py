"""A CSV of any size, answered here, in bounded memory: to a stream, or to a file in a way that can be taken up again."""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from qa_platform.answering.engine import Answerer, AnswerOptions
from qa_platform.answering.rows import AskedRow, Counts, answer_cells, answered_rows
from qa_platform.contract import ANSWER_COLUMNS
from qa_platform.errors import InputError
from qa_platform.ingest import FileRejected, RowReader, csv_line, iter_rows

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


def answer_file(
    answerer: Answerer,
    source: Path,
    target: Path,
    options: AnswerOptions,
    report: Report = lambda row: None,
    *,
    skipped: Report = lambda row: None,
) -> Counts:
    """Answer a CSV into a file, which appears when it is whole. A symbolic link stays one: what it points to is written.

    Until then the rows lie in ``<target>.partial``. A run that was cut off goes on there, if input, model and options are the
    same. ``skipped`` is then called for each row that was done before, ahead of the first call of ``report``, from another thread.

    Raises:
        FileRejected: the file cannot be read as a CSV of questions. Nothing of it is kept.
        InputError: writing would destroy the input or something that is no ordinary file, or another run writes there.
    """
    if target.exists() and not target.is_file():
        raise InputError(f"{target}: not an ordinary file; name another output, or none, which is standard output")
    target = target.resolve()
    partial = target.with_name(target.name + ".partial")
    state = target.with_name(target.name + ".partial.json")
    for path in (target, partial, state, _unfinished(state)):
        if path.exists() and path.samefile(source):
            raise InputError(f"{path}: is the input, which answers written to {target} would overwrite; name another output")
    origin = _origin(answerer, source, options)
    with source.open("rb") as lines, _locked(partial) as out:
        try:
            rows = iter_rows(lines, size=source.stat().st_size)
            good = _begin(out, state, origin, _header(rows, options))
            counts = good.counts
            answers = _answer(answerer, rows, options, counts, report, skipped)
            _write_answers(answers, out, state, good, counts)
        except FileRejected:
            partial.unlink()
            state.unlink(missing_ok=True)
            raise
        _settle(out)
        # Under the lock: another run would begin by emptying what lies here.
        partial.replace(target)
        state.unlink(missing_ok=True)
    return counts


@contextmanager
def _locked(partial: Path) -> Iterator[BinaryIO]:
    """The partial file as it lies there, or a new one, open for appending, and for this run alone."""
    with partial.open("ab") as out:
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A run that ended in between has given its file the final name.
            ours = partial.exists() and os.path.samestat(partial.stat(), os.fstat(out.fileno()))
        except BlockingIOError:
            ours = False
        if not ours:
            raise InputError(f"{partial}: another run is writing it; wait until that has ended, or name another output")
        yield out


def _begin(out: BinaryIO, state: Path, origin: str, header: bytes) -> _Checkpoint:
    """Cut a partial file to what is good in it. Where that is nothing, it is begun anew, with the header."""
    done = _read_checkpoint(state, origin)
    # One that is shorter has lost rows, or belongs to another checkpoint.
    if done and done.size <= os.fstat(out.fileno()).st_size:
        out.truncate(done.size)
        return done
    # First: a checkpoint that is left would vouch for what this run writes.
    state.unlink(missing_ok=True)
    out.truncate(0)
    out.write(header)
    return _Checkpoint(origin, len(header), **asdict(Counts()))


def _write_answers(answers: Iterator[bytes], out: BinaryIO, state: Path, good: _Checkpoint, counts: Counts) -> None:
    """Append the answered lines after what is ``good``, with a checkpoint every few seconds and where an interrupt comes."""
    try:
        shown = time.monotonic()
        for line in answers:
            out.write(line)
            # Set in one step after each row: an interrupt may come between counting a row and writing it.
            good = _Checkpoint(good.origin, good.size + len(line), counts.answered, counts.no_answer, counts.rejected)
            if time.monotonic() - shown > _CHECKPOINT_SECONDS:
                _write_checkpoint(state, out, good)
                shown = time.monotonic()
    except KeyboardInterrupt:
        _write_checkpoint(state, out, good)
        raise


def _answer(
    answerer: Answerer, rows: RowReader, options: AnswerOptions, counts: Counts, report: Report, skipped: Report = lambda row: None
) -> Iterator[bytes]:
    """The answered lines after the ``counts.rows`` that are done; keeps ``counts``, line by line."""
    model = answerer.identity.id
    for row, answer in answered_rows(answerer, _asked(rows, counts.rows, skipped), options):
        cells = [*row.cells, *answer_cells(answer, model)]
        if options.top_k > 1:
            cells.append(json.dumps([asdict(span) for span in answer.alternatives], ensure_ascii=False))
        counts.add(answer)
        yield csv_line(cells)
        report(row)


def _asked(rows: RowReader, done: int, skipped: Report) -> Iterator[AskedRow]:
    for number, row in enumerate(rows):
        reason = row.rejection.reason if row.rejection else None
        asked = AskedRow(row.cells, row.cells[rows.question], row.cells[rows.context], reason, len(row.raw))
        if number < done:
            skipped(asked)
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
    numbers = (found.size, found.answered, found.no_answer, found.rejected)
    return found if found.origin == origin and all(type(number) is int and number >= 0 for number in numbers) else None


def _write_checkpoint(path: Path, out: BinaryIO, checkpoint: _Checkpoint) -> None:
    _settle(out)
    written = _unfinished(path)
    written.write_text(json.dumps(asdict(checkpoint)), encoding="utf-8")
    written.replace(path)


def _unfinished(checkpoint: Path) -> Path:
    return checkpoint.with_name(checkpoint.name + ".new")


def _settle(out: BinaryIO) -> None:
    """Bring what is written to the disk, before a name says that it is there."""
    out.flush()
    os.fsync(out.fileno())
