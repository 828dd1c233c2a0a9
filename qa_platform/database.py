"""Connections to PostgreSQL, and its failures as the platform's own two kinds of error."""

import base64
import binascii
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from pydantic import SecretStr

from qa_platform.errors import InputError, QaPlatformError, TransientError
from qa_platform.settings import PostgresSettings

CONNECT_SECONDS = 10
APPLICATION = "qa-platform"

# libpq's parameter, the setting that it comes from, and the variable to name in messages.
_CERTIFICATES = (
    ("sslrootcert", "sslrootcert", "PG_SSLROOTCERT"),
    ("sslcert", "sslclient_cert", "PG_SSLCLIENT_CERT"),
    ("sslkey", "ssl_client_key", "PG_SSL_CLIENT_KEY"),
)
_VERIFYING_MODES = ("verify-ca", "verify-full")

# While a connection is made libpq gives no SQLSTATE, only text. What is not listed here may pass: a server that is away, that
# starts, that has too many clients, a name that is not resolved yet.
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


def connect(settings: PostgresSettings) -> psycopg.Connection:
    """Connect, in autocommit mode: a transaction is what :func:`transaction` opens, and nothing stays open between two.

    With any certificate given, TLS with at least ``verify-ca`` is used. Certificates come as files, as PEM text or as PEM in base64;
    they lie in private files while the connection is made. No statement is prepared on the server, so PgBouncer may share
    connections per transaction.

    Raises:
        InputError: wrong user, password, database or certificate.
        TransientError: the server is away, starting, or full.
    """
    # Nothing may quote the password: not libpq, and not a certificate's text that was put into the wrong variable.
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
                autocommit=True,
                prepare_threshold=None,
                **certificates,
            )
        except psycopg.Error as error:
            failure = _connection_error(settings, str(error))
    # Outside the handler: the original's frames hold the password.
    raise failure


def _sslmode(settings: PostgresSettings) -> str:
    if any(getattr(settings, name).get_secret_value() for _, name, _ in _CERTIFICATES):
        return settings.sslmode if settings.sslmode in _VERIFYING_MODES else "verify-ca"
    return settings.sslmode or "prefer"


@contextmanager
def _private_files(settings: PostgresSettings) -> Iterator[dict[str, Any]]:
    """libpq takes certificates as files only, and refuses a key that others can read, as those of mounted secrets are."""
    pems = {option: read_pem(getattr(settings, name), variable) for option, name, variable in _CERTIFICATES}
    if not any(pems.values()):
        yield {}
        return
    if not pems["sslrootcert"]:
        raise InputError(
            "PG_SSLROOTCERT is empty, but a client certificate is given: set it to the CA that signed the server's certificate"
        )
    if bool(pems["sslcert"]) != bool(pems["sslkey"]):
        raise InputError("PG_SSLCLIENT_CERT and PG_SSL_CLIENT_KEY belong together: set both or neither")
    with tempfile.TemporaryDirectory(prefix="qa-platform-") as folder:
        paths: dict[str, Any] = {}
        for option, pem in pems.items():
            if pem:
                path = Path(folder, option)
                path.touch(0o600, exist_ok=False)
                path.write_bytes(pem)
                paths[option] = str(path)
        yield paths


def read_pem(secret: SecretStr, variable: str) -> bytes:
    """The PEM that a setting holds as a file, as text or in base64; empty for an empty setting. ``variable`` names it in errors."""
    text = secret.get_secret_value().strip()
    if not text:
        return b""
    if text.startswith("-----BEGIN"):
        return text.encode() + b"\n"
    try:
        decoded = base64.b64decode("".join(text.split()), validate=True)
        if b"-----BEGIN" in decoded:
            return decoded
    except (binascii.Error, ValueError):
        pass
    try:
        return Path(text).read_bytes()
    except (OSError, ValueError):
        raise InputError(f"{variable} is neither a file that can be read nor a PEM in base64") from None


def _connection_error(settings: PostgresSettings, text: str) -> QaPlatformError:
    where = f"{settings.user}@{settings.host}:{settings.port}/{settings.dbname}"
    # Of several addresses of one host, all failures count, not only the last one.
    said = " ".join(text.rpartition("All failures were:")[2].split())
    password = settings.password.get_secret_value()
    if password:
        said = said.replace(password, "***")
    for pattern, advice in _NOT_RETRIED:
        if re.search(pattern, said, re.IGNORECASE):
            return InputError(f"cannot connect to PostgreSQL as {where}: {said}; {advice}")
    return TransientError(f"PostgreSQL cannot be reached as {where}: {said}; is it running there?")


@contextmanager
def transaction(connection: psycopg.Connection, *, about: str = "") -> Iterator[psycopg.Cursor]:
    """One transaction, committed at the end of the block, rolled back on any exception.

    Args:
        about: what it is for, which messages begin with.

    Raises:
        InputError: PostgreSQL refuses the data, a permission is missing, or the tables are.
        TransientError: the connection broke, or PostgreSQL gave up for now: a deadlock, a full disk, a shutdown, a lock's time-out, a
            standby that is not promoted yet.
    """
    try:
        with connection.transaction(), connection.cursor() as cursor:
            yield cursor
    except (psycopg.OperationalError, psycopg.InterfaceError, psycopg.errors.ReadOnlySqlTransaction) as error:
        raise TransientError(f"{about}PostgreSQL did not finish: {_said(error)}") from error
    except psycopg.errors.DataError as error:
        raise InputError(f"{about}PostgreSQL refuses the data: {_said(error)}") from error
    except psycopg.errors.InsufficientPrivilege as error:
        raise InputError(f"{about}PostgreSQL does not allow it: {_said(error)}; grant it, or be the owner of the tables") from error
    except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn) as error:
        raise InputError(f"{about}the tables are missing or old: {_said(error)}; run `qa-platform db upgrade`") from error


def only_row(cursor: psycopg.Cursor) -> tuple[Any, ...]:
    """The row of a statement that always gives one."""
    row = cursor.fetchone()
    assert row is not None
    return row


def _said(error: psycopg.Error) -> str:
    # Not the whole text: its later lines may quote cells.
    place = re.match(r"COPY \w+, line \d+(, column \w+)?", error.diag.context or "")
    return (error.diag.message_primary or str(error).split("\n")[0]) + (f" ({place.group()})" if place else "")
