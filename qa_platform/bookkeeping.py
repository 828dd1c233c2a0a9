"""The table ``question_file``: what is known of every generation of every file, and who works on it.

Each function is one short transaction, safe beside any number of others. Time is PostgreSQL's, never that of a caller. A claim
keeps two from doing the same work; that what is loaded is right does not depend on it.
"""

# Only constants of this file are put into SQL's text; values travel as parameters.
# ruff: noqa: S608

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

import psycopg
from psycopg.rows import kwargs_row

from qa_platform.contract import BLAMELESS, INCOMING, FileStatus, FileVersion, ModelChoice, file_id, partition_key
from qa_platform.database import only_row, transaction
from qa_platform.errors import InputError
from qa_platform.loading.load import LOAD_LOCK
from qa_platform.planning import Known
from qa_platform.settings import WorkSettings

# Names in one query. Larger ones are not faster.
_CHUNK = 5_000
# Claims are taken by one at a time: taking several names in different orders would deadlock.
_CLAIM_LOCK = 0x7161636C

_OPEN = "status IN ('pending', 'running')"
_LIVE = "claim_owner IS NOT NULL AND claim_until > now()"
_WANTED = "unnest(%(names)s::text[], %(generations)s::bigint[]) AS w (source_file, generation)"
_IS_WANTED = "f.source_file = w.source_file AND f.generation = w.generation"
_DUE = "(f.retry_at IS NULL OR f.retry_at <= now())"
_COLUMNS = f"""
    f.source_file, f.generation, f.size, f.crc32c, f.status, f.load_id, f.rows, f.answered, f.no_answer, f.rejected,
    CASE WHEN f.{_LIVE} THEN f.claim_owner ELSE '' END AS claim_owner, f.attempts, {_DUE} AS due,
    f.wanted_model, f.wanted_revision, f.wanted_precision, f.model, f.model_revision, f.model_precision, f.place,
    f.pachyderm_commit, f.pachyderm_job, f.batch_id, f.dagster_run,
    f.created_at, f.started_at, f.answered_at, f.loaded_at, f.archived_at, f.error
"""

# An enum's own look-up takes longer than the rest of a row.
_STATUSES = {str(status): status for status in FileStatus}

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What is known of one generation of a file.

    ``claim_owner`` is that of a live claim, else empty; ``due`` is false while a file that failed waits for its next attempt.
    ``model`` and what follows it is what really answered, ``wanted_`` what was asked for; both are empty before a load, as the
    counts are 0. ``place`` is the name of the object that holds this generation.
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


@dataclass(frozen=True)
class FileCheck:
    """What the tables hold of one generation of a file, counted by PostgreSQL.

    ``answered_rows`` and ``reject_rows`` are rows of the two tables; ``without_answer`` counts answered rows whose answer is empty,
    ``wrong_spans`` those whose answer is not the text of the context between their offsets.
    """

    answered_rows: int
    reject_rows: int
    without_answer: int
    wrong_spans: int


@dataclass(frozen=True)
class PutOff:
    """Files that wait through no fault of their own: how many, until when the first of them does, and the reason of that one."""

    files: int
    until: datetime
    why: str


def records(connection: psycopg.Connection, versions: Sequence[FileVersion]) -> dict[tuple[str, int], FileRecord]:
    """What is known of these versions, by (name, generation); what is not known is left out."""
    found: dict[tuple[str, int], FileRecord] = {}
    for chunk in _chunks(versions):
        for record in _select(connection, f"FROM question_file f JOIN {_WANTED} ON {_IS_WANTED}", _keys(chunk)):
            found[record.version.name, record.version.generation] = record
    return found


def known(connection: psycopg.Connection, versions: Sequence[FileVersion]) -> dict[tuple[str, int], Known]:
    """What `plan` has to know of these versions, like `records` but several times as fast: made for whole listings."""
    found: dict[tuple[str, int], Known] = {}
    for chunk in _chunks(versions):
        with transaction(connection) as cursor:
            cursor.execute(
                f"""
                SELECT f.source_file, f.generation, f.status, f.attempts, f.load_id, f.batch_id, {_DUE}
                FROM question_file f JOIN {_WANTED} ON {_IS_WANTED}
                """,
                _keys(chunk),
            )
            for name, generation, status, attempts, load_id, batch_id, due in cursor:
                found[name, generation] = Known(_STATUSES[status], attempts, load_id, batch_id, due)
    return found


