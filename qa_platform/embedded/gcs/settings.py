"""The settings of a bucket: validates the client's, and adds those that the service sets."""

from collections.abc import Mapping
from typing import Any

from qa_platform.embedded.gcs.model import forbidden, invalid
from qa_platform.embedded.gcs.times import now_text
from qa_platform.provisioning.merge_patch import merge_patch

# The parts of a bucket's resource that only the service writes.
_SERVICES_OWN = frozenset(
    (
        "kind",
        "id",
        "name",
        "selfLink",
        "projectNumber",
        "timeCreated",
        "updated",
        "metageneration",
        "generation",
        "etag",
        "locationType",
        "softDeleteTime",
        "hardDeleteTime",
        "owner",
    )
)
_PUBLIC_ACCESS = ("inherited", "enforced", "unspecified")
_LEAST_SOFT_DELETE, _MOST_SOFT_DELETE = 7 * 86_400, 90 * 86_400
_MOST_RETENTION = 3_155_760_000


def changed_settings(before: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The new settings of a bucket, after a client has requested ``wanted``.

    Raises:
        StorageError: 400 a setting is malformed; 403 the retention policy is locked.
    """
    # Merging into an empty object removes nulls.
    settings = merge_patch({}, {key: value for key, value in wanted.items() if key not in _SERVICES_OWN})
    for name, complete in _COMPLETE.items():
        value = complete(before.get(name) or {}, settings.get(name) or {})
        if value:
            settings[name] = value
        else:
            settings.pop(name, None)
    return settings


def locked_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with their retention policy locked.

    Raises:
        StorageError: 400 there is no retention policy.
    """
    policy = settings.get("retentionPolicy")
    if not policy:
        raise invalid("The bucket has no retention policy to lock.")
    return {**settings, "retentionPolicy": {**policy, "isLocked": True}}


def _retention_policy(before: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    seconds, old = _number(wanted.get("retentionPeriod"), "retentionPeriod"), int(before.get("retentionPeriod", 0))
    if before.get("isLocked") and seconds < old:
        raise forbidden("Cannot reduce retention duration of a locked Retention Policy, or remove it.")
    if not seconds:
        return {}
    if seconds > _MOST_RETENTION:
        raise invalid(f"A retention period has at most {_MOST_RETENTION} seconds.")
    since = before["effectiveTime"] if seconds == old else now_text()
    return {"retentionPeriod": str(seconds), "effectiveTime": since, "isLocked": bool(before.get("isLocked"))}


def _soft_delete_policy(before: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    seconds = _number(wanted.get("retentionDurationSeconds"), "retentionDurationSeconds")
    if seconds and not _LEAST_SOFT_DELETE <= seconds <= _MOST_SOFT_DELETE:
        raise invalid("A soft-delete policy has a duration of 7 to 90 days, or 0.")
    same = before.get("retentionDurationSeconds") == str(seconds)
    return {"retentionDurationSeconds": str(seconds), "effectiveTime": before["effectiveTime"] if same else now_text()}


def _iam_configuration(before: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    uniform = bool(wanted.get("uniformBucketLevelAccess", wanted.get("bucketPolicyOnly", {})).get("enabled"))
    public = wanted.get("publicAccessPrevention", "inherited")
    if public not in _PUBLIC_ACCESS:
        raise invalid(f"Invalid value for publicAccessPrevention: {public!r}")
    return {
        "uniformBucketLevelAccess": {"enabled": uniform},
        "bucketPolicyOnly": {"enabled": uniform},
        "publicAccessPrevention": public,
    }


def _autoclass(before: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    if not wanted:
        return {}
    enabled = bool(wanted.get("enabled"))
    toggled = before["toggleTime"] if before and before.get("enabled") == enabled else now_text()
    if not enabled:
        return {"enabled": False, "toggleTime": toggled}
    terminal = wanted.get("terminalStorageClass", "NEARLINE")
    since = before.get("terminalStorageClassUpdateTime") if before.get("terminalStorageClass") == terminal else None
    return {
        "enabled": True,
        "toggleTime": toggled,
        "terminalStorageClass": terminal,
        "terminalStorageClassUpdateTime": since or now_text(),
    }


def _encryption(before: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    settings = dict(wanted)
    for name, config in wanted.items():
        # The service sets the time of configurations that restrict something.
        if isinstance(config, dict) and name.endswith("EnforcementConfig"):
            restricted = config.get("restrictionMode") == "FullyRestricted"
            settings[name] = {key: value for key, value in config.items() if key != "effectiveTime"}
            if restricted:
                settings[name]["effectiveTime"] = before.get(name, {}).get("effectiveTime") or now_text()
    return settings


def _number(value: Any, name: str) -> int:
    try:
        return int(value or 0)
    except (TypeError, ValueError) as error:
        raise invalid(f"{name} is not a number: {value!r}") from error


# The functions that complete or check a setting, by its name.
_COMPLETE = {
    "retentionPolicy": _retention_policy,
    "softDeletePolicy": _soft_delete_policy,
    "iamConfiguration": _iam_configuration,
    "autoclass": _autoclass,
    "encryption": _encryption,
}
