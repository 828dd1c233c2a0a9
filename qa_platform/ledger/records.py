"""The records of files, one per generation, and the queries on them."""

# Only constants of this package are put into SQL's text; values travel as parameters.
# ruff: noqa: S608

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import psycopg
from psycopg.rows import kwargs_row

from qa_platform.clients.postgres import only_row
from qa_platform.contract import FileStatus, FileVersion, ModelChoice, partition_key
from qa_platform.ingest import FileRejection
from qa_platform.ledger.conditions import DUE, IN_THE_TABLE, IS_WANTED, LIVE, NOT_ARCHIVED, OPEN, WANTED, chunks, keys
from qa_platform.ledger.connection import LedgerConnection
from qa_platform.ledger.states import Known

_COLUMNS = f"""
    f.source_file, f.generation, f.size, f.crc32c, f.md5, f.status, f.load_id, f.rows, f.answered, f.no_answer, f.rejected,
    CASE WHEN {LIVE} THEN f.claim_owner ELSE '' END AS claim_owner, f.attempts, {DUE} AS due,
    f.put_off_since IS NOT NULL AS was_deferred,
    f.wanted_model, f.wanted_revision, f.wanted_precision, f.wanted_no_answer_threshold,
    f.model, f.model_revision, f.model_precision, f.place,
    f.pachyderm_commit, f.pachyderm_job, f.batch_id, f.dagster_run,
    f.created_at, f.started_at, f.answered_at, f.loaded_at, f.archived_at, f.archive_error, f.csv_error,
    f.error, f.rejection::text AS rejection, f.blank, f.delimiter
"""

# The number of newest loads that `recent_loads` searches. It bounds the search after the model has changed.
_REACH = 1_000
# An enum's own lookup takes longer than the rest of a row.
_STATUSES = {str(status): status for status in FileStatus}


@dataclass(frozen=True, slots=True)
class FileRecord:
    """The record of one generation of a file.

    Args:
        load_id: how often answers of this generation were requested, from 1.
        claim_owner: the owner of a live claim; else empty.
        attempts: how often a failure was charged to the file since answers were last requested.
        due: false while a failed or deferred file waits for its next attempt.
        was_deferred: the file has waited, uncharged, since it was last loaded or charged.
        wanted_model: the requested model, with revision and precision. Empty before a load, as the counts are 0.
        wanted_no_answer_threshold: the threshold requested with it; None if the model was not allowed to say "no answer".
        model: the model that answered, with revision and precision. Empty before a load.
        place: the name of the object that holds this generation; empty if the object was deleted.
        error: why the file is not done, for people. Of a running file: what its job waits for.
        rejection: why the file cannot be read; None for files that are not rejected, or were rejected before rejections had fields.
        archive_error: why the last attempt to archive the source of a done file failed; else empty.
        csv_error: why the last attempt to write the answered CSV to the bucket failed; else empty.
        blank: the number of blank rows, which were skipped and are in no other count; None if it was not recorded.
        delimiter: the delimiter of the upload; None if it was not recorded.
    """

    version: FileVersion
    status: FileStatus
    load_id: int
    rows: int
    answered: int
    no_answer: int
    rejected: int
    claim_owner: str
    attempts: int
    due: bool
    was_deferred: bool
    wanted_model: str
    wanted_revision: str
    wanted_precision: str
    model: str
    model_revision: str
    model_precision: str
    place: str
    pachyderm_commit: str
    pachyderm_job: str
    batch_id: str
    dagster_run: str
    created_at: datetime
    started_at: datetime | None
    answered_at: datetime | None
    loaded_at: datetime | None
    archived_at: datetime | None
    error: str
    rejection: FileRejection | None = None
    archive_error: str = ""
    csv_error: str = ""
    blank: int | None = None
    delimiter: str | None = None
    wanted_no_answer_threshold: float | None = None


@dataclass(frozen=True)
class Deferred:
    """The files that wait, uncharged, for a reason other than themselves.

    Args:
        files: the number of files that wait.
        until: when the first of them is due.
        why: the reason why that first one waits.
    """

    files: int
    until: datetime
    why: str


def as_read_values(record: FileRecord) -> dict[str, str | int]:
    """The parameters of `AS_READ`."""
    return {"read_load_id": record.load_id, "read_place": record.place, "read_owner": record.claim_owner}


