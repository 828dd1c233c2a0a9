"""The forms of a pipeline's spec, and its parsed contents."""

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from qa_platform.embedded.pachd.errors import InvalidArgument, PachError, Unimplemented
from qa_platform.embedded.pachd.pfs import BranchKey, RepoKey, check_name
from qa_platform.provisioning.merge_patch import merge_patch

_NAME_LIMIT = 51
_RESOURCES = {"cpu": 1, "memory": "256Mi", "disk": "1Gi"}
# A cluster's defaults for missing fields. The number is a string, as in a cluster.
CLUSTER_DEFAULTS: Mapping[str, Any] = {
    "transform": {"image": "ubuntu:20.04"},
    "outputBranch": "master",
    "datumTries": "3",
    "reprocessSpec": "until_success",
    "resourceRequests": _RESOURCES,
    "sidecarResourceRequests": _RESOURCES,
}
DEFAULT_SETS_PER_WORKER = 4
# Unsupported features. They are refused, because a user would wait for their effect in vain.
_MISSING = ("egress", "spout", "service", "s3Out")


@dataclass(frozen=True)
class EffectiveSpec:
    """A spec with the cluster's defaults, in two forms: ``raw_json`` has the values as the user wrote them, with sorted camel case keys;
    ``filled_json`` is protojson, and also has the project and the defaults of the inputs."""

    raw_json: str
    filled_json: str


@dataclass(frozen=True)
class SecretUse:
    """How a pipeline uses a secret: either ``env_var`` with ``key``, or ``mount_path`` for a folder with a file per key."""

    name: str
    key: str
    env_var: str
    mount_path: str


@dataclass(frozen=True)
class PfsInput:
    name: str
    repo: RepoKey
    branch: str
    glob: str
    join_on: str = ""
    outer_join: bool = False
    group_by: str = ""
    empty_files: bool = False

    @property
    def branch_key(self) -> BranchKey:
        return BranchKey(self.repo, self.branch)


@dataclass(frozen=True)
class CronInput:
    """A cron input. ``start`` is in seconds since the epoch."""

    name: str
    repo: RepoKey
    spec: str
    overwrite: bool
    start: float

    @property
    def branch_key(self) -> BranchKey:
        return BranchKey(self.repo, "master")

    @property
    def as_pfs(self) -> PfsInput:
        return PfsInput(name=self.name, repo=self.repo, branch="master", glob="/*")


@dataclass(frozen=True)
class Combination:
    """A combination of inputs. ``kind`` is cross, union, join or group."""

    kind: str
    inputs: tuple["Input", ...]


Input = PfsInput | CronInput | Combination


