"""The emulator through Google's own client, as the rest of the platform uses it."""

import base64
import gzip
import hashlib
import io
import json
import os
import threading
import urllib.parse
import uuid
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
import psutil
import pytest
import requests
from google.api_core.exceptions import Conflict, NotFound, PreconditionFailed
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qa_platform.embedded.supervise import RunningServer, ServerSpec, running

SPEC = ServerSpec("gcs", "qa_platform.embedded.gcs")
# Larger than what the client sends in one piece when told to use chunks, and no multiple of it.
CHUNK = 256 * 1024
LARGE = 3 * CHUNK + 17


def client_of(address: str) -> storage.Client:
    return storage.Client("test", AnonymousCredentials(), client_options={"api_endpoint": f"http://{address}"})


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gcs")


@pytest.fixture(scope="module")
def client(state: Path) -> Iterator[storage.Client]:
    with running([SPEC], state) as addresses:
        yield client_of(addresses["gcs"])


@pytest.fixture
def bucket(client: storage.Client) -> storage.Bucket:
    return client.create_bucket(f"b-{uuid.uuid4().hex}")


def crc32c(content: bytes) -> str:
    return base64.b64encode(google_crc32c.Checksum(content).digest()).decode()


def put(bucket: storage.Bucket, name: str, content: bytes = b"x", **kwargs: object) -> storage.Blob:
    blob = bucket.blob(name)
    blob.upload_from_string(content, **kwargs)
    return blob


def resumable(bucket: storage.Bucket, name: str, content: bytes, **kwargs: object) -> storage.Blob:
    blob = bucket.blob(name, chunk_size=CHUNK)
    blob.upload_from_file(io.BytesIO(content), **kwargs)
    return blob


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2\n", b"\r\n--\r\n\r\n", os.urandom(LARGE)])
@pytest.mark.parametrize("upload", [put, resumable])
def test_what_is_uploaded_is_downloaded(bucket: storage.Bucket, upload: object, content: bytes) -> None:
    upload(bucket, "a.csv", content)  # type: ignore[operator]
    found = bucket.get_blob("a.csv")
    assert found.download_as_bytes() == content
    assert (found.size, found.crc32c) == (len(content), crc32c(content))
    assert found.md5_hash == base64.b64encode(hashlib.md5(content).digest()).decode()


def test_a_simple_upload_takes_its_name_from_the_query(client: storage.Client, bucket: storage.Bucket) -> None:
    url = f"{client.api_endpoint}/upload/storage/v1/b/{bucket.name}/o"
    answer = requests.post(
        url, params={"uploadType": "media", "name": "ä/b.csv"}, data=b"raw", headers={"content-type": "text/csv"}, timeout=10
    )
    assert answer.json()["name"] == "ä/b.csv"
    found = bucket.get_blob("ä/b.csv")
    assert (found.download_as_bytes(), found.content_type) == (b"raw", "text/csv")


def test_a_large_object_is_streamed_in_both_directions(bucket: storage.Bucket) -> None:
    content = os.urandom(CHUNK) * 40
    put(bucket, "large", content, content_type="text/csv")
    with bucket.blob("large").open("rb", chunk_size=CHUNK) as file:
        assert file.read() == content


def test_part_of_an_object_can_be_read(bucket: storage.Bucket) -> None:
    blob = put(bucket, "a", b"0123456789")
    assert blob.download_as_bytes(start=2, end=4) == b"234"
    assert blob.download_as_bytes(start=7) == b"789"
    assert blob.download_as_bytes(start=-3) == b"789"
    assert blob.download_as_bytes(start=0, end=100) == b"0123456789"


def test_each_write_has_a_greater_generation(bucket: storage.Bucket) -> None:
    generations = [put(bucket, "a", str(number).encode()).generation for number in range(20)]
    assert generations == sorted(set(generations))


def test_a_generation_that_was_replaced_is_gone(bucket: storage.Bucket) -> None:
    old = put(bucket, "a", b"old").generation
    new = put(bucket, "a", b"new").generation
    assert bucket.get_blob("a", generation=old) is None
    with pytest.raises(NotFound):
        bucket.blob("a", generation=old).download_as_bytes()
    with pytest.raises(NotFound):
        bucket.blob("a", generation=old).delete()
    assert bucket.blob("a", generation=new).download_as_bytes() == b"new"


