"""Many small files through the whole stack, by `dagster job execute`, compared with the engine alone on the same rows.

Dagster's start and the two Pachyderm jobs of each batch are measured separately. The rest is the platform's own part: reading, claiming,
reporting and archiving.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psycopg
from pachyderm_sdk import Client

from qa_platform.clients.pachyderm import job_of
from qa_platform.contract import ANSWER_PIPELINE, LOAD_PIPELINE
from qa_platform.embedded.stack import Stack, open_stack
from qa_platform.provisioning.project_files import project_file

# Characters of a context.
_CONTEXT = 120
# Goals on two cores: seconds for all files, and the platform's own seconds for one of them.
WHOLE_SECONDS, OWN_SECONDS = 30.0, 0.05
_JOB = ("dagster", "job", "execute", "-m", "qa_platform.definitions", "-j", "answer_pending_files")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=300)
    parser.add_argument("--rows", type=int, default=5, help="rows of a file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qa-bench-") as folder, open_stack(Path(folder) / "state") as stack:
        # No file is pending, so this is the start of Dagster alone.
        start = _seconds(_JOB, stack)
        rows = _rows(arguments.files * arguments.rows)
        engine = _engine_alone(stack, Path(folder), rows)
        _upload(stack, Path(folder), arguments.files, rows)
        whole = _seconds(_JOB, stack)
        jobs = _job_seconds(stack)
        finished = _finished(stack)
    own = (whole - start - jobs) / arguments.files
    print(f"{arguments.files} files of {arguments.rows} rows: {whole:.1f} s; the engine alone answers them in {engine:.1f} s")
    print(f"Dagster's start {start:.1f} s; Pachyderm jobs {jobs:.1f} s; the platform's own part {own:.3f} s a file")
    good = finished == arguments.files and whole <= WHOLE_SECONDS and own <= OWN_SECONDS
    print(f"goals: {WHOLE_SECONDS:.0f} s and {OWN_SECONDS} s a file, {'met' if good else 'MISSED'}; {finished} files are finished")
    return 0 if good else 1


def _rows(number: int) -> list[tuple[str, str]]:
    """Different rows. They are short, because this does not measure the model."""
    with (project_file("samples") / "gold.csv").open(newline="", encoding="utf-8") as gold:
        samples = list(csv.DictReader(gold))
    rows = []
    for index in range(number):
        sample = samples[index % len(samples)]
        rows.append((sample["question"], f"{sample['context'][:_CONTEXT]} This is row {index}."))
    return rows


def _write(file: Path, rows: list[tuple[str, str]]) -> Path:
    with file.open("w", newline="", encoding="utf-8") as target:
        csv.writer(target).writerows([("question", "context"), *rows])
    return file


def _engine_alone(stack: Stack, folder: Path, rows: list[tuple[str, str]]) -> float:
    source = _write(folder / "all.csv", rows)
    return _seconds(("qa-platform", "answer", str(source), "-o", str(folder / "answered.csv")), stack)


def _upload(stack: Stack, folder: Path, files: int, rows: list[tuple[str, str]]) -> None:
    size = len(rows) // files
    names = [_write(folder / f"file-{n:05d}.csv", rows[n * size : (n + 1) * size]) for n in range(files)]
    subprocess.run(["qa-platform", "upload", *map(str, names)], env=stack.environment, check=True, capture_output=True)


def _seconds(command: tuple[str, ...], stack: Stack) -> float:
    begun = time.monotonic()
    subprocess.run(command, env=stack.environment, check=True, capture_output=True)
    return time.monotonic() - begun


def _job_seconds(stack: Stack) -> float:
    """The seconds from the commit of a batch to the end of its last job, summed over all batches."""
    with psycopg.connect(stack.variables["QA_DATABASE_URL"], password=stack.tokens["postgres"]) as connection:
        jobs = [job for (job,) in connection.execute("SELECT DISTINCT pachyderm_job FROM question_file WHERE pachyderm_job <> ''")]
    client = Client.from_pachd_address(stack.variables["PACHD_ADDRESS"], auth_token=stack.tokens["pachd"])
    begun = [client.pps.inspect_job(job=job_of(ANSWER_PIPELINE, job)).created for job in jobs]
    ended = [client.pps.inspect_job(job=job_of(LOAD_PIPELINE, job)).finished for job in jobs]
    return sum((end - begin).total_seconds() for begin, end in zip(begun, ended, strict=True))


def _finished(stack: Stack) -> int:
    with psycopg.connect(stack.variables["QA_DATABASE_URL"], password=stack.tokens["postgres"]) as connection:
        row = connection.execute("SELECT count(*) FROM question_file WHERE status = 'finished'").fetchone()
    return row[0] if row else 0


if __name__ == "__main__":
    sys.exit(main())