def newest_by_partition(connection: psycopg.Connection, keys: Sequence[str]) -> dict[str, FileRecord]:
    """The newest generation of the file of each partition, by partition key; unknown ones are left out."""
    found: dict[str, FileRecord] = {}
    for chunk in _chunks(keys):
        rest = """
            FROM unnest(%(keys)s::text[]) AS w (key) CROSS JOIN LATERAL
            (SELECT * FROM question_file g WHERE g.partition_key = w.key ORDER BY g.generation DESC LIMIT 1) f
        """
        for record in _select(connection, rest, {"keys": list(chunk)}):
            found[partition_key(record.version.name)] = record
    return found


def latest_answered(connection: psycopg.Connection, names: Sequence[str], *, model: ModelChoice) -> dict[str, FileVersion]:
    """Per name, the version whose answers are in the table, if they are those of this model and nobody wants them anew."""
    found: dict[str, FileVersion] = {}
    for chunk in _chunks(names):
        rest = """
            FROM unnest(%(names)s::text[]) AS w (name) CROSS JOIN LATERAL
            (SELECT * FROM question_file g WHERE g.source_file = w.name AND g.loaded_at IS NOT NULL
             ORDER BY g.generation DESC LIMIT 1) f
            WHERE f.status IN ('loaded', 'finished')
            AND (f.wanted_model, f.wanted_revision, f.wanted_precision) = (%(model)s, %(revision)s, %(precision)s)
        """
        values = {"names": list(chunk), "model": model.id, "revision": model.revision, "precision": model.precision}
        found.update((record.version.name, record.version) for record in _select(connection, rest, values))
    return found


def history(connection: psycopg.Connection, *, name: str | None = None, limit: int = 100) -> list[FileRecord]:
    """The newest records, of all files or of one, newest first."""
    where = "" if name is None else "WHERE f.source_file = %(name)s"
    rest = f"FROM question_file f {where} ORDER BY f.created_at DESC, f.generation DESC LIMIT %(limit)s"
    return _select(connection, rest, {"name": name, "limit": limit})


def in_work(connection: psycopg.Connection, *, limit: int = 10_000) -> list[FileRecord]:
    """Files that are not done, or whose source is not archived yet, newest first."""
    rest = f"FROM question_file f WHERE f.{_OPEN} OR f.status = 'loaded' ORDER BY f.created_at DESC LIMIT %(limit)s"
    return _select(connection, rest, {"limit": limit})


def names_with_status(connection: psycopg.Connection, statuses: Sequence[FileStatus]) -> set[str]:
    """The names of files of which any generation has one of these statuses."""
    with transaction(connection) as cursor:
        cursor.execute("SELECT DISTINCT source_file FROM question_file WHERE status = ANY(%s)", [[str(s) for s in statuses]])
        return {name for (name,) in cursor}


def waiting_elsewhere(connection: psycopg.Connection) -> list[FileVersion]:
    """Versions that are to be answered again and whose source has left ``incoming/``, so that no listing shows them."""
    rest = f"FROM question_file f WHERE f.{_OPEN} AND f.place <> %(incoming)s || f.source_file ORDER BY f.created_at"
    return [record.version for record in _select(connection, rest, {"incoming": INCOMING})]


def waiting_uploads(connection: psycopg.Connection) -> list[FileVersion]:
    """Versions that wait under ``incoming/``, as far as is recorded, and that nobody works on."""
    rest = f"FROM question_file f WHERE f.{_OPEN} AND f.place = %(incoming)s || f.source_file AND NOT (f.{_LIVE})"
    return [record.version for record in _select(connection, rest, {"incoming": INCOMING})]


def pending_archive(connection: psycopg.Connection, *, limit: int) -> list[FileRecord]:
    """Files that are done and whose source is not recorded as archived, oldest first; nobody works on them."""
    rest = f"""
        FROM question_file f WHERE f.status IN ('loaded', 'rejected', 'unchanged') AND f.archived_at IS NULL AND NOT (f.{_LIVE})
        ORDER BY f.created_at LIMIT %(limit)s
    """
    return _select(connection, rest, {"limit": limit})


