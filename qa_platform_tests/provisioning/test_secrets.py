"""Planted credentials are in no log line, event, specification, commit or file after full runs, successful and failed ones."""

import base64
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import grpc
import psycopg
import pytest
from dagster._serdes import serialize_value
from dagster._utils.error import serializable_error_info_from_exc_info
from pachyderm_sdk import Client
from pachyderm_sdk.api import pfs
from psycopg import sql

from qa_platform.clients.pachyderm import session
from qa_platform.contract import LOAD_PIPELINE
from qa_platform.embedded.stack import Stack
from qa_platform.errors import QaPlatformError
from qa_platform.orchestration.notifications import notify
from qa_platform.settings import NotificationSettings, PachydermSettings
from qa_platform_tests.credentials import certificate, pem_of, private_key
from qa_platform_tests.flow import Flow, bridge, csv_of, flow

__all__ = ["flow"]

pytestmark = pytest.mark.slow

KEY_ID = "planted-key-id-5f0a"
# What makes somebody be told of failures, so that the secrets of that are in use.
TOLD = {"QA_SMTP_HOST": "127.0.0.1", "QA_SMTP_PORT": "1", "QA_SMTP_USER": "qa", "QA_EMAIL_TO": '["a@b.example"]'}


def planted(stack: Stack) -> dict[str, str]:
    """Credentials of every kind; those of the stack's servers are the right ones."""
    account = {
        "type": "service_account",
        "private_key_id": KEY_ID,
        "private_key": pem_of(private_key()),
        "client_email": "a@b.example",
        "token_uri": "https://t.example",
    }
    key = private_key()
    pem, public = pem_of(key), certificate(key)
    return {
        "PG_PASSWORD": stack.tokens["postgres"],
        # Over a Unix socket libpq has no use for them, but everything before libpq does all that it does with them.
        "PG_SSLROOTCERT": in_base64(public),
        "PG_SSLCLIENT_CERT": in_base64(public),
        "PG_SSL_CLIENT_KEY": in_base64(pem),
        "PACH_TOKEN": stack.tokens["pachd"],
        "GCS_ACCESS": in_base64(json.dumps(account)),
        "QA_SLACK_WEBHOOK": "https://127.0.0.1:1/services/planted-w3bhook-71fe",
        "QA_SMTP_PASSWORD": "planted-5mtp-08d9",
    }


def in_base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def needles(values: Mapping[str, str]) -> set[bytes]:
    """What to look for: every value, its base64, and the secret parts of the service account and of the client key."""
    account = json.loads(base64.b64decode(values["GCS_ACCESS"]))
    keys = [account["private_key"], base64.b64decode(values["PG_SSL_CLIENT_KEY"]).decode()]
    plain = [*values.values(), KEY_ID, *(key.splitlines()[1] for key in keys)]
    return {form for text in plain for form in (text.encode(), base64.b64encode(text.encode()).rstrip(b"=")[:-1])}


def run(stack: Stack, values: Mapping[str, str], *command: str, fails: bool = False) -> bytes:
    result = subprocess.run(
        [sys.executable, "-m", *command], env={**stack.environment, **values}, capture_output=True, check=False, timeout=200
    )
    assert bool(result.returncode) == fails, result.stderr.decode()
    return result.stdout + result.stderr


def in_pachyderm(client: Client) -> Iterator[tuple[str, bytes]]:
    """Everything that a user of pachd can read: specifications, jobs, logs, and every file of every repo of every type."""
    for pipeline in client.pps.list_pipeline(details=True):
        yield f"pipeline {pipeline.pipeline.name}", bytes(pipeline)
        # Without Loki a pipeline that is idle has no lines to be searched.
        with suppress(grpc.RpcError):
            for message in client.pps.get_logs(pipeline=pipeline.pipeline):
                yield f"log of {pipeline.pipeline.name}", bytes(message)
    for job in client.pps.list_job(history=-1, details=True):
        yield f"job {job.job.id}", bytes(job)
    for repo in client.pfs.list_repo(type=""):
        for commit in client.pfs.list_commit(repo=repo.repo):
            yield f"commit {commit.commit.id}", bytes(commit)
            for info in client.pfs.walk_file(file=pfs.File(commit=commit.commit, path="/")):
                if info.file_type == pfs.FileType.FILE:
                    with client.pfs.pfs_file(info.file) as file:
                        yield f"{repo.repo.name}.{repo.repo.type}:{info.file.path}", file.read()


