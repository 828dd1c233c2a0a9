"""Errors of the bucket: which are transient, and what a person must do about the others."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from google.api_core.exceptions import GoogleAPICallError, GoogleAPIError
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, RefreshError, TransportError
from google.cloud.storage.exceptions import DataCorruption
from requests.exceptions import RequestException

from qa_platform.errors import InputError, QaPlatformError, TransientError

# The id of a resumable upload, in its address: whoever has it can write the object.
_UPLOAD_SESSION = re.compile(r"upload_id=[^&\s)'\"]+")
# What Google's client raises when the bucket refuses a request or cannot be reached.
BUCKET_ERRORS = (GoogleAPIError, GoogleAuthError, RequestException, DataCorruption)
# The transient statuses below 500. 308 and 410 end a resumable upload, which must begin again.
_BUSY = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.PERMANENT_REDIRECT, HTTPStatus.GONE)
_BUSY_REASONS = ("rateLimitExceeded", "userRateLimitExceeded")
_NO_CREDENTIALS = "Google's client finds no credentials"
_NO_CREDENTIALS_ADVICE = (
    "gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS to a key file; "
    "on a laptop: qa-platform local run -- COMMAND"
)
# No message of Google's client that names a file is longer.
_LONGEST_WITH_A_FILE = 500
_CREDENTIALS = "check GOOGLE_APPLICATION_CREDENTIALS and the grants on the bucket"
_PAYER = "let the account bill QA_BILLING_PROJECT: roles/serviceusage.serviceUsageConsumer on that project, whose billing must be active"
# What to do, by the service's own reason for a refusal.
_ADVICE_BY_REASON: Mapping[str, str] = {
    "required": "the requester pays for this bucket: set QA_BILLING_PROJECT to the project that pays",
    "userProjectMissing": "the requester pays for this bucket: set QA_BILLING_PROJECT to the project that pays",
    "userProjectAccessDenied": _PAYER,
    "userProjectAccountProblem": _PAYER,
    "userProjectInvalid": "set QA_BILLING_PROJECT to a project that exists",
    "resourceIsEncryptedWithCustomerEncryptionKey": "upload it again without an encryption key of your own",
    "objectUnderActiveHold": "release it: gcloud storage objects update URL --no-temporary-hold --no-event-based-hold",
    "retentionPolicyNotMet": "wait until then, or, if the policy is not locked, shorten it: "
    "gcloud storage buckets update gs://BUCKET --retention-period=…",
}
_ADVICE_BY_STATUS: Mapping[int, str] = {
    HTTPStatus.UNAUTHORIZED: _CREDENTIALS,
    HTTPStatus.FORBIDDEN: "grant the account roles/storage.objectUser on the bucket, which may list, read, write and delete objects, "
    "or check GOOGLE_APPLICATION_CREDENTIALS",
    HTTPStatus.NOT_FOUND: "check STORAGE_BUCKET",
    HTTPStatus.PRECONDITION_FAILED: "check whether something else writes the same object",
}


@contextmanager
def bucket_errors(doing: str) -> Iterator[None]:
    """Turn the exceptions of Google's client into the platform's own errors.

    Args:
        doing: what the block does, for the message.

    Raises:
        InputError: the bucket refuses for good: it does not exist, a role is missing, a hold or a retention policy forbids it, or no
            project pays for it.
        TransientError: the bucket cannot be reached.
    """
    try:
        yield
    except BUCKET_ERRORS as error:
        # Some originals are left out: Dagster would show their text.
        raise platform_error(error, doing) from None if _may_hold_a_secret(error) else error


def platform_error(error: Exception, doing: str, *, trouble: str = "the bucket cannot be reached") -> QaPlatformError:
    """The platform's own error for an exception of Google's client. An `InputError` must not be retried, see `bucket_errors`.

    Args:
        doing: what was attempted.
        trouble: what is wrong, if a retry may help.
    """
    if isinstance(error, DefaultCredentialsError):
        return InputError(_no_credentials(str(error)), where=doing, advice=_NO_CREDENTIALS_ADVICE)
    if isinstance(error, RefreshError) and not (error.retryable or isinstance(error.__cause__, TransportError)):
        return InputError(f"Google does not accept the credentials ({error})", where=doing, advice=_CREDENTIALS)
    status = error.code if isinstance(error, GoogleAPICallError) else None
    if status is None or status >= HTTPStatus.INTERNAL_SERVER_ERROR or status in _BUSY or reason_of(error) in _BUSY_REASONS:
        return TransientError(f"{trouble}: {_without_session(error)}", where=doing)
    advice = _ADVICE_BY_REASON.get(reason_of(error)) or _ADVICE_BY_STATUS.get(status, "check STORAGE_BUCKET and the name of the object")
    message = _first_detail(error).get("message") or getattr(error, "message", "") or error
    return InputError(f"{_what(status)} ({_without_session(message)})", where=doing, advice=advice)


def _without_session(message: object) -> str:
    return _UPLOAD_SESSION.sub("upload_id=…", str(message))


def _may_hold_a_secret(error: Exception) -> bool:
    return isinstance(error, DefaultCredentialsError) or bool(_UPLOAD_SESSION.search(str(error)))


def _no_credentials(text: str) -> str:
    """Google's text quotes GOOGLE_APPLICATION_CREDENTIALS, which may hold the key itself instead of its file's name."""
    if len(text) > _LONGEST_WITH_A_FILE or "{" in text:
        return f"{_NO_CREDENTIALS}: GOOGLE_APPLICATION_CREDENTIALS holds something other than the name of a file"
    return f"{_NO_CREDENTIALS} ({text})"


def reason_of(error: Exception) -> str:
    """The service's own reason for a refusal, such as ``forbidden``; empty if it gave none."""
    return str(_first_detail(error).get("reason", ""))


def _what(status: int) -> str:
    if status == HTTPStatus.NOT_FOUND:
        return "there is no such bucket or object"
    denied = status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
    return "the bucket denies access" if denied else "the bucket refuses the request"


def _first_detail(error: Exception) -> Mapping[str, Any]:
    details = getattr(error, "errors", None) or _details_of_response(error)
    return details[0] if details and isinstance(details[0], Mapping) else {}


def _details_of_response(error: Exception) -> list[Any]:
    """The details in the body of the response, which Google's client does not read for uploads and downloads."""
    try:
        details = json.loads(getattr(error, "response").text)["error"]["errors"]  # noqa: B009
    except (AttributeError, ValueError, KeyError, TypeError):
        return []
    return details if isinstance(details, list) else []
