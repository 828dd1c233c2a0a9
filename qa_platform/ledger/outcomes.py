"""Outcomes: records the progress of the work on a file and how it ends. Loads are in `ledger.loads`."""

# Only constants of this package are put into SQL's text; values travel as parameters.
# ruff: noqa: S608

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import psycopg

from qa_platform.contract import INCOMING, FileStatus, FileVersion
from qa_platform.ingest import FileRejection
from qa_platform.ledger.conditions import AS_READ, DUE, IN_THE_TABLE, IS_WANTED, LIVE, OPEN, WANTED, insert_unknown, keys
from qa_platform.ledger.connection import LedgerConnection
from qa_platform.ledger.loads import try_load_lock
from qa_platform.ledger.records import FileRecord, as_read_values, select
from qa_platform.ledger.waits import DEFERRAL, waits
from qa_platform.settings import WorkSettings
from qa_platform.text import escaped_lines


class Outcomes(LedgerConnection):
    """Records the progress of the work on files and how it ends."""

    def start(self, owner: str, versions: Sequence[FileVersion], *, run_id: str, batch_id: str) -> list[FileRecord]:
        """Record that the owner's run works on these versions, which it has claimed.

        Returns:
            The records as they are now, in the order of ``versions``. Work with these: a retry may have changed the load id since the
            claim. Versions that are done, or that the owner no longer holds, are left out.
        """
        with self._transaction() as cursor:
            cursor.execute(
                f"""
                UPDATE question_file f SET status = 'running', started_at = now(), dagster_run = %(run)s, batch_id = %(batch)s, error = ''
                FROM {WANTED} WHERE {IS_WANTED} AND {OPEN} AND f.claim_owner = %(owner)s RETURNING f.source_file, f.generation
                """,
                {**keys(versions), "run": run_id, "batch": batch_id, "owner": owner},
            )
            started = set(cursor.fetchall())
            mine = [version for version in versions if (version.name, version.generation) in started]
            records = {r.version.name: r for r in select(cursor, f"FROM question_file f JOIN {WANTED} ON {IS_WANTED}", keys(mine))}
        return [records[version.name] for version in mine]

    def record_layout(self, version: FileVersion, *, blank: int, delimiter: str) -> None:
        """Record the number of blank rows that were skipped when a version was read, and its delimiter."""
        values = {"name": version.name, "generation": version.generation, "blank": blank, "delimiter": delimiter}
        change = "SET blank = %(blank)s, delimiter = %(delimiter)s"
        self._update(f"{change} WHERE f.source_file = %(name)s AND f.generation = %(generation)s", values)

    def record_commit(self, owner: str, versions: Sequence[FileVersion], *, commit: str, job: str) -> None:
        """Record the Pachyderm commit that holds these versions, which the owner has claimed, and the job that answers it."""
        self._update(
            f"SET pachyderm_commit = %(commit)s, pachyderm_job = %(job)s FROM {WANTED} WHERE {IS_WANTED} AND f.claim_owner = %(owner)s",
            {**keys(versions), "commit": commit, "job": job, "owner": owner},
        )

    def note_waiting(self, owner: str, reason: str) -> None:
        """Record what the Pachyderm job of the owner's running files waits for; "" when it continues."""
        self._update(
            "SET error = %(reason)s WHERE f.status = 'running' AND f.claim_owner = %(owner)s",
            {"owner": owner, "reason": escaped_lines(reason)},
        )

    def charge(self, owner: str, version: FileVersion, *, error: str, work: WorkSettings, load_id: int | None = None) -> FileStatus | None:
        """Charge a failure to a file that the owner holds, and release the claim.

        Args:
            load_id: the load that failed; None for any. A retry requested meanwhile is another load, and is not charged.

        Returns:
            ``failed`` if that was the last attempt, else ``pending``: the file is due after a wait that doubles with every attempt, up
            to a bound. None if nothing was charged: the file is done or to be answered again, or the owner has lost its claim.
        """
        with self._transaction() as cursor:
            return _charge(cursor, owner, version, error=error, work=work, load_id=load_id)

    def defer(
        self,
        owner: str,
        versions: Sequence[FileVersion],
        *,
        error: str,
        work: WorkSettings,
        blameless: bool = True,
        suspect_after: float | None = None,
        batch_id: str = "",
    ) -> None:
        """Defer files that the owner holds, uncharged, for a reason other than themselves, and release the claims.

        The wait is about as long as the deferral so far, so it roughly doubles each time, up to a bound. Files that are always deferred
        together are due together.

        Args:
            error: what they wait for, or why they failed.
            blameless: no file is to blame; the record says so.
            batch_id: the batch in which they are retried; "" for any.
            suspect_after: seconds of deferral after which a file is suspected; None for never. A suspected file is charged if any file
                was loaded since it was first deferred, unless it was retried before its wait was over.
        """
        if not versions:
            return
        with self._transaction() as cursor:
            if suspect_after is not None:
                why = f"others are loaded, and this one fails on: {error}"
                for version in _suspects(cursor, versions, after=suspect_after):
                    _charge(cursor, owner, version, error=why, work=work)
            # The owner no longer holds the files that were just charged.
            cursor.execute(
                f"""
                UPDATE question_file f SET
                    status = 'pending', batch_id = %(batch)s, claim_owner = NULL, claim_until = NULL, error = %(error)s,
                    put_off_since = coalesce(put_off_since, now()), retry_at = now() + {DEFERRAL}
                FROM {WANTED} WHERE {IS_WANTED} AND {OPEN} AND f.claim_owner = %(owner)s
                """,
                {**keys(versions), **waits(work), "owner": owner, "error": _shown_error(error, blameless=blameless), "batch": batch_id},
            )

    def defer_run(self, owner: str, *, error: str, work: WorkSettings) -> None:
        """Defer all files of the owner as blameless, like `defer`, but keep the claims and the batch, which will be resumed."""
        self._update(
            f"""
            SET status = 'pending', error = %(error)s, put_off_since = coalesce(put_off_since, now()), retry_at = now() + {DEFERRAL}
            WHERE {OPEN} AND f.claim_owner = %(owner)s
            """,
            {**waits(work), "owner": owner, "error": _shown_error(error, blameless=True)},
        )

    def requeue(self, owner: str, versions: Sequence[FileVersion]) -> None:
        """Make files that the owner holds available to another batch at once, uncharged, and release the claims."""
        self._update(
            f"""
            SET status = 'pending', batch_id = '', claim_owner = NULL, claim_until = NULL
            FROM {WANTED} WHERE {IS_WANTED} AND {OPEN} AND f.claim_owner = %(owner)s
            """,
            {**keys(versions), "owner": owner},
        )

    def reject_file(self, version: FileVersion, rejection: FileRejection, *, as_read: FileRecord | None = None) -> bool:
        """Record that a file cannot be read, and why. Rows of its earlier generations stay in the table.

        Args:
            as_read: the record that the decision is based on; None for any. If it has changed since, for example by a retry, nothing is
                recorded.

        Returns:
            Whether that was recorded.
        """
        return self._close(version, FileStatus.REJECTED, error=str(rejection), rejection=rejection.to_json(), as_read=as_read)

    def mark_superseded(self, version: FileVersion, *, as_read: FileRecord | None = None) -> bool:
        """Record that a file was overwritten or deleted before it was read. ``as_read`` and the result are those of `reject_file`."""
        return self._close(version, FileStatus.SUPERSEDED, error="it was overwritten or deleted before it was read", as_read=as_read)

    def drop_failed(self, record: FileRecord) -> bool:
        """Record that the source of a failed file was overwritten or deleted. The result is that of `reject_file`."""
        with self._transaction() as cursor:
            cursor.execute(
                f"""
                UPDATE question_file f SET status = 'superseded', error = %(error)s
                FROM {WANTED} WHERE {IS_WANTED} AND {AS_READ} AND f.status = 'failed'
                """,
                {
                    **keys([record.version]),
                    **as_read_values(record),
                    "error": f"it was overwritten or deleted after it had failed: {record.error}",
                },
            )
            return cursor.rowcount == 1

    def mark_unchanged(self, version: FileVersion) -> bool:
        """Record that an upload has the same content as the answered version: the same size, CRC32C and MD5.

        It gets the figures of the loaded generation.

        Returns:
            Whether that was recorded. It was not if other content was loaded since the caller looked, or if the file is being loaded right
            now, for example by the job of a lost run. The next look then decides again.
        """
        with self._transaction() as cursor:
            # Held until the transaction ends, so that a later load sees this record.
            if not try_load_lock(cursor, version.name):
                return False
            insert_unknown(cursor, [version])
            cursor.execute(
                f"""
                UPDATE question_file f
                SET status = 'unchanged', error = '', md5 = %(md5)s, retry_at = NULL, put_off_since = NULL,
                    rows = g.rows, answered = g.answered, no_answer = g.no_answer, rejected = g.rejected,
                    blank = g.blank, delimiter = g.delimiter,
                    model = g.model, model_revision = g.model_revision, model_precision = g.model_precision,
                    wanted_model = g.wanted_model, wanted_revision = g.wanted_revision, wanted_precision = g.wanted_precision,
                    wanted_no_answer_threshold = g.wanted_no_answer_threshold,
                    pachyderm_commit = g.pachyderm_commit, pachyderm_job = g.pachyderm_job
                FROM (
                    SELECT * FROM question_file f WHERE f.source_file = %(name)s AND {IN_THE_TABLE} AND f.generation <> %(generation)s
                    ORDER BY f.generation DESC LIMIT 1
                ) g
                WHERE f.source_file = %(name)s AND f.generation = %(generation)s AND {OPEN} AND (f.size, f.crc32c) = (g.size, g.crc32c)
                    AND g.md5 = %(md5)s AND g.md5 <> ''
                    -- Nobody has asked for an answer of its own.
                    AND f.load_id = 1
                """,
                {"name": version.name, "generation": version.generation, "md5": version.md5},
            )
            return cursor.rowcount == 1

    def reopen(self, versions: Sequence[FileVersion], *, archived: bool, seen_after: datetime) -> int:
        """Correct the records of versions that lie under ``incoming/``.

        A version that is recorded as superseded, although no newer one is known, becomes pending.

        Args:
            archived: also have versions archived again that are recorded as archived.
            seen_after: PostgreSQL's time before they were listed. A version that was archived after that has left since.

        Returns:
            The number of wrong records.
        """
        values = {**keys(versions), "incoming": INCOMING, "seen_after": seen_after}
        with self._transaction() as cursor:
            wrong = cursor.execute(
                f"""
                UPDATE question_file f SET status = 'pending', batch_id = '', error = '', place = %(incoming)s || f.source_file
                FROM {WANTED} WHERE {IS_WANTED}
                AND f.status = 'superseded' AND NOT {LIVE} AND NOT EXISTS
                    (SELECT FROM question_file g WHERE g.source_file = f.source_file AND g.generation > f.generation)
                """,
                values,
            ).rowcount
            if archived:
                wrong += cursor.execute(
                    f"""
                    UPDATE question_file f SET status = CASE WHEN f.status = 'finished' THEN 'loaded' ELSE f.status END,
                        archived_at = NULL, retry_at = NULL, put_off_since = NULL, place = %(incoming)s || f.source_file
                    FROM {WANTED} WHERE {IS_WANTED} AND f.archived_at < %(seen_after)s AND f.status IN ('finished', 'rejected', 'unchanged')
                    """,
                    values,
                ).rowcount
        return wrong

    def _close(
        self, version: FileVersion, status: FileStatus, *, error: str, rejection: str | None = None, as_read: FileRecord | None
    ) -> bool:
        """End the work on a version that will not be loaded. A version that is already done is left as it is."""
        unchanged = f"AND {AS_READ}" if as_read else ""
        with self._transaction() as cursor:
            insert_unknown(cursor, [version])
            cursor.execute(
                f"""
                UPDATE question_file f SET
                    status = %(status)s, error = %(error)s, rejection = %(rejection)s::jsonb, retry_at = NULL, put_off_since = NULL
                FROM {WANTED} WHERE {IS_WANTED} AND {OPEN} {unchanged}
                """,
                {
                    **keys([version]),
                    **(as_read_values(as_read) if as_read else {}),
                    "status": str(status),
                    "error": escaped_lines(error),
                    "rejection": rejection,
                },
            )
            return cursor.rowcount == 1

    def _update(self, rest: str, values: Mapping[str, Any]) -> None:
        with self._transaction() as cursor:
            cursor.execute(f"UPDATE question_file f {rest}", values)


