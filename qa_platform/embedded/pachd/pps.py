"""The rules of pipelines, jobs and datums. Nothing runs here: ``execution`` looks at the jobs and does them."""

import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from qa_platform.embedded.pachd import schedule
from qa_platform.embedded.pachd import spec as specs
from qa_platform.embedded.pachd.errors import AlreadyExists, NotFound, PachError
from qa_platform.embedded.pachd.pfs import Commit, CommitRef, Pfs, RepoKey, new_id
from qa_platform.embedded.pachd.secrets import Secrets
from qa_platform.embedded.pachd.spec import CronInput, PfsInput, PipelineSpec
from qa_platform.embedded.pachd.storage.trees import TreeEditor, TreeError

SCHEMA = """
CREATE TABLE IF NOT EXISTS pipeline (
    pk INTEGER PRIMARY KEY AUTOINCREMENT, project TEXT NOT NULL, name TEXT NOT NULL, version INTEGER NOT NULL, stopped INTEGER NOT NULL,
    reason TEXT NOT NULL DEFAULT '', created REAL NOT NULL, updated REAL NOT NULL, UNIQUE (project, name)
);
CREATE TABLE IF NOT EXISTS pipeline_version (
    pipeline INTEGER NOT NULL REFERENCES pipeline(pk) ON DELETE CASCADE, version INTEGER NOT NULL, user_json TEXT NOT NULL,
    effective_json TEXT NOT NULL, salt TEXT NOT NULL, spec_commit TEXT NOT NULL, updated REAL NOT NULL, PRIMARY KEY (pipeline, version)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS job (
    pk INTEGER PRIMARY KEY AUTOINCREMENT, pipeline INTEGER NOT NULL REFERENCES pipeline(pk) ON DELETE CASCADE, id TEXT NOT NULL,
    version INTEGER NOT NULL, commit_ INTEGER NOT NULL UNIQUE REFERENCES commit_(pk) ON DELETE CASCADE, state INTEGER NOT NULL,
    reason TEXT NOT NULL DEFAULT '', created REAL NOT NULL, started REAL, finished REAL, total INTEGER NOT NULL DEFAULT 0,
    enumerated INTEGER NOT NULL DEFAULT 0, restarts INTEGER NOT NULL DEFAULT 0, UNIQUE (pipeline, id)
);
CREATE INDEX IF NOT EXISTS job_by_id ON job (id);
CREATE INDEX IF NOT EXISTS job_by_state ON job (state);
CREATE TABLE IF NOT EXISTS datum (
    job INTEGER NOT NULL REFERENCES job(pk) ON DELETE CASCADE, id TEXT NOT NULL, hash TEXT NOT NULL, position INTEGER NOT NULL,
    state INTEGER NOT NULL, inputs TEXT NOT NULL, output TEXT, seconds REAL NOT NULL DEFAULT 0, downloaded INTEGER NOT NULL DEFAULT 0,
    uploaded INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (job, id)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS cron_tick (
    pipeline INTEGER NOT NULL REFERENCES pipeline(pk) ON DELETE CASCADE, input TEXT NOT NULL, last REAL NOT NULL,
    PRIMARY KEY (pipeline, input)
);
"""

_SELECT_PIPELINE = (
    "SELECT p.pk, p.project, p.name, p.stopped, p.reason, p.created, p.version AS latest, v.version, v.user_json, "
    "v.effective_json, v.salt, v.spec_commit, v.updated FROM pipeline p JOIN pipeline_version v ON v.pipeline = p.pk"
)
_SELECT_JOB = "SELECT j.*, p.project, p.name FROM job j JOIN pipeline p ON p.pk = j.pipeline"


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
_TERMINAL_SQL = ",".join(str(int(state)) for state in TERMINAL)
_UNFINISHED = f"j.state NOT IN ({_TERMINAL_SQL})"


class DatumState(IntEnum):
    UNKNOWN = 0
    FAILED = 1
    SUCCESS = 2
    SKIPPED = 3
    STARTING = 4
    RECOVERED = 5


class PipelineState(IntEnum):
    RUNNING = 2
    FAILURE = 4
    PAUSED = 5


