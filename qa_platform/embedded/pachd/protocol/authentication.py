"""Authentication: every call needs a token, and most need a permission.

A token belongs to a robot. A robot has any of the three roles that the platform needs: ``projectWriter`` (on all projects),
``secretAdmin`` and ``repoWriter`` (on the cluster). The robot that creates a repo owns it. The tables below match Pachyderm's.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from pachyderm_sdk.api import auth as pa
from pachyderm_sdk.api import pfs as pb
from pachyderm_sdk.api import pps as pp

from qa_platform.embedded.pachd.errors import PachError, PermissionDenied, Unauthenticated
from qa_platform.embedded.pachd.protocol import protojson
from qa_platform.embedded.pachd.protocol.rpc import Call, Method
from qa_platform.embedded.pachd.storage.database import Database

SCHEMA = "CREATE TABLE IF NOT EXISTS repo_owner (project TEXT, name TEXT, robot TEXT NOT NULL, PRIMARY KEY (project, name));"

_P = pa.Permission
_LISTER = {_P.PROJECT_LIST_REPO}
_READER = {
    _P.REPO_READ, _P.REPO_INSPECT_COMMIT, _P.REPO_LIST_COMMIT, _P.REPO_LIST_BRANCH, _P.REPO_LIST_FILE, _P.REPO_INSPECT_FILE,
    _P.REPO_ADD_PIPELINE_READER, _P.REPO_REMOVE_PIPELINE_READER, _P.PIPELINE_LIST_JOB,
}  # fmt: skip
_WRITER = _READER | {
    _P.REPO_WRITE, _P.REPO_DELETE_COMMIT, _P.REPO_CREATE_BRANCH, _P.REPO_DELETE_BRANCH, _P.REPO_ADD_PIPELINE_WRITER,
}  # fmt: skip
_OWNER = _WRITER | {_P.REPO_MODIFY_BINDINGS, _P.REPO_DELETE}
ROLES: dict[str, set[pa.Permission]] = {
    "projectWriter": _LISTER | {_P.PROJECT_CREATE_REPO},
    "secretAdmin": {_P.CLUSTER_CREATE_SECRET, _P.CLUSTER_LIST_SECRETS, _P.SECRET_INSPECT, _P.SECRET_DELETE},
    "repoWriter": _WRITER,
}


class Resource(NamedTuple):
    """The resource of a permission. ``name`` is empty for the cluster, and ``project/name`` for a repo."""

    type: str
    name: str = ""

    @property
    def repo(self) -> tuple[str, str]:
        """The project and the name of a repo."""
        project, _, name = self.name.partition("/")
        return project, name


CLUSTER = Resource("CLUSTER")


@dataclass(frozen=True)
class Robot:
    """An account of a program, and its roles."""

    name: str
    roles: frozenset[str]

    @property
    def subject(self) -> str:
        return f"robot:{self.name}"


OWNER = Robot("owner", frozenset(ROLES))


@dataclass(frozen=True)
class _Rule:
    """The permissions that a request needs, on the resources that it names."""

    needs: tuple[pa.Permission, ...]
    on: Callable[[Any], Iterable[Resource]] = lambda request: (CLUSTER,)


def _project(project: pb.Project) -> Resource:
    return Resource("PROJECT", project.name or "default")


def _repo(named: pb.Repo | pp.Pipeline) -> Resource:
    return Resource("REPO", f"{named.project.name or 'default'}/{named.name}")


def _commit(commit: pb.Commit) -> Resource:
    return _repo(commit.repo if commit.repo.name else commit.branch.repo)


def _optional_pipeline(request: pp.ListJobRequest) -> list[Resource]:
    return [_repo(request.pipeline)] if request.pipeline.name else []


_RULES: dict[str, _Rule] = {
    "/pfs_v2.API/CreateProject": _Rule((_P.PROJECT_CREATE,)),
    "/pfs_v2.API/DeleteProject": _Rule((_P.PROJECT_DELETE,), lambda request: [_project(request.project)]),
    "/pfs_v2.API/CreateRepo": _Rule((_P.PROJECT_CREATE_REPO,), lambda request: [_project(request.repo.project)]),
    "/pfs_v2.API/DeleteRepo": _Rule((_P.REPO_DELETE,), lambda request: [_repo(request.repo)]),
    "/pfs_v2.API/CreateBranch": _Rule((_P.REPO_CREATE_BRANCH,), lambda request: [_repo(request.branch.repo)]),
    "/pfs_v2.API/ListBranch": _Rule((_P.REPO_LIST_BRANCH,), lambda request: [_repo(request.repo)]),
    "/pfs_v2.API/DeleteBranch": _Rule((_P.REPO_DELETE_BRANCH,), lambda request: [_repo(request.branch.repo)]),
    "/pfs_v2.API/StartCommit": _Rule((_P.REPO_WRITE,), lambda request: [_repo(request.branch.repo)]),
    "/pfs_v2.API/FinishCommit": _Rule((_P.REPO_WRITE,), lambda request: [_commit(request.commit)]),
    "/pfs_v2.API/ClearCommit": _Rule((_P.REPO_WRITE,), lambda request: [_commit(request.commit)]),
    "/pfs_v2.API/InspectCommit": _Rule((_P.REPO_INSPECT_COMMIT,), lambda request: [_commit(request.commit)]),
    "/pfs_v2.API/ListCommit": _Rule((_P.REPO_LIST_COMMIT,), lambda request: [_repo(request.repo)]),
    "/pfs_v2.API/InspectFile": _Rule((_P.REPO_INSPECT_FILE,), lambda request: [_commit(request.file.commit)]),
    "/pfs_v2.API/ListFile": _Rule((_P.REPO_LIST_FILE,), lambda request: [_commit(request.file.commit)]),
    "/pfs_v2.API/WalkFile": _Rule((_P.REPO_READ, _P.REPO_LIST_FILE), lambda request: [_commit(request.file.commit)]),
    "/pfs_v2.API/GlobFile": _Rule((_P.REPO_READ, _P.REPO_LIST_FILE), lambda request: [_commit(request.commit)]),
    "/pfs_v2.API/GetFile": _Rule((_P.REPO_READ,), lambda request: [_commit(request.file.commit)]),
    "/pfs_v2.API/GetFileTAR": _Rule((_P.REPO_READ,), lambda request: [_commit(request.file.commit)]),
    "/pfs_v2.API/DiffFile": _Rule((_P.REPO_READ,), lambda request: [_commit(request.new_file.commit)]),
    "/pfs_v2.API/DropCommit": _Rule((_P.REPO_DELETE_COMMIT,)),
    "/pfs_v2.API/SquashCommit": _Rule((_P.REPO_DELETE_COMMIT,)),
    "/pfs_v2.API/DropCommitSet": _Rule((_P.REPO_DELETE_COMMIT,)),
    "/pfs_v2.API/SquashCommitSet": _Rule((_P.REPO_DELETE_COMMIT,)),
    "/pps_v2.API/StartPipeline": _Rule((_P.REPO_WRITE,), lambda request: [_repo(request.pipeline)]),
    "/pps_v2.API/StopPipeline": _Rule((_P.REPO_WRITE,), lambda request: [_repo(request.pipeline)]),
    "/pps_v2.API/RerunPipeline": _Rule((_P.REPO_WRITE,), lambda request: [_repo(request.pipeline)]),
    "/pps_v2.API/RunCron": _Rule((_P.REPO_WRITE,), lambda request: [_repo(request.pipeline)]),
    "/pps_v2.API/DeletePipeline": _Rule((_P.REPO_DELETE,), lambda request: [_repo(request.pipeline)]),
    "/pps_v2.API/ListJob": _Rule((_P.PIPELINE_LIST_JOB,), _optional_pipeline),
    "/pps_v2.API/SubscribeJob": _Rule((_P.PIPELINE_LIST_JOB,), lambda request: [_repo(request.pipeline)]),
    "/pps_v2.API/CreateSecret": _Rule((_P.CLUSTER_CREATE_SECRET,)),
    "/pps_v2.API/ListSecret": _Rule((_P.CLUSTER_LIST_SECRETS,)),
    "/pps_v2.API/InspectSecret": _Rule((_P.SECRET_INSPECT,)),
    "/pps_v2.API/DeleteSecret": _Rule((_P.SECRET_DELETE,)),
}
# Open to everyone, without a token.
_OPEN = ("/versionpb_v2.API/GetVersion", "/admin_v2.API/InspectCluster")
# Listings that show a caller only the repos of projects that it may list, and the repos that it may read.
_LISTS: dict[str, Callable[[Any], Resource]] = {
    "/pfs_v2.API/ListRepo": lambda info: _repo(info.repo),
    "/pps_v2.API/ListPipeline": lambda info: _repo(info.pipeline),
}
# The repo that a call creates: its caller becomes the owner.
_MAKES: dict[str, Callable[[Any], Resource]] = {
    "/pfs_v2.API/CreateRepo": lambda request: _repo(request.repo),
    "/pps_v2.API/CreatePipeline": lambda request: _repo(request.pipeline),
    "/pps_v2.API/CreatePipelineV2": lambda request: _repo(_specification(request).pipeline),
}


def _specification(request: pp.CreatePipelineRequest | pp.CreatePipelineV2Request) -> pp.CreatePipelineRequest:
    if isinstance(request, pp.CreatePipelineRequest):
        return request
    try:
        parsed = protojson.parse(pp.CreatePipelineRequest, request.create_pipeline_request_json)
    except ValueError:
        # The method itself reports the error.
        return pp.CreatePipelineRequest()
    assert isinstance(parsed, pp.CreatePipelineRequest)
    return parsed


class Authentication:
    """Wraps a server's methods with checks of the token and of permissions."""

    def __init__(self, tokens: Mapping[str, Robot], database: Database) -> None:
        self._tokens = tokens
        self._db = database

    def protect(self, methods: Mapping[str, Method]) -> dict[str, Method]:
        """The methods, checked, and two methods of the auth service."""
        own = {
            "/auth_v2.API/WhoAmI": Method(pa.WhoAmIRequest.FromString, self._who_am_i),
            "/auth_v2.API/Authorize": Method(pa.AuthorizeRequest.FromString, self._authorize),
        }
        return {name: method if name in _OPEN else self._protected(name, method) for name, method in {**methods, **own}.items()}

    def _protected(self, name: str, method: Method) -> Method:
        def run(request: Any, call: Call) -> Any:
            robot = self._caller(call)
            self._check(robot, name, request)
            made = _MAKES[name](request) if name in _MAKES else None
            new = made is not None and not self._exists(made)
            result = method.run(request, call)
            if made is not None and new and self._exists(made):
                self._db.execute("INSERT OR REPLACE INTO repo_owner VALUES (?, ?, ?)", *made.repo, robot.name)
            return self._visible(robot, _LISTS[name], result) if name in _LISTS else result

        return replace(method, run=run)

    def _caller(self, call: Call) -> Robot:
        token = dict(call.context.invocation_metadata()).get("authn-token")
        if not token:
            raise Unauthenticated("no authentication token (try logging in)")
        robot = self._tokens.get(str(token))
        if robot is None:
            raise Unauthenticated("provided auth token is corrupted or has expired (try logging in again)")
        return robot

    def _check(self, robot: Robot, name: str, request: Any) -> None:
        if isinstance(request, pp.CreatePipelineRequest | pp.CreatePipelineV2Request):
            # A dry run only reads the specification, so it needs no permission.
            if not request.dry_run:
                self._check_pipeline(robot, _specification(request))
        elif rule := _RULES.get(name):
            for resource in rule.on(request):
                self._require(robot, rule.needs, resource)

    def _check_pipeline(self, robot: Robot, spec: pp.CreatePipelineRequest) -> None:
        for repo in _input_repos(spec.input):
            self._require(robot, (_P.REPO_READ,), repo)
        output = _repo(spec.pipeline)
        if self._exists(output):
            self._require(robot, (_P.REPO_WRITE,), output)
        else:
            self._require(robot, (_P.PROJECT_CREATE_REPO,), _project(spec.pipeline.project))

    def _require(self, robot: Robot, needs: tuple[pa.Permission, ...], resource: Resource) -> None:
        missing = [str(permission.name) for permission in needs if permission not in self._permissions(robot, resource)]
        # The method itself reports a missing repo.
        if missing and (resource.type != "REPO" or self._exists(resource)):
            where = " ".join(filter(None, resource))
            raise PermissionDenied(
                f"{robot.subject} is not authorized to perform this operation - needs permissions [{' '.join(missing)}] on {where}"
            )

    def _permissions(self, robot: Robot, resource: Resource) -> set[pa.Permission]:
        granted = set().union(*(ROLES[role] for role in robot.roles))
        if resource.type != "REPO":
            return granted
        owner = self._db.value("SELECT robot FROM repo_owner WHERE project = ? AND name = ?", *resource.repo)
        return granted | _OWNER if owner == robot.name else granted

    def _visible(self, robot: Robot, repo_of: Callable[[Any], Resource], infos: Iterable[Any]) -> Iterator[Any]:
        return (info for info in infos if self._permissions(robot, repo_of(info)) & (_LISTER | {_P.REPO_READ}))

    def _exists(self, repo: Resource) -> bool:
        return self._db.row("SELECT 1 FROM repo WHERE project = ? AND name = ?", *repo.repo) is not None

    def _who_am_i(self, request: pa.WhoAmIRequest, call: Call) -> pa.WhoAmIResponse:
        return pa.WhoAmIResponse(username=self._caller(call).subject)

    def _authorize(self, request: pa.AuthorizeRequest, call: Call) -> pa.AuthorizeResponse:
        robot = self._caller(call)
        granted = self._permissions(robot, Resource(str(pa.ResourceType(int(request.resource.type)).name), request.resource.name))
        satisfied = [permission for permission in request.permissions if permission in granted]
        missing = [permission for permission in request.permissions if permission not in granted]
        return pa.AuthorizeResponse(authorized=not missing, satisfied=satisfied, missing=missing, principal=robot.subject)


def _input_repos(node: pp.Input) -> Iterator[Resource]:
    if node.pfs.repo:
        yield Resource("REPO", f"{node.pfs.project or 'default'}/{node.pfs.repo}")
    for part in (*node.cross, *node.union, *node.join, *node.group):
        yield from _input_repos(part)


def read_tokens(path: Path) -> dict[str, Robot]:
    """Read the robots, by token, from a JSON file ``{token: {"robot": name, "roles": [...]}}``.

    Raises:
        PachError: the file is unreadable or malformed, or has an unknown role. The message contains no token.
    """
    try:
        robots = {token: Robot(value["robot"], frozenset(value["roles"])) for token, value in json.loads(path.read_text()).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = 'it must be a JSON object {token: {"robot": name, "roles": [...]}}'
        raise PachError(f"QA_PACHD_TOKENS: {path} cannot be used ({type(error).__name__}): {problem}") from None
    for robot in robots.values():
        if unknown := robot.roles - ROLES.keys():
            raise PachError(
                f"QA_PACHD_TOKENS: {path}: {robot.subject} has the unknown role {min(unknown)}; the roles are {', '.join(ROLES)}"
            )
    return robots