@pytest.mark.parametrize("upload", [put, resumable])
def test_an_upload_can_insist_on_what_it_replaces(bucket: storage.Bucket, upload: object) -> None:
    def write(content: bytes, match: int) -> None:
        upload(bucket, "a", content, if_generation_match=match)  # type: ignore[operator]

    write(b"first", 0)
    with pytest.raises(PreconditionFailed):
        write(b"not first", 0)
    generation = bucket.get_blob("a").generation
    write(b"second", generation)
    with pytest.raises(PreconditionFailed):
        write(b"late", generation)
    assert bucket.blob("a").download_as_bytes() == b"second"


def test_a_resumable_upload_is_refused_where_another_one_was_faster(bucket: storage.Bucket) -> None:
    first = bucket.blob("a")
    url = first.create_resumable_upload_session(if_generation_match=0, size=3)
    put(bucket, "a", b"faster")
    answer = requests.put(url, data=b"new", headers={"content-range": "bytes 0-2/3"}, timeout=10)
    assert answer.status_code == 412
    assert bucket.blob("a").download_as_bytes() == b"faster"


def test_reading_and_deleting_can_insist_on_a_generation(bucket: storage.Bucket) -> None:
    blob = put(bucket, "a")
    for call in (blob.download_as_bytes, blob.reload, blob.delete):
        with pytest.raises(PreconditionFailed):
            call(if_generation_match=blob.generation + 1)
    blob.delete(if_generation_match=blob.generation)
    with pytest.raises(NotFound):
        blob.delete()


def test_a_reader_notices_that_the_object_was_replaced_under_it(bucket: storage.Bucket) -> None:
    blob = put(bucket, "a", os.urandom(3 * CHUNK))
    file = blob.open("rb", chunk_size=CHUNK, if_generation_match=blob.generation)
    file.read(CHUNK)
    put(bucket, "a", b"new")
    # The client asks for the generation as such, too.
    with pytest.raises((NotFound, PreconditionFailed)):
        file.read()


def test_a_copy_can_insist_on_its_source_and_on_its_target(bucket: storage.Bucket) -> None:
    source = put(bucket, "a", b"content", content_type="text/csv")
    target = bucket.blob("processed/a")
    with pytest.raises(PreconditionFailed):
        target.rewrite(source, if_source_generation_match=source.generation + 1)
    token, done, total = target.rewrite(source, if_generation_match=0, if_source_generation_match=source.generation)
    assert (token, done, total) == (None, 7, 7)
    with pytest.raises(PreconditionFailed):
        target.rewrite(source, if_generation_match=0)
    target.reload()
    assert (target.download_as_bytes(), target.content_type, target.crc32c) == (b"content", "text/csv", crc32c(b"content"))
    assert target.generation > source.generation
    source.delete()
    assert target.download_as_bytes() == b"content"


def test_copying_what_is_not_there_is_not_found(bucket: storage.Bucket) -> None:
    with pytest.raises(NotFound):
        bucket.blob("b").rewrite(bucket.blob("a"))
    source = put(bucket, "a")
    with pytest.raises(NotFound):
        bucket.blob("b").rewrite(bucket.blob("a", generation=source.generation - 1))
    copy = bucket.copy_blob(source, bucket, "copied")
    assert copy.download_as_bytes() == b"x"


def multipart(bucket: storage.Bucket, metadata: str, content: bytes, *, boundary: str = "b", split: int = 0) -> requests.Response:
    """A multipart upload by hand; with ``split``, in chunks of that size."""
    part = f"--{boundary}\r\ncontent-type: application/json\r\n\r\n{metadata}\r\n--{boundary}\r\ncontent-type: text/csv\r\n\r\n"
    body = part.encode() + content + f"\r\n--{boundary}--".encode()
    chunks = (body[at : at + split] for at in range(0, len(body), split)) if split else body
    url = f"{bucket.client.api_endpoint}/upload/storage/v1/b/{bucket.name}/o?uploadType=multipart"
    return requests.post(url, data=chunks, headers={"content-type": f'multipart/related; boundary="{boundary}"'}, timeout=10)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.lists(st.sampled_from([b"\r\n", b"--", b"=b=", b"\r\n--=b", b"\r", b"\n", b"x"])).map(b"".join),
    split=st.integers(1, 60),
)
def test_content_that_looks_like_a_boundary_arrives_whole_however_it_is_cut(bucket: storage.Bucket, content: bytes, split: int) -> None:
    if b"\r\n--=b=" in content:
        return
    assert multipart(bucket, '{"name": "a"}', content, boundary="=b=", split=split).status_code == 200
    assert bucket.blob("a").download_as_bytes() == content


