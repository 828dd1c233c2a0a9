"""How `size_bytes` of a datum set affects a job, by number of workers: computed from the start-up cost of a set and the answering speed.

Each set starts the answering program and loads the model. A lost set is answered again, and progress is counted in sets. Both figures are
measured with one worker; the table for several workers is computed from them.
"""

import csv
import io
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from qa_platform.answering.engine import Answerer
from qa_platform.contract import ANSWER_PIPELINE
from qa_platform.provisioning.project_files import project_file
from qa_platform.settings import IngestSettings
from qa_platform.tools.bench.answering import peak_mebibytes

ROWS = 100_000
WORKERS = (1, 4, 32)
SIZES_MIB = (1, 4, 16, 64)
ROUNDS = 3
# A whole set: a process begins with every set, and its memory must not grow with the rows.
_MEASURED_ROWS = 6_000
# The work of a pipeline's process before its first row.
_START = "from qa_platform.answering.worker import Worker; from qa_platform.contract import ModelChoice; from pathlib import Path; "
_START += "Worker(Path('.'))._answerer_for(ModelChoice('bundled'))"


@dataclass(frozen=True)
class Job:
    """A job over one large file.

    Attributes:
        sets: the number of its datum sets.
        seconds: how long it takes.
        lost: the seconds of work to repeat if a set is lost.
    """

    sets: int
    seconds: float
    lost: float


def main() -> None:
    """Print the cost of a set, and the table."""
    start = statistics.median(_seconds([sys.executable, "-c", _START]) for _ in range(ROUNDS))
    rate, row_bytes = _measure()
    print(f"a set costs {start:.1f} s; {rate:.0f} rows/s; {row_bytes:.0f} bytes a row; {ROWS:,} rows, the bundled model")
    print(f"peak memory after {_MEASURED_ROWS:,} rows: {peak_mebibytes()} MiB\n")
    print("size_bytes   sets   rows each   " + "   ".join(f"{workers:>2} workers" for workers in WORKERS) + "   answered again if lost")
    for size in SIZES_MIB:
        jobs = [_job(size * 2**20, workers, start, rate, row_bytes) for workers in WORKERS]
        times = "   ".join(f"{job.seconds:>8.0f} s" for job in jobs)
        print(f"{size:>6} MiB {jobs[0].sets:>6} {ROWS / jobs[0].sets:>11.0f}   {times}   {jobs[0].lost:>8.0f} s")
    spec = json.loads((project_file("pachyderm") / ANSWER_PIPELINE / "pipeline.json").read_text())
    print(f"\nthe specification has {spec['datum_set_spec']} and {spec['parallelism_spec']}")


def _measure() -> tuple[float, float]:
    """Rows per second of one worker, and bytes per row in a shard."""
    rows = list(_rows())
    answerer = Answerer("bundled")
    answerer.warm_up()
    begun = time.monotonic()
    for _ in answerer.answer(rows):
        pass
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return len(rows) / (time.monotonic() - begun), len(text.getvalue().encode()) / len(rows)


def _rows() -> Iterator[tuple[str, str]]:
    with (project_file("samples") / "gold.csv").open(newline="", encoding="utf-8") as gold:
        samples = list(csv.DictReader(gold))
    for number in range(_MEASURED_ROWS):
        sample = samples[number % len(samples)]
        yield sample["question"], f"{sample['context']} This is copy {number}."


def _job(size: int, workers: int, start: float, rate: float, row_bytes: float) -> Job:
    shard = IngestSettings().shard_rows
    # A set takes shards until it reaches its size.
    shards_of_set = max(1, -(-size // int(shard * row_bytes)))
    shards = -(-ROWS // shard)
    sets = -(-shards // shards_of_set)
    rows_of_set = min(ROWS, shards_of_set * shard)
    turns = -(-sets // workers)
    return Job(sets, turns * (start + rows_of_set / rate), start + rows_of_set / rate)


def _seconds(command: list[str]) -> float:
    begun = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    return time.monotonic() - begun


if __name__ == "__main__":
    main()