def claimed(connection: psycopg.Connection) -> dict[str, str]:
    """The owner of every live claim, by name."""
    with transaction(connection) as cursor:
        cursor.execute(f"SELECT source_file, claim_owner FROM question_file WHERE {_LIVE}")
        return dict(cursor.fetchall())


def batch_is_claimed(connection: psycopg.Connection, batch_id: str) -> bool:
    """Whether anybody holds a live claim on a file of this batch."""
    with transaction(connection) as cursor:
        cursor.execute(f"SELECT EXISTS (SELECT FROM question_file WHERE {_LIVE} AND batch_id = %s)", [batch_id])
        return bool(only_row(cursor)[0])


def claim(connection: psycopg.Connection, versions: Sequence[FileVersion], *, owner: str, lease_seconds: int) -> list[FileVersion]:
    """Claim what is to be worked on; unknown versions become ``pending``.

    Returns:
        The versions that are ``owner``'s now, its own from before included. Left out are names that somebody else holds a live
        claim on, whatever the generation, and versions that are done or parked.
    """
    taken = _acquire(connection, versions, owner=owner, holders=[owner], lease_seconds=lease_seconds, only_open=True)
    return [record.version for record in taken]


def take_over(
    connection: psycopg.Connection,
    versions: Sequence[FileVersion],
    *,
    token: str,
    owner: str,
    lease_seconds: int,
    predecessors: Sequence[str] = (),
) -> list[FileRecord]:
    """Make the claims on these versions ``owner``'s, where they are ``token``'s, a predecessor's, free, or expired, whatever the status.

    Returns:
        The records that are ``owner``'s now, in the order of ``versions``.
    """
    return _acquire(connection, versions, owner=owner, holders=[owner, token, *predecessors], lease_seconds=lease_seconds, only_open=False)


def renew(connection: psycopg.Connection, owner: str, lease_seconds: int) -> int:
    """Let the owner's claims hold from now on for another lease; how many there are. An expired one that nobody took is revived."""
    with _exclusively(connection) as cursor:
        return cursor.execute(
            "UPDATE question_file SET claim_until = now() + make_interval(secs => %s) WHERE claim_owner = %s", [lease_seconds, owner]
        ).rowcount


def release(connection: psycopg.Connection, owner: str, names: Sequence[str] | None = None) -> None:
    """Give back the owner's claims, all or those on some names. What was running waits again, with its batch to be resumed."""
    with _exclusively(connection) as cursor:
        cursor.execute(
            """
            UPDATE question_file SET claim_owner = NULL, claim_until = NULL,
                status = CASE WHEN status = 'running' THEN 'pending' ELSE status END
            WHERE claim_owner = %(owner)s AND (%(names)s::text[] IS NULL OR source_file = ANY(%(names)s::text[]))
            """,
            {"owner": owner, "names": None if names is None else list(names)},
        )


def start(connection: psycopg.Connection, owner: str, versions: Sequence[FileVersion], *, run_id: str, batch_id: str) -> None:
    """Record that the owner's run works on these versions, which it has claimed."""
    _update(
        connection,
        f"""
        SET status = 'running', started_at = now(), dagster_run = %(run)s, batch_id = %(batch)s, error = ''
        FROM {_WANTED} WHERE {_IS_WANTED} AND f.{_OPEN} AND f.claim_owner = %(owner)s
        """,
        {**_keys(versions), "run": run_id, "batch": batch_id, "owner": owner},
    )


def record_commit(connection: psycopg.Connection, owner: str, versions: Sequence[FileVersion], *, commit: str, job: str) -> None:
    """Record the Pachyderm commit that holds these versions of the owner's, and the job that answers it."""
    _update(
        connection,
        f"SET pachyderm_commit = %(commit)s, pachyderm_job = %(job)s FROM {_WANTED} WHERE {_IS_WANTED} AND f.claim_owner = %(owner)s",
        {**_keys(versions), "commit": commit, "job": job, "owner": owner},
    )


def charge(connection: psycopg.Connection, owner: str, version: FileVersion, *, error: str, work: WorkSettings) -> FileStatus | None:
    """Charge a file of the owner's with a failure that is its own, and give up the claim.

    Returns:
        ``failed`` if that was the last attempt, else ``pending``: it is due after a while, which doubles with every attempt up to a
        bound. None if nothing is charged: the file is done meanwhile, or the owner has lost it to another.
    """
    with transaction(connection) as cursor:
        return _charge(cursor, owner, version, error, work)


