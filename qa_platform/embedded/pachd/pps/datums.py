"""The datums of jobs. They become visible when their datum set is done."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace

from qa_platform.embedded.pachd.errors import PachError
from qa_platform.embedded.pachd.pps import meta
from qa_platform.embedded.pachd.pps.jobs import Jobs
from qa_platform.embedded.pachd.pps.meta import MetaWriter, Outcome
from qa_platform.embedded.pachd.pps.records import (
    GOOD,
    Datum,
    DatumState,
    Job,
    JobState,
    datum_of,
    entries_json,
    inputs_json,
)
from qa_platform.embedded.pachd.storage.chunks import ChunkBatch
from qa_platform.embedded.pachd.storage.store import Store
from qa_platform.embedded.pachd.storage.tree_editor import TreeEditor
from qa_platform.embedded.pachd.storage.trees import TreeError

_PENDING = int(DatumState.STARTING)
# Skips datums that an earlier job has processed with the same hash, and copies its results.
_SKIP = """
UPDATE datum SET state = 3, inputs = b.inputs, output = b.output, entries = b.entries, reason = b.reason,
    origin = CASE b.origin WHEN '' THEN ? ELSE b.origin END, seconds = b.seconds, downloaded = b.downloaded, uploaded = b.uploaded,
    download_seconds = b.download_seconds, upload_seconds = b.upload_seconds
FROM datum b WHERE datum.job = ? AND datum.state = 4 AND b.job = ? AND b.id = datum.id AND b.hash = datum.hash AND b.state IN (2, 3)
"""


class Datums:
    """The datums in the metadata. Their output is in the trees."""

    def __init__(self, jobs: Jobs, store: Store) -> None:
        self._jobs = jobs
        self._store = store
        self._db = store.metadata

    def record(self, job: int, datums: Iterable[Datum]) -> None:
        """Record the datums of a job, once they are known. Datums that are already recorded keep their state."""
        rows = [(job, one.id, one.hash, one.position, _PENDING, inputs_json(one.inputs)) for one in datums]
        with self._db.transaction():
            self._db.execute_many("INSERT OR IGNORE INTO datum (job, id, hash, position, state, inputs) VALUES (?, ?, ?, ?, ?, ?)", rows)
            self._db.execute("UPDATE job SET total = ?, enumerated = 1 WHERE pk = ?", len(rows), job)

    def own(self, job: int) -> list[Datum]:
        """All datums of a job, done or not, in glob order."""
        return [datum_of(row) for row in self._db.rows("SELECT * FROM datum WHERE job = ? ORDER BY position", job)]

    def ids(self, job: int) -> set[str]:
        return {row["id"] for row in self._db.rows("SELECT id FROM datum WHERE job = ?", job)}

    def first_failed(self, job: int) -> str | None:
        """The id of the first datum that failed."""
        found = self._db.row("SELECT id FROM datum WHERE job = ? AND state = ? ORDER BY position LIMIT 1", job, int(DatumState.FAILED))
        return None if found is None else str(found["id"])

    def listed(self, job: Job) -> list[Datum]:
        """The datums in a job's meta commit, sorted by id: those whose set is done, and the base job's until the job takes over from it.

        A job that fails before the takeover keeps showing the base job's datums.

        Raises:
            PachError: the base job has not ended.
        """
        found = {one.id: one for one in self._done(job.pk)} if job.enumerated or job.terminal else {}
        base = None if job.serial or job.state == JobState.SUCCESS or not job.commit else self._jobs.base(job.commit)
        if base is not None:
            if not base.terminal:
                meta_repo = f"{job.pipeline}.meta"
                raise PachError(f"base commit {meta_repo}@{base.id} for commit {meta_repo}@{job.id} unfinished")
            inherited = (replace(one, state=DatumState.SKIPPED, origin=one.origin or base.id) for one in self._done(base.pk))
            found = {one.id: one for one in inherited} | found
        return [found[name] for name in sorted(found)]

    def _done(self, job: int) -> list[Datum]:
        return [datum_of(row) for row in self._db.rows("SELECT * FROM datum WHERE job = ? AND state != ?", job, _PENDING)]

    def end_set(self, job: Job, image: str, outcomes: Sequence[Outcome], batch: ChunkBatch) -> None:
        """Record the outcomes of a datum set at once. ``batch`` contains what the datums wrote."""
        if not outcomes:
            return
        with self._store.trees.transaction():
            writer = MetaWriter(self._store.trees, batch, job, image)
            entries = [entries_json(writer.write(outcome)) for outcome in outcomes]
            batch.flush()
        self._db.execute_many(
            "UPDATE datum SET state = ?, output = ?, reason = ?, entries = ?, seconds = ?, download_seconds = ?, upload_seconds = ?, "
            "downloaded = ?, uploaded = ? WHERE job = ? AND id = ?",
            [
                (
                    int(one.state), one.output, one.reason, written, one.stats.process_seconds, one.stats.download_seconds,
                    one.stats.upload_seconds, one.stats.downloaded, one.stats.uploaded, job.pk, one.datum.id,
                )
                for one, written in zip(outcomes, entries, strict=True)
            ],
        )  # fmt: skip

    def take_over(self, job: int, base: Job, *, skip: bool) -> None:
        """Make a job list only its own datums from now on, none of its base's. With ``skip``, those that the base has processed with the
        same hash are skipped."""
        with self._db.transaction():
            if skip:
                self._db.execute(_SKIP, base.id, job, base.pk)
            self._db.execute("UPDATE job SET serial = 1 WHERE pk = ?", job)

    def output(self, listed: Iterable[Datum]) -> str | None:
        """The merged output of these datums, without the failed ones.

        Raises:
            TreeError: two of them wrote the same path.
        """
        editor = TreeEditor(self._store.trees, None)
        for datum in listed:
            if datum.output is not None and datum.state in GOOD:
                try:
                    editor.merge(datum.output)
                except TreeError as error:
                    raise TreeError(f"duplicate path output by different datums: {error} (datum {datum.id})") from error
        written = editor.write()
        return written.node if written else None

    def meta(self, listed: Iterable[Datum]) -> str | None:
        """The tree of a meta commit with these datums."""
        with self._store.trees.transaction():
            return meta.commit_root(self._store.trees, [(one.id, one.entries) for one in listed if one.entries is not None])

    def roots(self) -> list[str]:
        """The trees that datums have written."""
        found = [row["output"] for row in self._db.rows("SELECT DISTINCT output FROM datum WHERE output IS NOT NULL")]
        for row in self._db.rows("SELECT entries FROM datum WHERE entries IS NOT NULL"):
            found += [node for _, _, node in json.loads(row["entries"])]
        return found
