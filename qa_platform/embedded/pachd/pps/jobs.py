"""The rules of jobs: finding them, waiting for them, ending them."""

import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator

from qa_platform.embedded.pachd.errors import NotFound
from qa_platform.embedded.pachd.pfs import Pfs
from qa_platform.embedded.pachd.pps.records import (
    REMOVED_JOB_SECONDS,
    TERMINAL,
    TERMINAL_SQL,
    DatumState,
    Job,
    JobState,
    PipelineKey,
    Stats,
)

_SELECT_JOB = "SELECT j.*, p.project, p.name FROM {table} j JOIN pipeline p ON p.pk = j.pipeline"
_UNFINISHED = f"j.state NOT IN ({TERMINAL_SQL})"


class Jobs:
    """The jobs in the metadata. An unfinished job whose output commit was removed can still be found for a while, as killed."""

    def __init__(self, pfs: Pfs) -> None:
        self._pfs = pfs
        self._db = pfs.store.metadata

    def job(self, key: PipelineKey, job_id: str) -> Job:
        """A job by its id. Raises NotFound if there is none."""
        rows = self._rows("p.project = ? AND p.name = ? AND j.id = ?", key.project, key.name, job_id)
        if not rows:
            raise NotFound(f"jobs {key}@{job_id} not found")
        return self._job(rows[-1])

    def by_pk(self, pk: int) -> Job:
        """A job by its primary key. Raises NotFound if there is none."""
        rows = self._rows("j.pk = ?", pk)
        if not rows:
            raise NotFound("the job was deleted")
        return self._job(rows[-1])

    def by_commit(self, commit: int) -> Job | None:
        row = self._db.row(f"{_SELECT_JOB} WHERE j.commit_ = ?".format(table="job"), commit)
        return None if row is None else self._job(row)

    def jobs(self, *, key: PipelineKey | None = None, history: int = 0, projects: Iterable[str] = ()) -> Iterator[Job]:
        """Jobs, the newest first: of the pipelines' current versions, and of ``history`` older versions (-1: all)."""
        wanted = set(projects)
        rows = self._rows(
            "(? IS NULL OR (p.project = ? AND p.name = ?)) AND (? < 0 OR j.version >= p.version - ?)",
            key and key.name, key and key.project, key and key.name, history, history,
        )  # fmt: skip
        return (self._job(row) for row in reversed(rows) if not wanted or row["project"] in wanted)

    def last_state(self, pipeline: int) -> JobState | None:
        """The state of a pipeline's newest job."""
        state = self._db.value("SELECT state FROM job WHERE pipeline = ? ORDER BY pk DESC LIMIT 1", pipeline)
        return None if state is None else JobState(state)

    def job_set(self, set_id: str) -> list[Job]:
        return [self._job(row) for row in self._rows("j.id = ?", set_id)]

    def job_sets(self, projects: Iterable[str] = ()) -> list[list[Job]]:
        """The sets of jobs with the same id, the newest first."""
        wanted = set(projects)
        groups: dict[str, list[Job]] = {}
        for row in reversed(self._rows("1")):
            if not wanted or row["project"] in wanted:
                groups.setdefault(row["id"], []).insert(0, self._job(row))
        return list(groups.values())

    def wait(self, job: Job, *, alive: Callable[[], bool]) -> Job:
        """Wait until a job is in a terminal state, and return it."""
        self._db.wait_until(lambda: self.state(job.pk) in TERMINAL, alive=alive)
        return self.by_pk(job.pk)

    def subscribe(self, key: PipelineKey, *, alive: Callable[[], bool]) -> Iterator[Job]:
        """The unfinished jobs, the oldest first, then new ones as they are created."""
        last = 0

        def look() -> sqlite3.Row | None:
            where = f"p.project = ? AND p.name = ? AND j.pk > ? AND {_UNFINISHED} ORDER BY j.pk LIMIT 1"
            return self._db.row(
                f"{_SELECT_JOB} WHERE {where}".format(table="job"), key.project, key.name, last,
            )  # fmt: skip

        while (row := self._db.wait_until(look, alive=alive)) is not None:
            last = row["pk"]
            yield self._job(row)

    def stop(self, key: PipelineKey, job_id: str, reason: str) -> None:
        """Kill a job, unless it has ended."""
        with self._db.transaction():
            job = self.job(key, job_id)
            if not job.terminal:
                self.end(job.pk, JobState.KILLED, reason or "job stopped")

    def delete(self, key: PipelineKey, job_id: str) -> None:
        with self._db.transaction():
            self.stop(key, job_id, "job deleted")
            self._db.execute("DELETE FROM job WHERE pk = ?", self.job(key, job_id).pk)
        self._pfs.store.gate.garbage.set()

    def kill_all(self, pipeline: int, reason: str) -> None:
        for pk in self._unfinished("pipeline = ?", pipeline):
            self.end(pk, JobState.KILLED, reason)

    def set_state(self, pk: int, state: JobState) -> None:
        """Set the state of a job, unless it has ended."""
        started = time.time() if state == JobState.STARTING else None
        self._db.execute(
            f"UPDATE job SET state = ?, started = coalesce(started, ?) WHERE pk = ? AND state NOT IN ({TERMINAL_SQL})",  # noqa: S608
            int(state),
            started,
            pk,
        )

    def restart(self, pk: int) -> None:
        """Restart a job, and count it. Processed datums are kept, but not shown until the datums are enumerated again."""
        self._db.execute("UPDATE job SET restarts = restarts + 1, total = 0, enumerated = 0 WHERE pk = ?", pk)

    def end(self, pk: int, state: JobState, reason: str, *, output: str | None = None, meta: str | None = None) -> None:
        """End a job and finish its commits with these trees, atomically. A job that has already ended does not change."""
        with self._db.transaction():
            row = self._db.row("SELECT state, commit_ FROM job WHERE pk = ?", pk)
            if row is None:
                raise NotFound("the job was deleted")
            if JobState(row["state"]) in TERMINAL:
                return
            now = time.time()
            self._db.execute(
                "UPDATE job SET state = ?, reason = ?, finished = ?, started = coalesce(started, ?) WHERE pk = ?",
                int(state), reason, now, now, pk,
            )  # fmt: skip
            error = "" if state == JobState.SUCCESS else reason or state.name
            self._pfs.complete(row["commit_"], output, error)
            if (meta_commit := self._meta_commit(row["commit_"])) is not None:
                self._pfs.complete(meta_commit, meta, error)

    def _meta_commit(self, output: int) -> int | None:
        pk = self._db.value(
            "SELECT m.pk FROM commit_ c JOIN repo r ON r.pk = c.repo JOIN repo mr ON mr.project = r.project AND mr.name = r.name "
            "JOIN commit_ m ON m.repo = mr.pk AND m.id = c.id WHERE c.pk = ? AND mr.type = 'meta'",
            output,
        )
        return None if pk is None else int(pk)

    def unfinished(self) -> list[tuple[int, int, int]]:
        """The unfinished jobs as (job's primary key, pipeline's primary key, pipeline's version), the oldest first."""
        rows = self._db.rows(f"SELECT pk, pipeline, version FROM job WHERE state NOT IN ({TERMINAL_SQL}) ORDER BY pk")  # noqa: S608
        return [(row["pk"], row["pipeline"], row["version"]) for row in rows]

    def _unfinished(self, where: str, *values: object) -> list[int]:
        rows = self._db.rows(f"SELECT pk FROM job WHERE {where} AND state NOT IN ({TERMINAL_SQL})", *values)  # noqa: S608
        return [row["pk"] for row in rows]

    def state(self, pk: int) -> JobState:
        """The state of a job. Raises NotFound if the job is gone."""
        state = self._db.value("SELECT state FROM job WHERE pk = ?", pk)
        if state is None:
            state = self._db.value("SELECT state FROM removed_job WHERE pk = ?", pk)
        if state is None:
            raise NotFound("the job was deleted")
        return JobState(state)

    def base(self, commit: int) -> Job | None:
        """The base job of an output commit: the nearest ancestor's job that has succeeded or may still succeed."""
        parent = self._pfs.commit_by_pk(commit).parent
        while parent is not None:
            job = self.by_commit(parent)
            if job is not None and (job.state == JobState.SUCCESS or not job.terminal):
                return job
            parent = self._pfs.commit_by_pk(parent).parent
        return None

    def wait_enumerated(self, pk: int, *, alive: Callable[[], bool]) -> None:
        """Wait until a job's datums are known, or the job has ended or is gone."""
        self._db.wait_until(
            lambda: not self._is_unfinished(pk) or self._db.value("SELECT enumerated FROM job WHERE pk = ?", pk), alive=alive
        )

    def wait_over(self, pk: int, *, alive: Callable[[], bool]) -> None:
        """Wait until a job has ended or is gone."""
        self._db.wait_until(lambda: not self._is_unfinished(pk), alive=alive)

    def _is_unfinished(self, pk: int) -> bool:
        return bool(self._unfinished("pk = ?", pk))

    def _rows(self, where: str, *values: object) -> list[sqlite3.Row]:
        """The rows of jobs, the oldest first, including recently removed ones."""
        found = self._db.rows(f"{_SELECT_JOB} WHERE {where} ORDER BY j.pk".format(table="job"), *values)
        since = time.time() - REMOVED_JOB_SECONDS
        removed = self._db.rows(f"{_SELECT_JOB} WHERE ({where}) AND j.finished > ?".format(table="removed_job"), *values, since)
        return sorted(found + removed, key=lambda row: int(row["pk"])) if removed else found

    def _job(self, row: sqlite3.Row) -> Job:
        counts, stats = self._totals(row["pk"]) if row["enumerated"] else ({}, Stats())
        return Job(
            pk=row["pk"], pipeline=PipelineKey(row["project"], row["name"]), id=row["id"],
            version=row["version"], commit=row["commit_"], state=JobState(row["state"]), reason=row["reason"],
            created=row["created"], started=row["started"], finished=row["finished"], total=row["total"],
            enumerated=bool(row["enumerated"]), restarts=row["restarts"], serial=bool(row["serial"]), counts=counts, stats=stats,
        )  # fmt: skip

    def _totals(self, pk: int) -> tuple[dict[DatumState, int], Stats]:
        """The number of datums by state, and the total cost of the datums that were not skipped."""
        counts: dict[DatumState, int] = {}
        stats = Stats()
        for row in self._db.rows(_TOTALS, pk):
            state = DatumState(row["state"])
            counts[state] = row["number"]
            if state != DatumState.SKIPPED:
                stats = Stats(
                    stats.download_seconds + row["download_seconds"],
                    stats.process_seconds + row["seconds"],
                    stats.upload_seconds + row["upload_seconds"],
                    stats.downloaded + row["downloaded"],
                    stats.uploaded + row["uploaded"],
                )
        return counts, stats


_TOTALS = (
    "SELECT state, count(*) AS number, sum(seconds) AS seconds, sum(download_seconds) AS download_seconds, "
    "sum(upload_seconds) AS upload_seconds, sum(downloaded) AS downloaded, sum(uploaded) AS uploaded "
    "FROM datum WHERE job = ? GROUP BY state"
)
