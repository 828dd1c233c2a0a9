"""Answered CSVs in the bucket: records which are still to be written, and why one could not be written."""

# Only constants of this package are put into SQL's text; values travel as parameters.
# ruff: noqa: S608

from qa_platform.clients.postgres import only_row
from qa_platform.ledger.conditions import DUE, IS_WANTED, LIVE, WANTED, keys
from qa_platform.ledger.connection import LedgerConnection
from qa_platform.ledger.records import FileRecord, select
from qa_platform.ledger.waits import DEFERRAL, waits
from qa_platform.settings import WorkSettings
from qa_platform.text import escaped_lines

# Recorded by `record_archived` in the statement that finishes a file, so it is not lost if the process dies.
_OWED = "f.csv_owed AND f.status = 'finished'"
_SAME_ANSWERS = f"{IS_WANTED} AND {_OWED} AND f.load_id = %(load_id)s"
# After this time an attempt is presumed dead. If it is only slow, the precondition of the write decides.
_TRY_SECONDS = 600


class Publishing(LedgerConnection):
    """Records the CSVs that are owed to the bucket. Does not change the status of a file."""

    def owed_csvs(self, *, limit: int) -> list[FileRecord]:
        """Finished files whose answered CSV is to be written now; any of them, if there are more than ``limit``."""
        # In random order: the oldest files may be refused every time, and would starve all others.
        rest = f"FROM question_file f WHERE {_OWED} AND NOT {LIVE} AND {DUE} ORDER BY random() LIMIT %(limit)s"
        with self._transaction() as cursor:
            return select(cursor, rest, {"limit": limit})

    def unwritten_csvs(self, *, limit: int) -> list[FileRecord]:
        """Finished files whose answered CSV could not be written; oldest first. The reason is in ``csv_error``."""
        rest = f"FROM question_file f WHERE {_OWED} AND f.csv_error <> '' ORDER BY f.created_at LIMIT %(limit)s"
        with self._transaction() as cursor:
            return select(cursor, rest, {"limit": limit})

    def count_owed_csvs(self) -> int:
        """The number of answered CSVs that are to be written, whether or not their next attempt is due."""
        with self._transaction() as cursor:
            return int(only_row(cursor.execute(f"SELECT count(*) FROM question_file f WHERE {_OWED}"))[0])

    def begin_csv(self, record: FileRecord) -> bool:
        """Record that an answered CSV is about to be written. It may be written only if this returns true.

        Returns:
            Whether that was recorded. It was not if a retry was requested, or another process is writing the CSV.
        """
        changes = f"put_off_since = coalesce(put_off_since, now()), retry_at = now() + make_interval(secs => {_TRY_SECONDS})"
        return self._mark(record, changes, {}, condition=DUE)

    def record_csv_failure(self, record: FileRecord, *, error: str, work: WorkSettings) -> None:
        """Record why an answered CSV could not be written. The next attempt waits like that of a deferred file."""
        self._mark(record, f"csv_error = %(error)s, retry_at = now() + {DEFERRAL}", {**waits(work), "error": escaped_lines(error)})

    def clear_owed_csv(self, record: FileRecord) -> bool:
        """Record that an answered CSV is written, or that a newer one takes its place.

        Returns:
            Whether that was recorded. It was not if the file was forgotten, or a retry was requested.
        """
        return self._mark(record, "csv_owed = false, csv_error = '', retry_at = NULL, put_off_since = NULL", {})

    def _mark(self, record: FileRecord, changes: str, values: dict[str, object], *, condition: str = "true") -> bool:
        with self._transaction() as cursor:
            cursor.execute(
                f"UPDATE question_file f SET {changes} FROM {WANTED} WHERE {_SAME_ANSWERS} AND {condition}",
                {**keys([record.version]), **values, "load_id": record.load_id},
            )
            return cursor.rowcount == 1
