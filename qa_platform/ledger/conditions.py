"""Pieces of SQL that the statements on ``question_file`` share. In all of them the table is ``f``."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import psycopg

from qa_platform.contract import INCOMING, FileVersion, file_id, partition_key

# The number of names in one query. Larger queries are not faster.
_CHUNK = 5_000

OPEN = "f.status IN ('pending', 'running')"
LIVE = "(f.claim_owner IS NOT NULL AND f.claim_until > now())"
DUE = "(f.retry_at IS NULL OR f.retry_at <= now())"
# A failed file that was not uploaded again, whatever the outcome of the new upload.
PARKED = """
    f.status = 'failed' AND NOT EXISTS
        (SELECT FROM question_file g WHERE g.source_file = f.source_file AND g.generation > f.generation)
"""
# A done file whose source leaves `incoming/`. Once that is recorded, a loaded file is finished.
LEAVES_INCOMING = "f.status IN ('loaded', 'rejected', 'unchanged')"
NOT_ARCHIVED = f"{LEAVES_INCOMING} AND f.archived_at IS NULL"
# Resets the columns of a file that is to be answered again on request. The caller sets `load_id`.
ASKED_AGAIN = """
    status = 'pending', attempts = 0, retry_at = NULL, put_off_since = NULL, batch_id = '', archived_at = NULL, archive_error = '',
    csv_owed = false, csv_error = '', error = '', rejection = NULL
"""


def first_row(table: str, where: str = "") -> str:
    """The first row number of file `f` in a table, NULL if it has no row there; with a condition, of the rows `q` that meet it.

    Used instead of EXISTS, so that the index is always used. With few files, the planner expects EXISTS to find a row almost at once, and
    scans the table from its beginning.
    """
    of_file = f"q.source_file = f.source_file {where}"
    return f"(SELECT q.row_number FROM {table} q WHERE {of_file} ORDER BY q.source_file, q.row_number LIMIT 1)"  # noqa: S608


_OF_GENERATION = "AND q.generation = f.generation"
# The table holds this generation's rows. An older generation's rows were removed when a newer one was loaded, and do not come back when
# the newer one is forgotten.
IN_THE_TABLE = f"""
    f.loaded_at IS NOT NULL AND (
        f.rows = 0
        OR {first_row("question_answer", _OF_GENERATION)} IS NOT NULL
        OR {first_row("question_answer_reject", _OF_GENERATION)} IS NOT NULL
    )
"""
# Joins the versions of `keys`.
WANTED = "unnest(%(names)s::text[], %(generations)s::bigint[]) AS w (source_file, generation)"
IS_WANTED = "f.source_file = w.source_file AND f.generation = w.generation"

# The record has not changed since it was read, and no other owner has claimed it since. Takes the parameters of `records.as_read_values`.
AS_READ = f"(f.load_id = %(read_load_id)s AND f.place = %(read_place)s AND (NOT {LIVE} OR f.claim_owner = %(read_owner)s))"

_T = TypeVar("_T")


def keys(versions: Sequence[FileVersion]) -> dict[str, list]:
    """The parameters of `WANTED`."""
    return {"names": [version.name for version in versions], "generations": [version.generation for version in versions]}


def chunks(values: Sequence[_T]) -> Iterator[Sequence[_T]]:
    """The values in chunks, each small enough for one query."""
    return (values[start : start + _CHUNK] for start in range(0, len(values), _CHUNK))


def insert_unknown(cursor: psycopg.Cursor, versions: Sequence[FileVersion]) -> None:
    """Add the versions that have no record yet, as pending files under ``incoming/``."""
    cursor.execute(
        """
        INSERT INTO question_file (source_file, generation, size, crc32c, md5, file_id, partition_key, place)
        SELECT * FROM unnest(
            %(names)s::text[], %(generations)s::bigint[], %(sizes)s::bigint[], %(checksums)s::text[], %(md5s)s::text[], %(ids)s::text[],
            %(keys)s::text[], %(places)s::text[])
        ON CONFLICT (source_file, generation) DO NOTHING
        """,
        {
            **keys(versions),
            "sizes": [version.size for version in versions],
            "checksums": [version.crc32c for version in versions],
            "md5s": [version.md5 for version in versions],
            "ids": [file_id(version.name) for version in versions],
            "keys": [partition_key(version.name) for version in versions],
            "places": [INCOMING + version.name for version in versions],
        },
    )