def _charge(cursor: psycopg.Cursor, owner: str, version: FileVersion, error: str, work: WorkSettings) -> FileStatus | None:
    cursor.execute(
        f"""
        UPDATE question_file f SET
            status = CASE WHEN attempts + 1 >= %(attempts)s THEN 'failed' ELSE 'pending' END,
            attempts = attempts + 1, error = %(error)s, batch_id = '', claim_owner = NULL, claim_until = NULL, put_off_since = NULL,
            retry_at = now() + make_interval(secs => least(%(most)s, %(first)s * 2.0 ^ least(attempts, 30)) * %(jitter)s)
        FROM {_WANTED} WHERE {_IS_WANTED} AND f.{_OPEN} AND f.claim_owner = %(owner)s RETURNING f.status
        """,
        {**_keys([version]), **_waits(work), "owner": owner, "error": error, "attempts": work.max_attempts},
    )
    row = cursor.fetchone()
    return FileStatus(row[0]) if row else None


def put_off(
    connection: psycopg.Connection,
    owner: str,
    versions: Sequence[FileVersion],
    *,
    error: str,
    work: WorkSettings,
    suspect_after: float | None = None,
) -> None:
    """Let files of the owner's wait, uncharged, for something that is not their fault, and give up the claims.

    They are due together, after as long as they have been put off already: the wait about doubles each time, up to a bound.

    Args:
        suspect_after: for so many seconds the files are believed innocent, None for ever. One that was put off first longer ago is
            charged after all if any file was loaded since, unless it was tried again before its wait was over.
    """
    if not versions:
        return
    with transaction(connection) as cursor:
        if suspect_after is not None:
            cursor.execute(
                f"""
                SELECT f.source_file, f.generation FROM question_file f JOIN {_WANTED} ON {_IS_WANTED}
                WHERE {_DUE} AND f.put_off_since <= now() - make_interval(secs => %(after)s)
                AND EXISTS (SELECT FROM question_file g WHERE g.loaded_at > f.put_off_since)
                """,
                {**_keys(versions), "after": suspect_after},
            )
            guilty = set(cursor.fetchall())
            why = f"others are loaded, and this one fails on: {error.removeprefix(BLAMELESS)}"
            for version in versions:
                if (version.name, version.generation) in guilty:
                    _charge(cursor, owner, version, why, work)
        # What was charged just now is nobody's any more.
        cursor.execute(
            f"""
            UPDATE question_file f SET
                status = 'pending', batch_id = '', claim_owner = NULL, claim_until = NULL, error = %(error)s,
                put_off_since = coalesce(put_off_since, now()),
                retry_at = now() + {_PUT_OFF_WAIT}
            FROM {_WANTED} WHERE {_IS_WANTED} AND f.{_OPEN} AND f.claim_owner = %(owner)s
            """,
            {**_keys(versions), **_waits(work), "owner": owner, "error": error},
        )


def put_off_run(connection: psycopg.Connection, owner: str, *, error: str, work: WorkSettings) -> None:
    """Let all that the owner works on wait like `put_off`, but still claimed, and with its batch to be resumed."""
    _update(
        connection,
        f"""
        SET status = 'pending', error = %(error)s, put_off_since = coalesce(put_off_since, now()), retry_at = now() + {_PUT_OFF_WAIT}
        WHERE f.{_OPEN} AND f.claim_owner = %(owner)s
        """,
        {**_waits(work), "owner": owner, "error": error},
    )


# `put_off_since` is the value from before the statement: null the first time.
_PUT_OFF_WAIT = """
    make_interval(secs => least(%(most)s, greatest(%(first)s, extract(epoch FROM now() - coalesce(put_off_since, now()))::float))
        * %(jitter)s)
"""


def _waits(work: WorkSettings) -> dict[str, float]:
    # Drawn here, so that what is put off together is due together, in one batch.
    return {"first": work.retry_first_seconds, "most": work.retry_most_seconds, "jitter": random.uniform(0.5, 1.0)}


