"""Restoring: finds files that the table lacks after a restore from an older backup, and has them answered again."""

# Only constants of this package are put into SQL's text; values travel as parameters.
# ruff: noqa: S608

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from qa_platform.contract import INCOMING, FileVersion
from qa_platform.ledger.conditions import ASKED_AGAIN, IS_WANTED, LIVE, OPEN, chunks, first_row, insert_unknown, keys
from qa_platform.ledger.connection import LedgerConnection


class Presence(enum.StrEnum):
    """Whether the answers of a file that was answered once, or newer ones, are in the tables, on their way, or missing.

    A forgotten version is not missing.
    """

    PRESENT = "present"
    COMING = "coming"
    MISSING = "missing"


@dataclass(frozen=True)
class AnsweredVersion:
    """A version that was answered once. ``place``: the object that holds its source now, "" if none does."""

    version: FileVersion
    place: str


# Generation `f` was loaded or is unchanged, and the table has rows of the file, of any generation. A file without any answer has all of its
# rows in another table.
_IS_ANSWERED = f"""
    ((f.loaded_at IS NOT NULL OR f.status = 'unchanged') AND (f.answered = 0 OR {first_row("question_answer")} IS NOT NULL))
"""
# A run has claimed it, or it waits and its source is where no listing shows it. An upload that waits to be listed may be gone.
_ON_ITS_WAY = f"({LIVE} OR {OPEN} AND f.place NOT IN ('', '{INCOMING}' || f.source_file))"
# It was restored or retried without success: its status stands.
_HAS_A_VERDICT = "(f.generation = w.generation AND f.status IN ('failed', 'rejected') AND f.place = w.place)"
# It must not come back: it was forgotten, or its rows were replaced by those of a version that was.
_FORGOTTEN = """
    (f.generation = w.generation AND (f.status = 'forgotten' OR f.loaded_at IS NOT NULL AND EXISTS (
        SELECT FROM question_file n WHERE n.source_file = f.source_file AND n.generation > f.generation AND n.status = 'forgotten')))
"""
_ANSWERED = "unnest(%(names)s::text[], %(generations)s::bigint[], %(places)s::text[]) AS w (source_file, generation, place)"
_SAME_OR_NEWER = "SELECT FROM question_file f WHERE f.source_file = w.source_file AND f.generation >= w.generation"


class Restoring(LedgerConnection):
    """Finds and restores what an older table lacks."""

    def presence(self, answered: Sequence[AnsweredVersion]) -> dict[tuple[str, int], Presence]:
        """Whether versions that were answered once are in the tables, by (name, generation)."""
        result: dict[tuple[str, int], Presence] = {}
        for chunk in chunks(answered):
            with self._transaction() as cursor:
                cursor.execute(
                    f"""
                    SELECT w.source_file, w.generation, CASE
                        WHEN EXISTS ({_SAME_OR_NEWER} AND ({_IS_ANSWERED} OR {_HAS_A_VERDICT} OR {_FORGOTTEN})) THEN 'present'
                        WHEN EXISTS ({_SAME_OR_NEWER} AND {_ON_ITS_WAY}) THEN 'coming'
                        ELSE 'missing' END
                    FROM {_ANSWERED}
                    """,
                    _values(chunk),
                )
                result.update({(name, generation): Presence(presence) for name, generation, presence in cursor})
        return result

    def restore(self, answered: Sequence[AnsweredVersion]) -> set[tuple[str, int]]:
        """Have versions answered again from where their sources lie, whether or not they have a record.

        Returns:
            The (name, generation) of those that wait now because of this call. Versions that are in the table, on their way or forgotten
            by now are left out.
        """
        done: set[tuple[str, int]] = set()
        # Rows are locked in one order everywhere: otherwise two transactions could deadlock.
        for chunk in chunks(sorted(answered, key=lambda each: each.version)):
            with self._exclusive() as cursor:
                insert_unknown(cursor, [each.version for each in chunk])
                cursor.execute(
                    f"""
                    UPDATE question_file f SET {ASKED_AGAIN}, place = w.place,
                        -- A load that counts as done would not be done again.
                        load_id = f.load_id + CASE WHEN f.loaded_at IS NULL THEN 0 ELSE 1 END
                    FROM {_ANSWERED} WHERE {IS_WANTED} AND NOT ({_IS_ANSWERED} OR {_ON_ITS_WAY} OR {_FORGOTTEN})
                    RETURNING f.source_file, f.generation
                    """,
                    _values(chunk),
                )
                done.update(cursor.fetchall())
        return done


def _values(answered: Sequence[AnsweredVersion]) -> dict[str, list]:
    """The parameters of `_ANSWERED`."""
    return {**keys([each.version for each in answered]), "places": [each.place for each in answered]}
