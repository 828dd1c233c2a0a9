"""Rows per second into PostgreSQL: the loader, a bare COPY, row inserts in one transaction, and an INSERT and commit per row.

``python -m qa_platform.tools.bench.loading`` starts its own PostgreSQL and prints one line per way. Then it prints the speed and the peak
memory of the loader for a million rows. It exits with 1 if a goal is missed.
"""

import argparse
import csv
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg

from qa_platform.clients.postgres import connect
from qa_platform.contract import (
    ANSWER_COLUMNS,
    MANIFEST,
    SHARD_ANSWERS,
    SHARD_INFO,
    Manifest,
    ModelChoice,
    ShardEntry,
    ShardInfo,
    shard_name,
)
from qa_platform.embedded import postgres_access
from qa_platform.embedded.supervise import ServerSpec, running
from qa_platform.loading import migrate
from qa_platform.loading.load import load_file
from qa_platform.settings import PostgresSettings
from qa_platform.tools.bench.ingest import peak_mib

SHARD_ROWS = 2_000
LARGE_ROWS, BOUND_MIB = 1_000_000, 600.0
MODEL = ModelChoice("bench-model", "0123456789abcdef", "fp32")
ANSWERED_AT = "2026-01-01T00:00:00"
_WORDS = ("river", "treaty", "Ångström", "1848", "engine", "the", "of", "and", "a", "parliament", "quartz", "wrote", "between", "north")
_BARE_COLUMNS = """
    question varchar(10000), answer varchar(10000), context varchar(500000), model varchar(1000), qa_timestamp timestamp,
    score double precision, answer_start integer, answer_end integer, model_revision text, model_precision text,
    source_file text, generation bigint, row_number bigint, load_id integer, run_id text, flag text, loaded_at timestamptz
"""
_LEGACY_INSERT = "INSERT INTO bare_legacy (question, answer, context, model, qa_timestamp) VALUES (%s, %s, %s, %s, %s)"
_LEGACY_TABLE = (
    "CREATE TABLE bare_legacy (question varchar(10000), answer varchar(10000), context varchar(500000), "
    "model varchar(1000), qa_timestamp timestamp)"
)


@dataclass(frozen=True)
class Row:
    question: str
    context: str
    answer: str
    start: int


@dataclass(frozen=True)
class Way:
    """One way of loading.

    Attributes:
        load: loads the rows of a round, given its number, and returns the number of rows.
        goal: the minimum ratio of the loader's speed to that of this way; None for no goal.
    """

    name: str
    load: Callable[[int], int]
    goal: float | None


def make_rows(count: int, seed: int) -> list[Row]:
    """Rows of about 500 characters, like paragraphs of an encyclopaedia."""
    choose = random.Random(seed)
    rows = []
    for number in range(count):
        words = choose.choices(_WORDS, k=75)
        context, at = " ".join(words), choose.randrange(70)
        answer = " ".join(words[at : at + 2])
        rows.append(Row(f"What is said in paragraph {number}?", context, answer, len(" ".join(words[:at])) + (at > 0)))
    return rows


def write_answered(folder: Path, rows: list[Row], *, generation: int) -> Path:
    """Write rows in the layout of the answering pipeline's output."""
    shards = [rows[start : start + SHARD_ROWS] for start in range(0, len(rows), SHARD_ROWS)]
    return _write_shards(folder, shards, name=f"bench-{generation}.csv", generation=generation)


