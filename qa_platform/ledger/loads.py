"""Records loads in ``question_file``, in the same transaction as the rows: each function takes that transaction's cursor."""

from dataclasses import dataclass
from datetime import datetime

import psycopg

from qa_platform.clients.postgres import only_row
from qa_platform.contract import INCOMING, FileStatus, Manifest, ModelChoice, file_id, partition_key

# The first half of the key of a load's advisory lock. The second half is a hash of the file's name; two names with the same hash merely
# wait for each other.
_LOAD_LOCK = 0x71616C64


@dataclass(frozen=True)
class Loaded:
    """The result of loading a file.

    Args:
        answered_by: the model that answered.
        answered_at: when the last shard was answered; None for a file without shards.
        job_id: the Pachyderm job; empty keeps what is recorded.
        commit_id: the Pachyderm commit; empty keeps what is recorded.
    """

    manifest: Manifest
    answered: int
    no_answer: int
    rejected: int
    answered_by: ModelChoice
    answered_at: datetime | None
    job_id: str = ""
    commit_id: str = ""


def wait_for_load_lock(cursor: psycopg.Cursor, name: str) -> None:
    """Block other loads of this file until the transaction ends. Waits for a load in progress."""
    cursor.execute("SELECT pg_advisory_xact_lock(%s, hashtext(%s))", [_LOAD_LOCK, name])


def try_load_lock(cursor: psycopg.Cursor, name: str) -> bool:
    """Like `wait_for_load_lock`, but returns false at once if a load is in progress."""
    cursor.execute("SELECT pg_try_advisory_xact_lock(%s, hashtext(%s))", [_LOAD_LOCK, name])
    return bool(only_row(cursor)[0])


def why_too_late(cursor: psycopg.Cursor, manifest: Manifest) -> str:
    """Why this load comes too late: the file was forgotten, a newer generation is loaded, or a newer answer is requested; else empty."""
    # The answers of an unchanged upload are the rows of an earlier generation. Behind it, only a generation that was loaded before may
    # be loaded again.
    newer = cursor.execute(
        """
        SELECT f.generation, f.load_id, f.status = 'forgotten' FROM question_file f
        LEFT JOIN question_file mine ON mine.source_file = f.source_file AND mine.generation = %(generation)s
        WHERE f.source_file = %(name)s AND (
            f.generation > %(generation)s AND (f.loaded_at IS NOT NULL OR f.status = 'unchanged' AND mine.loaded_at IS NULL)
            OR f.generation = %(generation)s AND (f.load_id > %(load_id)s OR f.status = 'forgotten'))
        ORDER BY f.generation DESC LIMIT 1
        """,
        {"name": manifest.name, "generation": manifest.generation, "load_id": manifest.load_id},
    ).fetchone()
    if not newer:
        return ""
    generation, load_id, is_forgotten = newer
    if generation > manifest.generation:
        return f"the newer generation {generation} is loaded"
    if is_forgotten:
        return "it was forgotten"
    return f"a retry was requested (load id {load_id}; this load has {manifest.load_id})"


def run_of(cursor: psycopg.Cursor, manifest: Manifest) -> str:
    """The Dagster run that answered the file; empty if none is recorded."""
    row = cursor.execute(
        "SELECT dagster_run FROM question_file WHERE source_file = %s AND generation = %s", [manifest.name, manifest.generation]
    ).fetchone()
    return row[0] if row else ""


def record_superseded(cursor: psycopg.Cursor, manifest: Manifest, why: str) -> None:
    """Record that the file was not loaded because something newer exists."""
    # A generation that was loaded before stays loaded in the history, and one that is to be answered again stays pending.
    cursor.execute(
        """
        INSERT INTO question_file (source_file, generation, size, crc32c, file_id, partition_key, place, load_id, status, error)
        VALUES (%(name)s, %(generation)s, %(size)s, %(crc32c)s, %(file_id)s, %(partition_key)s, %(place)s, %(load_id)s,
            'superseded', %(why)s)
        ON CONFLICT (source_file, generation) DO UPDATE SET status = 'superseded', error = excluded.error
        WHERE question_file.status IN ('pending', 'running') AND question_file.load_id <= excluded.load_id
        """,
        {**_identity(manifest), "why": why},
    )


