"""What the real service answers, and the emulator does not: refusals of a constraint, uploads that must begin again, other hosts."""

import io
import json
import socket
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import requests
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage

from qa_platform.clients.answered_csvs import AnswersId, write_answered
from qa_platform.clients.bucket import archive, list_incoming, open_version, upload
from qa_platform.contract import INCOMING
from qa_platform.errors import QaPlatformError, TransientError

_ROW = b"question,context\nWhere?,Here.\n"


class Meddling(requests.Session):
    """A session that answers some requests itself, and replaces the host of `mediaLink`."""

    media = ""

    def __init__(self) -> None:
        super().__init__()
        self.answer: Callable[[str], requests.Response | None] = lambda method: None

    def request(self, method: str, url: str, **options: Any) -> requests.Response:  # type: ignore[override]
        options.pop("max_allowed_time", None)
        assert not (self.media and url.startswith(self.media)), f"asked {self.media}"
        if (answer := self.answer(method)) is not None:
            answer.url, answer.request = url, requests.Request(method, url).prepare()
            return answer
        response = super().request(method, url, **options)
        if self.media and "json" in response.headers.get("content-type", "") and b"mediaLink" in response.content:
            found = json.loads(response.content)
            found["mediaLink"] = self.media + found["mediaLink"][found["mediaLink"].index("/download") :]
            response._content = json.dumps(found).encode()
        return response


def answer_of(status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> requests.Response:
    response = requests.Response()
    response.status_code, response._content = status, body
    response.headers.update(headers or {})
    return response


def refusal(status: int, reason: str, message: str) -> requests.Response:
    error = {"code": status, "message": message, "errors": [{"domain": "global", "reason": reason, "message": message}]}
    return answer_of(status, json.dumps({"error": error}).encode(), {"content-type": "application/json"})


@pytest.fixture
def meddled(gcs_address: str) -> tuple[storage.Bucket, Meddling]:
    session = Meddling()
    client = storage.Client("test", AnonymousCredentials(), _http=session, client_options={"api_endpoint": f"http://{gcs_address}"})
    return client.create_bucket(f"test-{uuid.uuid4().hex}"), session


@pytest.mark.parametrize(
    ("status", "headers"), [(410, {}), (308, {}), (308, {"range": "bytes=0-262143"})], ids=["gone", "nothing kept", "part kept"]
)
def test_an_upload_that_must_begin_again_is_not_refused(
    meddled: tuple[storage.Bucket, Meddling], status: int, headers: dict[str, str]
) -> None:
    bucket, session = meddled
    session.answer = lambda method: answer_of(status, headers=headers) if method == "PUT" else None
    with pytest.raises(TransientError):
        upload(bucket, "a.csv", io.BytesIO(b"x" * (3 * 2**20)))


def test_the_constraint_that_forbids_a_write_is_told(meddled: tuple[storage.Bucket, Meddling]) -> None:
    bucket, session = meddled
    version = upload(bucket, "a.csv", io.BytesIO(_ROW))
    session.answer = lambda method: refusal(412, "conditionNotMet", "Constraint says no.") if method == "POST" else None
    with pytest.raises(QaPlatformError, match="Constraint says no"):
        write_answered(bucket, "answered/", AnswersId("a.csv", 1, 1, "c"), lambda: iter([b"x"]), may_write=lambda: True)
    with pytest.raises(QaPlatformError, match="Constraint says no"):
        archive(bucket, version, mode="move")


def test_who_may_only_create_may_upload(bucket: storage.Bucket) -> None:
    policy = bucket.get_iam_policy()
    policy["roles/storage.objectCreator"] = {"allUsers"}
    bucket.set_iam_policy(policy)
    assert upload(bucket, "a.csv", io.BytesIO(_ROW)).size == len(_ROW)


def test_content_is_read_from_the_clients_own_endpoint(meddled: tuple[storage.Bucket, Meddling]) -> None:
    bucket, session = meddled
    version = upload(bucket, "a.csv", io.BytesIO(_ROW))
    session.media = "https://content-storage.googleapis.com"
    with open_version(bucket, version, f"{INCOMING}a.csv") as source:
        assert source.read(1000) == _ROW


@pytest.mark.parametrize("name", ["a.csv", "x" * 1000 + ".csv"], ids=["short", "long"])
def test_a_versioned_bucket_keeps_what_was_archived(bucket: storage.Bucket, name: str) -> None:
    bucket.versioning_enabled = True
    bucket.patch()
    version = upload(bucket, name, io.BytesIO(_ROW))
    archive(bucket, version, mode="move")
    assert [each.generation for each in bucket.list_blobs(prefix=INCOMING, versions=True)] == [version.generation]


def test_a_rate_limit_is_not_a_missing_role(meddled: tuple[storage.Bucket, Meddling]) -> None:
    bucket, session = meddled
    session.answer = lambda method: refusal(403, "rateLimitExceeded", "Retry using exponential backoff.")
    with pytest.raises(TransientError):
        list(list_incoming(bucket, (".csv",)))


def test_a_chunk_that_is_sent_again_while_the_first_request_still_writes_is_stored_once(bucket: storage.Bucket, gcs_address: str) -> None:
    content = bytes(i * 7 % 251 for i in range(4096)) * 256
    begun = requests.post(f"http://{gcs_address}/upload/storage/v1/b/{bucket.name}/o?uploadType=resumable&name=a", json={}, timeout=5)
    path = begun.headers["location"].split(gcs_address, 1)[1]
    host, port = gcs_address.split(":")
    head = (
        f"PUT {path} HTTP/1.1\r\nhost: {gcs_address}\r\ncontent-length: {len(content)}\r\n"
        f"content-range: bytes 0-{len(content) - 1}/{len(content)}\r\n\r\n"
    ).encode()
    with socket.create_connection((host, int(port))) as second:
        with socket.create_connection((host, int(port))) as first:
            first.sendall(head + content[:300_000])
            second.sendall(head + content[:310_000])
            first.sendall(content[300_000:600_000])
        second.sendall(content[310_000:])
        second.settimeout(30)
        assert second.recv(12) == b"HTTP/1.1 200"
    assert bucket.blob("a").download_as_bytes(checksum=None) == content
