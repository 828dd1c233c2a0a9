"""Migrating a database's tables."""

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg

from qa_platform.clients.postgres import LIFT_LIMITS, connect, only_row, transaction
from qa_platform.errors import InputError, TransientError
from qa_platform.settings import PostgresSettings

if TYPE_CHECKING:
    import sqlalchemy

logger = logging.getLogger(__name__)

HEAD = "0009"

# Not alembic's default name: the database may be shared with another program that uses alembic.
VERSION_TABLE = "question_answer_version"

# An arbitrary number that no other program uses. Programs that migrate at the same time wait for each other on this lock.
_LOCK = 0x71615F6D
# A migration that waits for a busy table blocks all other readers, so it gives up after a while, lets them through, and retries.
_LOCK_TIMEOUT = "30s"
_TRIES = 5
_PAUSE_SECONDS = 5.0


_ADVICE: tuple[tuple[tuple[type[psycopg.Error], ...], str], ...] = (
    (
        (psycopg.errors.DuplicateColumn, psycopg.errors.DuplicateTable),
        "rename your own column, table or index of that name, then repeat the command",
    ),
    ((psycopg.errors.InsufficientPrivilege,), "run it as the owner of the table question_answer"),
    (
        (psycopg.errors.WrongObjectType, psycopg.errors.FeatureNotSupported, psycopg.errors.InvalidTableDefinition),
        "question_answer must be an ordinary table, neither a view nor partitioned; give what you have another name",
    ),
)


class _BusyTables(TransientError):
    """Other sessions keep a table busy."""


def upgrade(settings: PostgresSettings, *, accept_newer: bool = False) -> None:
    """Migrate the tables to the newest revision: from nothing, or around an existing ``question_answer`` of five columns and its rows.

    Cheap if they are up to date. Safe if several programs do it at once. All or nothing.

    Args:
        accept_newer: leave tables that are newer than this program as they are. A migration only adds to what older programs use, so that
            those keep working while a new version is rolled out.

    Raises:
        InputError: the user may not create or alter the tables, the database is newer than this program and that is not accepted, or it
            is not encoded in UTF8.
        TransientError: PostgreSQL is unavailable, or other sessions keep a table busy.
    """
    with connect(settings) as connection:
        revision = current(connection)
    if revision == HEAD or (accept_newer and revision > HEAD):
        return
    # Programs that accept newer tables have their own retries.
    for tries_left in reversed(range(1 if accept_newer else _TRIES)):
        try:
            _migrate(settings)
        except _BusyTables as error:
            if not tries_left:
                raise
            logger.warning("%s; trying again", error)
            time.sleep(_PAUSE_SECONDS)
        else:
            return


def current(connection: psycopg.Connection) -> str:
    """The revision that the database is at; empty before the first migration."""
    with transaction(connection) as cursor:
        if only_row(cursor.execute("SELECT to_regclass(%s)", [VERSION_TABLE]))[0] is None:
            return ""
        version = cursor.execute("SELECT version_num FROM question_answer_version").fetchone()
        return version[0] if version else ""


def _migrate(settings: PostgresSettings, revision: str = "head") -> None:
    # Imported here: they take 0.5 s to import, and almost every start has nothing to migrate.
    import sqlalchemy
    from alembic import command, util
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    config.attributes["version_table"] = VERSION_TABLE

    def connection_in_transactions() -> psycopg.Connection:
        connection = connect(settings)
        connection.autocommit = False
        return connection

    where = f"{settings.host}, database {settings.dbname}"
    engine = sqlalchemy.create_engine("postgresql+psycopg://", creator=connection_in_transactions, poolclass=sqlalchemy.NullPool)
    try:
        with engine.begin() as connection:
            connection.execute(sqlalchemy.text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
            connection.execute(sqlalchemy.text(f"SET LOCAL lock_timeout = '{_LOCK_TIMEOUT}'"))
            # The role's or the database's limit would end every migration of large tables.
            connection.execute(sqlalchemy.text(LIFT_LIMITS))
            _refuse_two_schemas(connection)
            config.attributes["connection"] = connection
            command.upgrade(config, revision)
    except util.CommandError as error:
        raise InputError(f"cannot upgrade the tables: {error}", advice="check that this program is not older than the database") from error
    except (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InternalError) as error:
        if isinstance(error.orig, psycopg.errors.LockNotAvailable):
            raise _BusyTables(
                f"the tables are busy: {error.orig}", advice="find the sessions in pg_stat_activity, then run this again"
            ) from error
        read_only = isinstance(error.orig, psycopg.errors.ReadOnlySqlTransaction)
        advice = "connect to the primary server, without default_transaction_read_only" if read_only else ""
        raise TransientError(f"the tables could not be migrated now: {error.orig}", where=where, advice=advice) from error
    except sqlalchemy.exc.DatabaseError as error:
        advice = next((advice for kinds, advice in _ADVICE if isinstance(error.orig, kinds)), "")
        raise InputError(f"the tables cannot be migrated: {error.orig}", where=where, advice=advice) from error


def _refuse_two_schemas(connection: "sqlalchemy.Connection") -> None:
    """Refuse to create an empty `question_answer` that would hide the owner's table in a later schema of the search path."""
    found = connection.exec_driver_sql(
        """
        SELECT c.relnamespace::regnamespace::text, quote_ident(current_schema()) FROM pg_class c
        WHERE c.oid = to_regclass('question_answer') AND to_regclass(%s) IS NULL
        """,
        (VERSION_TABLE,),
    ).fetchone()
    if found and found[0] != found[1]:
        old, new = found
        what = f"the table question_answer is in the schema {old}, and new tables would be made in {new}"
        raise InputError(what, advice=f"put {old} first: ALTER ROLE … SET search_path = {old}")