@dataclass(frozen=True, order=True)
class PipelineKey:
    project: str
    name: str

    def __str__(self) -> str:
        return f"{self.project}/{self.name}"


@dataclass(frozen=True)
class Pipeline:
    """One version of a pipeline; ``latest`` is that pipeline's current version."""

    pk: int
    key: PipelineKey
    version: int
    latest: int
    stopped: bool
    reason: str
    created: float
    updated: float
    user_json: str
    effective_json: str
    salt: str
    spec_commit: str

    @property
    def spec(self) -> PipelineSpec:
        return specs.parse(json.loads(self.effective_json))


@dataclass(frozen=True)
class DatumInput:
    """One matched item of one input; ``path`` ends with a slash for a folder, except in the datum id and the environment."""

    name: str
    repo: RepoKey
    branch: str
    commit: str
    path: str
    digest: str
    size: int
    empty_files: bool = False


@dataclass(frozen=True)
class Datum:
    """``position`` is the place in glob order; ``output`` the root of the tree that it made."""

    id: str
    hash: str
    position: int
    inputs: tuple[DatumInput, ...]
    state: DatumState = DatumState.STARTING
    output: str | None = None
    seconds: float = 0.0
    downloaded: int = 0
    uploaded: int = 0


@dataclass(frozen=True)
class Job:
    """``counts`` are datums by state."""

    pk: int
    pipeline: PipelineKey
    pipeline_pk: int
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
    counts: dict[DatumState, int] = field(default_factory=dict)
    seconds: float = 0.0
    downloaded: int = 0
    uploaded: int = 0

    @property
    def terminal(self) -> bool:
        return self.state in TERMINAL


