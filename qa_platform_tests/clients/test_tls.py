"""Connections to a real PostgreSQL with TLS, and the message for each one that fails.

The embedded PostgreSQL is built without TLS, so these tests use the machine's own, and are skipped if there is none.
"""

import base64
import contextlib
import datetime
import ipaddress
import os
import pwd
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydantic import SecretStr

from qa_platform.clients.postgres import connect
from qa_platform.errors import InputError, QaPlatformError, TransientError
from qa_platform.settings import PostgresSettings
from qa_platform_tests.loading_helpers import AnsweredUpload, answered_rows

PASSWORD = "s3cret-Pa55word"
HBA = """
local   all all                          trust
hostssl all certified  127.0.0.1/32      cert
hostssl all clerk      127.0.0.1/32      scram-sha-256 clientcert=verify-ca
hostssl all reader     127.0.0.1/32      scram-sha-256
hostssl all full       127.0.0.1/32      scram-sha-256
hostssl all nologin    127.0.0.1/32      trust
host    all plain      127.0.0.1/32      scram-sha-256
"""
ROLES = f"""
CREATE ROLE certified LOGIN;
CREATE ROLE clerk LOGIN PASSWORD '{PASSWORD}';
CREATE ROLE reader LOGIN PASSWORD '{PASSWORD}';
CREATE ROLE plain LOGIN PASSWORD '{PASSWORD}';
CREATE ROLE nologin;
CREATE ROLE full LOGIN PASSWORD '{PASSWORD}' CONNECTION LIMIT 0;
"""
_NOW = datetime.datetime.now(datetime.UTC)
_DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Identity:
    """A certificate with its key, both in PEM."""

    certificate: bytes
    key: bytes


class Authority:
    """A CA made for the test."""

    def __init__(self, name: str) -> None:
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._certificate = self._sign(self._name, self._key, expired=False).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )

    @property
    def pem(self) -> bytes:
        return self._certificate.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def issue(self, name: str, *, hosts: tuple[str, ...] = (), expired: bool = False) -> Identity:
        key = ec.generate_private_key(ec.SECP256R1())
        builder = self._sign(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), key, expired=expired)
        if hosts:
            names = [x509.IPAddress(ipaddress.ip_address(h)) if h[0].isdigit() else x509.DNSName(h) for h in hosts]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return Identity(
            builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM),
            key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()),
        )

    def _sign(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, expired: bool) -> x509.CertificateBuilder:
        ends = _NOW - _DAY if expired else _NOW + _DAY
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(_NOW - 2 * _DAY)
            .not_valid_after(ends)
        )


@dataclass(frozen=True)
class Server:
    """A PostgreSQL with TLS on 127.0.0.1, and its CA."""

    port: int
    socket_folder: Path
    data: Path
    authority: Authority

    def settings(self, user: str, **changes: Any) -> PostgresSettings:
        values = {"host": "localhost", "port": self.port, "user": user, "dbname": "postgres", "password": PASSWORD}
        return PostgresSettings(**{**values, **changes})

    def admin(self) -> psycopg.Connection:
        return psycopg.connect(f"host={self.socket_folder} port={self.port} user=postgres dbname=postgres", autocommit=True)

    def present(self, identity: Identity) -> None:
        """Let the server present another certificate from now on."""
        (self.data / "server.crt").write_bytes(identity.certificate)
        (self.data / "server.key").write_bytes(identity.key)
        with self.admin() as connection:
            connection.execute("SELECT pg_reload_conf()")


def _as_account() -> dict[str, Any]:
    """PostgreSQL does not run as root: the account is the one that the embedded server has made."""
    if os.geteuid() != 0:
        return {}
    account = pwd.getpwnam("pgserver")
    return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


