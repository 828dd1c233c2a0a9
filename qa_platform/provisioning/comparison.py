"""Compares two specifications of a pipeline, as messages and not as JSON.

pachd returns a specification in two forms. The reply to a new one has 64-bit numbers as text and names the project. A stored one has
numbers as they were given and may omit the project. Keys may be in snake or camel case. Read as messages, with every default filled
in, both forms are equal.
"""

import difflib
import json
import posixpath
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import betterproto
from pachyderm_sdk.api import pps

# Fields of a request that control how it is applied, or that pachd sets itself.
_NOT_OF_THE_SPEC = frozenset({"update", "reprocess", "dry_run", "salt", "spec_commit"})
# Pachyderm's own defaults. Defaults that an administrator has set are in both forms.
_RESOURCES = {"cpu": 1.0, "memory": "256Mi", "disk": "1Gi"}
_TRIES = 3
# The SDK represents an unset time as the epoch.
_UNSET = datetime.fromtimestamp(0, UTC)


def difference(old_json: str, new_json: str, *, with_start: bool = False) -> str:
    """The difference between two effective specifications, as a diff; "" for none.

    Keys are in snake case, as in the specifications' files. Values of environment variables are not shown, only that they differ.

    Args:
        with_start: compare the starts of cron inputs. A cron input without a start begins when pachd first sees it, so its start is not a
            difference.
    """
    old, new = (plain(text, with_start=with_start) for text in (old_json, new_json))
    _hide_variables(old, new)
    return "\n".join(difflib.unified_diff(_lines(old), _lines(new), "now", "then", n=1, lineterm=""))


def plain(spec_json: str, *, with_start: bool = False) -> dict[str, Any]:
    """A specification in one form: keys in snake case, numbers as numbers, defaults filled in, and nothing that is unset."""
    request = pps.CreatePipelineRequest().from_dict(json.loads(spec_json or "{}"))
    _fill_in(request, with_start=with_start)
    return {name: value for name, value in _plain(request).items() if name not in _NOT_OF_THE_SPEC}


def _fill_in(request: pps.CreatePipelineRequest, *, with_start: bool) -> None:
    pipeline = request.pipeline
    pipeline.project.name = pipeline.project.name or "default"
    request.output_branch = request.output_branch or "master"
    request.datum_tries = request.datum_tries or _TRIES
    request.reprocess_spec = request.reprocess_spec or "until_success"
    request.parallelism_spec.constant = request.parallelism_spec.constant or 1
    for resources in (request.resource_requests, request.sidecar_resource_requests):
        for name, value in _RESOURCES.items():
            setattr(resources, name, getattr(resources, name) or value)
    for leaf in _leaves(request.input):
        leaf.project = leaf.project or pipeline.project.name
        if isinstance(leaf, pps.PfsInput):
            _fill_in_pfs(leaf)
        else:
            leaf.repo = leaf.repo or f"{pipeline.name}_{leaf.name}"
            if not with_start:
                leaf.start = _UNSET


def _fill_in_pfs(leaf: pps.PfsInput) -> None:
    leaf.name = leaf.name or leaf.repo
    leaf.repo_type = leaf.repo_type or "user"
    if not betterproto.serialized_on_wire(leaf.trigger):
        leaf.branch = leaf.branch or "master"
    if leaf.glob:
        leaf.glob = "/" + posixpath.normpath(leaf.glob).strip("/")


def _leaves(node: pps.Input) -> Iterator[pps.PfsInput | pps.CronInput]:
    for leaf in (node.pfs, node.cron):
        if betterproto.serialized_on_wire(leaf):
            yield leaf
    for child in (*node.cross, *node.union, *node.join, *node.group):
        yield from _leaves(child)


def _plain(message: betterproto.Message) -> dict[str, Any]:
    values = {}
    for name, meta in message._betterproto.meta_by_field_name.items():
        value = _value(message, name, getattr(message, name))
        # An empty message equals an unset one. A wrapped number that is 0 is set.
        if value or (value == 0 and meta.wraps):
            values[name] = value
    return values


def _value(message: betterproto.Message, name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_value(message, name, item) for item in value]
    if isinstance(value, betterproto.Message):
        return _plain(value)
    if isinstance(value, timedelta):
        return f"{value.total_seconds():f}".rstrip("0").rstrip(".") + "s" if value else ""
    if isinstance(value, datetime):
        return value.isoformat() if value != _UNSET else ""
    meta = message._betterproto.meta_by_field_name[name]
    if meta.proto_type == betterproto.TYPE_ENUM:
        return message._betterproto.cls_by_field[name](value).name if value else ""
    if meta.wraps in betterproto.INT_64_TYPES:
        return None if value is None else int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _hide_variables(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Hide the values of both environments, which may hold a password. The diff still shows that a value differs."""
    before, after = (spec.get("transform", {}).get("env", {}) for spec in (old, new))
    changed = {name for name in before.keys() & after.keys() if before[name] != after[name]}
    before.update(dict.fromkeys(before, "***"))
    after.update({name: "*** (another value)" if name in changed else "***" for name in after})


def _lines(spec: dict[str, Any]) -> list[str]:
    return json.dumps(spec, indent=2, sort_keys=True).splitlines()