def write_repeated(folder: Path, rows: int, *, generation: int) -> Path:
    """As `write_answered`, for any number of rows: all shards have the same rows."""
    return _write_shards(folder, [make_rows(SHARD_ROWS, seed=1)] * (rows // SHARD_ROWS), name="repeated.csv", generation=generation)


def _write_shards(folder: Path, shards: list[list[Row]], *, name: str, generation: int) -> Path:
    entries: list[ShardEntry] = []
    first_row = 1
    for index, part in enumerate(shards):
        shard = folder / shard_name(index)
        shard.mkdir(parents=True)
        if index and part is shards[0]:
            (shard / SHARD_ANSWERS).hardlink_to(folder / shard_name(0) / SHARD_ANSWERS)
        else:
            _write_answers(shard / SHARD_ANSWERS, part)
        digest = hashlib.sha256(shard.name.encode()).hexdigest()
        info = ShardInfo(
            first_row=first_row,
            rows=len(part),
            sha256=digest,
            model=MODEL,
            answered_by=MODEL,
            answered=len(part),
            answered_at=ANSWERED_AT,
        )
        (shard / SHARD_INFO).write_text(info.to_json())
        entries.append(ShardEntry(shard.name, first_row, len(part), 0, digest))
        first_row += len(part)
    manifest = Manifest(
        name=name,
        generation=generation,
        size=0,
        crc32c="",
        load_id=1,
        model=MODEL,
        columns=("question", "context"),
        rows=first_row - 1,
        rejected=0,
        shards=tuple(entries),
    )
    (folder / MANIFEST).write_text(manifest.to_json())
    return folder


def _write_answers(path: Path, rows: list[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\r\n")
        writer.writerow(["question", "context", *ANSWER_COLUMNS])
        for row in rows:
            writer.writerow([row.question, row.context, row.answer, "0.5", row.start, row.start + len(row.answer), MODEL.id, ""])


def prepared_copy(rows: list[Row]) -> list[bytes]:
    """All columns of the rows in COPY's text format, in blocks ready to be sent."""
    lines = []
    for number, row in enumerate(rows, 1):
        span = (str(row.start), str(row.start + len(row.answer)))
        answered = (row.question, row.answer, row.context, MODEL.id, ANSWERED_AT, "0.5", *span, MODEL.revision, MODEL.precision)
        lines.append("\t".join((*answered, "bench.csv", "1", str(number), "1", "", r"\N", ANSWERED_AT)) + "\n")
    return ["".join(lines[start : start + 500]).encode() for start in range(0, len(lines), 500)]


def measure(settings: PostgresSettings, rows: list[Row], *, rounds: int, scratch: Path) -> Iterator[tuple[Way, float, float]]:
    """Measure all ways in turn, ``rounds`` times. Yields each with its median rows per second, and the loader's median ratio to it."""
    blocks, few = prepared_copy(rows), rows[: max(1, len(rows) // 10)]
    folders = [write_answered(scratch / str(n), rows, generation=n) for n in range(1, rounds + 1)]
    with connect(settings) as connection:
        connection.execute(f"CREATE TABLE bare ({_BARE_COLUMNS})")
        connection.execute(_LEGACY_TABLE)
        # PostgreSQL's default.
        connection.execute("SET synchronous_commit = on")

        def loader(turn: int) -> int:
            return load_file(connection, folders[turn]).inserted

        def replay(turn: int) -> int:
            load_file(connection, folders[turn])
            return len(rows)

        def bare_copy(_: int) -> int:
            with connection.transaction(), connection.cursor().copy("COPY bare FROM STDIN") as copy:
                for block in blocks:
                    copy.write(block)
            return len(rows)

        def one_transaction(_: int) -> int:
            with connection.transaction():
                _insert(connection, few)
            return len(few)

        def commit_each(_: int) -> int:
            _insert(connection, few)
            return len(few)

        ways = (
            Way("loader", loader, None),
            Way("bare COPY, prepared text", bare_copy, 0.4),
            Way("INSERT per row, one transaction", one_transaction, 3.0),
            Way("INSERT and commit per row", commit_each, 5.0),
            Way("loader, replay", replay, None),
        )
        speeds: dict[str, list[float]] = {way.name: [] for way in ways}
        for turn in range(rounds):
            for way in ways:
                connection.execute("TRUNCATE bare, bare_legacy")
                connection.execute("CHECKPOINT")
                started = time.perf_counter()
                count = way.load(turn)
                speeds[way.name].append(count / (time.perf_counter() - started))
        for way in ways:
            ratios = [ours / theirs for ours, theirs in zip(speeds["loader"], speeds[way.name], strict=True)]
            yield way, statistics.median(speeds[way.name]), statistics.median(ratios)


def load_in_fresh_process(settings: PostgresSettings, folder: Path) -> tuple[int, float, float]:
    """Load a folder in a fresh process: the number of rows written, the seconds, and the peak memory in MiB."""
    variables = {"PG_HOST": settings.host, "PG_PORT": str(settings.port), "PG_USER": settings.user, "PG_DBNAME": settings.dbname}
    command = [sys.executable, "-m", "qa_platform.tools.bench.loading", "--load", str(folder)]
    written, seconds, peak = json.loads(subprocess.run(command, env={**os.environ, **variables}, check=True, capture_output=True).stdout)
    return written, seconds, peak


def _load(folder: Path) -> None:
    """One load in this process, as JSON on standard output."""
    with connect(PostgresSettings()) as connection:
        result = load_file(connection, folder)
    print(json.dumps([result.inserted + result.updated, result.seconds, peak_mib()]))


def _insert(connection: psycopg.Connection, rows: list[Row]) -> None:
    with connection.cursor() as cursor:
        for row in rows:
            cursor.execute(_LEGACY_INSERT, (row.question, row.answer, row.context, MODEL.id, ANSWERED_AT))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        _load(options.load)
        return 0
    missed = 0
    spec = ServerSpec("postgres", "qa_platform.embedded.postgres")
    with tempfile.TemporaryDirectory(prefix="qa-bench-") as scratch, running([spec], Path(scratch) / "postgres") as addresses:
        settings = PostgresSettings(
            host=addresses["postgres"], port=postgres_access.PORT, user=postgres_access.USER, dbname=postgres_access.ANSWERS_DATABASE
        )
        migrate.upgrade(settings)
        print(f"{options.rows} rows of about 500 characters, median of {options.rounds} rounds, {os.cpu_count()} cores")
        rows = make_rows(options.rows, options.seed)
        for way, speed, ratio in measure(settings, rows, rounds=options.rounds, scratch=Path(scratch) / "files"):
            verdict = "" if way.goal is None else f"  goal {way.goal}: {'met' if ratio >= way.goal else 'MISSED'}"
            missed += way.goal is not None and ratio < way.goal
            print(f"{way.name:34} {speed:10,.0f} rows/s   loader / this = {ratio:5.2f}{verdict}")
        large = write_repeated(Path(scratch) / "large", LARGE_ROWS, generation=options.rounds + 1)
        written, seconds, peak = load_in_fresh_process(settings, large)
        assert written == LARGE_ROWS
        missed += peak >= BOUND_MIB
        verdict = f"bound {BOUND_MIB:.0f} MiB: {'met' if peak < BOUND_MIB else 'MISSED'}"
        print(f"loader, {written:,} rows: {written / seconds:,.0f} rows/s, peak {peak:.0f} MiB; {verdict}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