def _binaries_with_tls() -> Path:
    candidates = [Path(found).resolve().parent for found in [shutil.which("postgres")] if found]
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for folder in candidates:
        # What is built without TLS refuses the parameter's value before it looks for a cluster.
        said = subprocess.run(
            [folder / "postgres", "--ssl=on", "-C", "ssl", "-D", "/nowhere"], capture_output=True, text=True, check=False, **_as_account()
        )
        if "not supported" not in said.stderr:
            return folder
    pytest.skip("no PostgreSQL that is built with TLS on this machine (Debian and Ubuntu: apt-get install postgresql)")


@pytest.fixture(scope="module")
def server(postgres_socket: str) -> Iterator[Server]:
    binaries = _binaries_with_tls()
    authority = Authority("Test CA")
    # Not below pytest's own folder, which nobody else may enter.
    home = Path(tempfile.mkdtemp(prefix="qa-tls-"))
    data = home / "data"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    who = _as_account()
    if who:
        os.chown(home, who["user"], who["group"])
    try:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        common: dict[str, Any] = {"cwd": home, "env": environment, **who}
        initdb: list[Path | str] = [binaries / "initdb", "-D", data, "-U", "postgres", "--auth=trust", "--encoding=UTF8", "--no-sync"]
        subprocess.run(initdb, check=True, capture_output=True, **common)
        (data / "pg_hba.conf").write_text(HBA)
        (data / "ca.crt").write_bytes(authority.pem)
        identity = authority.issue("localhost", hosts=("localhost",))
        for name, content in (("server.crt", identity.certificate), ("server.key", identity.key)):
            (data / name).write_bytes(content)
            (data / name).chmod(0o600)
            if who:
                os.chown(data / name, who["user"], who["group"])
        options = {
            "listen_addresses": "127.0.0.1",
            "port": str(port),
            "unix_socket_directories": str(home),
            "ssl": "on",
            "ssl_ca_file": "ca.crt",
            "fsync": "off",
            "max_connections": "20",
        }
        words = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        with (home / "log").open("wb") as log:
            process = subprocess.Popen([binaries / "postgres", "-D", data, *words], stdout=log, stderr=log, **common)
        try:
            found = Server(port, home, data, authority)
            _wait_for(found, process)
            with found.admin() as connection:
                connection.execute(ROLES)
                connection.execute("CREATE DATABASE answers OWNER clerk")
            yield found
        finally:
            process.terminate()
            process.wait(30)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _wait_for(server: Server, process: "subprocess.Popen[bytes]") -> None:
    until, pause = time.monotonic() + 60, threading.Event()
    while True:
        try:
            server.admin().close()
            return
        except psycopg.OperationalError:
            assert process.poll() is None, (server.socket_folder / "log").read_text()
            assert time.monotonic() < until
            pause.wait(0.05)


@dataclass(frozen=True)
class Encoding:
    """One of the ways in which a deployment hands over a PEM."""

    name: str
    encode: Callable[[bytes, Path], str]

    def __call__(self, pem: bytes, folder: Path) -> str:
        return self.encode(pem, folder)


def _file(pem: bytes, folder: Path) -> str:
    path = folder / f"{len(list(folder.iterdir()))}.pem"
    path.write_bytes(pem)
    # As Kubernetes mounts secrets. libpq by itself refuses a key like this.
    path.chmod(0o644)
    return str(path)


def _wrapped(pem: bytes, _: Path) -> str:
    return base64.encodebytes(pem).decode()


ENCODINGS = [
    Encoding("file", _file),
    Encoding("base64", lambda pem, _: base64.b64encode(pem).decode()),
    Encoding("base64 in lines", _wrapped),
    Encoding("PEM text", lambda pem, _: pem.decode()),
]


def _certificates(
    server: Server, folder: Path, name: str = "clerk", encode: Encoding = ENCODINGS[1], *, expired: bool = False
) -> dict[str, str]:
    identity = server.authority.issue(name, expired=expired)
    return {
        "sslrootcert": encode(server.authority.pem, folder),
        "sslclient_cert": encode(identity.certificate, folder),
        "ssl_client_key": encode(identity.key, folder),
    }


