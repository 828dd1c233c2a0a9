"""Forgetting: removes the rows and records of a file. A record without content stays, so that nothing loads the file again."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from qa_platform.clients.postgres import LIFT_LIMITS
from qa_platform.contract import FileVersion, file_id, partition_key
from qa_platform.errors import InputError
from qa_platform.ledger.connection import LedgerConnection
from qa_platform.ledger.loads import try_load_lock, wait_for_load_lock


@dataclass(frozen=True)
class Holdings:
    """What the tables hold of a file.

    Args:
        answers: rows of ``question_answer``, by generation.
        rejects: rows of ``question_answer_reject``, by generation.
        records: the generations with a record.
        forgotten: the generations that were forgotten before.
    """

    answers: Mapping[int, int]
    rejects: Mapping[int, int]
    records: frozenset[int]
    forgotten: frozenset[int]


class Forgetting(LedgerConnection):
    """Finds and removes what the tables hold of a file."""

    def holdings(self, name: str) -> Holdings:
        """What the three tables hold of a file."""
        with self._transaction() as cursor:
            cursor.execute(LIFT_LIMITS)
            answers, rejects, is_forgotten = (
                dict(cursor.execute(query, [name]).fetchall())
                for query in (
                    "SELECT generation, count(*) FROM question_answer WHERE source_file = %s GROUP BY generation",
                    "SELECT generation, count(*) FROM question_answer_reject WHERE source_file = %s GROUP BY generation",
                    "SELECT generation, status = 'forgotten' FROM question_file WHERE source_file = %s",
                )
            )
        forgotten = frozenset(generation for generation in is_forgotten if is_forgotten[generation])
        return Holdings(answers, rejects, frozenset(is_forgotten) - forgotten, forgotten)

    def is_forgotten(self, version: FileVersion) -> bool:
        """Whether a version was forgotten."""
        query = "SELECT FROM question_file WHERE source_file = %s AND generation = %s AND status = 'forgotten'"
        with self._transaction() as cursor:
            return cursor.execute(query, [version.name, version.generation]).fetchone() is not None

    def forget(self, name: str, generations: Collection[int]) -> None:
        """Remove the rows and records of generations, if there are any, and record the generations as forgotten. Can be repeated.

        Raises:
            InputError: a run has claimed the file, or it is being loaded right now. Nothing was removed.
        """
        values = {"name": name, "generations": list(generations), "file_id": file_id(name), "partition_key": partition_key(name)}
        with self._exclusive() as cursor:
            owner = cursor.execute(
                "SELECT claim_owner FROM question_file WHERE source_file = %(name)s AND claim_until > now()", values
            ).fetchone()
            if owner:
                what = f"run {owner[0]} is working on it or waiting to"
                raise InputError(what, where=name, advice="wait until it has ended, or terminate it; then repeat the command")
            # Held until the transaction ends: a load that waits for it then finds the record and writes nothing.
            if not try_load_lock(cursor, name):
                raise InputError("it is being loaded right now", where=name, advice="repeat the command in a minute")
            for statement in (
                """
                DELETE FROM question_file
                WHERE source_file = %(name)s AND generation = ANY(%(generations)s) AND status <> 'forgotten'
                """,
                """
                INSERT INTO question_file (source_file, generation, file_id, partition_key, status, place, archived_at)
                SELECT %(name)s, generation, %(file_id)s, %(partition_key)s, 'forgotten', '', now()
                FROM unnest(%(generations)s::bigint[]) AS w (generation)
                ON CONFLICT (source_file, generation) DO NOTHING
                """,
            ):
                cursor.execute(statement, values)
        # In a transaction of its own, without the lock on all claims: a file may have any number of rows.
        with self._transaction() as cursor:
            cursor.execute(LIFT_LIMITS)
            wait_for_load_lock(cursor, name)
            for table in ("question_answer", "question_answer_reject"):
                cursor.execute(f"DELETE FROM {table} WHERE source_file = %(name)s AND generation = ANY(%(generations)s)", values)  # noqa: S608
