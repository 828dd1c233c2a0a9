"""Connections to PostgreSQL, and the translation of its failures into the platform's own two kinds of error."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from qa_platform.clients.credentials import database_certificates
from qa_platform.errors import InputError, QaPlatformError, TransientError
from qa_platform.settings import PostgresSettings

CONNECT_SECONDS = 10
APPLICATION = "qa-platform"
# The only encoding in which every text can be stored, and in which PostgreSQL counts characters.
ENCODING = "UTF8"

_VERIFYING_MODES = ("verify-ca", "verify-full")

# libpq gives no SQLSTATE while it connects, only text. Errors that are not listed here are transient: a server that is down, starting or
# full, a name that does not resolve yet.
_NOT_RETRIED = (
    (r"certificate authentication failed", "the client certificate's common name must be the user's name"),
    (r"authentication failed|no password supplied", "check PG_USER and PG_PASSWORD"),
    (r"certificate verify failed", "the server's certificate is not signed by PG_SSLROOTCERT, or has expired"),
    (r"requires a valid client certificate", "set PG_SSLCLIENT_CERT and PG_SSL_CLIENT_KEY"),
    (r"alert certificate expired|certificate has expired", "the client certificate has expired: renew PG_SSLCLIENT_CERT"),
    (r"alert unknown ca|alert bad certificate|alert .*certificate", "the server does not accept the client certificate"),
    (r"does not match host name", "PG_HOST must be a name in the server's certificate, or PG_SSLMODE verify-ca"),
    (r"could not (read|load) (root )?certificate|could not load private key|key values mismatch", "check the certificates in PG_SSL…"),
    (r"root certificate file .* does not exist", "set PG_SSLROOTCERT"),
    (r"server does not support SSL", "the server has no TLS: switch it on there, or give no certificates"),
    (r"no pg_hba\.conf entry|pg_hba\.conf rejects", "the server does not let this user in from here: see its pg_hba.conf"),
    (r"database .* does not exist|no such database", "create it, or check PG_DBNAME"),
    (r"role .* does not exist|no such user|is not permitted to log in", "check PG_USER"),
    (r"invalid (sslmode|port|connection option)|sslmode value", "check the PG_ variables"),
)


class WrongDatabase(InputError):
    """The database lacks a permission, a table or a column. Its owner must fix that; no file is to blame."""

    blameless = True


class WrongEncoding(WrongDatabase):
    """The database does not store text as UTF-8. Its owner must move the tables."""


def connect(settings: PostgresSettings) -> psycopg.Connection:
    """Connect in autocommit mode: `transaction` opens transactions, and none stays open in between.

    Any certificate implies at least the TLS mode ``verify-ca``. The certificates lie in private files while the connection is made. No
    statement is prepared on the server, so PgBouncer may pool connections per transaction.

    Raises:
        InputError: wrong user, password, database or certificate.
        WrongEncoding: the database is not encoded in UTF8.
        TransientError: the server is unavailable, starting, or full.
    """
    connection = _connect(settings)
    try:
        _check_encoding(connection, settings)
        _override_defaults(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _connect(settings: PostgresSettings) -> psycopg.Connection:
    # No message may quote the password: neither libpq's, nor that of a certificate in the wrong variable.
    with _private_files(settings) as certificates:
        try:
            return psycopg.connect(
                host=settings.host,
                port=settings.port,
                user=settings.user,
                password=settings.password.get_secret_value(),
                dbname=settings.dbname,
                sslmode=_sslmode(settings),
                connect_timeout=CONNECT_SECONDS,
                application_name=APPLICATION,
                client_encoding="utf8",
                keepalives_idle=30,
                keepalives_interval=10,
                keepalives_count=3,
                # Keepalives do not count while something that was sent is unacknowledged. In milliseconds; a server that lives, but takes
                # nothing for as long, is given up too.
                tcp_user_timeout=600_000,
                autocommit=True,
                prepare_threshold=None,
                **certificates,
            )
        except psycopg.Error as error:
            failure = _connection_error(settings, str(error))
    # Outside the handler: the original's frames hold the password.
    raise failure


def _check_encoding(connection: psycopg.Connection, settings: PostgresSettings) -> None:
    # The server reports it when a connection opens, so this costs no round trip.
    encoding = connection.info.parameter_status("server_encoding")
    if encoding == ENCODING:
        return
    raise WrongEncoding(
        f"the database is encoded in {encoding or 'an encoding that the server does not name'}, and must be in {ENCODING}",
        where=f"PostgreSQL, {_where(settings)}",
        advice=f"make a new one (CREATE DATABASE new ENCODING '{ENCODING}' TEMPLATE template0), copy the tables with pg_dump and psql, "
        "and set PG_DBNAME; where workers have the secret dbaccess, `qa-platform pachyderm apply` sends it to them",
    )


def _override_defaults(connection: psycopg.Connection) -> None:
    """Override the defaults of the server, the database or the role that would change the outcome of our statements."""
    # In any other level, a transaction that waits for a lock does not see what the lock's last owner wrote.
    connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
    # psycopg reads timestamps in ISO style only. PgBouncer keeps this setting with the client's connection.
    if not (connection.info.parameter_status("DateStyle") or "").startswith("ISO"):
        with transaction(connection) as cursor:
            cursor.execute("SET datestyle TO ISO")


def _where(settings: PostgresSettings) -> str:
    return f"{settings.user}@{settings.host}:{settings.port}/{settings.dbname}"


def _sslmode(settings: PostgresSettings) -> str:
    if any(secret.get_secret_value() for secret in (settings.sslrootcert, settings.sslclient_cert, settings.ssl_client_key)):
        return settings.sslmode if settings.sslmode in _VERIFYING_MODES else "verify-ca"
    return settings.sslmode or "prefer"


@contextmanager
def _private_files(settings: PostgresSettings) -> Iterator[dict[str, Any]]:
    """Write the certificates to private files. libpq takes only files, and refuses a key that others can read, as in a mounted secret."""
    certificates = database_certificates(settings)
    if not certificates:
        yield {}
        return
    pems = {"sslrootcert": certificates.root, "sslcert": certificates.certificate, "sslkey": certificates.key}
    with tempfile.TemporaryDirectory(prefix="qa-platform-") as folder:
        paths: dict[str, Any] = {}
        for option, pem in pems.items():
            if pem:
                path = Path(folder, option)
                path.touch(0o600, exist_ok=False)
                path.write_bytes(pem)
                paths[option] = str(path)
        yield paths


def _connection_error(settings: PostgresSettings, text: str) -> QaPlatformError:
    where = _where(settings)
    # If a host has several addresses, the failures of all of them count, not only the last.
    said = " ".join(text.rpartition("All failures were:")[2].split())
    shown = without_password(said, settings.password.get_secret_value())
    for pattern, advice in _NOT_RETRIED:
        if re.search(pattern, said, re.IGNORECASE):
            return InputError(f"cannot connect to PostgreSQL as {where}: {shown}", advice=advice)
    return TransientError(f"PostgreSQL cannot be reached as {where}: {shown}", advice="check that it runs there")


def without_password(text: str, password: str) -> str:
    """The text of an error, if it does not contain the password.

    The password is not cut out: what is left would show a weak one.
    """
    return "its message is not shown, because it contains the password" if password and password in text else text


@contextmanager
def transaction(connection: psycopg.Connection, *, about: str = "") -> Iterator[psycopg.Cursor]:
    """One transaction, committed at the end of the block, rolled back on any exception.

    Args:
        about: what the transaction is for; it begins the messages.

    Raises:
        InputError: PostgreSQL refuses the data, or a constraint or trigger of the owner's does.
        WrongDatabase: a permission, a table or a column is missing, or a column that the owner added is mandatory and has no default.
        TransientError: the connection broke, or PostgreSQL gave up for now: a deadlock, a full disk, a shutdown, a time-out, a
            standby that is not promoted yet, an error of its own.
    """
    try:
        with connection.transaction(), connection.cursor() as cursor:
            yield cursor
    except psycopg.errors.ProgramLimitExceeded as error:
        # An operational error to psycopg, but it would come again: a value is too long for an index that the owner made.
        raise InputError(f"PostgreSQL refuses the data: {_safe_message(error)}", where=about) from error
    except (psycopg.OperationalError, psycopg.InterfaceError, psycopg.InternalError) as error:
        raise TransientError(f"PostgreSQL did not complete the transaction: {_safe_message(error)}", where=about) from error
    except psycopg.errors.InsufficientPrivilege as error:
        raise WrongDatabase(
            f"PostgreSQL refuses: {_safe_message(error)}", where=about, advice="grant the privilege, or connect as the owner of the tables"
        ) from error
    except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn) as error:
        raise WrongDatabase(
            f"the tables are missing or old: {_safe_message(error)}", where=about, advice="run `qa-platform db upgrade`"
        ) from error
    except psycopg.errors.FeatureNotSupported as error:
        # A property of the table, such as row-level security, which COPY does not support.
        raise WrongDatabase(
            f"PostgreSQL refuses: {_safe_message(error)}",
            where=about,
            advice="connect as the owner of the tables, whom row-level security spares",
        ) from error
    except psycopg.errors.NotNullViolation as error:
        raise WrongDatabase(
            f"the tables have a column that the platform does not fill: {_safe_message(error)}",
            where=about,
            advice="give that column a default",
        ) from error
    except psycopg.Error as error:
        # Never psycopg's own text: it quotes whole rows.
        raise InputError(f"PostgreSQL refuses the data: {_safe_message(error)}", where=about) from error


def limit_seconds(cursor: psycopg.Cursor, seconds: float) -> None:
    """Limit each statement of this transaction to ``seconds``. `transaction` raises a `TransientError` if one takes longer."""
    cursor.execute("SELECT set_config('statement_timeout', %s, true)", [f"{max(1, round(seconds * 1000))}ms"])


# Lifts the limits on the time of a transaction. `transaction_timeout` exists since PostgreSQL 17.
LIFT_LIMITS = "SELECT set_config(name, '0', true) FROM pg_settings WHERE name IN ('statement_timeout', 'transaction_timeout')"


@contextmanager
def long_transaction(connection: psycopg.Connection, *, about: str = "") -> Iterator[psycopg.Cursor]:
    """A `transaction` without the limits on time of the role or the database, which would end it for every large file."""
    with transaction(connection, about=about) as cursor:
        cursor.execute(LIFT_LIMITS)
        yield cursor


def notice_lost_client(cursor: psycopg.Cursor) -> None:
    """Let the server end this transaction a minute after this machine has vanished, with the locks that it holds.

    By default a server notices only after its TCP keepalive: on Linux, two hours.
    """
    cursor.execute("SET LOCAL tcp_keepalives_idle = 30; SET LOCAL tcp_keepalives_interval = 10; SET LOCAL tcp_keepalives_count = 3")


def only_row(cursor: psycopg.Cursor) -> tuple[Any, ...]:
    """The row of a statement that always returns one."""
    row = cursor.fetchone()
    assert row is not None
    return row


def _safe_message(error: psycopg.Error) -> str:
    # Not the whole text: its later lines may quote cells.
    location = re.match(r"COPY \w+, line \d+(, column \w+)?", error.diag.context or "")
    return (error.diag.message_primary or str(error).split("\n")[0]) + (f" ({location.group()})" if location else "")