@pytest.mark.parametrize("checksum", ["crc32c", "md5Hash"])
def test_wrong_checksums_are_refused(bucket: storage.Bucket, checksum: str) -> None:
    assert multipart(bucket, json.dumps({"name": "a", checksum: "AAAAAA=="}), b"content").status_code == 400
    assert not bucket.blob("a").exists()
    # The client refuses to go on, too, so this is by hand as well.
    url = bucket.blob("b").create_resumable_upload_session(size=1)
    header = {"content-range": "bytes 0-0/1", "x-goog-hash": f"{checksum.removesuffix('Hash')}=AAAAAA=="}
    assert requests.put(url, data=b"x", headers=header, timeout=10).status_code == 400
    assert not bucket.blob("b").exists()


def test_a_large_object_never_lies_in_memory(tmp_path: Path) -> None:
    size, piece = 128 * 2**20, os.urandom(2**20)
    server = RunningServer(SPEC, tmp_path)
    try:
        bucket = client_of(server.address()).create_bucket("bucket")
        put(bucket, "small")
        process = psutil.Process(server.pid)
        before = most = process.memory_info().rss
        url = f"{bucket.client.api_endpoint}/upload/storage/v1/b/bucket/o?uploadType=media&name=large"
        assert requests.post(url, data=(piece for _ in range(size // len(piece))), timeout=60).json()["size"] == str(size)
        most = max(most, process.memory_info().rss)
        with bucket.blob("large").open("rb", chunk_size=2**20) as file:
            read = 0
            while chunk := file.read(2**20):
                read += len(chunk)
                most = max(most, process.memory_info().rss)
        assert read == size
        assert most - before < size / 4
    finally:
        server.end()
        server.wait()


@pytest.mark.parametrize("checksum", ["md5", "crc32c"])
@pytest.mark.parametrize("upload", [put, resumable])
def test_right_checksums_are_accepted(bucket: storage.Bucket, upload: object, checksum: str) -> None:
    assert upload(bucket, "a", b"content", checksum=checksum).exists()  # type: ignore[operator]


@pytest.mark.parametrize("metadata", ["", "[]", "{", "x" * 300_000, '{"name": 3}', "{}"])
def test_a_multipart_upload_that_makes_no_sense_is_refused(bucket: storage.Bucket, metadata: str) -> None:
    assert multipart(bucket, metadata, b"x").status_code == 400
    assert list(bucket.list_blobs()) == []


def test_an_interrupted_upload_goes_on_where_it_stopped(bucket: storage.Bucket) -> None:
    content = os.urandom(LARGE)
    url = bucket.blob("a").create_resumable_upload_session(size=LARGE, content_type="text/csv")

    def send(first: int, last: int) -> requests.Response:
        return requests.put(url, data=content[first:last], headers={"content-range": f"bytes {first}-{last - 1}/{LARGE}"}, timeout=10)

    asked = requests.put(url, headers={"content-range": "bytes */*"}, timeout=10)
    assert (asked.status_code, asked.headers.get("range")) == (308, None)
    assert send(0, CHUNK).headers["range"] == f"bytes=0-{CHUNK - 1}"
    # A gap is not accepted, an overlap is.
    assert send(2 * CHUNK, 3 * CHUNK).headers["range"] == f"bytes=0-{CHUNK - 1}"
    assert send(CHUNK // 2, 2 * CHUNK).headers["range"] == f"bytes=0-{2 * CHUNK - 1}"
    finished = send(2 * CHUNK, LARGE)
    assert finished.status_code == 200
    assert bucket.blob("a").download_as_bytes() == content
    again = requests.put(url, headers={"content-range": f"bytes */{LARGE}"}, timeout=10)
    assert again.json()["generation"] == finished.json()["generation"]


def test_a_cancelled_upload_is_gone(bucket: storage.Bucket) -> None:
    url = bucket.blob("a").create_resumable_upload_session()
    assert requests.delete(url, timeout=10).status_code == 499
    assert requests.put(url, data=b"x", timeout=10).status_code == 404
    assert not bucket.blob("a").exists()


def test_listings_come_in_pages_and_in_the_order_of_utf8(bucket: storage.Bucket) -> None:
    names = sorted(["incoming/a", "incoming/b/c", "incoming/ä", "incoming/z", "incoming/😀", "incoming/￿"], key=str.encode)
    for name in [*names, "processed/a"]:
        put(bucket, name)
    fields = "items(name,generation,size,crc32c),nextPageToken"
    pages = [[blob.name for blob in page] for page in bucket.list_blobs(prefix="incoming/", page_size=4, fields=fields).pages]
    assert pages == [names[:4], names[4:]]
    assert [blob.name for blob in bucket.list_blobs(max_results=2)] == names[:2]
    assert [blob.name for blob in bucket.list_blobs(start_offset="incoming/z", end_offset="processed/")] == names[
        names.index("incoming/z") :
    ]


@pytest.mark.parametrize("page_size", [1, 2, 3, 100])
def test_a_delimiter_folds_names_into_prefixes_on_every_page(bucket: storage.Bucket, page_size: int) -> None:
    for name in ["a", "b/1", "b/2", "b/3", "c", "d/", "e/f/g"]:
        put(bucket, name)
    listing = bucket.list_blobs(delimiter="/", page_size=page_size)
    found: list[str] = []
    for page in listing.pages:
        found += [blob.name for blob in page]
    assert found == ["a", "c"]
    assert listing.prefixes == {"b/", "d/", "e/"}
    assert [blob.name for blob in bucket.list_blobs(prefix="b/", delimiter="/", page_size=page_size)] == ["b/1", "b/2", "b/3"]


def test_listing_while_objects_come_and_go_never_fails_or_repeats(bucket: storage.Bucket) -> None:
    for number in range(10):
        put(bucket, f"{number:02d}")
    found = []
    for page in bucket.list_blobs(page_size=3).pages:
        found += [blob.name for blob in page]
        bucket.blob(found[-1]).delete()
        put(bucket, f"{found[-1]}-later")
    assert len(found) == len(set(found))
    assert set(found) >= {f"{number:02d}" for number in range(10)}


HOSTILE = [
    "../../../x",
    "..%2f..%2fx",
    "a/../../b",
    "/a",
    "a//b",
    "a/./b",
    "a\\b",
    "a/",
    "%00",
    "C:\\x",
    "a?b=c#d",
    "a b+c",
    "é" * 512,
    "a/b",
    "a",
    "-rf",
    "o/a",
    "x/rewriteTo/b/c/o/d",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_any_name_is_kept_as_it_is_and_inside_the_folder(bucket: storage.Bucket, name: str, state: Path) -> None:
    outside = sorted(path for path in state.parent.iterdir())
    put(bucket, name, name.encode())
    resumable(bucket, f"{name}2"[-512:], b"x")
    blob = bucket.get_blob(name)
    assert (blob.name, blob.download_as_bytes()) == (name, name.encode())
    copy = bucket.copy_blob(blob, bucket, f"c/{name}"[:512])
    assert copy.download_as_bytes() == name.encode()
    assert name in [listed.name for listed in bucket.list_blobs(prefix=name)]
    blob.delete()
    assert bucket.get_blob(name) is None
    assert sorted(path for path in state.parent.iterdir()) == outside
    assert all(path.name.isdigit() for path in (state / "gcs" / "contents").iterdir())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0"), min_size=1, max_size=200).filter(
        lambda text: text not in (".", "..")
    ),
    content=st.binary(max_size=200),
)
def test_names_and_contents_survive(bucket: storage.Bucket, name: str, content: bytes) -> None:
    put(bucket, name, content)
    found = next(blob for blob in bucket.list_blobs(prefix=name) if blob.name == name)
    assert found.download_as_bytes() == content


@pytest.mark.parametrize("name", ["", "a" * 1025, "é" * 513, "a\nb", "a\rb", ".", ".."])
def test_impossible_names_are_refused(client: storage.Client, bucket: storage.Bucket, name: str) -> None:
    url = f"{client.api_endpoint}/upload/storage/v1/b/{bucket.name}/o?uploadType=media&name={urllib.parse.quote(name, safe='')}"
    assert requests.post(url, data=b"x", timeout=10).status_code == 400


def test_a_name_that_is_not_utf8_is_refused(client: storage.Client, bucket: storage.Bucket) -> None:
    assert requests.get(f"{client.api_endpoint}/storage/v1/b/{bucket.name}/o/%ff%fe", timeout=10).status_code == 400


def test_a_compressed_object_is_decompressed_for_clients_that_do_not_accept_gzip(client: storage.Client, bucket: storage.Bucket) -> None:
    content = b"question,context\n" + b"q,c\n" * 1_000_000
    packed = gzip.compress(content)
    for name, cache in (("a", None), ("b", "no-transform")):
        blob = bucket.blob(name)
        blob.content_encoding, blob.cache_control = "gzip", cache
        blob.upload_from_string(packed, content_type="text/csv")
    found = bucket.get_blob("a")
    assert (found.size, found.crc32c) == (len(packed), crc32c(packed))
    assert (found.download_as_bytes(), found.download_as_bytes(raw_download=True)) == (content, packed)
    assert found.download_as_bytes(raw_download=True, start=2, end=9) == packed[2:10]

    url = f"{client.api_endpoint}/download/storage/v1/b/{bucket.name}/o/"

    def plain(name: str) -> requests.Response:
        headers = {"accept-encoding": "identity", "range": "bytes=2-9"}
        return requests.get(url + name, params={"alt": "media"}, headers=headers, stream=True, timeout=10)

    transcoded, kept = plain("a"), plain("b")
    assert (transcoded.status_code, transcoded.raw.read()) == (200, content), "the range is ignored"
    assert "content-encoding" not in transcoded.headers
    assert transcoded.headers["x-goog-hash"].startswith(f"crc32c={crc32c(packed)}")
    assert transcoded.headers["x-goog-stored-content-length"] == str(len(packed))
    assert (kept.status_code, kept.headers["content-encoding"], kept.raw.read()) == (206, "gzip", packed[2:10])


def test_attributes_can_be_set_and_changed(bucket: storage.Bucket) -> None:
    blob = bucket.blob("a")
    blob.metadata = {"owner": "Zoë"}
    blob.upload_from_string(b"x", content_type="text/csv")
    found = bucket.get_blob("a")
    assert (found.metadata, found.content_type, found.metageneration) == ({"owner": "Zoë"}, "text/csv", 1)
    found.content_type = "text/plain"
    found.patch()
    again = bucket.get_blob("a")
    assert (again.content_type, again.metadata, again.metageneration) == ("text/plain", {"owner": "Zoë"}, 2)
    assert again.generation == found.generation
    with pytest.raises(PreconditionFailed):
        found.delete(if_metageneration_match=1)


def test_buckets_come_and_go(client: storage.Client, bucket: storage.Bucket) -> None:
    with pytest.raises(Conflict):
        client.create_bucket(bucket.name)
    assert bucket.name in [found.name for found in client.list_buckets()]
    put(bucket, "a")
    with pytest.raises(Conflict):
        bucket.delete()
    bucket.delete(force=True)
    assert client.lookup_bucket(bucket.name) is None
    with pytest.raises(NotFound):
        list(bucket.list_blobs())
    with pytest.raises(NotFound):
        put(bucket, "a")


def test_what_is_not_served_says_so(client: storage.Client, bucket: storage.Bucket) -> None:
    assert requests.get(f"{client.api_endpoint}/storage/v1/somewhere", timeout=10).status_code == 404
    assert requests.post(f"{client.api_endpoint}/storage/v1/b/{bucket.name}/o/a/somewhere", timeout=10).status_code == 501
    assert requests.get(f"{client.api_endpoint}/storage/v1/b/{bucket.name}/o?pageToken=nonsense", timeout=10).status_code == 400
    assert requests.get(f"{client.api_endpoint}/storage/v1/b/{bucket.name}/o/a?ifGenerationMatch=x", timeout=10).status_code == 400


def test_only_one_of_many_simultaneous_first_writes_wins(bucket: storage.Bucket) -> None:
    won: list[int] = []
    lost: list[int] = []
    start = threading.Barrier(8)

    def write(number: int) -> None:
        start.wait()
        try:
            put(bucket, "a", str(number).encode(), if_generation_match=0, retry=None)
            won.append(number)
        except PreconditionFailed:
            lost.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 7)
    assert bucket.blob("a").download_as_bytes() == str(won[0]).encode()


@pytest.mark.faults
def test_what_was_written_is_there_after_a_kill(tmp_path: Path) -> None:
    server = RunningServer(SPEC, tmp_path)
    bucket = client_of(server.address()).create_bucket("bucket")
    blob = put(bucket, "a", b"content")
    half = bucket.blob("half").create_resumable_upload_session(size=4)
    requests.put(half, data=b"ab", headers={"content-range": "bytes 0-1/4"}, timeout=10)
    server.kill()
    with running([SPEC], tmp_path) as addresses:
        again = client_of(addresses["gcs"]).bucket("bucket")
        found = again.get_blob("a")
        assert (found.generation, found.download_as_bytes()) == (blob.generation, b"content")
        assert put(again, "a", b"new").generation > blob.generation
        there = urllib.parse.urlsplit(half)._replace(netloc=addresses["gcs"]).geturl()
        assert requests.put(there, data=b"cd", headers={"content-range": "bytes 2-3/4"}, timeout=10).status_code == 200
        assert again.blob("half").download_as_bytes() == b"abcd"
