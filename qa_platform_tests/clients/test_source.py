"""Compressed uploads: their stored bytes are verified, read, compared and archived, whichever side decompresses them."""

import gzip
import io

import pytest
from google.cloud import storage

from qa_platform.clients.archived import find_archived, list_archived
from qa_platform.clients.bucket import archive, find_incoming, open_version, upload
from qa_platform.contract import INCOMING, FileVersion
from qa_platform.ingest import RowReader

CSV = b"question,context\nWhere?,Here.\nWho?,Me.\n"
PACKED = gzip.compress(CSV, mtime=0)


def put(bucket: storage.Bucket, name: str, encoding: str | None) -> FileVersion:
    blob = bucket.blob(INCOMING + name)
    blob.content_encoding = encoding
    blob.metadata = {"sent-by": "somebody"}
    blob.upload_from_string(PACKED, content_type="text/csv")
    version = find_incoming(bucket, name)
    assert version is not None
    return version


@pytest.mark.parametrize(("name", "encoding"), [("a.csv.gz", None), ("b.csv", "gzip"), ("c.csv.gz", "gzip"), ("d.csv", None)])
def test_the_rows_of_a_compressed_object_are_read(bucket: storage.Bucket, name: str, encoding: str | None) -> None:
    version = put(bucket, name, encoding)
    assert version.size == len(PACKED)
    with open_version(bucket, version, INCOMING + name) as source:
        assert [list(row.cells) for row in RowReader(source, size=version.size)] == [["Where?", "Here."], ["Who?", "Me."]]


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "x" * 1000 + ".csv.gz"], ids=["plain name", "gz", "long"])
def test_the_archive_keeps_a_compressed_object_as_it_was(bucket: storage.Bucket, name: str) -> None:
    version = put(bucket, name, "gzip")
    place = archive(bucket, version, mode="move")
    assert place is not None
    assert place.endswith(f"/{version.generation}.csv" + ".gz" * name.endswith(".gz"))
    copy = bucket.get_blob(place)
    assert (copy.content_encoding, copy.content_type, copy.metadata["sent-by"]) == ("gzip", "text/csv", "somebody")
    assert copy.download_as_bytes(raw_download=True) == PACKED
    assert find_archived(bucket, version) == place
    assert [found.version for found in list_archived(bucket, (".csv", ".csv.gz"))] == [version]


def test_the_type_of_an_upload_is_that_of_its_name(bucket: storage.Bucket) -> None:
    for name, content in (("a.csv", CSV), ("a.csv.gz", PACKED)):
        upload(bucket, name, io.BytesIO(content))
    types = [bucket.get_blob(INCOMING + name).content_type for name in ("a.csv", "a.csv.gz")]
    assert types == ["text/csv", "application/gzip"]
