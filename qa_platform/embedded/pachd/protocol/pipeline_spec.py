"""Converts the JSON of a CreatePipelineRequest to the stored and the returned form of a pipeline's spec."""

import json
import time
from dataclasses import dataclass
from typing import Any

from pachyderm_sdk.api import pps as pp

from qa_platform.embedded.pachd import spec as specs
from qa_platform.embedded.pachd.errors import InvalidArgument
from qa_platform.embedded.pachd.protocol import protojson
from qa_platform.embedded.pachd.spec import EffectiveSpec
from qa_platform.provisioning.merge_patch import merge_patch

# Keys of a request that are not part of the spec: they say what to do with it.
_ORDERS = ("update", "reprocess", "dryRun", "specCommit")


@dataclass(frozen=True)
class SpecRequest:
    """A parsed request. ``reply_json`` is the effective spec for the reply: protojson with the project, but without input defaults."""

    spec: EffectiveSpec
    reply_json: str
    update: bool
    reprocess: bool
    dry_run: bool


def read(text: str, *, update: bool = False, reprocess: bool = False, dry_run: bool = False) -> SpecRequest:
    """Parse a request. The keyword arguments are combined with its fields of the same name.

    Raises:
        InvalidArgument: the text is not a CreatePipelineRequest.
        PachError: the spec is invalid.
    """
    asked = _parse(text)
    raw = protojson.camel_keys(pp.CreatePipelineRequest, json.loads(text))
    merged = merge_patch(specs.CLUSTER_DEFAULTS, {key: value for key, value in raw.items() if key not in _ORDERS})
    message = _parse(json.dumps(merged))
    filled = specs.with_defaults(protojson.to_dict(message), now=time.time())
    message.pipeline.project.name = message.pipeline.project.name or "default"
    message.update, message.reprocess = update or asked.update, reprocess or asked.reprocess
    message.dry_run = dry_run or asked.dry_run
    return SpecRequest(
        spec=EffectiveSpec(_compact(merged, sort_keys=True), _compact(filled)),
        reply_json=_compact(protojson.to_dict(message)),
        update=message.update,
        reprocess=message.reprocess,
        dry_run=message.dry_run,
    )


def _compact(value: dict[str, Any], *, sort_keys: bool = False) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=sort_keys)


def _parse(text: str) -> pp.CreatePipelineRequest:
    try:
        message = protojson.parse(pp.CreatePipelineRequest, text)
    except ValueError as error:
        where, _, problem = str(error).partition(": ")
        told = f"could not make effective spec: could not parse {text} as Create Pipeline Request message: proto: {error}"
        raise InvalidArgument(told, field=where, problem=problem) from error
    assert isinstance(message, pp.CreatePipelineRequest)
    return message
