"""The two secrets that the pipelines' workers read: makes and checks their values, and finds those that a cluster has.

Values come from the environment or from files that it names. They are written to pachd and nowhere else.
"""

import base64
from dataclasses import dataclass
from datetime import UTC, datetime

import grpc
from pachyderm_sdk import Client
from pachyderm_sdk.api import pps

from qa_platform.clients.credentials import check_certificates, database_certificates, service_account
from qa_platform.settings import BucketSettings, PostgresSettings

DATABASE_SECRET = "dbaccess"
BUCKET_SECRET = "gcsaccess"

# The keys that the programs read.
_KEYS = {
    DATABASE_SECRET: "the programs need host, user, password and dbname, and with certificates sslrootcert, sslcert and sslkey",
    BUCKET_SECRET: "the cron variant needs creds and storage_bucket",
}


def keys_needed(name: str) -> str:
    """The keys that a secret must have, and who reads them."""
    return _KEYS[name]


@dataclass(frozen=True)
class ClusterSecret:
    """A secret of the cluster. ``is_ours``: it was created through pachd, not by kubectl, Helm or Terraform."""

    created: datetime
    is_ours: bool


def find_secret(client: Client, name: str) -> ClusterSecret | None:
    """A secret that Pachyderm's workers can read, whoever created it; None if there is none."""
    try:
        info = client.pps.inspect_secret(secret=pps.Secret(name=name))
    except grpc.RpcError as error:
        # pachd passes on Kubernetes' message, but not its code NOT_FOUND.
        if f'secrets "{name}" not found' not in (error.details() or ""):
            raise
        return None
    # The list has only secrets that were created through pachd.
    is_ours = any(listed.secret.name == name for listed in client.pps.list_secret().secret_info)
    return ClusterSecret(info.creation_timestamp, is_ours)


def described(name: str, secret: ClusterSecret) -> str:
    """When and by whom an existing secret was created, and the keys that it must have."""
    made = "written" if secret.is_ours else "created by another tool (kubectl, Helm, Terraform) and used as it is; from"
    return f"{made} {secret.created.astimezone(UTC):%Y-%m-%d %H:%M} UTC; its keys cannot be read back: {keys_needed(name)}"


def database_secret(settings: PostgresSettings) -> dict[str, str]:
    """The values of ``dbaccess``; certificates as base64 of their PEM, empty if there are none.

    Raises:
        InputError: a certificate or key is unusable; the message names the variable and quotes nothing of its value.
    """
    certificates = database_certificates(settings)
    check_certificates(certificates)
    pems = {"sslrootcert": certificates.root, "sslcert": certificates.certificate, "sslkey": certificates.key}
    values = {"host": settings.host, "user": settings.user, "password": settings.password.get_secret_value(), "dbname": settings.dbname}
    return values | {name: base64.b64encode(pem).decode() for name, pem in pems.items()}


def bucket_secret(settings: BucketSettings) -> dict[str, str] | None:
    """The values of ``gcsaccess``, the service account as base64 of its JSON; None if no service account is given.

    Raises:
        InputError: GCS_ACCESS is not a service account; the message quotes nothing of it.
    """
    if not settings.gcs_access.get_secret_value().strip():
        return None
    document = service_account(settings.gcs_access)
    return {"creds": base64.b64encode(document).decode(), "storage_bucket": settings.storage_bucket}
