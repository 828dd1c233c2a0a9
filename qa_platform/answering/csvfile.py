"""Answering a CSV of any size on this machine, in bounded memory: into a stream, or into a file, which can be resumed."""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from qa_platform.answering.engine import Answerer, AnswerOptions
from qa_platform.answering.rows import ALTERNATIVES, AskedRow, Counts, alternatives_cell, answer_cells, answered_rows
from qa_platform.contract import ANSWER_COLUMNS, pass_through_columns
from qa_platform.errors import InputError, TransientError
from qa_platform.ingest import FileRejected, RowReader, TextLimits, csv_line
from qa_platform.ingest.packing import is_packed, packed
from qa_platform.ingest.rules import TABLE_LIMITS

_CHECKPOINT_SECONDS = 2.0

Report = Callable[[AskedRow], None]


@dataclass(frozen=True)
class _Checkpoint:
    """How much of a partial output is valid: its first ``size`` bytes, and the counts of the rows in them.

    ``origin`` identifies the input, the model and the options. A checkpoint with another origin is ignored.
    """

    origin: str
    size: int
    answered: int
    no_answer: int
    rejected: int

    @property
    def counts(self) -> Counts:
        return Counts(self.answered, self.no_answer, self.rejected)


class _InputChanged(TransientError):
    """The input changed while it was read, so the rows that were answered may be those of two versions."""


def answer_stream(
    answerer: Answerer,
    source: BinaryIO,
    target: BinaryIO,
    options: AnswerOptions,
    report: Report = lambda row: None,
    *,
    limits: TextLimits = TABLE_LIMITS,
) -> Counts:
    """Answer a CSV into a stream. Damaged rows keep their line, with an ``error``. ``report`` is called after each row.

    Raises:
        FileRejected: the file cannot be read as a CSV of questions, possibly only at its end.
    """
    return answer_rows(answerer, RowReader(source, limits=limits), target, options, report)


def answer_rows(answerer: Answerer, rows: RowReader, target: BinaryIO, options: AnswerOptions, report: Report = lambda row: None) -> Counts:
    """Like `answer_stream`, for a CSV whose header has already been read."""
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
    limits: TextLimits = TABLE_LIMITS,
) -> Counts:
    """Answer a CSV into a file, which appears only when it is complete. If ``target`` is a symbolic link, the file it points to is written.

    The file is gzip if its name ends in ``.gz``. Until it is complete, the rows are in ``<target>.partial``, always uncompressed. A run
    that was interrupted, even while compressing, is resumed from there if input, model and options are the same. ``skipped`` is then
    called for each row that was done before, in another thread, before the first call of ``report``.

    Raises:
        FileRejected: the file cannot be read as a CSV of questions. Nothing of it is kept.
        InputError: the output would overwrite the input, is not an ordinary file, or is being written by another run.
        TransientError: the input changed while it was read. Nothing of it is kept.
    """
    # Refused by its own name: a pipe behind /dev/stdout has none.
    given, target = target, target.resolve()
    partial = target.with_name(target.name + ".partial")
    state = target.with_name(target.name + ".partial.json")
    # None if the partial file itself becomes the target.
    pack = target.with_name(target.name + ".packed") if is_packed(target.name) else None
    refuse_output(source, given, (target, partial, state, _unfinished(state), *([pack] if pack else [])))
    origin, size_and_time = _origin(answerer, source, options, limits), _size_and_time(source)
    with source.open("rb") as lines, _locked(partial) as out:
        try:
            rows = RowReader(lines, limits=limits, size=source.stat().st_size)
            good = _begin(out, state, origin, _header(rows, options))
            counts = good.counts
            answers = _answer(answerer, rows, options, counts, report, skipped)
            _write_answers(answers, out, state, good, counts)
            if _size_and_time(source) != size_and_time:
                raise _InputChanged("it changed while it was read", where=str(source), advice="repeat the command once it is complete")
        except (FileRejected, _InputChanged):
            partial.unlink()
            state.unlink(missing_ok=True)
            raise
        # Under the lock: otherwise another run could empty the partial file first.
        if pack:
            _pack(partial, pack, target)
            partial.unlink()
        else:
            partial.replace(target)
        state.unlink(missing_ok=True)
    return counts


def refuse_output(source: Path, target: Path, written: Iterable[Path]) -> None:
    """Refuse a target that is not an ordinary file, or whose writing would overwrite the source.

    Args:
        written: all files that are written to produce the target.

    Raises:
        InputError: it is refused.
    """
    if target.exists() and not target.is_file():
        raise InputError("not an ordinary file", where=str(target), advice="name another output, or none for standard output")
    for path in written:
        if path.exists() and path.samefile(source):
            what = f"this is the input, which answers written to {target} would overwrite"
            raise InputError(what, where=str(path), advice="name another output")


@contextmanager
def _locked(partial: Path) -> Iterator[BinaryIO]:
    """The partial file, new or as it was left, open for appending and locked for this run."""
    with partial.open("ab") as out:
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A run that has just ended may have renamed the file that was opened here.
            ours = partial.exists() and os.path.samestat(partial.stat(), os.fstat(out.fileno()))
        except BlockingIOError:
            ours = False
        if not ours:
            advice = "wait until that run has ended, or name another output"
            raise InputError("another run is writing this file", where=str(partial), advice=advice)
        yield out


