"""Pipelines, jobs and datums as stored. Times are seconds since the epoch; durations are seconds."""

import json
import sqlite3
from dataclasses import dataclass, field
from enum import IntEnum

from qa_platform.embedded.pachd import spec as specs
from qa_platform.embedded.pachd.pfs import RepoKey
from qa_platform.embedded.pachd.spec import PipelineSpec
from qa_platform.embedded.pachd.storage.database import Database
from qa_platform.embedded.pachd.storage.trees import DirEntry


class JobState(IntEnum):
    CREATED = 1
    STARTING = 2
    RUNNING = 3
    FAILURE = 4
    SUCCESS = 5
    KILLED = 6
    EGRESSING = 7
    FINISHING = 8
    UNRUNNABLE = 9


TERMINAL = (JobState.FAILURE, JobState.SUCCESS, JobState.KILLED, JobState.UNRUNNABLE)
TERMINAL_SQL = ",".join(str(int(state)) for state in TERMINAL)


# For this long, an unfinished job whose commit was removed is still reported, as killed.
REMOVED_JOB_SECONDS = 2.0
_NOW = "((julianday('now') - 2440587.5) * 86400.0)"

_TABLES = """
CREATE TABLE IF NOT EXISTS pipeline (
    pk INTEGER PRIMARY KEY AUTOINCREMENT, project TEXT NOT NULL, name TEXT NOT NULL, version INTEGER NOT NULL, stopped INTEGER NOT NULL,
    reason TEXT NOT NULL DEFAULT '', created REAL NOT NULL, updated REAL NOT NULL, state INTEGER NOT NULL DEFAULT 1, UNIQUE (project, name)
);
CREATE TABLE IF NOT EXISTS pipeline_version (
    pipeline INTEGER NOT NULL REFERENCES pipeline(pk) ON DELETE CASCADE, version INTEGER NOT NULL, user_json TEXT NOT NULL,
    effective_json TEXT NOT NULL, salt TEXT NOT NULL, spec_commit TEXT NOT NULL, updated REAL NOT NULL,
    filled_json TEXT NOT NULL DEFAULT '', PRIMARY KEY (pipeline, version)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS job (
    pk INTEGER PRIMARY KEY AUTOINCREMENT, pipeline INTEGER NOT NULL REFERENCES pipeline(pk) ON DELETE CASCADE, id TEXT NOT NULL,
    version INTEGER NOT NULL, commit_ INTEGER NOT NULL UNIQUE REFERENCES commit_(pk) ON DELETE CASCADE, state INTEGER NOT NULL,
    reason TEXT NOT NULL DEFAULT '', created REAL NOT NULL, started REAL, finished REAL, total INTEGER NOT NULL DEFAULT 0,
    enumerated INTEGER NOT NULL DEFAULT 0, restarts INTEGER NOT NULL DEFAULT 0, serial INTEGER NOT NULL DEFAULT 0, UNIQUE (pipeline, id)
);
CREATE INDEX IF NOT EXISTS job_by_id ON job (id);
CREATE INDEX IF NOT EXISTS job_by_state ON job (state);
CREATE TABLE IF NOT EXISTS removed_job (
    pk INTEGER PRIMARY KEY, pipeline INTEGER NOT NULL REFERENCES pipeline(pk) ON DELETE CASCADE, id TEXT NOT NULL,
    version INTEGER NOT NULL, commit_ INTEGER NOT NULL, state INTEGER NOT NULL, reason TEXT NOT NULL, created REAL NOT NULL, started REAL,
    finished REAL NOT NULL, total INTEGER NOT NULL, enumerated INTEGER NOT NULL, restarts INTEGER NOT NULL, serial INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS datum (
    job INTEGER NOT NULL REFERENCES job(pk) ON DELETE CASCADE, id TEXT NOT NULL, hash TEXT NOT NULL, position INTEGER NOT NULL,
    state INTEGER NOT NULL, inputs TEXT NOT NULL, output TEXT, seconds REAL NOT NULL DEFAULT 0, downloaded INTEGER NOT NULL DEFAULT 0,
    uploaded INTEGER NOT NULL DEFAULT 0, reason TEXT NOT NULL DEFAULT '', origin TEXT NOT NULL DEFAULT '', entries TEXT,
    download_seconds REAL NOT NULL DEFAULT 0, upload_seconds REAL NOT NULL DEFAULT 0, PRIMARY KEY (job, id)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS cron_tick (
    pipeline INTEGER NOT NULL REFERENCES pipeline(pk) ON DELETE CASCADE, input TEXT NOT NULL, last REAL NOT NULL,
    PRIMARY KEY (pipeline, input)
);
"""
# Keeps an unfinished job before its commit is deleted, and the job with it. Ended jobs are not kept.
_KEEP_REMOVED_JOB = f"""
DROP TRIGGER IF EXISTS commit_of_job_removed;
CREATE TRIGGER commit_of_job_removed BEFORE DELETE ON commit_ BEGIN
    DELETE FROM removed_job WHERE finished < {_NOW} - {REMOVED_JOB_SECONDS};
    INSERT INTO removed_job SELECT pk, pipeline, id, version, 0, 6, 'output commit removed', created, started, {_NOW}, 0, 0, restarts, 0
        FROM job WHERE commit_ = OLD.pk AND state NOT IN ({TERMINAL_SQL});
END;
"""  # noqa: S608
SCHEMA = _TABLES + _KEEP_REMOVED_JOB

