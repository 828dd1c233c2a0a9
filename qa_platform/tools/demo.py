"""The demonstration: sends the samples through the whole pipeline, and accounts for every row. Run by ``make demo``."""

import csv
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import dagster as dg
import psutil
from rich.console import Console
from rich.table import Table

from qa_platform.clients import bucket
from qa_platform.clients.postgres import connect
from qa_platform.contract import FileStatus, FileVersion
from qa_platform.ledger import FileRecord, Ledger
from qa_platform.settings import BucketSettings, DagsterSettings, PostgresSettings

PROJECT = Path(__file__).resolve().parents[2]
SAMPLES = ("lighthouses.csv", "field_notes.csv", "customer_letters.csv", "holiday_photo.csv")
# It takes well under a minute on two cores. The limit leaves room for much slower machines.
LIMIT_SECONDS = 600
SHOWN_ANSWERS = 8

NOT_ENDED = (dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED)
SETTLED = (FileStatus.FINISHED, FileStatus.REJECTED, FileStatus.UNCHANGED, FileStatus.SUPERSEDED, FileStatus.FAILED)


def main() -> int:
    """Run the demonstration in the stack that the environment names.

    Returns:
        The exit status: 0 only if every row is accounted for.
    """
    # No markup: file names and messages may contain square brackets.
    console = Console(width=None if sys.stdout.isatty() else 120, markup=False)
    uploaded = upload_samples(console)
    with daemon():
        console.print("The sensor finds the files under incoming/ and requests a run. The run starts Pachyderm jobs that answer and load …")
        records = wait(uploaded)
        wait_for_runs()
    show_files(console, records)
    show_answers(console)
    lost = unaccounted(records)
    for line in lost:
        console.print(f"NOT ACCOUNTED FOR {line}", style="red")
    console.print(where_to_look(lost))
    return 1 if lost else 0


def upload_samples(console: Console) -> list[FileVersion]:
    settings = BucketSettings()
    opened = bucket.open_bucket(settings)
    versions = []
    for name in SAMPLES:
        with (PROJECT / "samples" / name).open("rb") as file:
            versions.append(bucket.upload(opened, name, file))
        console.print(f"uploaded samples/{name} to gs://{settings.storage_bucket}/incoming/{name}")
    return versions


def _daemon_runs(home: Path) -> bool:
    """Whether a daemon of this instance runs. Heartbeats are no proof: they count as fresh long after the daemon has ended."""
    for process in psutil.process_iter(["cmdline"]):
        with suppress(psutil.Error):
            if "dagster._daemon" in (process.info["cmdline"] or ()) and process.environ().get("DAGSTER_HOME") == str(home):
                return True
    return False


@contextmanager
def daemon() -> Iterator[None]:
    """Run Dagster's daemon, which ticks the sensor. If one already runs in this stack, that one is used."""
    home = DagsterSettings().dagster_home
    if _daemon_runs(home):
        yield
        return
    log = home / "daemon.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            ["dagster-daemon", "run", "-w", str(PROJECT / "workspace.yaml")], stdout=output, stderr=output, cwd=PROJECT
        )
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()


def wait(versions: list[FileVersion]) -> list[FileRecord]:
    """Wait until every file is settled, for at most LIMIT_SECONDS, and return the records."""
    until = time.monotonic() + LIMIT_SECONDS
    with Ledger(PostgresSettings()) as ledger:
        while True:
            records = ledger.records(versions)
            settled = [record for record in records.values() if record.status in SETTLED]
            if len(settled) == len(versions) or time.monotonic() > until:
                return [records[v.name, v.generation] for v in versions if (v.name, v.generation) in records]
            time.sleep(0.5)


def wait_for_runs() -> None:
    """Wait until all runs have ended. They end a little after their files are settled."""
    until = time.monotonic() + LIMIT_SECONDS
    with dg.DagsterInstance.get() as instance:
        while instance.get_runs_count(dg.RunsFilter(statuses=list(NOT_ENDED))) and time.monotonic() < until:
            time.sleep(0.2)


def show_files(console: Console, records: list[FileRecord]) -> None:
    """Print a table of the files."""
    table = Table("file", "status", "rows", "answered", "rejected", "seconds", "note")
    for record in records:
        seconds = (record.loaded_at - record.started_at).total_seconds() if record.loaded_at and record.started_at else None
        table.add_row(
            record.version.name,
            str(record.status),
            str(record.rows),
            str(record.answered),
            str(record.rejected + record.no_answer),
            f"{seconds:.1f}" if seconds is not None else "",
            record.error or "",
        )
    console.print(table)


def show_answers(console: Console) -> None:
    """Print a table of some answers."""
    query = """
        SELECT question, answer, score, source_file FROM question_answer
        WHERE source_file = ANY(%s) ORDER BY md5(question) LIMIT %s
    """
    table = Table("question", "answer", "score", "file")
    with connect(PostgresSettings()) as connection:
        for question, answer, score, source in connection.execute(query, (list(SAMPLES), SHOWN_ANSWERS)):
            table.add_row(question, answer, f"{score:.2f}", source)
    console.print(table)


def unaccounted(records: list[FileRecord]) -> list[str]:
    """A line for each problem: a file without a record, a file with the wrong status, rows that are in neither table."""
    lost = [f"{name}: no record of it" for name in sorted(set(SAMPLES) - {r.version.name for r in records})]
    query = """
        SELECT (SELECT count(*) FROM question_answer WHERE source_file = %(name)s),
               (SELECT count(*) FROM question_answer_reject WHERE source_file = %(name)s)
    """
    with connect(PostgresSettings()) as connection:
        for record in records:
            name, rows = record.version.name, rows_of_sample(record.version.name)
            if rows is None:
                if record.status is not FileStatus.REJECTED:
                    lost.append(f"{name}: is not a CSV file, so it should have been rejected, but is {record.status}")
                continue
            answered, rejected = connection.execute(query, {"name": name}).fetchone() or (0, 0)
            if answered + rejected != rows:
                lost.append(f"{name}: has {rows} rows, but {answered} answers and {rejected} rejected rows are in the tables")
            if record.status not in (FileStatus.FINISHED, FileStatus.UNCHANGED):
                lost.append(f"{name}: is {record.status}. {record.error or ''}")
    return lost


def rows_of_sample(name: str) -> int | None:
    """The number of data rows of a sample, counted by Python's CSV reader; None for a file that is not text."""
    try:
        with (PROJECT / "samples" / name).open(newline="", encoding="utf-8-sig") as file:
            return sum(1 for row in csv.reader(file) if row) - 1
    except UnicodeDecodeError:
        return None


def where_to_look(lost: list[str]) -> str:
    """The verdict, and commands for a closer look."""
    first = "Every row is accounted for." if not lost else "Some rows are not accounted for; the Dagster run says why."
    return f"""
{first} Where to look next:
  make dev                                                   the Dagster UI with these runs, at http://127.0.0.1:3000
  .venv/bin/qa-platform local run -- qa-platform status      what happened to each file
  .venv/bin/qa-platform local run -- qa-platform answers lighthouses.csv
  .venv/bin/qa-platform local run -- psql -c 'TABLE question_answer LIMIT 5'
"""


if __name__ == "__main__":
    sys.exit(main())
