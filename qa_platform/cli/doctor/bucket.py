"""The bucket: it exists, its objects can be listed, and the platform has the permissions that it needs."""

import shlex
from collections.abc import Iterator

from qa_platform.cli.doctor.findings import IN_THE_STACK, Part, Result, Wrong, ok, wrong
from qa_platform.contract import INCOMING
from qa_platform.errors import InputError, QaPlatformError
from qa_platform.settings import BucketSettings, DagsterSettings

_TIMEOUT_SECONDS = 5
# The platform lists, reads and archives objects. Archiving (copy, then delete) and replacing an answered CSV need the last two.
_PERMISSIONS = ("storage.objects.list", "storage.objects.get", "storage.objects.create", "storage.objects.delete")
_ROLE = "roles/storage.objectUser"
# Dagster's logs in the bucket need it too.
_SEE_BUCKET = "storage.buckets.get"
_LOG_ROLE = "roles/storage.legacyBucketReader"


def _examine() -> Iterator[Result]:
    from qa_platform.clients.bucket import open_bucket
    from qa_platform.clients.refusals import bucket_errors

    settings = BucketSettings()
    url = f"gs://{settings.storage_bucket}"
    is_listed = False
    try:
        with bucket_errors(f"listing {url}"):
            bucket = open_bucket(settings)
            # Not `exists()`, which needs a permission that the platform does not need.
            listing = list(bucket.list_blobs(prefix=INCOMING, max_results=1, timeout=_TIMEOUT_SECONDS, retry=None))
            is_listed = True
            yield ok(f"{url} can be listed; there is {'something' if listing else 'nothing'} under {INCOMING}")
            needed = [*_PERMISSIONS, *([_SEE_BUCKET] if _logs_are_there() else [])]
            granted = bucket.test_iam_permissions(needed, timeout=_TIMEOUT_SECONDS, retry=None)
    except QaPlatformError as error:
        raise _explained(error, url, is_listed=is_listed) from error
    missing = [permission for permission in needed if permission not in granted]
    role = _LOG_ROLE if missing == [_SEE_BUCKET] else _ROLE
    yield wrong(f"missing: {', '.join(missing)}", _grant(url, role)) if missing else ok("objects can be listed, read, written and deleted")


def _explained(error: QaPlatformError, url: str, *, is_listed: bool) -> Wrong:
    from google.api_core.exceptions import Forbidden, GoogleAPIError, NotFound, Unauthorized

    from qa_platform.clients.refusals import reason_of

    origin = error.__cause__
    if isinstance(origin, NotFound) and not is_listed:
        return Wrong(f"there is no bucket {url}", f"gcloud storage buckets create {shlex.quote(url)}, or set STORAGE_BUCKET")
    if isinstance(error, InputError) and origin is None:
        return Wrong(error.cause, error.advice)
    if isinstance(error, InputError) and isinstance(origin, GoogleAPIError):
        is_role_missing = isinstance(origin, (Forbidden, Unauthorized)) and reason_of(origin) in ("", "forbidden")
        return Wrong(error.cause, _grant(url) if is_role_missing else error.advice)
    return Wrong(error.cause, f"check the network to the bucket, and STORAGE_EMULATOR_HOST or API_ENDPOINT_OVERRIDE if set; {IN_THE_STACK}")


def _logs_are_there() -> bool:
    """Whether Dagster keeps its logs in a bucket, as on Kubernetes. Each run then asks whether that exists, and fails if it may not."""
    try:
        return "GCSComputeLogManager" in (DagsterSettings().dagster_home / "dagster.yaml").read_text()
    except OSError:
        return False


def _grant(url: str, role: str = _ROLE) -> str:
    return f"gcloud storage buckets add-iam-policy-binding {shlex.quote(url)} --member=serviceAccount:ACCOUNT --role={role}"


PART = Part(("bucket", "bucket permissions"), _examine, lambda: f"the bucket {BucketSettings().storage_bucket}")
