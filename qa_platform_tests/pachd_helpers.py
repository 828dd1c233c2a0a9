"""Helpers for the tests of Pachyderm's protocol, which use an address and the SDK, whatever server is behind them.

``QA_TEST_PACHD=grpc://host:port`` points the tests at a cluster; without it they start the embedded server. ``QA_TEST_PACHD_WORKERS=0``
says that the cluster runs no workers. ``QA_TEST_PACHD_IMAGE`` names an image with a shell, Python and the SDK.
``QA_TEST_PACHD_SECONDS`` limits every wait: a cluster that has to pull images and start pods needs minutes.

The whole platform is tested on a cluster too (`batches/test_cluster.py`). ``QA_TEST_PACHD_REGISTRY`` and ``QA_TEST_PACHD_TAG`` name its
images. ``QA_TEST_PACHD_DATABASE`` is the URL of an empty database that the cluster's workers and this machine can reach. The default is the
embedded database, whose socket only workers on this machine can reach; with other workers, the tests are skipped.
"""

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import grpc
import psutil
import pytest
from pachyderm_sdk import Client
from pachyderm_sdk.api import pfs, pps

from qa_platform.contract import ANSWER_PIPELINE, LOAD_PIPELINE, QUESTIONS_REPO

T = TypeVar("T")
CLUSTER = os.environ.get("QA_TEST_PACHD", "")
LIMIT_SECONDS = float(os.environ.get("QA_TEST_PACHD_SECONDS", "30"))
# A cluster needs an image with Python and the SDK. The embedded server has no images.
IMAGE = os.environ.get("QA_TEST_PACHD_IMAGE", "python:3.12-slim")
REGISTRY, TAG = os.environ.get("QA_TEST_PACHD_REGISTRY", ""), os.environ.get("QA_TEST_PACHD_TAG", "")
DATABASE = os.environ.get("QA_TEST_PACHD_DATABASE", "")
SUCCESS, FAILURE, KILLED, UNRUNNABLE = (
    pps.JobState.JOB_SUCCESS,
    pps.JobState.JOB_FAILURE,
    pps.JobState.JOB_KILLED,
    pps.JobState.JOB_UNRUNNABLE,
)

# For tests that need running workers.
needs_workers = pytest.mark.skipif(os.environ.get("QA_TEST_PACHD_WORKERS") == "0", reason="this cluster runs no workers")
_PLATFORM_SECRETS = ("dbaccess", "gcsaccess")


class Server:
    """The process of an embedded server on a state folder."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self.state = folder / "state"
        address_file = folder / "address"
        address_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "qa_platform.embedded.pachd", "--state", str(self.state), "--address-file", str(address_file)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, env={**os.environ, **(environment or {})})
        eventually(address_file.exists, lambda: f"the server ended with {self.process.poll()}")
        self.address = f"grpc://{address_file.read_text()}"

    def stop(self) -> int:
        """End the server by closing its standard input, as if its parent had ended."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(LIMIT_SECONDS)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(LIMIT_SECONDS)