def files_put_off(connection: psycopg.Connection) -> PutOff | None:
    """The files that are put off right now, or None."""
    with transaction(connection) as cursor:
        cursor.execute(
            f"""
            SELECT count(*) OVER (), retry_at, error FROM question_file
            WHERE {_OPEN} AND retry_at > now() AND put_off_since IS NOT NULL ORDER BY retry_at LIMIT 1
            """
        )
        row = cursor.fetchone()
    return PutOff(*row) if row else None


def requeue(connection: psycopg.Connection, owner: str, versions: Sequence[FileVersion]) -> None:
    """Let files of the owner's that are not to blame for their batch's failure go into another one at once, and give up the claims."""
    _update(
        connection,
        f"""
        SET status = 'pending', batch_id = '', claim_owner = NULL, claim_until = NULL
        FROM {_WANTED} WHERE {_IS_WANTED} AND f.{_OPEN} AND f.claim_owner = %(owner)s
        """,
        {**_keys(versions), "owner": owner},
    )


def reject_file(connection: psycopg.Connection, version: FileVersion, *, error: str) -> None:
    """Record that a file cannot be read, and the message that says why. Rows of its earlier generations stay in the table."""
    _close(connection, version, FileStatus.REJECTED, error)


def mark_superseded(connection: psycopg.Connection, version: FileVersion, *, error: str = "") -> None:
    """Record that a file was overwritten or deleted before it was read."""
    _close(connection, version, FileStatus.SUPERSEDED, error or "it was overwritten or deleted before it was read")


def mark_unchanged(connection: psycopg.Connection, version: FileVersion) -> bool:
    """Record that an upload has the content that is answered already; its figures are those of the loaded generation.

    Returns:
        Whether that is recorded. Not if another content has come into the table since somebody looked, or is being loaded just now,
        say by the job of a run that was lost: then the next look decides anew.
    """
    with transaction(connection) as cursor:
        # Held to the end, so that a load that comes after this knows of it.
        cursor.execute("SELECT pg_try_advisory_xact_lock(%s, hashtext(%s))", [LOAD_LOCK, version.name])
        if not only_row(cursor)[0]:
            return False
        _insert_unknown(cursor, [version])
        cursor.execute(
            f"""
            UPDATE question_file f
            SET status = 'unchanged', error = '', rows = g.rows, answered = g.answered, no_answer = g.no_answer, rejected = g.rejected,
                model = g.model, model_revision = g.model_revision, model_precision = g.model_precision, wanted_model = g.wanted_model,
                wanted_revision = g.wanted_revision, wanted_precision = g.wanted_precision,
                pachyderm_commit = g.pachyderm_commit, pachyderm_job = g.pachyderm_job
            FROM (
                SELECT * FROM question_file WHERE source_file = %(name)s AND loaded_at IS NOT NULL AND generation <> %(generation)s
                ORDER BY generation DESC LIMIT 1
            ) g
            WHERE f.source_file = %(name)s AND f.generation = %(generation)s AND f.{_OPEN} AND (f.size, f.crc32c) = (g.size, g.crc32c)
            """,
            {"name": version.name, "generation": version.generation},
        )
        return cursor.rowcount == 1


def archived(connection: psycopg.Connection, version: FileVersion, *, place: str) -> None:
    """Record where the source of a file that is done lies now; a loaded file is finished by that."""
    _update(
        connection,
        f"""
        SET place = %(place)s, archived_at = now(), status = CASE WHEN f.status = 'loaded' THEN 'finished' ELSE f.status END
        FROM {_WANTED} WHERE {_IS_WANTED}
        """,
        {**_keys([version]), "place": place},
    )


def reopen(connection: psycopg.Connection, versions: Sequence[FileVersion], *, archived: bool) -> int:
    """Correct the records of versions that lie under ``incoming/``; how many were wrong.

    One that counts as superseded, though no newer one is known, waits again. With ``archived``, one that is recorded as archived
    is to be archived again.
    """
    values = {**_keys(versions), "incoming": INCOMING}
    with transaction(connection) as cursor:
        wrong = cursor.execute(
            f"""
            UPDATE question_file f SET status = 'pending', batch_id = '', error = '' FROM {_WANTED} WHERE {_IS_WANTED}
            AND f.status = 'superseded' AND NOT (f.{_LIVE}) AND NOT EXISTS
                (SELECT FROM question_file g WHERE g.source_file = f.source_file AND g.generation > f.generation)
            """,
            values,
        ).rowcount
        if archived:
            wrong += cursor.execute(
                f"""
                UPDATE question_file f SET status = CASE WHEN f.status = 'finished' THEN 'loaded' ELSE f.status END,
                    archived_at = NULL, place = %(incoming)s || f.source_file
                FROM {_WANTED} WHERE {_IS_WANTED} AND f.archived_at IS NOT NULL AND f.status IN ('finished', 'rejected', 'unchanged')
                """,
                values,
            ).rowcount
    return wrong