# Columns that the tables of an earlier version lack.
_ADDED = (
    ("pipeline", "state", "INTEGER NOT NULL DEFAULT 1"),
    ("pipeline_version", "filled_json", "TEXT NOT NULL DEFAULT ''"),
    ("job", "serial", "INTEGER NOT NULL DEFAULT 0"),
    ("datum", "reason", "TEXT NOT NULL DEFAULT ''"),
    ("datum", "origin", "TEXT NOT NULL DEFAULT ''"),
    ("datum", "entries", "TEXT"),
    ("datum", "download_seconds", "REAL NOT NULL DEFAULT 0"),
    ("datum", "upload_seconds", "REAL NOT NULL DEFAULT 0"),
)


def add_missing_columns(database: Database) -> None:
    """Bring the tables of an earlier version up to date."""
    for table, column, kind in _ADDED:
        if column not in {row["name"] for row in database.rows(f"PRAGMA table_info({table})")}:
            database.execute(f"ALTER TABLE {table} ADD COLUMN {column} {kind}")


class DatumState(IntEnum):
    UNKNOWN = 0
    FAILED = 1
    SUCCESS = 2
    SKIPPED = 3
    STARTING = 4
    RECOVERED = 5


# The states of datums whose output is part of the job's output.
GOOD = (DatumState.SUCCESS, DatumState.SKIPPED)


class PipelineState(IntEnum):
    STARTING = 1
    RUNNING = 2
    RESTARTING = 3
    FAILURE = 4
    PAUSED = 5
    STANDBY = 6
    CRASHING = 7


@dataclass(frozen=True, order=True)
class PipelineKey:
    project: str
    name: str

    def __str__(self) -> str:
        return f"{self.project}/{self.name}"


@dataclass(frozen=True)
class Pipeline:
    """One version of a pipeline.

    ``user_json`` is what the user sent, ``effective_json`` is that merged with the cluster's defaults, and ``filled_json`` is the same as
    protojson with all defaults of the inputs.
    """

    pk: int
    key: PipelineKey
    version: int
    stopped: bool
    state: PipelineState
    reason: str
    created: float
    updated: float
    user_json: str
    effective_json: str
    filled_json: str
    salt: str
    spec_commit: str

    @property
    def spec(self) -> PipelineSpec:
        return specs.parse_text(self.filled_json)


