"""Reads certificates, keys and the service account from settings, and checks them. No message quotes any of them.

A setting holds a PEM or a JSON document as text, in base64, or as the name of a file.
"""

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import SecretStr

from qa_platform.errors import InputError
from qa_platform.settings import PachydermSettings, PostgresSettings

if TYPE_CHECKING:
    from cryptography import x509

_ACCOUNT_FIELDS = ("type", "client_email", "private_key", "token_uri")


@dataclass(frozen=True)
class DatabaseCertificates:
    """The PEMs of a connection to PostgreSQL; each is empty if it is not set.

    Args:
        root: the CAs that may have signed the server's certificate.
        certificate: the client's certificate.
        key: the client's key.
    """

    root: bytes
    certificate: bytes
    key: bytes

    def __bool__(self) -> bool:
        return bool(self.root or self.certificate or self.key)


def database_certificates(settings: PostgresSettings) -> DatabaseCertificates:
    """The certificates in the settings. They are complete, but may still be unusable: see `check_certificates`.

    Raises:
        InputError: a file cannot be read, or one setting needs another that is empty.
    """
    root = read_pem(settings.sslrootcert, "PG_SSLROOTCERT")
    certificate = read_pem(settings.sslclient_cert, "PG_SSLCLIENT_CERT")
    key = read_pem(settings.ssl_client_key, "PG_SSL_CLIENT_KEY")
    if bool(certificate) != bool(key):
        raise InputError("PG_SSLCLIENT_CERT and PG_SSL_CLIENT_KEY belong together", advice="set both or neither")
    if certificate and not root:
        raise InputError(
            "PG_SSLROOTCERT is empty, but a client certificate is given", advice="set it to the CA that signed the server's certificate"
        )
    return DatabaseCertificates(root, certificate, key)


def read_pem(secret: SecretStr, variable: str) -> bytes:
    """The PEM that a setting holds; empty for an empty setting.

    Args:
        variable: the setting's name, for errors.

    Raises:
        InputError: the setting holds something else.
    """
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
        raise InputError(f"{variable} is neither a readable file nor a PEM in base64") from None


def check_certificates(certificates: DatabaseCertificates) -> None:
    """Check that the certificates and the key can be used.

    Raises:
        InputError: one cannot be read, or the key does not belong to the client certificate.
    """
    if certificates.root:
        _load_certificates(certificates.root, "PG_SSLROOTCERT")
    if certificates.certificate:
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        own = _load_certificates(certificates.certificate, "PG_SSLCLIENT_CERT")[0]
        public = own.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        if public != _public_half(certificates.key, "PG_SSL_CLIENT_KEY"):
            raise InputError("PG_SSL_CLIENT_KEY is not the key of PG_SSLCLIENT_CERT", advice="set the two that were created together")


@dataclass(frozen=True)
class CertificateExpiry:
    """When the certificates of a setting expire.

    Args:
        variable: the setting's name.
        subject: the subject of the certificate that expires first.
        expires_at: when it expires.
    """

    variable: str
    subject: str
    expires_at: datetime


def certificate_expiries(postgres: PostgresSettings, pachyderm: PachydermSettings) -> list[CertificateExpiry]:
    """When the certificates in the settings expire. Empty settings are left out.

    Raises:
        InputError: one cannot be read.
    """
    expiries = []
    if pem := read_pem(postgres.sslrootcert, "PG_SSLROOTCERT"):
        expiries.append(_expiry_of_authorities(pem, "PG_SSLROOTCERT"))
    if pem := read_pem(postgres.sslclient_cert, "PG_SSLCLIENT_CERT"):
        expiries.append(_first_expiry(_load_certificates(pem, "PG_SSLCLIENT_CERT"), "PG_SSLCLIENT_CERT"))
    if bundle := pachyderm.pach_ca_bundle:
        try:
            pem = bundle.read_bytes()
        except OSError as error:
            raise InputError(f"PACH_CA_BUNDLE cannot be read: {error.strerror}") from None
        expiries.append(_expiry_of_authorities(pem, "PACH_CA_BUNDLE"))
    return expiries


def _expiry_of_authorities(pem: bytes, variable: str) -> CertificateExpiry:
    # An expired authority does not matter while the bundle has a valid one.
    authorities, now = _load_certificates(pem, variable), datetime.now(UTC)
    return _first_expiry([one for one in authorities if one.not_valid_after_utc > now] or authorities, variable)


def _first_expiry(certificates: "Sequence[x509.Certificate]", variable: str) -> CertificateExpiry:
    first = min(certificates, key=lambda certificate: certificate.not_valid_after_utc)
    return CertificateExpiry(variable, first.subject.rfc4514_string(), first.not_valid_after_utc)


def service_account(secret: SecretStr) -> bytes:
    """The JSON of the service account that GCS_ACCESS holds.

    Raises:
        InputError: it holds no service account.
    """
    document = _decoded(secret.get_secret_value().strip())
    try:
        account = json.loads(document)
    except ValueError:
        raise InputError("GCS_ACCESS is not JSON", advice="set it to a service account's JSON, in base64 or as a file") from None
    missing = [name for name in _ACCOUNT_FIELDS if not isinstance(account, dict) or not isinstance(account.get(name), str)]
    if missing or account["type"] != "service_account":
        raise InputError(
            f"GCS_ACCESS is not a service account: {', '.join(missing) or 'its type'} is missing or wrong",
            advice="create a new JSON key for it",
        )
    _public_half(account["private_key"].encode(), "the private_key in GCS_ACCESS")
    return document


def _decoded(text: str) -> bytes:
    if text.startswith("{"):
        return text.encode()
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        pass
    try:
        return Path(text).read_bytes()
    except (OSError, ValueError):
        raise InputError("GCS_ACCESS is neither a service account's JSON in base64 nor a readable file") from None


# `cryptography` is imported where it is used: the loader reads PEMs and does not have it. `from None`: the library's messages and the
# traceback's frames may quote the value.


def _load_certificates(pem: bytes, variable: str) -> "list[x509.Certificate]":
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise InputError(f"{variable} holds no readable certificate", advice="a PEM begins with -----BEGIN CERTIFICATE-----") from None


def _public_half(pem: bytes, what: str) -> bytes:
    """Check a private key, and return its public half as DER."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

    try:
        key = load_pem_private_key(pem, password=None)
    except TypeError:
        raise InputError(f"{what} has a passphrase, which no worker knows", advice="remove it with `openssl pkey`") from None
    except ValueError:
        raise InputError(f"{what} is not a readable private key", advice="a PEM begins with -----BEGIN PRIVATE KEY-----") from None
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