class Pps:
    """Pipelines and jobs, over the metadata."""

    def __init__(self, pfs: Pfs, secrets: Secrets) -> None:
        self.pfs = pfs
        self.secrets = secrets
        self.store = pfs.store
        self._db = pfs.store.metadata
        pfs.on_propagated = self._create_jobs
        pfs.is_pipeline = lambda repo: self.owner(repo) is not None

    # Pipelines

    def effective(self, spec: dict[str, Any], *, update: bool, reprocess: bool) -> dict[str, Any]:
        """The effective spec, checked against what there is: what ``create`` would store."""
        effective = specs.with_defaults(spec, now=time.time())
        parsed = specs.parse(effective)
        key = PipelineKey(parsed.project, parsed.name)
        self.pfs.project(parsed.project)
        old = self.find(key)
        if old is not None and not update:
            raise AlreadyExists(f'pipeline "{key}" already exists')
        if old is None and self.pfs.repo_exists(parsed.repo):
            raise PachError(f"cannot create pipeline {key}: a repo with the same name already exists")
        effective["salt"] = new_id() if old is None or reprocess else old.salt
        for leaf in parsed.leaves():
            if isinstance(leaf, PfsInput):
                self.pfs.repo_pk(leaf.repo)
                if leaf.repo == parsed.repo:
                    raise PachError(f"pipeline {key} cannot have its own output as an input")
            else:
                schedule.check(leaf.spec)
        self._check_secrets(parsed)
        return effective

    def create(self, spec: dict[str, Any], user_json: str, *, update: bool = False, reprocess: bool = False) -> dict[str, Any]:
        """Makes a pipeline, or a new version of it, and with it a job. Returns the effective spec."""
        with self._db.transaction():
            effective = self.effective(spec, update=update, reprocess=reprocess)
            parsed = specs.parse(effective)
            key = PipelineKey(parsed.project, parsed.name)
            old = self.find(key)
            set_id = new_id()
            for repo_type in ("user", "spec", "meta"):
                repo = RepoKey(key.project, key.name, repo_type)
                self.pfs.create_repo(repo, f"Output repo for pipeline {key}." if repo_type == "user" else "", update=True)
            for cron in parsed.crons:
                self.pfs.create_repo(cron.repo, f"Cron tick repo for pipeline {key}.", update=True)
            for leaf in parsed.leaves():
                self.pfs.ensure_branch(leaf.branch_key, set_id)
            for branch in (parsed.output, parsed.meta):
                self.pfs.ensure_branch(branch, new_id())
            spec_commit = self.pfs.add_finished_commit(parsed.spec_branch, set_id).id
            self._store_version(key, old, user_json, effective, spec_commit)
            if old is not None:
                self._kill_jobs(key, "pipeline has been updated")
            if old is None or not old.stopped:
                self._connect(parsed, set_id)
            return effective

    def _check_secrets(self, spec: PipelineSpec) -> None:
        for use in spec.secrets:
            values = self.secrets.values(use.name)
            if use.env_var and use.key not in values:
                raise PachError(f'missing key "{use.key}" in Kubernetes secret "{use.name}"')

    def _store_version(self, key: PipelineKey, old: Pipeline | None, user_json: str, effective: dict[str, Any], spec_commit: str) -> None:
        now = time.time()
        if old is None:
            pk, version = (
                self._db.execute(
                    "INSERT INTO pipeline (project, name, version, stopped, created, updated) VALUES (?, ?, 1, 0, ?, ?)",
                    key.project,
                    key.name,
                    now,
                    now,
                ),
                1,
            )
        else:
            pk, version = old.pk, old.version + 1
            self._db.execute("UPDATE pipeline SET version = ?, updated = ?, reason = '' WHERE pk = ?", version, now, pk)
        text = json.dumps(effective)
        self._db.execute(
            "INSERT INTO pipeline_version VALUES (?, ?, ?, ?, ?, ?, ?)", pk, version, user_json, text, effective["salt"], spec_commit, now
        )

    def _connect(self, spec: PipelineSpec, set_id: str) -> None:
        upstream = [*(leaf.branch_key for leaf in spec.leaves()), spec.spec_branch]
        for branch in (spec.output, spec.meta):
            self.pfs.set_provenance(branch, upstream)
        self.pfs.propagate(set_id, [spec.output, spec.meta])

    def find(self, key: PipelineKey, version: int = 0) -> Pipeline | None:
        row = self._db.row(
            f"{_SELECT_PIPELINE} WHERE p.project = ? AND p.name = ? AND v.version = CASE WHEN ? = 0 THEN p.version ELSE ? END",
            key.project, key.name, version, version,
        )  # fmt: skip
        return None if row is None else _pipeline(row)

    def pipeline(self, key: PipelineKey, version: int = 0) -> Pipeline:
        found = self.find(key, version)
        if found is None:
            raise NotFound(f'pipeline "{key}" not found')
        return found

    def pipelines(self, *, key: PipelineKey | None = None, history: int = 0, projects: Iterable[str] = ()) -> list[Pipeline]:
        """The current versions, and as many older ones as ``history`` says (-1: all), the newest pipelines first."""
        wanted = set(projects)
        rows = self._db.rows(
            f"{_SELECT_PIPELINE} WHERE ? < 0 OR v.version >= p.version - ? ORDER BY p.pk DESC, v.version DESC",
            history, history,
        )  # fmt: skip
        found = [_pipeline(row) for row in rows]
        return [one for one in found if (key is None or one.key == key) and (not wanted or one.key.project in wanted)]

    def stop_pipeline(self, key: PipelineKey) -> None:
        with self._db.transaction():
            pipeline = self.pipeline(key)
            self._db.execute("UPDATE pipeline SET stopped = 1 WHERE pk = ?", pipeline.pk)
            for branch in (pipeline.spec.output, pipeline.spec.meta):
                self.pfs.set_provenance(branch, ())
            self._kill_jobs(key, "pipeline has been stopped")

    def start_pipeline(self, key: PipelineKey) -> None:
        with self._db.transaction():
            pipeline = self.pipeline(key)
            self._db.execute("UPDATE pipeline SET stopped = 0 WHERE pk = ?", pipeline.pk)
            # No ticks for the time in which the pipeline was stopped.
            for cron in pipeline.spec.crons:
                self._db.execute("INSERT OR REPLACE INTO cron_tick VALUES (?, ?, ?)", pipeline.pk, cron.name, time.time())
            self._connect(pipeline.spec, new_id())

    def rerun(self, key: PipelineKey, *, reprocess: bool) -> None:
        pipeline = self.pipeline(key)
        effective = json.loads(pipeline.effective_json)
        self.create(effective, pipeline.user_json, update=True, reprocess=reprocess)

    def delete_pipeline(self, key: PipelineKey, *, force: bool, keep_repo: bool, must_exist: bool) -> None:
        with self._db.transaction():
            pipeline = self.find(key)
            if pipeline is None:
                if must_exist:
                    raise NotFound(f'pipeline "{key}" not found')
                return
            parsed = pipeline.spec
            downstream = [
                other.key
                for other in self.pipelines()
                if other.key != key and any(leaf.repo == parsed.repo for leaf in other.spec.leaves())
            ]
            if downstream and not force and not keep_repo:
                raise PachError(f"cannot delete pipeline {key}: pipelines {', '.join(map(str, downstream))} depend on it")
            self._kill_jobs(key, "pipeline has been deleted")
            for branch in (parsed.output, parsed.meta):
                self.pfs.set_provenance(branch, ())
            self._db.execute("DELETE FROM pipeline WHERE pk = ?", pipeline.pk)
            self.pfs.delete_repo(parsed.meta.repo, force=True)
            self.pfs.delete_repo(parsed.spec_branch.repo, force=True)
            if not keep_repo:
                self.pfs.delete_repo(parsed.repo, force=True)
                for cron in parsed.crons:
                    self.pfs.delete_repo(cron.repo, force=True)
        self.store.gate.garbage.set()
        self.store.logs.delete_pipeline(key.project, key.name)

    def owner(self, repo: RepoKey) -> PipelineKey | None:
        """The pipeline that a repo belongs to."""
        key = PipelineKey(repo.project, repo.name)
        return key if self.find(key) is not None else None

    # Cron

    def cron_pipelines(self) -> list[Pipeline]:
        """The pipelines that may tick."""
        rows = self._db.rows(f"{_SELECT_PIPELINE} WHERE v.version = p.version AND p.stopped = 0 AND v.effective_json LIKE '%\"cron\"%'")
        return [_pipeline(row) for row in rows]

    def last_tick(self, pipeline: Pipeline, cron: CronInput) -> float:
        """The scheduled time of the last tick, or when the schedule began."""
        last = self._db.value("SELECT last FROM cron_tick WHERE pipeline = ? AND input = ?", pipeline.pk, cron.name)
        return max(float(last or 0), cron.start)

    def run_cron(self, key: PipelineKey) -> None:
        """A tick now of all the pipeline's cron inputs, beside their schedules."""
        pipeline = self.pipeline(key)
        crons = pipeline.spec.crons
        if not crons:
            raise PachError(f"pipeline {key} doesn't have a cron input")
        for cron in crons:
            self.tick(pipeline, cron, None, schedule.file_name(time.time()))

    def tick(self, pipeline: Pipeline, cron: CronInput, when: float | None, file_name: str) -> None:
        """Writes the file of a tick into the cron repo, which starts a job. ``when`` is its place in the schedule, if it has one."""
        writer = self.store.filesets.writer()
        if cron.overwrite:
            writer.delete("/", "default")
        writer.add(f"/{file_name}", "default", b"")
        with self.store.gate.writing(), self._db.transaction():
            fileset = writer.close(None)
            self.pfs.add_fileset(CommitRef(cron.repo, branch="master"), fileset, owned=True)
            if when is not None:
                self._db.execute("INSERT OR REPLACE INTO cron_tick VALUES (?, ?, ?)", pipeline.pk, cron.name, when)

    # Jobs

    def _create_jobs(self, commits: list[Commit]) -> None:
        for commit in commits:
            pipeline = self.find(PipelineKey(commit.repo.project, commit.repo.name))
            if pipeline is not None and commit.repo.type == "user" and commit.branch == pipeline.spec.output_branch:
                self._db.execute(
                    "INSERT INTO job (pipeline, id, version, commit_, state, created) VALUES (?, ?, ?, ?, ?, ?)",
                    pipeline.pk, commit.id, pipeline.version, commit.pk, int(JobState.CREATED), time.time(),
                )  # fmt: skip

    def job(self, key: PipelineKey, job_id: str) -> Job:
        row = self._db.row(f"{_SELECT_JOB} WHERE p.project = ? AND p.name = ? AND j.id = ?", key.project, key.name, job_id)
        if row is None:
            raise NotFound(f"jobs {key}@{job_id} not found")
        return self._job(row)

    def job_by_pk(self, pk: int) -> Job:
        row = self._db.row(f"{_SELECT_JOB} WHERE j.pk = ?", pk)
        if row is None:
            raise NotFound(f"jobs {pk} not found")
        return self._job(row)

    def job_by_commit(self, commit: int) -> Job | None:
        row = self._db.row(f"{_SELECT_JOB} WHERE j.commit_ = ?", commit)
        return None if row is None else self._job(row)

    def jobs(self, *, key: PipelineKey | None = None, history: int = 0, projects: Iterable[str] = ()) -> Iterator[Job]:
        """Newest first."""
        wanted = set(projects)
        rows = self._db.rows(
            f"{_SELECT_JOB} WHERE (? IS NULL OR (p.project = ? AND p.name = ?)) AND (? < 0 OR j.version >= p.version - ?) "
            "ORDER BY j.pk DESC",
            key and key.name, key and key.project, key and key.name, history, history,
        )  # fmt: skip
        return (self._job(row) for row in rows if not wanted or row["project"] in wanted)

    def job_set(self, set_id: str) -> list[Job]:
        return [self._job(row) for row in self._db.rows(f"{_SELECT_JOB} WHERE j.id = ? ORDER BY j.pk", set_id)]

    def job_sets(self, projects: Iterable[str] = ()) -> list[list[Job]]:
        """Newest first."""
        wanted = set(projects)
        groups: dict[str, list[Job]] = {}
        for row in self._db.rows(f"{_SELECT_JOB} ORDER BY j.pk DESC"):
            if not wanted or row["project"] in wanted:
                groups.setdefault(row["id"], []).insert(0, self._job(row))
        return list(groups.values())

    def wait_job(self, job: Job, *, alive: Callable[[], bool]) -> Job:
        """The job once it is in a terminal state."""
        self._db.wait_until(lambda: self._state(job.pk) in TERMINAL, alive=alive)
        return self.job_by_pk(job.pk)

    def subscribe(self, key: PipelineKey, *, alive: Callable[[], bool]) -> Iterator[Job]:
        """Unfinished jobs, oldest first, then new ones as they are made."""
        self.pipeline(key)
        last = 0

        def look() -> sqlite3.Row | None:
            return self._db.row(
                f"{_SELECT_JOB} WHERE p.project = ? AND p.name = ? AND j.pk > ? AND j.state NOT IN ({_TERMINAL_SQL}) ORDER BY j.pk LIMIT 1",
                key.project, key.name, last,
            )  # fmt: skip

        while (row := self._db.wait_until(look, alive=alive)) is not None:
            last = row["pk"]
            yield self._job(row)

    def stop_job(self, key: PipelineKey, job_id: str, reason: str) -> None:
        """Kills a job that is not over yet."""
        with self._db.transaction():
            job = self.job(key, job_id)
            if not job.terminal:
                self.end_job(job.pk, JobState.KILLED, None, reason or "job stopped")

    def delete_job(self, key: PipelineKey, job_id: str) -> None:
        with self._db.transaction():
            self.stop_job(key, job_id, "job deleted")
            self._db.execute("DELETE FROM job WHERE pk = ?", self.job(key, job_id).pk)
        self.store.gate.garbage.set()

    def _kill_jobs(self, key: PipelineKey, reason: str) -> None:
        for job in self.jobs(key=key, history=-1):
            if not job.terminal:
                self.end_job(job.pk, JobState.KILLED, None, reason)

    def set_state(self, pk: int, state: JobState) -> None:
        """Moves a job on, unless it is over."""
        with self._db.transaction():
            started = time.time() if state == JobState.STARTING else None
            self._db.execute(
                f"UPDATE job SET state = ?, started = coalesce(started, ?) WHERE pk = ? AND state NOT IN ({_TERMINAL_SQL})",  # noqa: S608
                int(state),
                started,
                pk,
            )

    def end_job(self, pk: int, state: JobState, root: str | None, reason: str) -> None:
        """Ends a job and finishes its commits, both or neither. A job that is over stays as it is."""
        with self._db.transaction():
            job = self.job_by_pk(pk)
            if job.terminal:
                return
            error = "" if state == JobState.SUCCESS else reason or state.name
            commit = self.pfs.commit_by_pk(job.commit)
            meta = self._db.value(
                "SELECT c.pk FROM commit_ c JOIN repo r ON r.pk = c.repo "
                "WHERE c.id = ? AND r.project = ? AND r.name = ? AND r.type = 'meta'",
                job.id, commit.repo.project, commit.repo.name,
            )  # fmt: skip
            now = time.time()
            self._db.execute(
                "UPDATE job SET state = ?, reason = ?, finished = ?, started = coalesce(started, ?) WHERE pk = ?",
                int(state),
                reason,
                now,
                now,
                pk,
            )
            self.pfs.complete(commit.pk, root, error)
            if meta is not None:
                self.pfs.complete(meta, None, error)

    def unfinished_jobs(self) -> list[int]:
        return [row["pk"] for row in self._db.rows(f"SELECT pk FROM job WHERE state NOT IN ({_TERMINAL_SQL}) ORDER BY pk")]  # noqa: S608

    def _state(self, pk: int) -> JobState:
        state = self._db.value("SELECT state FROM job WHERE pk = ?", pk)
        if state is None:
            raise NotFound("the job was deleted")
        return JobState(state)

    def base_job(self, commit: int) -> Job | None:
        """The nearest ancestor job that has succeeded or may still succeed."""
        parent = self.pfs.commit_by_pk(commit).parent
        while parent is not None:
            job = self.job_by_commit(parent)
            if job is not None and (job.state == JobState.SUCCESS or not job.terminal):
                return job
            parent = self.pfs.commit_by_pk(parent).parent
        return None

    # Datums

    def record_datums(self, job: int, datums: Iterable[Datum]) -> None:
        """The datums of a job, once they are known. Those that are there already keep their state."""
        rows = [
            (job, datum.id, datum.hash, datum.position, int(DatumState.STARTING), json.dumps([_input_json(one) for one in datum.inputs]))
            for datum in datums
        ]
        with self._db.transaction():
            self._db.execute_many("INSERT OR IGNORE INTO datum (job, id, hash, position, state, inputs) VALUES (?, ?, ?, ?, ?, ?)", rows)
            self._db.execute("UPDATE job SET total = ?, enumerated = 1 WHERE pk = ?", len(rows), job)

    def datums(self, job: int) -> list[Datum]:
        """Sorted by id."""
        return [_datum(row) for row in self._db.rows("SELECT * FROM datum WHERE job = ? ORDER BY id", job)]

    def datum(self, job: Job, datum_id: str) -> Datum:
        row = self._db.row("SELECT * FROM datum WHERE job = ? AND id = ?", job.pk, datum_id)
        if row is None:
            raise PachError(f"datum {datum_id} not found in job {job.pipeline}@{job.id}")
        return _datum(row)

    def end_datum(
        self,
        job: int,
        datum_id: str,
        state: DatumState,
        *,
        output: str | None = None,
        seconds: float = 0.0,
        downloaded: int = 0,
        uploaded: int = 0,
    ) -> None:
        self._db.execute(
            "UPDATE datum SET state = ?, output = ?, seconds = ?, downloaded = ?, uploaded = ? WHERE job = ? AND id = ?",
            int(state), output, seconds, downloaded, uploaded, job, datum_id,
        )  # fmt: skip

    def skip_datums(self, job: int, outputs: Iterable[tuple[str, str | None]]) -> None:
        """Datums whose output is inherited: (id, root of the output)."""
        self._db.execute_many(
            "UPDATE datum SET state = ?, output = ? WHERE job = ? AND id = ?",
            [(int(DatumState.SKIPPED), output, job, datum_id) for datum_id, output in outputs],
        )

    def merged_output(self, job: int) -> str | None:
        """The tree of everything that the job's good datums made.

        Raises:
            TreeError: two of them made the same path.
        """
        editor = TreeEditor(self.store.trees, None)
        for datum in self.datums(job):
            if datum.output is not None and datum.state in (DatumState.SUCCESS, DatumState.SKIPPED):
                try:
                    editor.merge(datum.output)
                except TreeError as error:
                    raise TreeError(f"duplicate path output by different datums: {error} (datum {datum.id})") from error
        written = editor.write()
        return written.node if written else None

    def roots(self) -> list[str]:
        """The trees that jobs' datums have made."""
        return [row["output"] for row in self._db.rows("SELECT DISTINCT output FROM datum WHERE output IS NOT NULL")]

    def wait_enumerated(self, job: int, *, alive: Callable[[], bool]) -> None:
        """Returns when the job's datums are known or the job is over or gone."""
        self._db.wait_until(
            lambda: not self._db.row(f"{_SELECT_JOB} WHERE j.pk = ? AND j.enumerated = 0 AND {_UNFINISHED}", job),
            alive=alive,
        )

    def wait_over(self, job: int, *, alive: Callable[[], bool]) -> None:
        """Returns when the job is over or gone."""
        self._db.wait_until(lambda: not self._db.row(f"{_SELECT_JOB} WHERE j.pk = ? AND {_UNFINISHED}", job), alive=alive)

    def _job(self, row: sqlite3.Row) -> Job:
        counts: dict[DatumState, int] = {}
        seconds, downloaded, uploaded = 0.0, 0, 0
        for group in self._db.rows(
            "SELECT state, count(*) AS number, sum(seconds) AS seconds, sum(downloaded) AS downloaded, sum(uploaded) AS uploaded "
            "FROM datum WHERE job = ? GROUP BY state",
            row["pk"],
        ):
            counts[DatumState(group["state"])] = group["number"]
            seconds, downloaded, uploaded = seconds + group["seconds"], downloaded + group["downloaded"], uploaded + group["uploaded"]
        return Job(
            pk=row["pk"], pipeline=PipelineKey(row["project"], row["name"]), pipeline_pk=row["pipeline"], id=row["id"],
            version=row["version"], commit=row["commit_"], state=JobState(row["state"]), reason=row["reason"],
            created=row["created"], started=row["started"], finished=row["finished"], total=row["total"],
            enumerated=bool(row["enumerated"]), restarts=row["restarts"], counts=counts,
            seconds=seconds, downloaded=downloaded, uploaded=uploaded,
        )  # fmt: skip


