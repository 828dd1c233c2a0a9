"""A deployment's changes to the pipelines' specifications: a JSON merge patch (RFC 7396) for each pipeline.

A patch sizes and places the workers. A patch that would change anything the platform relies on is refused.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import betterproto
from pachyderm_sdk.api import pps

from qa_platform.errors import InputError
from qa_platform.provisioning.merge_patch import merge_patch

# Names in snake case, as in the specifications' files.
_PATCHABLE = (
    *("autoscaling", "datum_set_spec", "datum_timeout", "datum_tries", "description", "metadata", "parallelism_spec"),
    *("pod_patch", "pod_spec", "resource_limits", "resource_requests", "scheduling_spec", "sidecar_resource_limits"),
    *("sidecar_resource_requests", "tolerations", "transform.env", "transform.image_pull_secrets", "transform.user"),
)
# How often the cron variant looks at the bucket.
_INTERVAL = "input.cron.spec"
_NESTED = ("transform", "transform.env", "input", "input.cron")
_VARIABLE = "transform.env."
# Variables that override the secrets, or say where the programs find the secrets and their datums. The platform's settings ignore case.
_OF_THE_PLATFORM = re.compile(r"(PG|PACH|PPS)_.*|GCS_ACCESS|STORAGE_BUCKET|QA_(SECRETS|PFS)_ROOT", re.IGNORECASE | re.DOTALL)
# The user in the images' /etc/passwd, where Pachyderm's worker looks it up.
_USER = "10001"
# Checked here, since Pachyderm ignores a quantity or a user that it cannot parse.
_FORMS = {
    "memory": re.compile(r"\d+(\.\d+)?([kMGTPE]|[KMGTPE]i)?"),
    "disk": re.compile(r"\d+(\.\d+)?([kMGTPE]|[KMGTPE]i)?"),
    "user": re.compile(r"\d+"),
}
_DURATION = re.compile(r"\d+(\.\d+)?s")
_NUMBER = re.compile(r"\d+")
# Parts of a pod that hold the program, its mounts and its environment. A pod patch may add to their lists, but replace nothing.
_OF_THE_PROGRAM = re.compile(r"(/(containers|initContainers)(/[^/]+(/(name|image|command|args|workingDir))?)?|/volumes)?")
_LISTS = re.compile(r"(/volumes|/(containers|initContainers)/[^/]+/(env|envFrom|volumeMounts))/")
_POD_FIELDS = ("containers", "initContainers", "volumes")


def read_patches(path: Path, pipelines: Collection[str]) -> dict[str, dict[str, Any]]:
    """The patches in a file, by pipeline name.

    Raises:
        InputError: the file cannot be read, is not a JSON object of objects, or names another pipeline.
    """
    try:
        patches = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"it cannot be read: {error.strerror}",
            where=str(path),
            advice="set --patch or QA_PIPELINES_PATCH to a JSON file, or leave both unset",
        ) from error
    except ValueError as error:
        raise InputError(f"it is not valid JSON: {error}", where=str(path), advice=_shape(pipelines)) from error
    if not isinstance(patches, dict):
        raise InputError("it is not a JSON object", where=str(path), advice=_shape(pipelines))
    for name, patch in patches.items():
        if name not in pipelines:
            raise InputError(f"there is no pipeline {name}", where=str(path), advice=f"the pipelines are {' and '.join(pipelines)}")
        if not isinstance(patch, dict):
            raise InputError(f"the patch of {name} is not a JSON object", where=str(path), advice=_shape(pipelines))
    return patches


def _shape(pipelines: Collection[str]) -> str:
    example = {name: {"resource_limits": {"memory": "4Gi"}} for name in list(pipelines)[:1]}
    return f"an object with a patch for each pipeline, such as {json.dumps(example)}"


def patched(spec: dict[str, Any], patch: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """A specification with a patch applied.

    Args:
        where: the file and the pipeline, for errors.

    Raises:
        InputError: the patch changes what the platform relies on, or the result is not a valid Pachyderm specification.
    """
    for name in _names(patch):
        _check_permitted(name, spec, where)
    merged = merge_patch(spec, patch)
    if isinstance(patch.get("pod_patch"), str):
        merged["pod_patch"] = _joined(spec.get("pod_patch", ""), patch["pod_patch"])
    if problem := next(_problems(pps.CreatePipelineRequest, merged, ""), ""):
        raise InputError(problem, where=where, advice="see Pachyderm's pipeline specification for the fields and their types")
    _check_workers(merged, where)
    _check_pod(merged, where)
    return merged


def _joined(own: str, more: str) -> str:
    """The operations of two JSON patches. A second one that is not a list is returned as it is, and refused later."""
    try:
        operations = json.loads(more or "[]") or []
    except ValueError:
        return more
    return json.dumps([*json.loads(own or "[]"), *operations]) if isinstance(operations, list) else more


def _names(patch: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in patch.items():
        name = prefix + key
        if name in _NESTED and isinstance(value, dict):
            yield from _names(value, f"{name}.")
        else:
            yield name


def _check_permitted(name: str, spec: Mapping[str, Any], where: str) -> None:
    if name.startswith(_VARIABLE):
        variable = name.removeprefix(_VARIABLE)
        if not _OF_THE_PLATFORM.fullmatch(variable) and variable not in spec["transform"].get("env", {}):
            return
    elif name in _PATCHABLE and name not in _NESTED:
        return
    elif name == _INTERVAL:
        if "cron" in spec["input"]:
            return
        raise InputError(f"it sets {name}, which only the cron variant has", where=where, advice="remove it, or apply with --cron")
    parent, _, field = name.rpartition(".")
    message = {"": pps.CreatePipelineRequest, "transform": pps.Transform}.get(parent)
    is_known = message is None or field in message()._betterproto.meta_by_field_name
    what = f"it changes {name}, which the platform relies on" if is_known else f"Pachyderm's specifications have no {name}"
    raise InputError(what, where=where, advice=f"a patch may change {', '.join(_PATCHABLE)}")


def _problems(message: type[betterproto.Message], value: Any, where: str) -> Iterator[str]:
    """Why a value is not a message of this type: unknown names, and values of the wrong type."""
    if not isinstance(value, Mapping):
        yield f"{where} must be an object"
        return
    types = message()._betterproto
    for key, item in value.items():
        path = f"{where}.{key}" if where else key
        meta = types.meta_by_field_name.get(key)
        if meta is None:
            yield f"Pachyderm's specifications have no {path}"
        elif types.default_gen[key] is list:
            if not isinstance(item, list):
                yield f"{path} must be a list"
                continue
            for index, element in enumerate(item):
                yield from _problems_of_value(meta, types.cls_by_field[key], element, f"{path}[{index}]")
        elif meta.proto_type == betterproto.TYPE_MAP:
            if not isinstance(item, Mapping) or not all(isinstance(text, str) for text in item.values()):
                yield f"{path} must be an object with string values"
        else:
            yield from _problems_of_value(meta, types.cls_by_field[key], item, path)
        if (form := _FORMS.get(key)) and isinstance(item, str) and not form.fullmatch(item):
            yield f"{path} is {item!r}, which Pachyderm cannot read"


def _problems_of_value(meta: Any, cls: Any, value: Any, path: str) -> Iterator[str]:
    kind = meta.wraps or meta.proto_type
    if cls is timedelta:
        if not isinstance(value, str) or not _DURATION.fullmatch(value):
            yield f"{path} must be a time in seconds, such as 3600s"
    elif kind == betterproto.TYPE_MESSAGE:
        yield from _problems(cls, value, path)
    elif kind == betterproto.TYPE_ENUM:
        if value not in cls.__members__:
            yield f"{path} must be one of {', '.join(cls.__members__)}"
    elif kind == betterproto.TYPE_BOOL:
        if not isinstance(value, bool):
            yield f"{path} must be true or false"
    elif kind == betterproto.TYPE_STRING:
        if not isinstance(value, str):
            yield f"{path} must be a string"
    elif kind in (betterproto.TYPE_FLOAT, betterproto.TYPE_DOUBLE):
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not value >= 0:
            yield f"{path} must be a number that is not negative"
    elif not isinstance(value, (int, str)) or not _NUMBER.fullmatch(str(value)):
        yield f"{path} must be a whole number that is not negative"


def _check_workers(spec: Mapping[str, Any], where: str) -> None:
    """Refuse values that pachd accepts but that make the workers crash in a loop.

    The states of the pipeline and its jobs would not show the crash.
    """
    sets, user = spec.get("datum_set_spec"), spec["transform"].get("user")
    if sets is not None and not any(int(sets.get(name) or 0) for name in ("number", "size_bytes", "per_worker")):
        raise InputError(
            "datum_set_spec has no number, size_bytes or per_worker",
            where=where,
            advice="set one of them, or remove datum_set_spec with null",
        )
    if user not in (None, _USER):
        raise InputError(f"transform.user is {user!r}, which the images do not have", where=where, advice=f"leave it at {_USER}, or null")


def _check_pod(spec: Mapping[str, Any], where: str) -> None:
    """Refuse patches of the pod that cannot be read, or that replace the program, its mounts or its environment."""
    for name, kind in (("pod_spec", dict), ("pod_patch", list)):
        try:
            document = json.loads(spec.get(name) or "null")
        except ValueError as error:
            raise InputError(f"{name} is not valid JSON: {error}", where=where, advice=_POD_ADVICE) from error
        if document is not None and not isinstance(document, kind):
            raise InputError(f"{name} is not a JSON {'object' if kind is dict else 'list'}", where=where, advice=_POD_ADVICE)
        if changed := next(_changes(document or ()), ""):
            raise InputError(f"{name} changes {changed}, which the platform relies on", where=where, advice=_POD_ADVICE)


_POD_ADVICE = (
    "pod_spec is a string: a JSON merge patch without containers and volumes. pod_patch is a string: a list of JSON patch operations "
    "(RFC 6902), which may append to the program's lists but not replace anything of the program"
)


def _changes(document: Any) -> Iterator[str]:
    """The parts of a pod that belong to the program and that a merge patch (an object) or a JSON patch (a list) would change."""
    if isinstance(document, dict):
        yield from (name for name in document if name in _POD_FIELDS)
        return
    for operation in document:
        changes = operation if isinstance(operation, dict) else {}
        paths = [changes.get("path"), *([changes.get("from")] if changes.get("op") == "move" else [])]
        for path in paths:
            if not isinstance(path, str) or _OF_THE_PROGRAM.fullmatch(path):
                yield str(path or "/")
            elif _LISTS.match(f"{path}/") and not (changes.get("op") == "add" and path.endswith("/-")):
                yield path
