"""Claims: who works on which file. A claim is a lease that its owner renews; it keeps two runs from doing the same work.

When a run dies, its claims are no longer renewed. They expire after ``QA_LEASE_SECONDS``, and another run resumes their
batch. No file is charged for that, except by `qa_platform.cron`.

Two runs that work on the same file load the same rows: the answers do not depend on claims.
"""

# Only constants of this package are put into SQL's text; values travel as parameters.
# ruff: noqa: S608

from collections.abc import Sequence

import psycopg

from qa_platform.clients.postgres import only_row
from qa_platform.contract import FileVersion
from qa_platform.ledger.conditions import IS_WANTED, LIVE, OPEN, WANTED, insert_unknown, keys
from qa_platform.ledger.connection import LedgerConnection
from qa_platform.ledger.records import FileRecord, select


class Claims(LedgerConnection):
    """Takes, renews and releases claims."""

    def claimed(self) -> dict[str, str]:
        """The owner of every live claim, by file name."""
        with self._transaction() as cursor:
            cursor.execute(f"SELECT f.source_file, f.claim_owner FROM question_file f WHERE {LIVE}")
            return dict(cursor.fetchall())

    def waiting_claims(self, *, expired_for: float) -> dict[str, int]:
        """The owners of claims on files that are still pending, with the number of these files.

        Args:
            expired_for: include claims that expired at most this many seconds ago.
        """
        with self._transaction() as cursor:
            cursor.execute(
                """
                SELECT claim_owner, count(*) FROM question_file
                WHERE status = 'pending' AND claim_owner IS NOT NULL AND claim_until > now() - make_interval(secs => %s)
                GROUP BY claim_owner
                """,
                [expired_for],
            )
            return dict(cursor.fetchall())

    def batch_is_claimed(self, batch_id: str) -> bool:
        """Whether any file of this batch is under a live claim."""
        with self._transaction() as cursor:
            cursor.execute(f"SELECT EXISTS (SELECT FROM question_file f WHERE {LIVE} AND f.batch_id = %s)", [batch_id])
            return bool(only_row(cursor)[0])

    def claim(self, versions: Sequence[FileVersion], *, owner: str, lease_seconds: int) -> list[FileVersion]:
        """Claim files that are to be answered. Unknown versions become ``pending``.

        Returns:
            The versions that ``owner`` holds now, including those it held before. Versions that are done are left out, and so are names
            under another owner's live claim, whatever the generation.
        """
        with self._exclusive() as cursor:
            taken = acquire(cursor, versions, owner=owner, holders=[owner], lease_seconds=lease_seconds, only_open=True)
        return [record.version for record in taken]

    def take_over(
        self, versions: Sequence[FileVersion], *, token: str, owner: str, lease_seconds: int, predecessors: Sequence[str] = ()
    ) -> list[FileRecord]:
        """Pass the claims on these versions to ``owner``, whatever their status.

        A claim passes if ``token``, ``owner`` or a predecessor holds it, if it has expired, or if there is none.

        Returns:
            The records that ``owner`` holds now, in the order of ``versions``.
        """
        holders = [owner, token, *predecessors]
        with self._exclusive() as cursor:
            return acquire(cursor, versions, owner=owner, holders=holders, lease_seconds=lease_seconds, only_open=False)

    def renew(self, owner: str, lease_seconds: int) -> int:
        """Extend the owner's claims by a full lease from now. An expired claim is revived unless another owner has taken it.

        Returns:
            The number of claims.
        """
        with self._exclusive() as cursor:
            return cursor.execute(
                "UPDATE question_file SET claim_until = now() + make_interval(secs => %s) WHERE claim_owner = %s", [lease_seconds, owner]
            ).rowcount

    def renew_expiring(self, owners: Sequence[str], lease_seconds: int) -> int:
        """Renew those claims of several owners that have less than half a lease left. Expired claims are revived as by `renew`.

        Returns:
            The number of claims that were renewed.
        """
        with self._exclusive() as cursor:
            # One statement: with one per owner, the time would grow with the square of the queue's length.
            return cursor.execute(
                """
                UPDATE question_file SET claim_until = now() + make_interval(secs => %(lease)s)
                WHERE claim_owner = ANY(%(owners)s::text[]) AND claim_until < now() + make_interval(secs => %(lease)s) / 2
                """,
                {"owners": list(owners), "lease": lease_seconds},
            ).rowcount

    def release(self, owner: str, names: Sequence[str] | None = None) -> None:
        """Release the owner's claims: all, or those on ``names``. Running files become pending, and their batch can be resumed."""
        with self._exclusive() as cursor:
            cursor.execute(
                """
                UPDATE question_file SET claim_owner = NULL, claim_until = NULL,
                    status = CASE WHEN status = 'running' THEN 'pending' ELSE status END
                WHERE claim_owner = %(owner)s AND (%(names)s::text[] IS NULL OR source_file = ANY(%(names)s::text[]))
                """,
                {"owner": owner, "names": None if names is None else list(names)},
            )


def acquire(
    cursor: psycopg.Cursor, versions: Sequence[FileVersion], *, owner: str, holders: Sequence[str], lease_seconds: int, only_open: bool
) -> list[FileRecord]:
    """Claim versions for ``owner``, except names under a live claim of an owner not in ``holders``. Of several generations, the newest."""
    newest = {version.name: version for version in sorted(versions)}
    wanted = [version for version in dict.fromkeys(versions) if newest[version.name] == version]
    insert_unknown(cursor, wanted)
    free = _free(cursor, wanted, holders=holders, only_open=only_open)
    won = [version for version in wanted if (version.name, version.generation) in free]
    _hold(cursor, won, owner=owner, lease_seconds=lease_seconds)
    owned = {r.version.name: r for r in select(cursor, f"FROM question_file f JOIN {WANTED} ON {IS_WANTED}", keys(won))}
    return [owned[version.name] for version in won]


def _free(cursor: psycopg.Cursor, versions: Sequence[FileVersion], *, holders: Sequence[str], only_open: bool) -> set[tuple[str, int]]:
    """The (name, generation) of the versions whose name has no live claim of an owner outside ``holders``."""
    status = f"AND {OPEN}" if only_open else ""
    cursor.execute(
        f"""
        SELECT f.source_file, f.generation FROM question_file f JOIN {WANTED} ON {IS_WANTED}
        WHERE NOT EXISTS (
            SELECT FROM question_file o
            WHERE o.source_file = f.source_file AND o.claim_owner <> ALL(%(holders)s::text[]) AND o.claim_until > now()
        ) {status}
        """,
        {**keys(versions), "holders": list(holders)},
    )
    return {(name, generation) for name, generation in cursor}


def _hold(cursor: psycopg.Cursor, versions: Sequence[FileVersion], *, owner: str, lease_seconds: int) -> None:
    """Set the claims. A claim on another generation of the same name ends."""
    cursor.execute(
        f"""
        UPDATE question_file f SET claim_owner = NULL, claim_until = NULL FROM {WANTED}
        WHERE f.source_file = w.source_file AND f.generation <> w.generation AND f.claim_owner IS NOT NULL
        """,
        keys(versions),
    )
    cursor.execute(
        f"""
        UPDATE question_file f SET claim_owner = %(owner)s, claim_until = now() + make_interval(secs => %(lease)s)
        FROM {WANTED} WHERE {IS_WANTED}
        """,
        {**keys(versions), "owner": owner, "lease": lease_seconds},
    )