def _tls(settings: PostgresSettings) -> tuple | None:
    with connect(settings) as connection:
        return connection.execute("SELECT ssl, client_dn FROM pg_stat_ssl WHERE pid = pg_backend_pid()").fetchone()


# What works


@pytest.mark.parametrize("encode", ENCODINGS, ids=lambda encoding: encoding.name)
@pytest.mark.parametrize("mode", ["", "verify-ca", "verify-full"])
def test_a_client_certificate_is_taken_from_any_encoding(server: Server, tmp_path: Path, encode: Encoding, mode: str) -> None:
    settings = server.settings("certified", password="", sslmode=mode, **_certificates(server, tmp_path, "certified", encode))
    assert _tls(settings) == (True, "/CN=certified")


def test_a_password_beside_a_client_certificate_works(server: Server, tmp_path: Path) -> None:
    assert _tls(server.settings("clerk", **_certificates(server, tmp_path))) == (True, "/CN=clerk")


def test_a_ca_alone_is_enough_where_the_server_wants_no_more(server: Server) -> None:
    assert _tls(server.settings("reader", sslrootcert=server.authority.pem.decode())) == (True, None)


def test_verify_ca_does_not_mind_the_host_name(server: Server) -> None:
    assert _tls(server.settings("reader", host="127.0.0.1", sslrootcert=server.authority.pem.decode())) == (True, None)


