"""Listings of any number of records: of many files, or of all generations of one."""

# Only constants of this package are put into SQL's text; values travel as parameters.

from collections.abc import Iterator
from itertools import chain

from qa_platform.contract import INCOMING, FileVersion
from qa_platform.ledger.conditions import IN_THE_TABLE, LIVE, OPEN, PARKED
from qa_platform.ledger.records import FileRecord, Records

# The number of records that one query reads.
_PAGE = 2_000


class Listings(Records):
    """Reads many records. No query reads more than a page, or than ``limit``."""

    def history(self, *, name: str | None = None, limit: int) -> list[FileRecord]:
        """The newest records, of all files or of one, newest first."""
        rest = "f.created_at DESC, f.generation DESC" if name is None else "f.generation DESC"
        where = "" if name is None else "WHERE f.source_file = %(name)s"
        return self._select(f"FROM question_file f {where} ORDER BY {rest} LIMIT %(limit)s", {"name": name, "limit": limit})

    def in_the_table(self, name: str) -> FileRecord | None:
        """The generation whose rows are in the table, however many unchanged ones came after it."""
        rest = f"FROM question_file f WHERE f.source_file = %(name)s AND {IN_THE_TABLE} ORDER BY f.generation DESC LIMIT 1"
        return next(iter(self._select(rest, {"name": name})), None)

    def unfinished(self) -> Iterator[FileRecord]:
        """Files that are not done, then loaded files whose source is not archived yet; each group oldest first."""
        return chain(self._paged(OPEN), self._paged("f.status = 'loaded' AND f.archived_at IS NULL"))

    def waiting_elsewhere(self) -> Iterator[FileVersion]:
        """Versions to be answered again whose source has left ``incoming/``, oldest record first. No listing shows them."""
        return (record.version for record in self._paged(f"{OPEN} AND f.place <> %(incoming)s || f.source_file"))

    def waiting_uploads(self) -> Iterator[FileRecord]:
        """Unclaimed files that wait under ``incoming/``, according to their records."""
        # Filtered here and not in SQL: the planner would assume that few records match, and sort all matching records for every page.
        return (each for each in self._paged(f"{OPEN} AND NOT {LIVE}") if each.place == INCOMING + each.version.name)

    def parked(self) -> Iterator[FileRecord]:
        """Files that are parked as ``failed`` and were not uploaded again."""
        return self._paged(PARKED)

    def _paged(self, condition: str) -> Iterator[FileRecord]:
        """The records that meet a condition, oldest first, each page in its own transaction."""
        # The indexes of unfinished files have only `created_at`, so it comes first.
        key, after = "f.created_at, f.source_file, f.generation", ""
        values: dict[str, object] = {"incoming": INCOMING, "page": _PAGE}
        while page := self._select(f"FROM question_file f WHERE {condition} {after} ORDER BY {key} LIMIT %(page)s", values):
            yield from page
            last = page[-1]
            after = f"AND ({key}) > (%(created)s, %(name)s, %(generation)s)"
            values |= {"created": last.created_at, "name": last.version.name, "generation": last.version.generation}
