"""Refusals of the emulator, as in the real service: holds, retention, roles, payers, checksums. All are configured through the API."""

import asyncio
import datetime
import io
import json
import sqlite3
import uuid
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import requests
from google.api_core.exceptions import BadRequest, Forbidden, GoogleAPICallError, NotFound, PreconditionFailed
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage

from qa_platform.embedded.gcs.app import Emulator
from qa_platform.embedded.gcs.disk import Disk
from qa_platform.embedded.supervise import ServerSpec, running

SPEC = ServerSpec("gcs", "qa_platform.embedded.gcs")
CHUNK = 256 * 1024


def client_of(address: str) -> storage.Client:
    return storage.Client("test", AnonymousCredentials(), client_options={"api_endpoint": f"http://{address}"})


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[storage.Client]:
    with running([SPEC], tmp_path_factory.mktemp("gcs")) as addresses:
        yield client_of(addresses["gcs"])


@pytest.fixture
def bucket(client: storage.Client) -> storage.Bucket:
    return client.create_bucket(f"b-{uuid.uuid4().hex}")


def put(bucket: storage.Bucket, name: str, content: bytes = b"x") -> storage.Blob:
    blob = bucket.blob(name)
    blob.upload_from_string(content)
    return blob


def changed(bucket: storage.Bucket, **settings: Any) -> storage.Bucket:
    for name, value in settings.items():
        setattr(bucket, name, value)
    bucket.patch()
    return bucket


def grant(bucket: storage.Bucket, *roles: str) -> None:
    policy = bucket.get_iam_policy()
    policy.bindings = [{"role": role, "members": {"allUsers"}} for role in roles]
    bucket.set_iam_policy(policy)


def reason(error: GoogleAPICallError) -> str:
    detail = error.errors[0] if error.errors else error.response.json()["error"]["errors"][0]
    return str(detail["reason"])


def refused(blob: storage.Blob) -> str:
    """The reason for which an object can neither be deleted nor overwritten."""
    with pytest.raises(Forbidden) as of_deleting:
        blob.delete()
    with pytest.raises(Forbidden) as of_writing:
        blob.bucket.blob(blob.name).upload_from_string(b"other")
    assert reason(of_deleting.value) == reason(of_writing.value)
    assert blob.download_as_bytes() == b"x"
    return reason(of_deleting.value)


@pytest.mark.parametrize("hold", ["temporary_hold", "event_based_hold"])
def test_a_held_object_can_be_copied_but_neither_deleted_nor_overwritten_nor_moved(bucket: storage.Bucket, hold: str) -> None:
    blob = put(bucket, "a")
    setattr(blob, hold, True)
    blob.patch()
    assert refused(blob) == "objectUnderActiveHold"
    with pytest.raises(Forbidden):
        bucket.move_blob(blob, "moved")
    copy = bucket.copy_blob(blob, bucket, "copy")
    copy.delete()
    setattr(blob, hold, False)
    blob.patch()
    blob.delete()


def test_a_retention_policy_protects_until_its_time_and_a_locked_one_cannot_be_weakened(bucket: storage.Bucket) -> None:
    blob = put(bucket, "a")
    changed(bucket, retention_period=3600)
    assert refused(blob) == "retentionPolicyNotMet"
    blob.reload()
    assert blob.retention_expiration_time - blob.time_created == datetime.timedelta(hours=1)
    changed(bucket, retention_period=None)
    blob.delete()

    changed(bucket, retention_period=60)
    bucket.lock_retention_policy()
    for period in (30, None):
        bucket.retention_period = period
        with pytest.raises(Forbidden):
            bucket.patch()
    bucket.reload()
    assert changed(bucket, retention_period=90).retention_policy_locked


def test_an_event_based_hold_starts_the_retention_when_it_ends(bucket: storage.Bucket) -> None:
    changed(bucket, retention_period=3600, default_event_based_hold=True)
    blob = put(bucket, "a")
    blob.reload()
    assert (blob.event_based_hold, blob.retention_expiration_time) == (True, None)
    blob.event_based_hold = False
    blob.patch()
    assert blob.retention_expiration_time > blob.time_created + datetime.timedelta(hours=1)


