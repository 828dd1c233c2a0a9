"""The whole stack compared with the engine alone: one file of 1,200 rows, from upload to table, and by `qa-platform answer`."""

import csv
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qa_platform.embedded.stack import Stack, open_stack
from qa_platform.provisioning.project_files import project_file

ROWS = 1200
# The stack's bound: a multiple of the engine's time, plus a constant for starting everything.
RATIO, CONSTANT_SECONDS = 1.5, 15.0


def make_csv(path: Path) -> None:
    """Write 1,200 different rows: the questions of the samples with contexts that differ by a sentence."""
    with (project_file("samples") / "gold.csv").open(newline="", encoding="utf-8") as gold:
        samples = list(csv.DictReader(gold))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("question", "context"))
        for number in range(ROWS):
            row = samples[number % len(samples)]
            writer.writerow((row["question"], f"{row['context']} This is copy {number // len(samples)}."))


def run() -> None:
    """Print both times and the bound."""
    command = shutil.which("qa-platform", path=str(Path(sys.executable).parent)) or "qa-platform"
    with tempfile.TemporaryDirectory(prefix="qa-bench-") as folder, open_stack(Path(folder) / "state") as stack:
        file = Path(folder) / "bench.csv"
        make_csv(file)
        alone = _seconds([command, "answer", str(file), "-o", str(Path(folder) / "alone.csv")], stack)
        subprocess.run([command, "upload", str(file)], env=stack.environment, check=True, capture_output=True)
        job = ["dagster", "job", "execute", "-m", "qa_platform.definitions", "-j", "answer_pending_files"]
        whole = _seconds(job, stack)
    allowed = RATIO * alone + CONSTANT_SECONDS
    print(f"{ROWS} rows: engine alone {alone:.1f} s, whole stack {whole:.1f} s")
    print(f"the bound, {RATIO} x + {CONSTANT_SECONDS:.0f} s, is {allowed:.1f} s")


def _seconds(command: list[str], stack: Stack) -> float:
    begun = time.monotonic()
    subprocess.run(command, env=stack.environment, check=True, capture_output=True)
    return time.monotonic() - begun


if __name__ == "__main__":
    run()