@contextmanager
def pachd_address(folder: Path, environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """The address to test: the configured cluster's, or that of a new embedded server with these variables (its options)."""
    if CLUSTER:
        yield CLUSTER
        return
    server = Server(folder, environment)
    try:
        yield server.address
    finally:
        assert server.stop() == 0


def remove_platform(client: Client) -> None:
    """Remove everything of the platform with a fixed name: pipelines, repo and secrets."""
    for name in (LOAD_PIPELINE, ANSWER_PIPELINE):
        client.pps.delete_pipeline(pipeline=pps.Pipeline(name=name), force=True)
    client.pfs.delete_repo(repo=pfs.Repo(name=QUESTIONS_REPO), force=True)
    for name in _PLATFORM_SECRETS:
        with suppress(grpc.RpcError):
            client.pps.delete_secret(secret=pps.Secret(name=name))


def make_by_kubectl(server: Server, name: str, values: Mapping[str, str]) -> None:
    """Create a secret in the cluster without Pachyderm."""
    folder = server.state / "kubernetes-secrets"
    folder.mkdir(exist_ok=True)
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": dict(values)}
    (folder / f"{name}.json").write_text(json.dumps(secret))


def eventually(look: Callable[[], T], problem: Callable[[], str] = lambda: "it did not happen", seconds: float = LIMIT_SECONDS) -> T:
    """Wait for the first true value of ``look``, and return it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.01)
    raise AssertionError(problem())


def has_ended(process: int) -> bool:
    """Whether a process has ended. A zombie has."""
    try:
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@contextmanager
def refused(code: grpc.StatusCode, text: str) -> Iterator[Any]:
    """The block must raise an error with this status, and this text in its message. Yields pytest's record of the error."""
    with pytest.raises(grpc.RpcError) as caught:
        yield caught
    error: Any = caught.value
    assert error.code() == code, f"{error.code()}: {error.details()}"
    assert text in error.details()


class Pachd:
    """A namespace in a pachd, with shortcuts for what most tests need."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.client = Client.from_pachd_address(address)
        self._prefix = f"t{uuid.uuid4().hex[:8]}"
        self._pipelines: list[str] = []

    def name(self, text: str) -> str:
        return f"{self._prefix}-{text}"

    def repo(self, text: str = "input") -> pfs.Repo:
        """Create a repo."""
        repo = pfs.Repo(name=self.name(text))
        self.client.pfs.create_repo(repo=repo)
        return repo

    def branch(self, repo: pfs.Repo, name: str = "master") -> pfs.Branch:
        return pfs.Branch(repo=repo, name=name)

    def put(self, repo: pfs.Repo, files: Mapping[str, bytes], *, delete: Sequence[str] = (), branch: str = "master") -> str:
        """Make one finished commit. Returns its id."""
        with self.client.pfs.commit(branch=self.branch(repo, branch)) as commit:
            for path in delete:
                commit.delete_file(path=path)
            for path, data in files.items():
                commit.put_file_from_bytes(path, data)
        commit.wait()
        return str(commit.id)

    def commit(self, repo: pfs.Repo | str, commit_id: str) -> pfs.Commit:
        if isinstance(repo, str):
            repo = pfs.Repo(name=repo)
        return pfs.Commit(repo=repo, id=commit_id)

    def read(self, repo: pfs.Repo | str, commit_id: str, path: str) -> bytes:
        file = pfs.File(commit=self.commit(repo, commit_id), path=path)
        return b"".join(message.value for message in self.client.pfs.get_file(file=file))

    def paths(self, repo: pfs.Repo | str, commit_id: str) -> list[str]:
        """The paths of a commit's files, without folders."""
        infos = self.client.pfs.walk_file(file=pfs.File(commit=self.commit(repo, commit_id), path="/"))
        return [info.file.path for info in infos if info.file_type == pfs.FileType.FILE]

    def spec(self, name: str, cmd: Sequence[str] | str, source: pfs.Repo | str, *, glob: str = "/*", **more: Any) -> dict[str, Any]:
        """A spec with one input named ``source``. A text as ``cmd`` is a shell script, with the root in ``$pfs``."""
        transform: dict[str, Any] = {"image": IMAGE, "cmd": list(cmd)}
        if isinstance(cmd, str):
            transform = {"image": IMAGE, "cmd": ["sh", "-e"], "stdin": ["pfs=${QA_PFS_ROOT:-/pfs}", *cmd.splitlines()]}
        transform |= more.pop("transform", {})
        repo = source if isinstance(source, str) else source.name
        return {
            "pipeline": {"name": name},
            "transform": transform,
            "input": {"pfs": {"name": "source", "repo": repo, "glob": glob}},
            "datumTries": 1,
            **more,
        }

    def create(self, spec: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        """Create or update a pipeline. Returns the effective spec."""
        reply = self.client.pps.create_pipeline_v2(create_pipeline_request_json=json.dumps(spec), **more)
        if spec["pipeline"]["name"] not in self._pipelines:
            self._pipelines.append(spec["pipeline"]["name"])
        effective: dict[str, Any] = json.loads(reply.effective_create_pipeline_request_json)
        return effective

    def pipeline(self, text: str, cmd: Sequence[str] | str, source: pfs.Repo | str, **more: Any) -> str:
        """Create a pipeline. Returns its full name."""
        name = self.name(text)
        self.create(self.spec(name, cmd, source, **more))
        return name

    def job(self, pipeline: str, job_id: str) -> pps.Job:
        return pps.Job(pipeline=pps.Pipeline(name=pipeline), id=job_id)

    def wait(self, pipeline: str, job_id: str) -> pps.JobInfo:
        """Wait until a job has ended, and return it."""
        return self.client.pps.inspect_job(job=self.job(pipeline, job_id), wait=True, details=True)

    def jobs(self, pipeline: str, history: int = 0) -> list[pps.JobInfo]:
        return list(self.client.pps.list_job(pipeline=pps.Pipeline(name=pipeline), history=history))

    def datums(self, pipeline: str, job_id: str) -> dict[str, pps.DatumInfo]:
        """A job's datums, by the path of their first input. Waits until the previous job has ended."""
        found: list[pps.DatumInfo] = []

        def is_listed() -> bool:
            try:
                found[:] = self.client.pps.list_datum(job=self.job(pipeline, job_id))
            except grpc.RpcError as error:
                if "unfinished" not in str(error.details()):
                    raise
                return False
            return True

        eventually(is_listed, lambda: "the job before has not closed")
        return {info.data[0].file.path: info for info in found}

    def lines(self, pipeline: str, job_id: str) -> list[str]:
        """The output of user code; empty while there are no pods."""
        try:
            return [line.message for line in self.client.pps.get_logs(job=self.job(pipeline, job_id)) if line.user]
        except grpc.RpcError as error:
            if "no pods belonging to the rc" not in str(error.details()):
                raise
            return []

    def lines_once(self, pipeline: str, job_id: str, number: int) -> list[str]:
        """As `lines`, once there are ``number`` of them, or after the time limit: on a cluster with Loki they are late."""
        with suppress(AssertionError):
            eventually(lambda: len(self.lines(pipeline, job_id)) >= number)
        return self.lines(pipeline, job_id)

    def clean_up(self) -> None:
        """Remove everything whose name begins with this object's prefix."""
        listed = [info.pipeline.name for info in self.client.pps.list_pipeline()]
        for name in dict.fromkeys([*reversed(self._pipelines), *(name for name in listed if name.startswith(self._prefix))]):
            self.client.pps.delete_pipeline(pipeline=pps.Pipeline(name=name), force=True)
        for info in list(self.client.pfs.list_repo(type="user")):
            if info.repo.name.startswith(self._prefix):
                self.client.pfs.delete_repo(repo=info.repo, force=True)
        for info in self.client.pps.list_secret().secret_info:
            if info.secret.name.startswith(self._prefix):
                self.client.pps.delete_secret(secret=info.secret)
        for project in [info.project for info in self.client.pfs.list_project()]:
            if project.name.startswith(self._prefix):
                self.client.pfs.delete_project(project=project)