def _charge(
    cursor: psycopg.Cursor, owner: str, version: FileVersion, *, error: str, work: WorkSettings, load_id: int | None = None
) -> FileStatus | None:
    cursor.execute(
        f"""
        UPDATE question_file f SET
            status = CASE WHEN attempts + 1 >= %(attempts)s THEN 'failed' ELSE 'pending' END,
            attempts = attempts + 1, error = %(error)s, batch_id = '', claim_owner = NULL, claim_until = NULL, put_off_since = NULL,
            retry_at = now() + make_interval(secs => least(%(most)s, %(first)s * 2.0 ^ least(attempts, 30)) * %(jitter)s)
        FROM {WANTED} WHERE {IS_WANTED} AND {OPEN} AND f.claim_owner = %(owner)s AND f.load_id = coalesce(%(load)s::int, f.load_id)
        RETURNING f.status
        """,
        {**keys([version]), **waits(work), "owner": owner, "error": escaped_lines(error), "attempts": work.max_attempts, "load": load_id},
    )
    row = cursor.fetchone()
    return FileStatus(row[0]) if row else None


def _suspects(cursor: psycopg.Cursor, versions: Sequence[FileVersion], *, after: float) -> list[FileVersion]:
    """The versions that have been deferred for ``after`` seconds and are due, if another file was loaded since."""
    cursor.execute(
        f"""
        SELECT f.source_file, f.generation FROM question_file f JOIN {WANTED} ON {IS_WANTED}
        WHERE {DUE} AND f.put_off_since <= now() - make_interval(secs => %(after)s)
        AND f.put_off_since < (SELECT max(g.loaded_at) FROM question_file g)
        """,
        {**keys(versions), "after": after},
    )
    suspected = set(cursor.fetchall())
    return [version for version in versions if (version.name, version.generation) in suspected]


def _shown_error(error: str, *, blameless: bool) -> str:
    """The error of a deferred file, for people."""
    return escaped_lines(f"No file is to blame: {error}" if blameless else error)