def test_a_role_that_may_write_may_not_delete_or_overwrite(bucket: storage.Bucket) -> None:
    put(bucket, "a")
    grant(bucket, "roles/storage.objectViewer", "roles/storage.objectCreator")
    assert bucket.test_iam_permissions(["storage.objects.create", "storage.objects.delete"]) == ["storage.objects.create"]
    put(bucket, "b")
    assert refused(bucket.blob("a")) == "forbidden"
    with pytest.raises(Forbidden, match=r"does not have storage\.objects\.delete access"):
        bucket.blob("a").delete()
    grant(bucket, "roles/storage.objectCreator")
    with pytest.raises(Forbidden, match=r"storage\.objects\.list"):
        list(bucket.list_blobs())
    with pytest.raises(Forbidden, match=r"storage\.objects\.get"):
        bucket.blob("a").reload()
    grant(bucket)
    bucket.blob("a").delete()


def test_where_the_requester_pays_a_request_names_a_project(client: storage.Client, bucket: storage.Bucket) -> None:
    changed(bucket, requester_pays=True)
    with pytest.raises(BadRequest, match="requester pays bucket but no user project") as caught:
        list(bucket.list_blobs())
    assert reason(caught.value) == "required"
    with pytest.raises(BadRequest):
        put(bucket, "a")
    paid = client.bucket(bucket.name, user_project="mine")
    assert put(paid, "a").download_as_bytes() == b"x"


@pytest.mark.parametrize("sums", [{"crc32c_checksum_value": "AAAAAA=="}])
def test_a_resumable_upload_with_a_wrong_sum_is_refused_whatever_the_last_chunk_says(bucket: storage.Bucket, sums: dict[str, str]) -> None:
    blob = bucket.blob("a", chunk_size=CHUNK)
    with pytest.raises(BadRequest):
        blob.upload_from_file(io.BytesIO(bytes(CHUNK + 1)), **sums)
    assert not bucket.blob("a").exists()


def test_what_is_composed_has_no_md5_and_counts_its_parts(bucket: storage.Bucket) -> None:
    parts = [put(bucket, str(number), str(number).encode()) for number in range(3)]
    composed = bucket.blob("all")
    composed.compose(parts[:2])
    assert (composed.component_count, composed.md5_hash, composed.download_as_bytes()) == (2, None, b"01")
    again = bucket.blob("more")
    again.compose([composed, parts[2]])
    assert (again.component_count, again.download_as_bytes()) == (3, b"012")
    assert bucket.copy_blob(again, bucket, "copy").md5_hash is None
    with pytest.raises(PreconditionFailed):
        bucket.blob("all").compose(parts, if_source_generation_match=[1, 2, 3])
    with pytest.raises(NotFound):
        bucket.blob("none").compose([bucket.blob("missing")])


def test_a_moved_object_is_under_its_new_name_only(bucket: storage.Bucket) -> None:
    blob = put(bucket, "a/b")
    moved = bucket.move_blob(blob, "c/d", if_source_generation_match=blob.generation, if_generation_match=0)
    assert moved.download_as_bytes() == b"x"
    assert [found.name for found in bucket.list_blobs()] == ["c/d"]
    put(bucket, "e")
    with pytest.raises(PreconditionFailed):
        bucket.move_blob(moved, "e", if_generation_match=0)


def test_what_was_soft_deleted_can_be_listed_and_restored(client: storage.Client) -> None:
    bucket = client.bucket(f"b-{uuid.uuid4().hex}")
    bucket.soft_delete_policy.retention_duration_seconds = 7 * 86_400
    bucket.create()
    first = put(bucket, "a", b"first")
    put(bucket, "a", b"second").delete()
    assert list(bucket.list_blobs()) == []
    assert len(list(bucket.list_blobs(soft_deleted=True))) == 2
    restored = bucket.restore_blob("a", generation=first.generation)
    assert restored.download_as_bytes() == b"first"
    assert restored.generation > first.generation
    with pytest.raises(NotFound):
        bucket.restore_blob("a", generation=first.generation)


def test_versions_are_kept_where_the_bucket_says_so(client: storage.Client) -> None:
    bucket = client.bucket(f"b-{uuid.uuid4().hex}")
    bucket.versioning_enabled = True
    bucket.create()
    old, new = put(bucket, "a", b"old"), put(bucket, "a", b"new")
    assert [found.generation for found in bucket.list_blobs(versions=True)] == [old.generation, new.generation]
    assert bucket.blob("a", generation=old.generation).download_as_bytes() == b"old"
    bucket.blob("a").delete()
    assert not bucket.blob("a").exists()
    assert bucket.blob("a", generation=new.generation).download_as_bytes() == b"new"
    bucket.delete(force=True)


