"""Refusals by a bucket: missing roles, holds, retention, and requests without a payer.

Every caller may do everything, unless the bucket's IAM policy has a binding of the member ``allUsers``. Then the roles of ``allUsers``
define what callers may do to objects. The settings and the policy of a bucket can always be changed, so that a test can lift its
restrictions.
"""

from collections.abc import Collection, Mapping
from http import HTTPStatus
from typing import Any

from qa_platform.embedded.gcs.model import Bucket, StorageError, StoredObject, forbidden, invalid
from qa_platform.embedded.gcs.times import in_seconds, normalised, now_text

EVERYBODY = "allUsers"
# The account in messages. The emulator has no accounts.
_CALLER = "caller@emulator.iam.gserviceaccount.com"
_READ = frozenset(("storage.objects.get", "storage.objects.list"))
_CREATE = frozenset(("storage.objects.create",))
_CHANGE = frozenset(("storage.objects.delete", "storage.objects.update", "storage.objects.restore"))
_SEE_BUCKET = frozenset(("storage.buckets.get",))
# The permissions on objects of the service's predefined roles.
_ROLES: Mapping[str, frozenset[str]] = {
    "roles/storage.objectViewer": _READ,
    "roles/storage.objectCreator": _CREATE,
    "roles/storage.objectUser": _READ | _CREATE | _CHANGE,
    "roles/storage.objectAdmin": _READ | _CREATE | _CHANGE,
    "roles/storage.admin": _READ | _CREATE | _CHANGE | _SEE_BUCKET,
    "roles/storage.legacyObjectReader": frozenset(("storage.objects.get",)),
    "roles/storage.legacyBucketReader": _SEE_BUCKET | {"storage.objects.list"},
    "roles/storage.legacyBucketWriter": _SEE_BUCKET | {"storage.objects.list", "storage.objects.create", "storage.objects.delete"},
}
_CONDITIONAL_POLICY = 3


def granted(bucket: Bucket, permissions: Collection[str]) -> list[str]:
    """The subset of the permissions that callers have. Only permissions on objects are ever restricted."""
    roles = [str(binding.get("role")) for binding in bucket.policy.get("bindings", ()) if EVERYBODY in binding.get("members", ())]
    if not roles:
        return list(permissions)
    given = frozenset().union(*(_ROLES.get(role, frozenset()) for role in roles))
    restricted = ("storage.objects.", *_SEE_BUCKET)
    return [permission for permission in permissions if permission in given or not permission.startswith(restricted)]


def require(bucket: Bucket, *permissions: str) -> None:
    """Refuse a request without these permissions.

    Raises:
        StorageError: 403.
    """
    for permission in permissions:
        if not granted(bucket, [permission]):
            on = "bucket" if permission in ("storage.objects.list", *_SEE_BUCKET) else "object"
            raise forbidden(
                f"{_CALLER} does not have {permission} access to the Google Cloud Storage {on}. "
                f"Permission '{permission}' denied on resource (or it may not exist)."
            )


def check_payer(bucket: Bucket, project: str | None) -> None:
    """Refuse a request that names no project to pay for it, if the bucket has requester pays.

    Raises:
        StorageError: 400.
    """
    if bucket.settings.get("billing", {}).get("requesterPays") and not project:
        message = "Bucket is a requester pays bucket but no user project provided."
        raise StorageError(HTTPStatus.BAD_REQUEST, "required", message)


def retained_until(bucket: Bucket, stored: StoredObject) -> str:
    """The time until which a retention protects an object, in RFC 3339; empty without retention."""
    times = [stored.attributes.get("retention", {}).get("retainUntilTime", "")]
    if bucket.retention_seconds and not stored.attributes.get("eventBasedHold"):
        times.append(in_seconds(stored.attributes.get("holdReleased", stored.created), bucket.retention_seconds))
    return max(times)


def check_unprotected(bucket: Bucket, stored: StoredObject) -> None:
    """Refuse to delete or overwrite an object that a hold or a retention protects.

    Raises:
        StorageError: 403.
    """
    name = f"Object '{stored.bucket}/{stored.name}'"
    for attribute, hold in (("temporaryHold", "Temporary"), ("eventBasedHold", "Event-Based")):
        if stored.attributes.get(attribute):
            raise forbidden(
                f"{name} is under active {hold} hold and cannot be deleted, overwritten or archived until hold is removed.",
                "objectUnderActiveHold",
            )
    until = retained_until(bucket, stored)
    if until > now_text():
        raise forbidden(
            f"{name} is subject to bucket's retention policy or object retention and cannot be deleted or overwritten until {until}",
            "retentionPolicyNotMet",
        )


def checked_retention(before: Mapping[str, Any], wanted: Mapping[str, Any] | None, *, override: bool) -> dict[str, Any]:
    """An object's new retention, after a client has requested ``wanted``; empty for none.

    Args:
        override: permit shortening or removing an unlocked retention.

    Raises:
        StorageError: 400 the request is malformed; 403 the previous retention forbids it.
    """
    mode, until = (wanted or {}).get("mode"), (wanted or {}).get("retainUntilTime")
    if bool(mode) != bool(until) or mode not in (None, "Locked", "Unlocked"):
        raise invalid("A retention has a mode, Locked or Unlocked, and a retainUntilTime.")
    try:
        retention = {"mode": mode, "retainUntilTime": normalised(str(until))} if mode else {}
    except ValueError as error:
        raise invalid(f"Invalid retainUntilTime: {until!r}") from error
    is_weaker = retention.get("retainUntilTime", "") < before.get("retainUntilTime", "") or (
        before.get("mode") == "Locked" and mode != "Locked"
    )
    if is_weaker and (before.get("mode") == "Locked" or not override):
        raise forbidden("The object's retention cannot be reduced or removed.")
    return retention


def check_acl(bucket: Bucket, acl: Any = ()) -> None:
    """Refuse access control lists that the bucket's configuration rules out.

    Raises:
        StorageError: 400 access is uniform; 412 the list grants public access, which is prevented.
    """
    configuration = bucket.settings.get("iamConfiguration", {})
    if configuration.get("uniformBucketLevelAccess", {}).get("enabled"):
        raise invalid("Cannot use ACL API to update bucket policy when uniform bucket-level access is enabled.")
    public = any(entry.get("entity") in (EVERYBODY, "allAuthenticatedUsers") for entry in acl or ())
    if public and configuration.get("publicAccessPrevention") == "enforced":
        message = "The member bindings allUsers and allAuthenticatedUsers are not allowed since public access prevention is enforced."
        raise StorageError(HTTPStatus.PRECONDITION_FAILED, "conditionNotMet", message)


def check_iam_policy(policy: Mapping[str, Any], bucket: Bucket) -> None:
    """Refuse an invalid IAM policy.

    Raises:
        StorageError: 400 it is malformed, or its version does not allow conditions; 412 it has conditions, but access is not uniform.
    """
    bindings = policy.get("bindings", [])
    if not isinstance(bindings, list) or not all(isinstance(binding, dict) and binding.get("role") for binding in bindings):
        raise invalid("A binding has a role and members.")
    if any(binding.get("condition") for binding in bindings):
        uniform = bucket.settings.get("iamConfiguration", {}).get("uniformBucketLevelAccess", {}).get("enabled")
        if not uniform:
            message = "To use conditions in a policy, you must enable uniform bucket-level access."
            raise StorageError(HTTPStatus.PRECONDITION_FAILED, "conditionNotMet", message)
        if int(policy.get("version") or 1) < _CONDITIONAL_POLICY:
            raise invalid("The version of a policy with conditions must be at least 3.")
