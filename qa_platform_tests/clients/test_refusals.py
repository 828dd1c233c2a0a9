"""Permanent refusals of the bucket, as distinct from transient errors: the message, and that they are not retried."""

import base64
import io
import json
import re
import threading
import traceback
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from google.api_core.exceptions import BadRequest, Forbidden, InternalServerError, RetryError, ServiceUnavailable, TooManyRequests
from google.cloud import storage
from google.cloud.storage.exceptions import DataCorruption
from google.oauth2.service_account import Credentials

from qa_platform.clients.bucket import (
    account_client,
    archive,
    find_incoming,
    list_incoming,
    open_bucket,
    open_version,
    upload,
    write_report,
)
from qa_platform.clients.refusals import bucket_errors
from qa_platform.contract import INCOMING, FileVersion
from qa_platform.errors import InputError, TransientError
from qa_platform.settings import BucketSettings
from qa_platform_tests.credentials import service_account

CONTENT = b"question,context\nWhere?,Here.\n"
PAYER = "billing-project"


def configured(bucket: storage.Bucket) -> storage.Bucket:
    return open_bucket(BucketSettings(storage_bucket=bucket.name), bucket.client)


def everything(bucket: storage.Bucket, version: FileVersion) -> list[Callable[[], object]]:
    """All that the platform does with a bucket, as calls."""
    return [
        lambda: list(list_incoming(bucket, (".csv",))),
        lambda: find_incoming(bucket, version.name),
        lambda: open_version(bucket, version, INCOMING + version.name).read_to_the_end(),
        lambda: write_report(bucket, version, b"report"),
        lambda: archive(bucket, version, mode="move"),
        lambda: upload(bucket, "b.csv", io.BytesIO(CONTENT)),
    ]


def test_where_the_requester_pays_everything_needs_the_billing_project_and_says_so(
    bucket: storage.Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = upload(bucket, "a.csv", io.BytesIO(CONTENT))
    owner = bucket.client.get_bucket(bucket.name)
    owner.requester_pays = True
    owner.patch()
    for number, call in enumerate(everything(configured(bucket), version)):
        with pytest.raises(InputError, match="requester pays") as caught:
            call()
        assert "QA_BILLING_PROJECT" in caught.value.advice, number
    monkeypatch.setenv("QA_BILLING_PROJECT", PAYER)
    for call in everything(configured(bucket), version):
        call()


@pytest.mark.parametrize(
    ("role", "call", "permission"),
    [
        ("roles/storage.objectCreator", 0, "storage.objects.list"),
        ("roles/storage.objectCreator", 2, "storage.objects.get"),
        ("roles/storage.objectViewer", 3, "storage.objects.create"),
        ("roles/storage.objectViewer", 5, "storage.objects.create"),
    ],
)
def test_a_role_that_does_not_suffice_is_named_with_the_one_that_does(
    bucket: storage.Bucket, role: str, call: int, permission: str
) -> None:
    version = upload(bucket, "a.csv", io.BytesIO(CONTENT))
    policy = bucket.get_iam_policy()
    policy[role] = {"allUsers"}
    bucket.set_iam_policy(policy)
    with pytest.raises(InputError, match=re.escape(permission)) as caught:
        everything(bucket, version)[call]()
    assert "roles/storage.objectUser" in caught.value.advice


def test_an_upload_over_a_held_object_is_refused_for_good(bucket: storage.Bucket) -> None:
    upload(bucket, "a.csv", io.BytesIO(CONTENT))
    blob = bucket.get_blob(INCOMING + "a.csv")
    blob.temporary_hold = True
    blob.patch()
    with pytest.raises(InputError, match="Temporary hold") as caught:
        upload(bucket, "a.csv", io.BytesIO(CONTENT))
    assert "--no-temporary-hold" in caught.value.advice


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (BadRequest("no"), InputError),
        (TooManyRequests("later"), TransientError),
        (InternalServerError("later"), TransientError),
        (ServiceUnavailable("later"), TransientError),
        (DataCorruption(None, "other bytes than were sent"), TransientError),
        (ConnectionResetError("gone"), ConnectionResetError),
    ],
)
def test_what_passes_by_itself_is_told_from_what_does_not(error: Exception, kind: type[Exception]) -> None:
    with pytest.raises(kind), bucket_errors("trying"):
        raise error


KEY = json.dumps({"type": "service_account", "private_key": "-----BEGIN PRIVATE KEY-----\nMIIE" + "x" * 1600, "client_email": "a@b"})


@pytest.mark.parametrize("value", [KEY, base64.b64encode(KEY.encode()).decode()])
def test_a_key_in_place_of_its_file_s_name_is_never_quoted(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", value)
    for opened in (open_bucket, account_client):
        with pytest.raises(InputError, match="holds something other than the name of a file") as caught:
            opened(BucketSettings())
        shown = "".join(traceback.format_exception(caught.value))
        assert value[:40] not in shown
        assert "MIIE" not in shown


def test_the_address_of_an_upload_session_is_never_quoted() -> None:
    with pytest.raises(TransientError, match="upload_id=…") as caught, bucket_errors("writing"):
        raise RetryError("Max retries exceeded with url: /upload?uploadType=resumable&upload_id=SESSION (Caused by x)", cause=None)
    assert "SESSION" not in "".join(traceback.format_exception(caught.value))
    with pytest.raises(InputError, match="upload_id=…") as refused, bucket_errors("writing"):
        raise Forbidden("PUT http://127.0.0.1/o?uploadType=resumable&upload_id=SESSION: no")
    assert "SESSION" not in "".join(traceback.format_exception(refused.value))


def test_a_file_that_may_not_be_read_any_more_is_refused_for_good(bucket: storage.Bucket) -> None:
    version = upload(bucket, "a.csv", io.BytesIO(CONTENT))
    source = open_version(bucket, version, INCOMING + "a.csv")
    policy = bucket.get_iam_policy()
    policy["roles/storage.objectCreator"] = {"allUsers"}
    bucket.set_iam_policy(policy)
    with pytest.raises(InputError, match=r"storage\.objects\.get"):
        source.read_to_the_end()


def test_an_outage_of_the_service_for_tokens_is_not_a_refusal(gcs_address: str) -> None:
    class Down(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(503)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Down) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        key = rsa.generate_private_key(65537, 2048).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
        account = json.loads(service_account(private_key=key, token_uri=f"http://127.0.0.1:{server.server_port}/"))
        credentials = Credentials.from_service_account_info(account, scopes=["x"])
        credentials = credentials.with_always_use_jwt_access(False)
        client = storage.Client("test", credentials, client_options={"api_endpoint": f"http://{gcs_address}"})
        with pytest.raises(TransientError):
            find_incoming(client.bucket("x"), "a.csv")
        server.shutdown()