def request_retry(connection: psycopg.Connection, name: str) -> FileRecord:
    """`request_retries` for one file."""
    return request_retries(connection, [name])[0]


def request_retries(connection: psycopg.Connection, names: Sequence[str]) -> list[FileRecord]:
    """Let the newest generations of files be answered again, with a new load id, whatever became of them: all or none.

    Returns:
        Their records, in the order of ``names``.

    Raises:
        InputError: some were never seen, or their sources are gone; the message names them all.
    """
    with transaction(connection) as cursor:
        newest = {record.version.name: record for record in _records(connection, _NEWEST, {"names": list(names)})}
        faults = [f"no file {name!r} was ever seen; `qa-platform status` lists those that were" for name in names if name not in newest]
        faults += [
            f"the source of {name!r} is gone: QA_ARCHIVE has it deleted, or it was overwritten before it was archived; upload it again"
            for name, record in newest.items()
            if not record.place
        ]
        if faults:
            raise InputError("; ".join(faults))
        cursor.execute(
            f"""
            UPDATE question_file f SET status = 'pending', load_id = load_id + 1, attempts = 0, retry_at = NULL, put_off_since = NULL,
                batch_id = '', archived_at = NULL, error = ''
            FROM {_WANTED} WHERE {_IS_WANTED}
            """,
            _keys([record.version for record in newest.values()]),
        )
        newest = {record.version.name: record for record in _records(connection, _NEWEST, {"names": list(names)})}
    return [newest[name] for name in names]


_NEWEST = """
    FROM (SELECT DISTINCT ON (source_file) * FROM question_file WHERE source_file = ANY(%(names)s::text[])
          ORDER BY source_file, generation DESC) f
"""


def commits_in_use(connection: psycopg.Connection, commits: Sequence[str]) -> set[str]:
    """Which of these Pachyderm commits hold files that are not done, or that somebody works on."""
    with transaction(connection) as cursor:
        cursor.execute(
            f"SELECT DISTINCT pachyderm_commit FROM question_file WHERE ({_OPEN} OR {_LIVE}) AND pachyderm_commit = ANY(%s)",
            [list(commits)],
        )
        return {commit for (commit,) in cursor}


def check_file(connection: psycopg.Connection, version: FileVersion) -> FileCheck:
    """Count and compare one generation's rows in the tables, inside PostgreSQL."""
    with transaction(connection) as cursor:
        # `substr` refuses a negative length.
        cursor.execute(
            """
            SELECT count(*), count(*) FILTER (WHERE coalesce(answer, '') = ''),
                count(*) FILTER (WHERE substr(context, answer_start + 1, greatest(answer_end - answer_start, 0)) IS DISTINCT FROM answer)
            FROM question_answer WHERE source_file = %(name)s AND generation = %(generation)s
            """,
            {"name": version.name, "generation": version.generation},
        )
        answered, without_answer, wrong_spans = only_row(cursor)
        cursor.execute(
            "SELECT count(*) FROM question_answer_reject WHERE source_file = %s AND generation = %s", [version.name, version.generation]
        )
        return FileCheck(answered, only_row(cursor)[0], without_answer, wrong_spans)