@dataclass(frozen=True)
class DatumInput:
    """One matched item of one input. The ``path`` of a folder ends with a slash.

    ``tag`` is the file's datum tag, empty for a folder. ``committed`` is when its commit finished.
    """

    name: str
    repo: RepoKey
    branch: str
    commit: str
    path: str
    digest: str
    size: int
    empty_files: bool = False
    tag: str = ""
    committed: float | None = None


@dataclass(frozen=True)
class Stats:
    """The cost of a datum, in seconds and bytes."""

    download_seconds: float = 0.0
    process_seconds: float = 0.0
    upload_seconds: float = 0.0
    downloaded: int = 0
    uploaded: int = 0


@dataclass(frozen=True)
class MetaEntries:
    """A datum's two folders in the meta repo: ``/meta/<id>/`` and ``/pfs/<id>/``."""

    meta: DirEntry
    files: DirEntry


@dataclass(frozen=True)
class Datum:
    """A datum of a job. ``position`` is its place in glob order, ``output`` the root of the tree that it wrote.

    ``origin`` is the id of the job that processed it; empty if that is the job that it is listed with.
    """

    id: str
    hash: str
    position: int
    inputs: tuple[DatumInput, ...]
    state: DatumState = DatumState.STARTING
    output: str | None = None
    stats: Stats = Stats()
    reason: str = ""
    origin: str = ""
    entries: MetaEntries | None = None


@dataclass(frozen=True)
class Job:
    """A job. ``counts`` are datums by state; ``restarts`` counts restarts after a datum set that could not be processed.

    ``serial``: the job has taken over from its base job, and no longer lists the base job's datums.
    """

    pk: int
    pipeline: PipelineKey
    id: str
    version: int
    commit: int
    state: JobState
    reason: str
    created: float
    started: float | None
    finished: float | None
    total: int
    enumerated: bool
    restarts: int
    serial: bool
    counts: dict[DatumState, int] = field(default_factory=dict)
    stats: Stats = Stats()

    @property
    def terminal(self) -> bool:
        return self.state in TERMINAL


def pipeline_of(row: sqlite3.Row) -> Pipeline:
    return Pipeline(
        pk=row["pk"], key=PipelineKey(row["project"], row["name"]), version=row["version"],
        stopped=bool(row["stopped"]), state=PipelineState(row["state"]), reason=row["reason"], created=row["created"],
        updated=row["updated"], user_json=row["user_json"], effective_json=row["effective_json"],
        filled_json=row["filled_json"] or row["effective_json"], salt=row["salt"], spec_commit=row["spec_commit"],
    )  # fmt: skip


def inputs_json(inputs: tuple[DatumInput, ...]) -> str:
    return json.dumps(
        [
            [one.name, one.repo.project, one.repo.name, one.repo.type, one.branch, one.commit, one.path, one.digest, one.size,
             one.empty_files, one.tag, one.committed]
            for one in inputs
        ],
        separators=(",", ":"),
    )  # fmt: skip


def entries_json(entries: MetaEntries | None) -> str | None:
    return None if entries is None else json.dumps([[one.size, one.digest, one.node] for one in (entries.meta, entries.files)])


def datum_of(row: sqlite3.Row) -> Datum:
    inputs = tuple(DatumInput(name, RepoKey(project, repo, kind), *rest) for name, project, repo, kind, *rest in json.loads(row["inputs"]))
    entries = MetaEntries(*(DirEntry(*one) for one in json.loads(row["entries"]))) if row["entries"] else None
    return Datum(
        id=row["id"], hash=row["hash"], position=row["position"], inputs=inputs, state=DatumState(row["state"]), output=row["output"],
        stats=Stats(row["download_seconds"], row["seconds"], row["upload_seconds"], row["downloaded"], row["uploaded"]),
        reason=row["reason"], origin=row["origin"], entries=entries,
    )  # fmt: skip