def in_database(url: str) -> Iterator[tuple[str, bytes]]:
    """Every row of every table."""
    with psycopg.connect(url) as connection:
        for (table,) in connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall():
            for (row,) in connection.execute(sql.SQL("SELECT t::text FROM {} t").format(sql.Identifier(table))):
                yield f"table {table}", row.encode()


def in_a_failed_tick(values: Mapping[str, str]) -> tuple[str, bytes]:
    """What Dagster's daemon keeps of a tick of a sensor that can tell nobody."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**values, **TOLD}.items():
            patch.setenv(name, value)
        try:
            notify(NotificationSettings(), "a run failed", "What to do: nothing")
        except QaPlatformError:
            return "a failed tick", serialize_value(serializable_error_info_from_exc_info(sys.exc_info())).encode()
    raise AssertionError("nobody is there to be told")


def in_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """All files but those that are there to hold a secret."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.match("*.token") and path.name != "google-credentials.json":
            yield str(path), path.read_bytes()


def test_planted_credentials_are_nowhere_after_a_good_and_a_failed_run(flow: Flow, stack: Stack) -> None:
    secrets = planted(stack)
    wanted = needles({**secrets, "the bucket's token": stack.tokens["gcs"]})
    url = stack.variables["DAGSTER_PG_URL"]
    values = {**secrets, **TOLD}
    job = ("dagster", "job", "execute", "-m", "qa_platform.definitions", "-j", "answer_pending_files")
    try:
        outputs = [run(stack, values, "qa_platform.cli.main", "pachyderm", "apply")]
        version = flow.upload("planted.csv", csv_of(bridge("Essen")))
        outputs.append(run(stack, values, *job))
        assert len(flow.rows(version.name)) == 1
        flow.upload("planted.csv", csv_of(bridge("Hagen")))
        # At once: each spends its time on trying again.
        with ThreadPoolExecutor() as pool:
            broken = [{"PG_PORT": "1"}, {"PACHD_ADDRESS": "grpc://127.0.0.1:1"}]
            outputs += pool.map(lambda changes: run(stack, {**values, **changes}, *job, fails=True), broken)
        outputs.append(run(stack, {**values, "GCS_ACCESS": stack.tokens["gcs"]}, "qa_platform.cli.main", "pachyderm", "apply", fails=True))
        outputs.append(run(stack, values, *job))
        places = [("what a command printed", output) for output in outputs]
        with session(PachydermSettings(), "searching") as client:
            places += in_pachyderm(client)
    finally:
        run(stack, {}, "qa_platform.cli.main", "pachyderm", "apply")
    places += [*in_database(url), *in_database(url.replace("/dagster?", "/answers?")), in_a_failed_tick(secrets)]
    assert {"table event_logs", "table runs", "table question_file"} <= {place for place, _ in places}
    # Pachyderm writes the environment of every datum there.
    assert any(place.startswith(f"{LOAD_PIPELINE}.meta:/pfs/") and place.endswith("/.env") for place, _ in places)
    places += in_files(stack.state)
    assert len(places) > 50, "there is something to be searched"
    found = [(place, needle) for place, content in places for needle in wanted if needle in content]
    assert found == []


def test_the_search_finds_what_is_there(stack: Stack, tmp_path: Path) -> None:
    values = planted(stack)
    (tmp_path / "log").write_bytes(b"password: " + base64.b64encode(stack.tokens["postgres"].encode()))
    assert [place for place, content in in_files(tmp_path) for needle in needles(values) if needle in content] == [str(tmp_path / "log")]
