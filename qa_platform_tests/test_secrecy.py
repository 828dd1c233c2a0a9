"""A password reaches the pipelines' programs, and is nowhere else: in no repo, log, event or specification."""

import json
import uuid
from collections.abc import Iterator
from hashlib import sha256

import pytest
from pachyderm_sdk import Client
from pachyderm_sdk.api import pfs, pps

from qa_platform.clients.pachyderm import job_of, session
from qa_platform.contract import ANSWER_PIPELINE, LOAD_PIPELINE, FileStatus
from qa_platform.embedded.stack import Stack
from qa_platform.settings import PachydermSettings
from qa_platform_tests.flow import Flow, bridge, csv_of, flow
from qa_platform_tests.pachd_helpers import IMAGE, SUCCESS

__all__ = ["flow"]

pytestmark = pytest.mark.slow

# Tells what it was given without telling it.
PROBE = """
from hashlib import sha256
from pathlib import Path
from qa_platform.settings import PostgresSettings, WorkerSettings
digest = sha256(PostgresSettings().password.get_secret_value().encode()).hexdigest()
Path(WorkerSettings().pfs_root, "out", "digest").write_text(digest)
"""


@pytest.fixture
def password(flow: Flow, stack: Stack) -> str:
    """The password of the database, which is in the pipelines' secret."""
    return stack.tokens["postgres"]


def stored(client: Client) -> Iterator[tuple[str, bytes]]:
    """Every file of every commit of every repo, of whatever type, with its place."""
    for info in client.pfs.list_repo(type=""):
        for commit in client.pfs.list_commit(repo=info.repo, all=True):
            for found in client.pfs.walk_file(file=pfs.File(commit=commit.commit, path="/")):
                if found.file_type == pfs.FileType.FILE:
                    content = b"".join(piece.value for piece in client.pfs.get_file(file=found.file))
                    yield f"{info.repo.name}.{info.repo.type}@{commit.commit.id}:{found.file.path}", content


def logged(client: Client) -> Iterator[tuple[str, str]]:
    for job in client.pps.list_job(history=-1):
        for line in client.pps.get_logs(pipeline=job.job.pipeline, job=job.job):
            yield f"the log of {job.job.pipeline.name}@{job.job.id}", line.message


def test_a_password_reaches_the_programs_and_is_stored_nowhere(flow: Flow, password: str) -> None:
    version = flow.upload("secret.csv", csv_of(bridge("Ulm"), bridge("Graz")))
    results = flow.tick_and_run()
    assert [result.success for result in results] == [True]
    assert flow.record(version).status is FileStatus.FINISHED
    with session(PachydermSettings(), "searching") as client:
        files = dict(stored(client))
        environments = [place for place in files if place.endswith("/.env")]
        assert any(place.startswith(f"{LOAD_PIPELINE}.meta@") for place in environments), "the loader's environment is stored"
        assert any(place.startswith(f"{ANSWER_PIPELINE}.meta@") for place in environments)
        assert [place for place, content in files.items() if password.encode() in content] == []
        assert [place for place, text in logged(client) if password in text] == []
        for pipeline in (ANSWER_PIPELINE, LOAD_PIPELINE):
            assert password not in str(client.pps.inspect_pipeline(pipeline=job_of(pipeline, "").pipeline, details=True))
    for result in results:
        assert [entry for entry in flow.instance.all_logs(result.run_id) if password in str(entry)] == []


def test_the_program_of_a_pipeline_is_given_the_password_of_its_mounted_secret(flow: Flow, password: str) -> None:
    name = f"probe-{uuid.uuid4().hex[:8]}"
    with session(PachydermSettings(), "probing") as client:
        repo = pfs.Repo(name=f"{name}-in")
        client.pfs.create_repo(repo=repo)
        secrets = [{"name": "dbaccess", "mount_path": "/secrets/dbaccess"}]
        spec = {
            "pipeline": {"name": name},
            "input": {"pfs": {"repo": repo.name, "glob": "/*"}},
            "transform": {"image": IMAGE, "cmd": ["python", "-c", PROBE], "secrets": secrets},
        }
        client.pps.create_pipeline_v2(create_pipeline_request_json=json.dumps(spec))
        try:
            with client.pfs.commit(branch=pfs.Branch(repo=repo, name="master")) as commit:
                commit.put_file_from_bytes("/a", b"1")
            assert client.pps.inspect_job(job=job_of(name, commit.id), wait=True).state == SUCCESS
            pieces = client.pfs.get_file(file=pfs.File.from_uri(f"{name}@{commit.id}:/digest"))
            assert b"".join(piece.value for piece in pieces).decode() == sha256(password.encode()).hexdigest()
        finally:
            client.pps.delete_pipeline(pipeline=pps.Pipeline(name=name), force=True)
            client.pfs.delete_repo(repo=repo, force=True)
