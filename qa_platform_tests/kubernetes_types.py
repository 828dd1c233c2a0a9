"""Checks strictly, against the types of its official client, whether the Kubernetes API would accept a document."""

import re
from collections.abc import Iterator
from datetime import date, datetime
from typing import Any

from kubernetes import client  # type: ignore[import-untyped]

_PRIMITIVES: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "int": int,
    "float": (int, float),
    "bool": bool,
    "datetime": (str, datetime),
    "date": (str, date),
}
# Has client-side validation on: required fields must exist, and enumerated values must be valid.
_VALIDATING = client.Configuration()


def problems(document: Any, kind: str, place: str = "") -> Iterator[str]:
    """What the API would refuse in a document: unknown keys, missing keys, values of the wrong type.

    Args:
        document: decoded JSON, with the API's own names.
        kind: a type of the client, such as ``V1Job``, ``list[V1EnvVar]``, ``dict[str, str]``.
    """
    place = place or kind
    if found := re.fullmatch(r"list\[(.*)\]", kind):
        if not isinstance(document, list):
            yield f"{place}: {document!r} is no list"
            return
        for index, item in enumerate(document):
            yield from problems(item, found[1], f"{place}[{index}]")
    elif found := re.fullmatch(r"dict[\[(]str, (.*)[\])]", kind):
        if not isinstance(document, dict):
            yield f"{place}: {document!r} is no mapping"
            return
        for key, value in document.items():
            yield from problems(value, found[1], f"{place}.{key}")
    elif kind == "object":
        return
    elif kind in _PRIMITIVES:
        if not isinstance(document, _PRIMITIVES[kind]) or (isinstance(document, bool) and kind != "bool"):
            yield f"{place}: {document!r} is no {kind}"
    else:
        yield from _problems_of_model(document, getattr(client, kind), place)


def _problems_of_model(document: Any, model: Any, place: str) -> Iterator[str]:
    if not isinstance(document, dict):
        yield f"{place}: {document!r} is no {model.__name__}"
        return
    names = {key: attribute for attribute, key in model.attribute_map.items()}
    known = {names[key]: value for key, value in document.items() if key in names}
    yield from (f"{place}: {model.__name__} has no {key}" for key in document if key not in names)
    try:
        model(**known, local_vars_configuration=_VALIDATING)
    except ValueError as error:
        yield f"{place}: {error}"
    for attribute, value in known.items():
        yield from problems(value, model.openapi_types[attribute], f"{place}.{model.attribute_map[attribute]}")
