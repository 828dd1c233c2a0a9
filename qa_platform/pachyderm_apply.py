"""Bring a Pachyderm cluster to what the platform needs: the repo, the two secrets, the two pipelines. Idempotent.

An update of a pipeline kills its running jobs and makes a new one, so a pipeline whose specification is what it should be is
left alone.
"""

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
from pachyderm_sdk import Client
from pachyderm_sdk.api import pfs, pps

from qa_platform.contract import ANSWER_PIPELINE, LOAD_PIPELINE, QUESTIONS_REPO
from qa_platform.database import read_pem
from qa_platform.errors import InputError
from qa_platform.pachd import is_code, session
from qa_platform.project_files import project_file
from qa_platform.settings import BucketSettings, PachydermSettings, PostgresSettings

_SPEC_FILES = {
    ANSWER_PIPELINE: "question_answer/pipeline.json",
    LOAD_PIPELINE: "push_answers_to_sql/pipeline.json",
}


@dataclass(frozen=True)
class Change:
    """One thing that was, or with a dry run would be, done: ``action`` is created, updated or unchanged."""

    kind: str
    name: str
    action: str


def apply(
    pachyderm: PachydermSettings, postgres: PostgresSettings, bucket: BucketSettings, *, registry: str = "", tag: str = ""
) -> list[Change]:
    """Create or update everything, in the order in which it depends on each other.

    Args:
        registry: where the images are, put before their names; "" leaves the specifications' names.
        tag: the images' tag; "" leaves the specifications' tags.

    Raises:
        InputError: a specification or a credential is unusable, with its name; or pachd refused.
        TransientError: pachd is away.
    """
    secrets = {"dbaccess": _dbaccess(postgres), "gcsaccess": _gcsaccess(bucket)}
    with session(pachyderm, "applying repos, secrets and pipelines") as client:
        changes = [_apply_repo(client)]
        changes += [_apply_secret(client, name, values) for name, values in secrets.items()]
        changes += [_apply_pipeline(client, name, spec) for name, spec in _specs(registry, tag)]
    return changes


def _specs(registry: str, tag: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, file in _SPEC_FILES.items():
        path = project_file("pachyderm") / file
        if not path.exists():
            raise InputError(f"{path} is missing: the pipelines' specifications lie beside the package, in the project's folder pachyderm/")
        spec = json.loads(path.read_text())
        image, _, spec_tag = spec["transform"]["image"].rpartition(":")
        prefix = f"{registry.rstrip('/')}/" if registry else ""
        spec["transform"]["image"] = f"{prefix}{image}:{tag or spec_tag}"
        yield name, spec


def _apply_repo(client: Client) -> Change:
    try:
        client.pfs.create_repo(repo=pfs.Repo.from_uri(QUESTIONS_REPO), description="Batches of uploaded CSVs, cut into shards.")
    except grpc.RpcError as error:
        if not is_code(error, grpc.StatusCode.ALREADY_EXISTS):
            raise
        return Change("repo", QUESTIONS_REPO, "unchanged")
    client.pfs.create_branch(branch=pfs.Branch.from_uri(f"{QUESTIONS_REPO}@master"))
    return Change("repo", QUESTIONS_REPO, "created")


def _dbaccess(settings: PostgresSettings) -> dict[str, str]:
    """The secret's keys as deployments have them; certificates as base64 of their PEM."""
    pems = {
        "sslrootcert": read_pem(settings.sslrootcert, "PG_SSLROOTCERT"),
        "sslcert": read_pem(settings.sslclient_cert, "PG_SSLCLIENT_CERT"),
        "sslkey": read_pem(settings.ssl_client_key, "PG_SSL_CLIENT_KEY"),
    }
    values = {"host": settings.host, "user": settings.user, "password": settings.password.get_secret_value(), "dbname": settings.dbname}
    return values | {key: base64.b64encode(pem).decode() for key, pem in pems.items()}


def _gcsaccess(settings: BucketSettings) -> dict[str, str]:
    return {"creds": settings.gcs_access.get_secret_value(), "storage_bucket": settings.storage_bucket}


def _apply_secret(client: Client, name: str, values: dict[str, str]) -> Change:
    """Put a secret in place. Its values cannot be read back, so it is written anew each time."""
    there = any(info.secret.name == name for info in client.pps.list_secret().secret_info)
    if there:
        client.pps.delete_secret(secret=pps.Secret(name=name))
    client.pps.create_secret(name=name, data=values)
    return Change("secret", name, "updated" if there else "created")


def _apply_pipeline(client: Client, name: str, spec: dict[str, Any]) -> Change:
    pipeline = pps.Pipeline(project=pfs.Project(name="default"), name=name)
    try:
        info = client.pps.inspect_pipeline(pipeline=pipeline, details=True)
    except grpc.RpcError as error:
        if not is_code(error, grpc.StatusCode.NOT_FOUND):
            raise
        client.pps.create_pipeline_v2(create_pipeline_request_json=json.dumps(spec))
        return Change("pipeline", name, "created")
    if info.user_spec_json and json.loads(info.user_spec_json) == spec:
        return Change("pipeline", name, "unchanged")
    client.pps.create_pipeline_v2(create_pipeline_request_json=json.dumps(spec), update=True)
    return Change("pipeline", name, "updated")