def _acquire(
    connection: psycopg.Connection,
    versions: Sequence[FileVersion],
    *,
    owner: str,
    holders: Sequence[str],
    lease_seconds: int,
    only_open: bool,
) -> list[FileRecord]:
    """Claim versions for ``owner`` where no live claim of anybody but ``holders`` is in the way. One generation of a name: the newest."""
    newest = {version.name: version for version in sorted(versions)}
    wanted = [version for version in dict.fromkeys(versions) if newest[version.name] == version]
    status = f"AND f.{_OPEN}" if only_open else ""
    values = {**_keys(wanted), "owner": owner, "holders": list(holders), "lease": lease_seconds}
    with _exclusively(connection) as cursor:
        _insert_unknown(cursor, wanted)
        cursor.execute(
            f"""
            SELECT f.source_file, f.generation FROM question_file f JOIN {_WANTED} ON {_IS_WANTED}
            WHERE NOT EXISTS (
                SELECT FROM question_file o
                WHERE o.source_file = f.source_file AND o.claim_owner <> ALL(%(holders)s::text[]) AND o.claim_until > now()
            ) {status}
            """,
            values,
        )
        free = {(name, generation) for name, generation in cursor}
        won = [version for version in wanted if (version.name, version.generation) in free]
        values |= _keys(won)
        cursor.execute(
            f"""
            UPDATE question_file f SET claim_owner = NULL, claim_until = NULL FROM {_WANTED}
            WHERE f.source_file = w.source_file AND f.generation <> w.generation AND f.claim_owner IS NOT NULL
            """,
            values,
        )
        cursor.execute(
            f"""
            UPDATE question_file f SET claim_owner = %(owner)s, claim_until = now() + make_interval(secs => %(lease)s)
            FROM {_WANTED} WHERE {_IS_WANTED}
            """,
            values,
        )
        owned = {r.version.name: r for r in _records(connection, f"FROM question_file f JOIN {_WANTED} ON {_IS_WANTED}", _keys(won))}
    return [owned[version.name] for version in won]


def _close(connection: psycopg.Connection, version: FileVersion, status: FileStatus, error: str) -> None:
    """End the work on a version that is not to be loaded. One that is done already is left as it is."""
    with transaction(connection) as cursor:
        _insert_unknown(cursor, [version])
        cursor.execute(
            f"UPDATE question_file f SET status = %(status)s, error = %(error)s FROM {_WANTED} WHERE {_IS_WANTED} AND f.{_OPEN}",
            {**_keys([version]), "status": str(status), "error": error},
        )


def _insert_unknown(cursor: psycopg.Cursor, versions: Sequence[FileVersion]) -> None:
    cursor.execute(
        """
        INSERT INTO question_file (source_file, generation, size, crc32c, file_id, partition_key, place)
        SELECT * FROM unnest(
            %(names)s::text[], %(generations)s::bigint[], %(sizes)s::bigint[], %(checksums)s::text[], %(ids)s::text[], %(keys)s::text[],
            %(places)s::text[])
        ON CONFLICT (source_file, generation) DO NOTHING
        """,
        {
            **_keys(versions),
            "sizes": [version.size for version in versions],
            "checksums": [version.crc32c for version in versions],
            "ids": [file_id(version.name) for version in versions],
            "keys": [partition_key(version.name) for version in versions],
            "places": [INCOMING + version.name for version in versions],
        },
    )


@contextmanager
def _exclusively(connection: psycopg.Connection) -> Iterator[psycopg.Cursor]:
    with transaction(connection) as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(%s)", [_CLAIM_LOCK])
        yield cursor


def _select(connection: psycopg.Connection, rest: str, values: Mapping[str, Any]) -> list[FileRecord]:
    with transaction(connection):
        return _records(connection, rest, values)


def _records(connection: psycopg.Connection, rest: str, values: Mapping[str, Any]) -> list[FileRecord]:
    with connection.cursor(row_factory=kwargs_row(_record)) as cursor:
        return cursor.execute(f"SELECT {_COLUMNS} {rest}", values).fetchall()


def _record(source_file: str, generation: int, size: int, crc32c: str, status: str, **others: Any) -> FileRecord:
    return FileRecord(FileVersion(source_file, generation, size, crc32c), _STATUSES[status], **others)


def _update(connection: psycopg.Connection, rest: str, values: Mapping[str, Any]) -> None:
    with transaction(connection) as cursor:
        cursor.execute(f"UPDATE question_file f {rest}", values)


def _keys(versions: Sequence[FileVersion]) -> dict[str, list]:
    return {"names": [version.name for version in versions], "generations": [version.generation for version in versions]}


def _chunks(values: Sequence[_T]) -> Iterator[Sequence[_T]]:
    return (values[start : start + _CHUNK] for start in range(0, len(values), _CHUNK))