def test_keys_lie_in_private_files_that_are_gone_with_the_connection_made(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    seen: list[tuple[str, int, int]] = []
    really = psycopg.connect

    def watching(**options: Any) -> psycopg.Connection:
        for name in ("sslrootcert", "sslcert", "sslkey"):
            path = Path(options[name])
            assert path.is_relative_to(scratch)
            seen.append((name, stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(path.parent.stat().st_mode)))
        return really(**options)

    monkeypatch.setattr("qa_platform.clients.postgres.psycopg.connect", watching)
    good = server.settings("clerk", **_certificates(server, tmp_path))
    with connect(good) as connection:
        assert list(scratch.iterdir()) == []
        assert connection.execute("SELECT 1").fetchone() == (1,)
    with pytest.raises(InputError):
        connect(good.model_copy(update={"dbname": "nowhere"}))

    assert seen == [("sslrootcert", 0o600, 0o700), ("sslcert", 0o600, 0o700), ("sslkey", 0o600, 0o700)] * 2
    assert list(scratch.iterdir()) == []


def test_a_connection_is_in_autocommit_and_names_its_program(server: Server) -> None:
    with connect(server.settings("reader")) as connection:
        assert connection.autocommit
        assert connection.execute("SHOW application_name").fetchone() == ("qa-platform",)
        assert connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE


# What fails


def _wrong_ca(server: Server, folder: Path) -> PostgresSettings:
    return server.settings("clerk", **{**_certificates(server, folder), "sslrootcert": Authority("Another CA").pem.decode()})


def _wrong_ca_with_a_weak_mode(server: Server, folder: Path) -> PostgresSettings:
    return _wrong_ca(server, folder).model_copy(update={"sslmode": "require"})


def _stranger(server: Server, folder: Path) -> PostgresSettings:
    identity = Authority("Another CA").issue("clerk")
    changes = {"sslclient_cert": identity.certificate.decode(), "ssl_client_key": identity.key.decode()}
    return server.settings("clerk", **{**_certificates(server, folder), **changes})


def _mismatched_key(server: Server, folder: Path) -> PostgresSettings:
    other = server.authority.issue("clerk").key.decode()
    return server.settings("clerk", **{**_certificates(server, folder), "ssl_client_key": other})


def _closed_port(server: Server, _: Path) -> PostgresSettings:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return server.settings("reader", port=free.getsockname()[1])


FAILURES: dict[str, tuple[Callable[[Server, Path], PostgresSettings], type[QaPlatformError], str]] = {
    "wrong CA": (_wrong_ca, InputError, "not signed by PG_SSLROOTCERT"),
    "wrong CA, sslmode=require": (_wrong_ca_with_a_weak_mode, InputError, "not signed by PG_SSLROOTCERT"),
    "expired client certificate": (
        lambda server, folder: server.settings("clerk", **_certificates(server, folder, expired=True)),
        InputError,
        "the client certificate has expired",
    ),
    "client certificate of a stranger": (_stranger, InputError, "does not accept the client certificate"),
    "missing client certificate": (
        lambda server, _: server.settings("clerk", sslrootcert=server.authority.pem.decode()),
        InputError,
        "set PG_SSLCLIENT_CERT",
    ),
    "certificate of another user": (
        lambda server, folder: server.settings("certified", **_certificates(server, folder, "clerk")),
        InputError,
        "common name",
    ),
    "key of another certificate": (_mismatched_key, InputError, "check the certificates"),
    "wrong password": (
        lambda server, folder: server.settings("clerk", password=f"{PASSWORD}-not", **_certificates(server, folder)),
        InputError,
        "check PG_USER and PG_PASSWORD",
    ),
    "wrong password at one of two addresses": (
        lambda server, _: server.settings("reader", host="localhost,/nowhere", password=f"{PASSWORD}-not"),
        InputError,
        "check PG_USER and PG_PASSWORD",
    ),
    "no password": (lambda server, _: server.settings("reader", password=""), InputError, "check PG_USER and PG_PASSWORD"),
    "unknown user": (lambda server, _: server.settings("nobody"), InputError, "pg_hba.conf"),
    "user without login": (lambda server, _: server.settings("nologin"), InputError, "check PG_USER"),
    "no such database": (lambda server, _: server.settings("reader", dbname="nowhere"), InputError, "check PG_DBNAME"),
    "no TLS where it is wanted": (lambda server, _: server.settings("reader", sslmode="disable"), InputError, "pg_hba.conf"),
    "other host name": (
        lambda server, _: server.settings("reader", host="127.0.0.1", sslmode="verify-full", sslrootcert=server.authority.pem.decode()),
        InputError,
        "PG_HOST must be a name in the server's certificate",
    ),
    "unknown sslmode": (lambda server, _: server.settings("reader", sslmode="sometimes"), InputError, "check the PG_ variables"),
    "no CA": (
        lambda server, folder: server.settings("clerk", **{**_certificates(server, folder), "sslrootcert": ""}),
        InputError,
        "PG_SSLROOTCERT is empty",
    ),
    "certificate missing": (
        lambda server, folder: server.settings("clerk", **{**_certificates(server, folder), "sslclient_cert": ""}),
        InputError,
        "belong together",
    ),
    "key missing": (
        lambda server, folder: server.settings("clerk", **{**_certificates(server, folder), "ssl_client_key": ""}),
        InputError,
        "belong together",
    ),
    "certificate is no PEM": (
        lambda server, _: server.settings("reader", sslrootcert="/nowhere/ca.pem"),
        InputError,
        "PG_SSLROOTCERT is neither a readable file nor a PEM",
    ),
    "certificate is damaged": (
        lambda server, _: server.settings("reader", sslrootcert="-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"),
        InputError,
        "check the certificates",
    ),
    "nobody listens": (_closed_port, TransientError, "cannot be reached"),
    "no such host": (lambda server, _: server.settings("reader", host="nowhere.invalid"), TransientError, "cannot be reached"),
    "too many connections": (lambda server, _: server.settings("full"), TransientError, "too many connections"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_connection_that_fails_gives_one_clear_error_without_the_password(server: Server, tmp_path: Path, failure: str) -> None:
    settings, kind, message = FAILURES[failure]
    with pytest.raises(kind) as caught:
        connect(settings(server, tmp_path))
    assert type(caught.value) is kind
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert PASSWORD not in "".join(traceback.format_exception(caught.value))
    assert "BEGIN" not in str(caught.value)


def test_an_expired_server_certificate_is_refused(server: Server) -> None:
    settings = server.settings("reader", sslrootcert=server.authority.pem.decode())
    server.present(server.authority.issue("localhost", hosts=("localhost",), expired=True))
    try:
        with pytest.raises(InputError, match="or has expired"):
            _until_refused(settings)
    finally:
        server.present(server.authority.issue("localhost", hosts=("localhost",)))


def _until_refused(settings: PostgresSettings) -> None:
    # The server takes a moment to read its files again.
    until, pause = time.monotonic() + 30, threading.Event()
    while time.monotonic() < until:
        connect(settings).close()
        pause.wait(0.05)


def test_a_server_without_tls_is_refused_where_certificates_are_given(server: Server) -> None:
    settings = server.settings("plain", sslrootcert=server.authority.pem.decode())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # The one byte with which a PostgreSQL without TLS answers the request for it.
        threading.Thread(target=_decline, args=[listener], daemon=True).start()
        with pytest.raises(InputError, match="the server has no TLS"):
            connect(settings.model_copy(update={"port": listener.getsockname()[1]}))


def _decline(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            peer, _ = listener.accept()
            with peer:
                peer.recv(8)
                peer.sendall(b"N")


# The loader, with the variables that the secret `dbaccess` gives it


def _run_loader(settings: PostgresSettings, pfs: Path) -> "subprocess.CompletedProcess[str]":
    upload = AnsweredUpload(answered_rows(7))
    folder = pfs / "question_answer" / "file"
    if not folder.exists():
        upload.write(folder)
        (pfs / "out").mkdir()
    values = {
        "PG_HOST": settings.host,
        "PG_PORT": str(settings.port),
        "PG_USER": settings.user,
        "PG_PASSWORD": settings.password.get_secret_value(),
        "PG_DBNAME": "answers",
        "PG_SSLROOTCERT": settings.sslrootcert.get_secret_value(),
        "PG_SSLCLIENT_CERT": settings.sslclient_cert.get_secret_value(),
        "PG_SSL_CLIENT_KEY": settings.ssl_client_key.get_secret_value(),
        "QA_PFS_ROOT": str(pfs),
        "question_answer": "/pfs/question_answer/file",
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")} | values
    command = [sys.executable, "-m", "qa_platform.loading.worker"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_the_loader_migrates_and_loads_by_certificates_in_base64_and_says_one_line_about_a_wrong_password(
    server: Server, tmp_path: Path
) -> None:
    settings = server.settings("clerk", **_certificates(server, tmp_path))
    done = _run_loader(settings, tmp_path / "pfs")
    assert done.returncode == 0, done.stderr
    with connect(settings.model_copy(update={"dbname": "answers"})) as connection:
        assert connection.execute("SELECT count(*) FROM question_answer").fetchone() == (7,)

    refused = _run_loader(settings.model_copy(update={"password": SecretStr(f"{PASSWORD}-not")}), tmp_path / "pfs")
    assert refused.returncode == 1
    assert len(refused.stderr.splitlines()) == 1
    assert "check PG_USER and PG_PASSWORD" in refused.stderr
    for secret in (PASSWORD, "BEGIN", settings.ssl_client_key.get_secret_value()[:40]):
        assert secret not in done.stdout + done.stderr + refused.stdout + refused.stderr


# The embedded PostgreSQL


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"dbname": "nowhere"}, InputError, "check PG_DBNAME"),
        ({"user": "nobody"}, InputError, "check PG_USER"),
        ({"port": 1}, TransientError, "cannot be reached"),
    ],
)
def test_a_server_without_tls_tells_of_failures_alike(
    postgres_socket: str, changes: dict[str, Any], kind: type[QaPlatformError], message: str
) -> None:
    values = {"host": postgres_socket, "port": 5432, "user": "postgres", "dbname": "postgres", "password": PASSWORD}
    with pytest.raises(kind, match=message) as caught:
        connect(PostgresSettings(**{**values, **changes}))
    assert PASSWORD not in "".join(traceback.format_exception(caught.value))