@dataclass(frozen=True)
class PipelineSpec:
    """A parsed spec. Timeouts are in seconds, None for no limit. ``datum_set`` is (number, size in bytes, per worker); zero if unset."""

    project: str
    name: str
    cmd: tuple[str, ...]
    stdin: tuple[str, ...]
    err_cmd: tuple[str, ...]
    err_stdin: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    secrets: tuple[SecretUse, ...]
    accept_return_code: tuple[int, ...]
    working_dir: str
    datum_batching: bool
    autoscaling: bool
    image: str
    parallelism: int
    input: Input
    output_branch: str
    datum_set: tuple[int, int, int]
    datum_timeout: float | None
    job_timeout: float | None
    datum_tries: int
    every_job: bool

    @property
    def repo(self) -> RepoKey:
        return RepoKey(self.project, self.name)

    @property
    def output(self) -> BranchKey:
        return BranchKey(self.repo, self.output_branch)

    @property
    def meta(self) -> BranchKey:
        return BranchKey(RepoKey(self.project, self.name, "meta"), self.output_branch)

    @property
    def spec_branch(self) -> BranchKey:
        return BranchKey(RepoKey(self.project, self.name, "spec"), "master")

    def leaves(self) -> list[PfsInput | CronInput]:
        return list(leaves(self.input))

    @property
    def crons(self) -> list[CronInput]:
        return [leaf for leaf in self.leaves() if isinstance(leaf, CronInput)]

    def set_size(self, datums: int) -> int:
        """The most datums of a datum set; no limit (``datums``) if the spec limits sets by size."""
        number, size, per_worker = self.datum_set
        if number or size:
            return datums if size else number
        return max(1, datums // (self.parallelism * (per_worker or DEFAULT_SETS_PER_WORKER)))


def leaves(node: Input) -> Iterator[PfsInput | CronInput]:
    if isinstance(node, Combination):
        for child in node.inputs:
            yield from leaves(child)
    else:
        yield node


def with_defaults(spec: dict[str, Any], *, now: float) -> dict[str, Any]:
    """A spec in protojson with the project and all defaults.

    Raises:
        PachError: the spec is invalid.
    """
    spec = merge_patch(CLUSTER_DEFAULTS, spec)
    pipeline = dict(spec.get("pipeline") or {})
    pipeline["project"] = {"name": (pipeline.get("project") or {}).get("name") or "default"}
    spec["pipeline"] = pipeline
    name = pipeline.get("name", "")
    _check_pipeline_name(name)
    if spec["reprocessSpec"] not in ("until_success", "every_job"):
        raise PachError(f"invalid reprocess spec {spec['reprocessSpec']!r}: it is until_success or every_job")
    for feature in _MISSING:
        if spec.get(feature):
            raise Unimplemented(f"pipeline {name!r} has {feature}, which the embedded server does not support")
    for field, called in (("podSpec", "PodSpec"), ("podPatch", "PodPatch")):
        _check_json(spec.get(field) or "null", called)
    for use in (spec.get("transform") or {}).get("secrets") or ():
        if mount := use.get("mountPath"):
            _check_mount_path(mount)
    if not spec.get("input"):
        raise PachError(f"pipeline {name!r} has no input")
    spec["input"] = _input_defaults(spec["input"], pipeline, now)
    names = [leaf.name for leaf in leaves(_input(spec["input"]))]
    for forbidden in ("out", ".env"):
        if forbidden in names:
            raise PachError(f"input cannot be named {forbidden}, as pachyderm creates {forbidden} for output of its own")
    return spec


def _check_pipeline_name(name: str) -> None:
    if not name:
        raise InvalidArgument("validate request: invalid CreatePipelineRequest: pipeline name is missing")
    try:
        check_name(name)
    except PachError as error:
        raise PachError(f"invalid pipeline name: {error}") from error
    if len(name) > _NAME_LIMIT:
        raise PachError(f"pipeline name {name!r} is {len(name) - _NAME_LIMIT} characters longer than the {_NAME_LIMIT} max")


def _check_mount_path(path: str) -> None:
    if not path.startswith("/") or ".." in path.split("/") or not path.strip("/"):
        raise PachError(f"mount path {path!r} of a secret must be an absolute path below the root, without ..")


def _check_json(text: str, called: str) -> None:
    try:
        json.loads(text)
    except ValueError as error:
        raise PachError(f"malformed {called}") from error


def salt(spec: EffectiveSpec) -> str:
    """The salt that a spec requests; empty if it does not."""
    return str(json.loads(spec.filled_json).get("salt") or "")


def _input_defaults(node: dict[str, Any], pipeline: dict[str, Any], now: float) -> dict[str, Any]:
    project = pipeline["project"]["name"]
    kinds = [kind for kind in ("pfs", "cron", "cross", "union", "join", "group") if node.get(kind)]
    if len(kinds) != 1:
        raise PachError(f"an input must be exactly one of pfs, cron, cross, union, join and group, not {kinds or 'none'}")
    kind = kinds[0]
    if kind == "pfs":
        pfs = dict(node["pfs"])
        if not pfs.get("repo"):
            raise PachError("input must specify a repo")
        if not pfs.get("glob"):
            raise PachError("input must specify a glob")
        for feature in ("s3", "trigger"):
            if pfs.get(feature):
                raise Unimplemented(
                    f"pipeline {pipeline['name']!r} has an input with {feature}, which the embedded server does not support"
                )
        glob = pfs["glob"]
        pfs["glob"] = glob.rstrip("/") or "/"
        defaults = {"project": project, "name": pfs["repo"], "branch": "master", "repoType": "user"}
        return {"pfs": {**pfs, **{key: value for key, value in defaults.items() if not pfs.get(key)}}}
    if kind == "cron":
        cron = dict(node["cron"])
        if not cron.get("name") or not cron.get("spec"):
            raise PachError("a cron input must specify a name and a spec")
        defaults = {
            "project": project,
            "repo": f"{pipeline['name']}_{cron['name']}",
            "start": datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        }
        return {"cron": {**cron, **{key: value for key, value in defaults.items() if not cron.get(key)}}}
    return {kind: [_input_defaults(child, pipeline, now) for child in node[kind]]}


@functools.lru_cache(256)
def parse_text(filled_json: str) -> PipelineSpec:
    """Parse the JSON of a spec that ``with_defaults`` has completed."""
    return parse(json.loads(filled_json))


def parse(spec: dict[str, Any]) -> PipelineSpec:
    """As ``parse_text``, from decoded JSON."""
    transform = spec.get("transform") or {}
    sets = spec.get("datumSetSpec") or {}
    return PipelineSpec(
        project=spec["pipeline"]["project"]["name"],
        name=spec["pipeline"]["name"],
        cmd=tuple(transform.get("cmd") or ()),
        stdin=tuple(transform.get("stdin") or ()),
        err_cmd=tuple(transform.get("errCmd") or ()),
        err_stdin=tuple(transform.get("errStdin") or ()),
        env=tuple(sorted((transform.get("env") or {}).items())),
        secrets=tuple(
            SecretUse(use.get("name", ""), use.get("key", ""), use.get("envVar", ""), use.get("mountPath", ""))
            for use in transform.get("secrets") or ()
        ),
        accept_return_code=tuple(int(code) for code in transform.get("acceptReturnCode") or ()),
        working_dir=transform.get("workingDir", ""),
        datum_batching=bool(transform.get("datumBatching")),
        autoscaling=bool(spec.get("autoscaling")),
        image=transform.get("image", ""),
        parallelism=max(1, int((spec.get("parallelismSpec") or {}).get("constant") or 1)),
        input=_input(spec["input"]),
        output_branch=spec["outputBranch"],
        datum_set=(int(sets.get("number") or 0), int(sets.get("sizeBytes") or 0), int(sets.get("perWorker") or 0)),
        datum_timeout=_seconds(spec.get("datumTimeout")),
        job_timeout=_seconds(spec.get("jobTimeout")),
        datum_tries=max(1, int(spec["datumTries"])),
        every_job=spec["reprocessSpec"] == "every_job",
    )


def _input(node: dict[str, Any]) -> Input:
    if pfs := node.get("pfs"):
        return PfsInput(
            name=pfs["name"],
            repo=RepoKey(pfs["project"], pfs["repo"], pfs["repoType"]),
            branch=pfs["branch"],
            glob=pfs["glob"],
            join_on=pfs.get("joinOn", ""),
            outer_join=bool(pfs.get("outerJoin")),
            group_by=pfs.get("groupBy", ""),
            empty_files=bool(pfs.get("emptyFiles")),
        )
    if cron := node.get("cron"):
        start = datetime.fromisoformat(cron["start"].replace("Z", "+00:00")).timestamp()
        return CronInput(cron["name"], RepoKey(cron["project"], cron["repo"]), cron["spec"], bool(cron.get("overwrite")), start)
    [(kind, children)] = node.items()
    return Combination(kind, tuple(_input(child) for child in children))


def _seconds(text: str | None) -> float | None:
    return float(text.removesuffix("s")) if text else None