class Records(LedgerConnection):
    """Reads records. No method writes."""

    def now(self) -> datetime:
        """PostgreSQL's time, which is also the clock of the times in records."""
        with self._transaction() as cursor:
            moment: datetime = only_row(cursor.execute("SELECT now()"))[0]
        return moment

    def records(self, versions: Sequence[FileVersion]) -> dict[tuple[str, int], FileRecord]:
        """The records of these versions, by (name, generation). Unknown versions are left out."""
        result: dict[tuple[str, int], FileRecord] = {}
        for chunk in chunks(versions):
            for record in self._select(f"FROM question_file f JOIN {WANTED} ON {IS_WANTED}", keys(chunk)):
                result[record.version.name, record.version.generation] = record
        return result

    def known(self, versions: Sequence[FileVersion]) -> dict[tuple[str, int], Known]:
        """What planning needs of these versions, by (name, generation). Several times faster than `records`; meant for whole listings."""
        result: dict[tuple[str, int], Known] = {}
        for chunk in chunks(versions):
            with self._transaction() as cursor:
                cursor.execute(
                    f"""
                    SELECT f.source_file, f.generation, f.status, f.attempts, f.load_id, f.batch_id, {DUE}
                    FROM question_file f JOIN {WANTED} ON {IS_WANTED}
                    """,
                    keys(chunk),
                )
                for name, generation, status, attempts, load_id, batch_id, due in cursor:
                    result[name, generation] = Known(_STATUSES[status], attempts, load_id, batch_id, due)
        return result

    def newest_by_partition(self, partition_keys: Sequence[str]) -> dict[str, FileRecord]:
        """The newest generation of the file of each partition, by partition key. Unknown partitions are left out."""
        result: dict[str, FileRecord] = {}
        for chunk in chunks(partition_keys):
            rest = """
                FROM unnest(%(keys)s::text[]) AS w (key) CROSS JOIN LATERAL
                (SELECT * FROM question_file g WHERE g.partition_key = w.key ORDER BY g.generation DESC LIMIT 1) f
            """
            for record in self._select(rest, {"keys": list(chunk)}):
                result[partition_key(record.version.name)] = record
        return result

    def latest_answered(self, names: Sequence[str], *, model: ModelChoice, revision: str = "") -> dict[str, FileVersion]:
        """Per name, the version whose answers are in the table, if they were requested of this model and no new ones are requested.

        Args:
            revision: the revision that answered; any if it is empty.
        """
        result: dict[str, FileVersion] = {}
        for chunk in chunks(names):
            rest = f"""
                FROM unnest(%(names)s::text[]) AS w (name) CROSS JOIN LATERAL
                (SELECT * FROM question_file f WHERE f.source_file = w.name AND {IN_THE_TABLE}
                 ORDER BY f.generation DESC LIMIT 1) f
                WHERE f.status IN ('loaded', 'finished')
                AND (f.wanted_model, f.wanted_revision, f.wanted_precision) = (%(id)s, %(revision)s, %(precision)s)
                AND f.wanted_no_answer_threshold IS NOT DISTINCT FROM %(no_answer_threshold)s::double precision
                AND (%(answered_by)s = '' OR f.model_revision = %(answered_by)s)
            """
            values = {"names": list(chunk), **asdict(model), "answered_by": revision}
            result.update((record.version.name, record.version) for record in self._select(rest, values))
        return result

    def names_of_unfinished(self) -> set[str]:
        """The names of files of which any generation waits, runs, or is loaded and not archived yet."""
        with self._transaction() as cursor:
            # Two SELECTs, because each condition must match its partial index: question_file_open, question_file_unarchived.
            cursor.execute(
                f"""
                SELECT f.source_file FROM question_file f WHERE {OPEN}
                UNION SELECT f.source_file FROM question_file f WHERE {NOT_ARCHIVED} AND f.status = 'loaded'
                """
            )
            return {name for (name,) in cursor}

    def names_of_run(self, run_id: str) -> set[str]:
        """The names of files with any generation that this run was the last to work on."""
        with self._transaction() as cursor:
            cursor.execute("SELECT DISTINCT source_file FROM question_file WHERE dagster_run = %s", [run_id])
            return {name for (name,) in cursor}

    def loaded_below(self, prefix: str, *, limit: int) -> list[str]:
        """The names of files that begin with a prefix and were ever loaded, the most recently loaded first."""
        with self._transaction() as cursor:
            cursor.execute(
                """
                SELECT source_file FROM question_file WHERE starts_with(source_file, %s) AND loaded_at IS NOT NULL
                GROUP BY source_file ORDER BY max(loaded_at) DESC LIMIT %s
                """,
                [prefix, limit],
            )
            return [name for (name,) in cursor]

    def recent_loads(self, model: ModelChoice, *, without: Sequence[str], limit: int) -> list[FileRecord]:
        """The newest files with answers of this model in the table, newest first.

        Args:
            without: names to leave out.
        """
        rest = """
            FROM (
                SELECT * FROM question_file WHERE source_file <> ALL(%(without)s::text[]) AND loaded_at IS NOT NULL
                ORDER BY created_at DESC, generation DESC LIMIT %(reach)s
            ) f
            WHERE f.status IN ('loaded', 'finished') AND f.answered > 0
            AND (f.model, f.model_revision, f.model_precision) = (%(model)s, %(revision)s, %(precision)s)
            AND NOT EXISTS (
                SELECT FROM question_file g
                WHERE g.source_file = f.source_file AND g.generation > f.generation AND g.loaded_at IS NOT NULL)
            ORDER BY f.created_at DESC, f.generation DESC LIMIT %(limit)s
        """
        values = {"model": model.id, "revision": model.revision, "precision": model.precision, "without": list(without)}
        return self._select(rest, {**values, "reach": _REACH, "limit": limit})

    def pending_archive(self, *, limit: int) -> list[FileRecord]:
        """Done, unclaimed files whose source is to be archived now; any of them, if there are more than ``limit``.

        A file that could not be archived is left out until its next attempt is due.
        """
        # In random order: the oldest files may be impossible to archive, and would starve all others.
        rest = f"""
            FROM question_file f WHERE {NOT_ARCHIVED} AND NOT {LIVE} AND {DUE} ORDER BY random() LIMIT %(limit)s
        """
        return self._select(rest, {"limit": limit})

    def unarchived_files(self, *, limit: int) -> list[FileRecord]:
        """Done files whose source could not be archived; oldest first. The reason is in ``archive_error``."""
        rest = f"FROM question_file f WHERE {NOT_ARCHIVED} AND f.archive_error <> '' ORDER BY f.created_at LIMIT %(limit)s"
        return self._select(rest, {"limit": limit})

    def count_unarchived(self) -> int:
        """The number of done, unclaimed files that are not archived, whether or not their next attempt is due."""
        with self._transaction() as cursor:
            cursor.execute(f"SELECT count(*) FROM question_file f WHERE {NOT_ARCHIVED} AND NOT {LIVE}")
            return int(only_row(cursor)[0])

    def deferred_files(self, *, also_due: bool = False) -> Deferred | None:
        """The files that are deferred right now, or None. ``also_due`` adds those whose next attempt is due."""
        waiting = "" if also_due else "AND f.retry_at > now()"
        with self._transaction() as cursor:
            cursor.execute(
                f"""
                SELECT count(*) OVER (), f.retry_at, f.error FROM question_file f
                WHERE {OPEN} {waiting} AND f.put_off_since IS NOT NULL ORDER BY f.retry_at LIMIT 1
                """
            )
            row = cursor.fetchone()
        return Deferred(*row) if row else None

    def commits_in_use(self, commits: Sequence[str]) -> set[str]:
        """Which of these Pachyderm commits hold files that are open or claimed."""
        with self._transaction() as cursor:
            cursor.execute(
                f"SELECT DISTINCT f.pachyderm_commit FROM question_file f WHERE ({OPEN} OR {LIVE}) AND f.pachyderm_commit = ANY(%s)",
                [list(commits)],
            )
            return {commit for (commit,) in cursor}

    def _select(self, rest: str, values: Mapping[str, Any]) -> list[FileRecord]:
        with self._transaction() as cursor:
            return select(cursor, rest, values)


def select(cursor: psycopg.Cursor, rest: str, values: Mapping[str, Any]) -> list[FileRecord]:
    """The records that a statement selects, given its part from ``FROM`` on; the table is ``f``."""
    with cursor.connection.cursor(row_factory=kwargs_row(_record)) as rows:
        return rows.execute(f"SELECT {_COLUMNS} {rest}", values).fetchall()


def _record(
    source_file: str, generation: int, size: int, crc32c: str, md5: str, status: str, rejection: str | None, **others: Any
) -> FileRecord:
    why = FileRejection.from_json(rejection) if rejection else None
    return FileRecord(FileVersion(source_file, generation, size, crc32c, md5), _STATUSES[status], rejection=why, **others)