def _pipeline(row: sqlite3.Row) -> Pipeline:
    return Pipeline(
        pk=row["pk"], key=PipelineKey(row["project"], row["name"]), version=row["version"], latest=row["latest"],
        stopped=bool(row["stopped"]), reason=row["reason"], created=row["created"], updated=row["updated"], user_json=row["user_json"],
        effective_json=row["effective_json"], salt=row["salt"], spec_commit=row["spec_commit"],
    )  # fmt: skip


def _input_json(one: DatumInput) -> list[object]:
    return [
        one.name,
        one.repo.project,
        one.repo.name,
        one.repo.type,
        one.branch,
        one.commit,
        one.path,
        one.digest,
        one.size,
        one.empty_files,
    ]


def _datum(row: sqlite3.Row) -> Datum:
    inputs = tuple(
        DatumInput(name, RepoKey(project, repo, kind), branch, commit, path, digest, size, empty)
        for name, project, repo, kind, branch, commit, path, digest, size, empty in json.loads(row["inputs"])
    )
    return Datum(
        id=row["id"], hash=row["hash"], position=row["position"], inputs=inputs, state=DatumState(row["state"]), output=row["output"],
        seconds=row["seconds"], downloaded=row["downloaded"], uploaded=row["uploaded"],
    )  # fmt: skip
