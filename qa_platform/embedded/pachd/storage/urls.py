"""Fetches objects for ModifyFile by URL: ``gs://bucket/object``, or with ``recursive`` everything below a prefix."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from qa_platform.embedded.pachd.errors import PachError

_READ_BYTES = 4 * 2**20


def read(url: str, *, recursive: bool) -> Iterator[tuple[str, Iterator[bytes]]]:
    """The objects of a URL, each as (the rest of its name after the URL, empty for the object itself; its content).

    Raises:
        PachError: the URL has another scheme, or the object does not exist.
    """
    parts = urlsplit(url)
    if parts.scheme != "gs":
        raise PachError(f"unrecognized object store: {parts.scheme}")
    bucket = _client().bucket(parts.netloc)
    name = parts.path.lstrip("/")
    if recursive:
        prefix = name.rstrip("/") + "/" if name else ""
        for blob in bucket.list_blobs(prefix=prefix):
            yield "/" + blob.name[len(prefix) :], _content(blob)
        return
    blob = bucket.get_blob(name)
    if blob is None:
        raise PachError(f"cannot read {url}: there is no such object")
    yield "", _content(blob)


def _content(blob: Any) -> Iterator[bytes]:
    with blob.open("rb") as file:
        while data := file.read(_READ_BYTES):
            yield data


def _client() -> Any:
    # Imported late: only requests with a URL need Google's client.
    from google.auth.credentials import AnonymousCredentials
    from google.auth.exceptions import DefaultCredentialsError
    from google.cloud import storage

    try:
        return storage.Client()
    except (DefaultCredentialsError, OSError):
        return storage.Client(project="none", credentials=AnonymousCredentials())