def record_loaded(cursor: psycopg.Cursor, loaded: Loaded) -> FileStatus:
    """Record a load. Returns the file's new status."""
    # If the source is archived already, the file is finished. If another answer was requested during this load, that request stays.
    cursor.execute(
        """
        INSERT INTO question_file AS f (
            source_file, generation, size, crc32c, file_id, partition_key, place, load_id, status,
            rows, answered, no_answer, rejected, wanted_model, wanted_revision, wanted_precision,
            wanted_no_answer_threshold, model, model_revision, model_precision, pachyderm_job, pachyderm_commit, answered_at, loaded_at
        )
        VALUES (
            %(name)s, %(generation)s, %(size)s, %(crc32c)s, %(file_id)s, %(partition_key)s, %(place)s, %(load_id)s, 'loaded',
            %(rows)s, %(answered)s, %(no_answer)s, %(rejected)s, %(wanted_model)s, %(wanted_revision)s, %(wanted_precision)s,
            %(wanted_no_answer_threshold)s, %(model)s, %(model_revision)s, %(model_precision)s, %(job)s, %(commit)s, %(answered_at)s, now()
        )
        ON CONFLICT (source_file, generation) DO UPDATE SET
            status = CASE
                WHEN f.load_id > excluded.load_id THEN f.status WHEN f.archived_at IS NULL THEN 'loaded' ELSE 'finished'
            END,
            load_id = greatest(f.load_id, excluded.load_id),
            rows = excluded.rows, answered = excluded.answered, no_answer = excluded.no_answer,
            rejected = excluded.rejected, wanted_model = excluded.wanted_model, wanted_revision = excluded.wanted_revision,
            wanted_precision = excluded.wanted_precision, wanted_no_answer_threshold = excluded.wanted_no_answer_threshold,
            model = excluded.model, model_revision = excluded.model_revision,
            model_precision = excluded.model_precision, answered_at = excluded.answered_at,
            -- A replay loads nothing new: it must not look like the end of the work that loaded the file.
            loaded_at = CASE
                WHEN f.load_id = excluded.load_id AND f.status NOT IN ('pending', 'running') THEN coalesce(f.loaded_at, excluded.loaded_at)
                ELSE excluded.loaded_at
            END,
            pachyderm_job = coalesce(nullif(excluded.pachyderm_job, ''), f.pachyderm_job),
            pachyderm_commit = coalesce(nullif(excluded.pachyderm_commit, ''), f.pachyderm_commit),
            retry_at = NULL, put_off_since = NULL, error = '', rejection = NULL
        RETURNING status
        """,
        {**_identity(loaded.manifest), **_figures(loaded)},
    )
    return FileStatus(only_row(cursor)[0])


def _identity(manifest: Manifest) -> dict[str, str | int]:
    return {
        "name": manifest.name,
        "generation": manifest.generation,
        "size": manifest.size,
        "crc32c": manifest.crc32c,
        "file_id": file_id(manifest.name),
        "partition_key": partition_key(manifest.name),
        "place": INCOMING + manifest.name,
        "load_id": manifest.load_id,
    }


def _figures(loaded: Loaded) -> dict[str, str | int | float | datetime | None]:
    wanted, used = loaded.manifest.model, loaded.answered_by
    return {
        "rows": loaded.manifest.rows,
        "answered": loaded.answered,
        "no_answer": loaded.no_answer,
        "rejected": loaded.rejected,
        "wanted_model": wanted.id,
        "wanted_revision": wanted.revision,
        "wanted_precision": wanted.precision,
        "wanted_no_answer_threshold": wanted.no_answer_threshold,
        "model": used.id,
        "model_revision": used.revision,
        "model_precision": used.precision,
        "job": loaded.job_id,
        "commit": loaded.commit_id,
        "answered_at": loaded.answered_at,
    }