@pytest.mark.parametrize(
    ("glob", "names"),
    [
        ("*", ["a", "c[d]"]),
        ("**", ["a", "b/a", "b/c/a", "c[d]"]),
        ("**/a", ["a", "b/a", "b/c/a"]),
        ("b/?", ["b/a"]),
        ("{a,b/*}", ["a", "b/a"]),
        ("b/[!b-z]", ["b/a"]),
        ("c[[]d]", ["c[d]"]),
    ],
)
def test_a_glob_selects_names(bucket: storage.Bucket, glob: str, names: list[str]) -> None:
    for name in ("a", "b/a", "b/c/a", "c[d]"):
        put(bucket, name)
    assert [blob.name for blob in bucket.list_blobs(match_glob=glob)] == names


def test_a_malformed_glob_is_refused(bucket: storage.Bucket) -> None:
    with pytest.raises(BadRequest):
        list(bucket.list_blobs(match_glob="{a"))


def test_a_page_ends_with_a_trailing_delimiter_and_the_next_goes_on_after_it(bucket: storage.Bucket) -> None:
    for name in ("a/", "a/1", "b/", "c"):
        put(bucket, name)
    found: list[str] = []
    listing = bucket.list_blobs(delimiter="/", include_trailing_delimiter=True, page_size=1)
    for page in listing.pages:
        found += [blob.name for blob in page]
    assert (found, listing.prefixes) == (["a/", "b/", "c"], {"a/", "b/"})


def test_storage_class_and_labels_are_kept(client: storage.Client) -> None:
    bucket = client.bucket(f"b-{uuid.uuid4().hex}")
    bucket.storage_class = "NEARLINE"
    bucket.create()
    blob = put(bucket, "a")
    assert blob.storage_class == "NEARLINE"
    blob.update_storage_class("COLDLINE")
    assert bucket.get_blob("a").storage_class == "COLDLINE"
    bucket.labels = {"team": "qa"}
    bucket.patch()
    bucket.labels = {"other": "x"}
    bucket.patch()
    assert client.get_bucket(bucket.name).labels == {"other": "x"}


def test_a_refusal_has_the_shape_of_the_real_one(client: storage.Client, bucket: storage.Bucket) -> None:
    blob = put(bucket, "a")
    blob.temporary_hold = True
    blob.patch()
    answer = requests.delete(f"{client.api_endpoint}/storage/v1/b/{bucket.name}/o/a", timeout=10)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (403, 403)
    detail = {"domain": "global", "reason": "objectUnderActiveHold", "message": error["message"]}
    assert error["errors"] == [detail]
    assert error["message"].startswith(f"Object '{bucket.name}/a' is under active Temporary hold")


def test_a_state_folder_from_before_there_were_settings_is_served(tmp_path: Path) -> None:
    with running([SPEC], tmp_path) as addresses:
        put(client_of(addresses["gcs"]).create_bucket("old-bucket"), "a")
    with sqlite3.connect(next(tmp_path.rglob("index.sqlite"))) as index:
        for table in ("bucket_details", "past_object", "deleted_bucket"):
            index.execute(f"drop table {table}")
    index.close()
    with running([SPEC], tmp_path) as addresses:
        bucket = client_of(addresses["gcs"]).get_bucket("old-bucket")
        assert bucket.blob("a").download_as_bytes() == b"x"
        assert changed(bucket, retention_period=60).metageneration == 2
        assert put(bucket, "b").download_as_bytes() == b"x"


def test_a_full_disk_is_said_with_a_status_that_clients_do_not_retry(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    emulator = Emulator(disk)
    body = json.dumps({"name": "bucket"}).encode()
    assert asyncio.run(answer_of(emulator, "/storage/v1/b?project=test", body))[0] == HTTPStatus.OK
    (pages,) = disk.index.execute("pragma page_count").fetchone()
    disk.index.execute(f"pragma max_page_count = {pages}")
    status, content = int(HTTPStatus.OK), b""
    for number in range(1000):
        attributes = json.dumps({"name": f"{number}.csv", "metadata": {"x": "x" * 1000}}).encode()
        status, content = asyncio.run(answer_of(emulator, "/upload/storage/v1/b/bucket/o?uploadType=resumable", attributes))
        if status != HTTPStatus.OK:
            break
    disk.close()
    assert status == HTTPStatus.INSUFFICIENT_STORAGE
    assert b"The disk that holds this bucket is full" in content


async def answer_of(emulator: Emulator, address: str, body: bytes) -> tuple[int, bytes]:
    """The status and the content with which the application answers a POST."""
    path, _, query = address.partition("?")
    sent: list[Any] = []
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": query.encode()}
    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body}

    async def send(message: Any) -> None:
        sent.append(message)

    await emulator({**scope, "headers": headers, "server": ("127.0.0.1", 80), "scheme": "http"}, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)
