"""JSON merge patches."""

from collections.abc import Mapping
from typing import Any


def merge_patch(target: Any, patch: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON document with a merge patch applied (RFC 7396): objects are merged, null removes a key, everything else is replaced."""
    merged = dict(target) if isinstance(target, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value) if isinstance(value, Mapping) else value
    return merged