def _begin(out: BinaryIO, state: Path, origin: str, header: bytes) -> _Checkpoint:
    """Truncate a partial file to its valid part. If there is none, start over with the header."""
    done = _read_checkpoint(state, origin)
    # A shorter file has lost rows, or belongs to another checkpoint.
    if done and done.size <= os.fstat(out.fileno()).st_size:
        out.truncate(done.size)
        return done
    # This comes first: an old checkpoint would otherwise vouch for what this run writes.
    state.unlink(missing_ok=True)
    out.truncate(0)
    out.write(header)
    return _Checkpoint(origin, len(header), **asdict(Counts()))


def _write_answers(answers: Iterator[bytes], out: BinaryIO, state: Path, good: _Checkpoint, counts: Counts) -> None:
    """Append the answered lines after the ``good`` part, with a checkpoint every few seconds, on an interrupt and at the end."""
    try:
        shown = time.monotonic()
        for line in answers:
            out.write(line)
            # Replaced as a whole after each row: an interrupt may come between counting a row and writing it.
            good = _Checkpoint(good.origin, good.size + len(line), counts.answered, counts.no_answer, counts.rejected)
            if time.monotonic() - shown > _CHECKPOINT_SECONDS:
                _write_checkpoint(state, out, good)
                shown = time.monotonic()
    except (KeyboardInterrupt, SystemExit):
        _write_checkpoint(state, out, good)
        raise
    # The remaining steps may fail, which must not cost the answers.
    _write_checkpoint(state, out, good)


def _pack(rows: Path, pack: Path, target: Path) -> None:
    """Compress the rows, and rename the result to the target when it is complete. The rows stay, so that this can be repeated."""
    try:
        with pack.open("wb") as out:
            with rows.open("rb") as source, packed(out, target.name) as stream:
                shutil.copyfileobj(source, stream)
            _sync(out)
        pack.replace(target)
    finally:
        # On a full disk, a leftover would take the room that the next run needs.
        pack.unlink(missing_ok=True)


def _answer(
    answerer: Answerer, rows: RowReader, options: AnswerOptions, counts: Counts, report: Report, skipped: Report = lambda row: None
) -> Iterator[bytes]:
    """The answered lines after the first ``counts.rows`` rows, which are done already. Each line is added to ``counts``."""
    model = answerer.identity.id
    for row, answer in answered_rows(answerer, _asked(rows, counts.rows, skipped), options):
        cells = [*row.cells, *answer_cells(answer, model)]
        if options.top_k > 1:
            cells.append(alternatives_cell(answer))
        counts.add(answer)
        yield csv_line(cells, delimiter=rows.delimiter)
        report(row)


def _asked(rows: RowReader, done: int, skipped: Report) -> Iterator[AskedRow]:
    for number, row in enumerate(rows):
        reason = row.rejection.reason if row.rejection else None
        asked = AskedRow(row.cells, row.cells[rows.question], row.cells[rows.context], reason, len(row.raw))
        if number < done:
            skipped(asked)
        else:
            yield asked


def answered_columns(rows: RowReader, options: AnswerOptions) -> list[str]:
    """The header of the answered CSV."""
    added = [*ANSWER_COLUMNS, *([ALTERNATIVES] if options.top_k > 1 else [])]
    return [*pass_through_columns(rows.columns, added), *added]


def _header(rows: RowReader, options: AnswerOptions) -> bytes:
    return csv_line(answered_columns(rows, options), delimiter=rows.delimiter)


def _origin(answerer: Answerer, source: Path, options: AnswerOptions, limits: TextLimits) -> str:
    how = (asdict(answerer.identity), asdict(options), answerer.no_answer_threshold(options), asdict(limits))
    return json.dumps([str(source.resolve()), *_size_and_time(source), *how])


def _size_and_time(source: Path) -> tuple[int, int]:
    status = source.stat()
    return status.st_size, status.st_mtime_ns


def _read_checkpoint(path: Path, origin: str) -> _Checkpoint | None:
    try:
        checkpoint = _Checkpoint(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    numbers = (checkpoint.size, checkpoint.answered, checkpoint.no_answer, checkpoint.rejected)
    valid = checkpoint.origin == origin and all(type(number) is int and number >= 0 for number in numbers)
    return checkpoint if valid else None


def _write_checkpoint(path: Path, out: BinaryIO, checkpoint: _Checkpoint) -> None:
    _sync(out)
    unfinished = _unfinished(path)
    unfinished.write_text(json.dumps(asdict(checkpoint)), encoding="utf-8")
    unfinished.replace(path)


def _unfinished(checkpoint: Path) -> Path:
    return checkpoint.with_name(checkpoint.name + ".new")


def _sync(out: BinaryIO) -> None:
    """Flush what was written to disk."""
    out.flush()
    os.fsync(out.fileno())
