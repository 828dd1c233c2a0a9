"""Archiving: records where the sources of files lie, and why one could not be moved out of ``incoming/``."""

# Only constants of this package are put into SQL's text; values travel as parameters.
# ruff: noqa: S608

from qa_platform.contract import FileVersion
from qa_platform.ledger.conditions import AS_READ, IS_WANTED, LEAVES_INCOMING, NOT_ARCHIVED, WANTED, keys
from qa_platform.ledger.connection import LedgerConnection
from qa_platform.ledger.records import FileRecord, as_read_values
from qa_platform.ledger.waits import DEFERRAL, waits
from qa_platform.settings import WorkSettings
from qa_platform.text import escaped_lines


class Archiving(LedgerConnection):
    """Records where sources lie."""

    def begin_archiving(self, version: FileVersion, *, source: str, place: str) -> bool:
        """Record that a source is about to leave ``source``. It may be deleted there only if this returns true.

        Args:
            place: the object that holds the source from now on, "" if none does.

        Returns:
            Whether that was recorded. It was not if the file is to be answered again, or another process is archiving it.
        """
        return self._move(version, source=source, place=place)

    def cancel_archiving(self, version: FileVersion, *, source: str, place: str) -> None:
        """Undo `begin_archiving`: the source could not be deleted. A file that is to be answered again is left as it is."""
        self._move(version, source=place, place=source)

    def record_archived(self, version: FileVersion, *, place: str, owes_csv: bool = False) -> bool:
        """Record the name of the object that holds the source of a file that is done, "" if it was deleted.

        A loaded file is then finished. A file that is to be answered again, or was forgotten, is left as it is.

        Args:
            owes_csv: the answered CSV of a loaded file is to be written to the bucket. See `Publishing`.

        Returns:
            Whether that was recorded.
        """
        with self._transaction() as cursor:
            cursor.execute(
                f"""
                UPDATE question_file f
                SET place = %(place)s, archived_at = now(), archive_error = '', retry_at = NULL, put_off_since = NULL,
                    csv_owed = f.csv_owed OR f.status = 'loaded' AND %(owes_csv)s,
                    status = CASE WHEN f.status = 'loaded' THEN 'finished' ELSE f.status END
                FROM {WANTED} WHERE {IS_WANTED} AND {LEAVES_INCOMING}
                """,
                {**keys([version]), "place": place, "owes_csv": owes_csv},
            )
            return cursor.rowcount == 1

    def record_archive_failure(self, version: FileVersion, *, error: str, work: WorkSettings) -> None:
        """Record why the source of a done file could not be archived. The next attempt waits like that of a deferred file."""
        with self._transaction() as cursor:
            cursor.execute(
                f"""
                UPDATE question_file f
                SET archive_error = %(error)s, put_off_since = coalesce(put_off_since, now()), retry_at = now() + {DEFERRAL}
                FROM {WANTED} WHERE {IS_WANTED} AND {NOT_ARCHIVED}
                """,
                {**keys([version]), **waits(work), "error": escaped_lines(error)},
            )

    def relocate(self, record: FileRecord, *, place: str) -> bool:
        """Record that the source of a file lies at another place. The status stays.

        Returns:
            Whether that was recorded: false if the record has changed since it was read.
        """
        with self._transaction() as cursor:
            cursor.execute(
                f"""
                UPDATE question_file f SET place = %(place)s
                FROM {WANTED} WHERE {IS_WANTED} AND {AS_READ} AND f.status = %(status)s
                """,
                {**keys([record.version]), **as_read_values(record), "place": place, "status": str(record.status)},
            )
            return cursor.rowcount == 1

    def _move(self, version: FileVersion, *, source: str, place: str) -> bool:
        with self._transaction() as cursor:
            cursor.execute(
                f"""
                UPDATE question_file f SET place = %(place)s FROM {WANTED}
                WHERE {IS_WANTED} AND {NOT_ARCHIVED} AND f.place = %(source)s
                """,
                {**keys([version]), "source": source, "place": place},
            )
            return cursor.rowcount == 1
