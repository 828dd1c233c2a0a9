"""Files that the embedded pachd fetches from a bucket."""

from collections.abc import Iterator

import grpc
import pytest
from google.cloud import storage
from pachyderm_sdk.api import pfs

from qa_platform_tests.pachd_helpers import Pachd, Server, refused


@pytest.fixture
def pachd(tmp_path_factory: pytest.TempPathFactory, gcs_address: str) -> Iterator[Pachd]:
    environment = {"STORAGE_EMULATOR_HOST": f"http://{gcs_address}"}
    server = Server(tmp_path_factory.mktemp("pachd"), environment)
    yield Pachd(server.address)
    assert server.stop() == 0


def test_objects_are_fetched_one_by_one_and_by_prefix(pachd: Pachd, bucket: storage.Bucket) -> None:
    for name, data in {"d/a.csv": b"1", "d/e/b.csv": b"2" * 5_000_000, "other": b"3"}.items():
        bucket.blob(name).upload_from_string(data)
    repo = pachd.repo()
    with pachd.client.pfs.commit(branch=pachd.branch(repo)) as commit:
        commit.put_file_from_url(path="/one", url=f"gs://{bucket.name}/other")
        commit.put_file_from_url(path="/all", url=f"gs://{bucket.name}/d", recursive=True)
        with refused(grpc.StatusCode.UNKNOWN, "there is no such object"):
            commit.put_file_from_url(path="/none", url=f"gs://{bucket.name}/none")
    commit.wait()
    assert pachd.paths(repo, commit.id) == ["/all/a.csv", "/all/e/b.csv", "/one"]
    assert pachd.read(repo, commit.id, "/all/e/b.csv") == b"2" * 5_000_000
    assert pachd.read(repo, commit.id, "/one") == b"3"


def test_an_object_that_is_missing_leaves_the_commit_as_it_was(pachd: Pachd, bucket: storage.Bucket) -> None:
    repo = pachd.repo()
    commit = pachd.client.pfs.start_commit(branch=pachd.branch(repo))
    with refused(grpc.StatusCode.UNKNOWN, "there is no such object"):
        pachd.client.pfs.put_file_from_url(commit=commit, path="/a", url=f"gs://{bucket.name}/none")
    assert list(pachd.client.pfs.list_file(file=pfs.File(commit=commit, path="/"))) == []
