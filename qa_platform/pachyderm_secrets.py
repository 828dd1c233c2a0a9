"""The two secrets that the pipelines' workers read, in the shapes and names that deployments have, checked before they are sent.

Values come from the environment or from files that it names; they are never written anywhere but to pachd.
"""

import base64
import binascii
import json
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from pydantic import SecretStr

from qa_platform.database import read_pem
from qa_platform.errors import InputError
from qa_platform.settings import BucketSettings, PostgresSettings

DATABASE_SECRET = "dbaccess"
BUCKET_SECRET = "gcsaccess"

_ACCOUNT_FIELDS = ("type", "client_email", "private_key", "token_uri")


def database_secret(settings: PostgresSettings) -> dict[str, str]:
    """The values of ``dbaccess``; certificates as base64 of their PEM, empty where there are none.

    Raises:
        InputError: a certificate or key is unusable; the message names the variable, and quotes nothing of it.
    """
    root = read_pem(settings.sslrootcert, "PG_SSLROOTCERT")
    certificate = read_pem(settings.sslclient_cert, "PG_SSLCLIENT_CERT")
    key = read_pem(settings.ssl_client_key, "PG_SSL_CLIENT_KEY")
    if root:
        _certificates(root, "PG_SSLROOTCERT")
    if bool(certificate) != bool(key):
        raise InputError("PG_SSLCLIENT_CERT and PG_SSL_CLIENT_KEY belong together: set both or neither")
    if certificate:
        if not root:
            raise InputError("PG_SSLROOTCERT is empty, but a client certificate is given: set it to the CA of the server's certificate")
        _check_pair(certificate, key)
    pems = {"sslrootcert": root, "sslcert": certificate, "sslkey": key}
    values = {"host": settings.host, "user": settings.user, "password": settings.password.get_secret_value(), "dbname": settings.dbname}
    return values | {name: base64.b64encode(pem).decode() for name, pem in pems.items()}


def bucket_secret(settings: BucketSettings) -> dict[str, str] | None:
    """The values of ``gcsaccess``, the service account as base64 of its JSON; None where no service account is given.

    Raises:
        InputError: GCS_ACCESS is no service account; the message quotes nothing of it.
    """
    if not settings.gcs_access.get_secret_value().strip():
        return None
    document = service_account(settings.gcs_access)
    return {"creds": base64.b64encode(document).decode(), "storage_bucket": settings.storage_bucket}


def service_account(secret: SecretStr) -> bytes:
    """The JSON of a service account that GCS_ACCESS holds as text, in base64, or as a file.

    Raises:
        InputError: it holds nothing of the kind.
    """
    document = _decoded(secret.get_secret_value().strip())
    try:
        account = json.loads(document)
    except ValueError:
        raise InputError("GCS_ACCESS is not JSON: it holds a service account's JSON, in base64 or as a file") from None
    missing = [name for name in _ACCOUNT_FIELDS if not isinstance(account, dict) or not isinstance(account.get(name), str)]
    if missing or account["type"] != "service_account":
        raise InputError(
            f"GCS_ACCESS is no service account: {', '.join(missing) or 'its type'} is missing or wrong; make a new JSON key for it"
        )
    _private_key(account["private_key"].encode(), "the private_key in GCS_ACCESS")
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
        raise InputError("GCS_ACCESS is neither a service account's JSON in base64 nor a file that can be read") from None


def _certificates(pem: bytes, variable: str) -> list[x509.Certificate]:
    # The originals' messages, and the traceback's frames, may quote what was given.
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise InputError(f"{variable} holds no certificate that can be read: a PEM begins with -----BEGIN CERTIFICATE-----") from None


def _private_key(pem: bytes, what: str) -> bytes:
    """Check a key, and return its public half as DER."""
    try:
        key = load_pem_private_key(pem, password=None)
    except TypeError:
        raise InputError(f"{what} has a passphrase, which no worker knows; remove it with `openssl pkey`") from None
    except ValueError:
        raise InputError(f"{what} is no private key that can be read: a PEM begins with -----BEGIN PRIVATE KEY-----") from None
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _check_pair(certificate: bytes, key: bytes) -> None:
    public = _certificates(certificate, "PG_SSLCLIENT_CERT")[0].public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if public != _private_key(key, "PG_SSL_CLIENT_KEY"):
        raise InputError("PG_SSL_CLIENT_KEY is not the key of PG_SSLCLIENT_CERT; give the two that were made together")
