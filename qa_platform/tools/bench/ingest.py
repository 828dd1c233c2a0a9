"""The speed and memory of cutting input files into shards, compared with parsing and writing every row with ``csv``.

The input is generated as it is read, so it needs neither a disk nor gigabytes of memory.
"""

import argparse
import csv
import io
import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from qa_platform.contract import CONTEXT_LIMIT, QUESTION_LIMIT, FileVersion, ModelChoice
from qa_platform.ingest import ByteSource, csv_line, split
from qa_platform.settings import IngestSettings

_HEADER = ("id", "question", "context", "topic")
# Distinct rows; the file repeats them.
_SAMPLE_ROWS = 2_000
# Rows of the file for the comparison. The peer, plain ``csv``, is too slow for the large one.
_PEER_ROWS = 50_000
GOAL_RATE, BOUND_MIB = 60.0, 600.0


@dataclass(frozen=True)
class IngestFigures:
    """One measurement. A megabyte is 10**6 bytes. ``cpu_seconds`` is processor time, which other processes do not affect."""

    rows: int
    megabytes: float
    seconds: float
    cpu_seconds: float
    peak_mib: float

    @property
    def rate(self) -> float:
        """Megabytes per second."""
        return self.megabytes / self.seconds

    @property
    def cpu_rate(self) -> float:
        """Megabytes per second of processor time."""
        return self.megabytes / self.cpu_seconds


class RepeatedRows:
    """A stream of a CSV with ``rows`` rows, whose contexts have about ``context`` characters. Half of them are quoted."""

    def __init__(self, rows: int, *, context: int) -> None:
        rng = random.Random(0)
        words = ("river", "the", "of", "naïve", "1815,", 'so-called "model"', "bridge", "engineers", "in", "was", "completed.\n", "東京")
        sample = []
        for number in range(_SAMPLE_ROWS):
            text = " ".join(rng.choices(words[:4] + words[6:10] if number % 2 else words, k=context // 6))[:context]
            sample.append(csv_line([f"row-{number}", f"What was completed in {number}?", text, "history"]))
        self._rows = sample
        self._all = b"".join(sample)
        self._pieces = self._make(rows)
        self._piece, self._at = b"", 0
        self.length = 0

    def _make(self, rows: int) -> Iterator[bytes]:
        yield csv_line(_HEADER)
        for _ in range(rows // _SAMPLE_ROWS):
            yield self._all
        if rows % _SAMPLE_ROWS:
            yield b"".join(self._rows[: rows % _SAMPLE_ROWS])

    def read(self, size: int, /) -> bytes:
        if self._at == len(self._piece):
            self._piece, self._at = next(self._pieces, b""), 0
        taken = self._piece[self._at : self._at + size]
        self._at += len(taken)
        self.length += len(taken)
        return taken


def measure(rows: int, *, context: int) -> IngestFigures:
    """Cut a file into shards in this process. Use a fresh process: the peak memory covers its whole life."""
    source = RepeatedRows(rows, context=context)
    began, cpu = time.perf_counter(), time.process_time()
    manifest = split(
        source, version=FileVersion("bench.csv", 1), load_id=1, model=ModelChoice("bundled"), settings=IngestSettings(), write=_discard
    )
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    assert (manifest.rows, manifest.rejected) == (rows, 0)
    return _figures(rows, source.length, seconds, cpu)


def measure_peer(rows: int, *, context: int) -> IngestFigures:
    """Measure the simple way: ``csv.reader``, the same checks on every row, ``csv.writer``; no hashing, no shards."""
    source = RepeatedRows(rows, context=context)
    began, cpu = time.perf_counter(), time.process_time()
    reader = csv.reader(io.TextIOWrapper(io.BufferedReader(_Raw(source), 2**20), encoding="utf-8", newline=""), strict=True)
    out = io.TextIOWrapper(io.BufferedWriter(_Null(), 2**20), encoding="utf-8", newline="")
    writer = csv.writer(out)
    writer.writerow(next(reader))
    for cells in reader:
        if cells[1].strip() and cells[2].strip() and len(cells[1]) <= QUESTION_LIMIT and len(cells[2]) <= CONTEXT_LIMIT:
            writer.writerow(cells)
    out.flush()
    return _figures(rows, source.length, time.perf_counter() - began, time.process_time() - cpu)


def run(rows: int, *, context: int) -> bool:
    """Print the table: the large file, one with short rows, and both ways on a smaller file. Returns whether the goals are met."""
    cases = (
        ("split, long contexts", "split", rows, context),
        ("split, short rows", "split", rows, 100),
        ("split, smaller file", "split", _PEER_ROWS, context),
        ("csv.reader, checks, csv.writer", "peer", _PEER_ROWS, context),
    )
    print(f"{'':32}{'rows':>10} {'MB':>8} {'MB/s':>7} {'MB/CPU s':>9} {'peak MiB':>9}")
    figures = []
    for title, way, count, length in cases:
        figure = _in_fresh_process(way, count, length)
        figures.append(figure)
        speeds = f"{figure.rate:>7.0f} {figure.cpu_rate:>9.0f} {figure.peak_mib:>9.0f}"
        print(f"{title:32}{figure.rows:>10,} {figure.megabytes:>8,.0f} {speeds}", flush=True)
    whole, peak = figures[0], max(figures[0].peak_mib, figures[1].peak_mib)
    met = whole.rate >= GOAL_RATE and peak < BOUND_MIB
    print(f"goals for the whole file: {GOAL_RATE:.0f} MB/s and a peak under {BOUND_MIB:.0f} MiB: {'met' if met else 'MISSED'}")
    return met


def _in_fresh_process(way: str, rows: int, context: int) -> IngestFigures:
    words = {"--way": way, "--rows": str(rows), "--context": str(context)}
    command = [sys.executable, "-m", "qa_platform.tools.bench.ingest", *(word for pair in words.items() for word in pair)]
    return IngestFigures(**json.loads(subprocess.run(command, check=True, capture_output=True).stdout))


class _Raw(io.RawIOBase):
    def __init__(self, source: ByteSource) -> None:
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        data = self._source.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Null(io.RawIOBase):
    def writable(self) -> bool:
        return True

    def write(self, data: object, /) -> int:
        return len(data)  # type: ignore[arg-type]


def _discard(path: str, chunks: Iterable[bytes]) -> None:
    for _ in chunks:
        pass


def _figures(rows: int, length: int, seconds: float, cpu: float) -> IngestFigures:
    return IngestFigures(rows=rows, megabytes=length / 1e6, seconds=seconds, cpu_seconds=cpu, peak_mib=peak_mib())


def peak_mib() -> float:
    """The peak memory of this program in MiB. On Linux ``ru_maxrss`` would include the process's memory before it ran this program."""
    status = Path("/proc/self/status")
    if status.exists():
        [peak] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(peak.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    # One measurement, as JSON on standard output.
    parser.add_argument("--way", choices=["split", "peer"], help=argparse.SUPPRESS)
    parser.add_argument("--context", type=int, default=3_000, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        measured = (measure if options.way == "split" else measure_peer)(options.rows, context=options.context)
        json.dump(asdict(measured), sys.stdout)
        return 0
    return 0 if run(options.rows, context=options.context) else 1


if __name__ == "__main__":
    sys.exit(main())
