"""Calls, with the replies of a real pachd 2.12.2: the status and the significant part of the text.

In a text, ``…`` stands for anything, mostly ids, and ``{n}`` for the prefix of all names of this run. A call without a text succeeds,
and ``shows`` is what its reply must contain. The cluster under test must have no Loki; otherwise two of the calls are left out.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import grpc
import pytest
from pachyderm_sdk.api import logs, pfs, pps

from qa_platform_tests.pachd_helpers import CLUSTER, IMAGE, SUCCESS, Pachd, eventually, needs_workers, pachd_address

ABORTED, ALREADY_EXISTS, FAILED_PRECONDITION, INTERNAL, INVALID_ARGUMENT, NOT_FOUND, OK, UNKNOWN = (
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.OK,
    grpc.StatusCode.UNKNOWN,
)
# Slow enough to find a commit that is finishing; without logs of what has no pod now.
OPTIONS = {"QA_PACHD_FINISH_SECONDS": "0.3", "QA_PACHD_LOKI": "false"}
MISSING_ID = "0" * 12 + "4" + "0" * 19
NO_ID = "f" * 32
no_loki = pytest.mark.skipif(bool(CLUSTER) and os.environ.get("QA_TEST_PACHD_LOKI") != "0", reason="this cluster has Loki")


class World(Pachd):
    """What the calls find: made when the first of them looks at it."""

    @cached_property
    def a(self) -> pfs.Repo:
        """A repo with one finished commit, of a file in a folder."""
        repo = self.repo("a")
        self.put(repo, {"/d/f": b"1"})
        return repo

    @cached_property
    def head(self) -> pfs.Commit:
        return self.client.pfs.inspect_branch(branch=self.branch(self.a)).head

    @cached_property
    def input(self) -> pfs.Repo:
        return self.repo("in")

    @cached_property
    def secret(self) -> str:
        """The name of a secret with the key ``a``."""
        self.client.pps.create_secret(name=self.name("s"), data={"a": "1"})
        return self.name("s")

    @cached_property
    def running(self) -> tuple[str, str]:
        """A pipeline and the id of a job of it that works for ever."""
        repo = self.repo("slow-in")
        pipeline = self.pipeline("slow", "sleep 600", repo)
        job = self.put(repo, {"/f": b"1"})
        eventually(lambda: self.client.pps.inspect_job(job=self.job(pipeline, job)).state == pps.JobState.JOB_RUNNING)
        return pipeline, job

    @cached_property
    def made(self) -> str:
        """A pipeline with the plain specification, as it was created."""
        name = self.name("d")
        self.create(self.plain(name))
        return name

    @cached_property
    def updated(self) -> pps.PipelineInfo:
        """The same once more, as an update that changes nothing."""
        name = self.name("same")
        self.create(self.plain(name))
        self.create(self.plain(name), update=True)
        return self.client.pps.inspect_pipeline(pipeline=pps.Pipeline(name=name), details=True)

    def plain(self, name: str, **changes: Any) -> dict[str, Any]:
        """A specification in which numbers are numbers and keys are in both cases."""
        return {
            "pipeline": {"name": name},
            "input": {"pfs": {"repo": self.input.name, "glob": "/*"}},
            "transform": {"cmd": ["true"], "image": IMAGE},
            "datumTries": 2,
            "parallelismSpec": {"constant": 1},
            "datum_set_spec": {"per_worker": 1},
            **changes,
        }

    def with_secret(self, secret: Mapping[str, str]) -> dict[str, Any]:
        return self.plain(self.name("x"), transform={"cmd": ["true"], "image": IMAGE, "secrets": [secret]})

    def file(self, path: str) -> pfs.File:
        return pfs.File(commit=self.head, path=path)

    def pick(self, *, id: str = "", branch: str = "") -> pfs.Commit:
        return pfs.Commit(repo=self.a, id=id, branch=self.branch(self.a, branch) if branch else None)

    def open(self, text: str) -> pfs.Commit:
        return self.client.pfs.start_commit(branch=self.branch(self.repo(text)))

    def file_set(self) -> str:
        request = pfs.ModifyFileRequest(add_file=pfs.AddFile(path="/a", raw=b"1"))
        return self.client.pfs.create_file_set(iter([request])).file_set_id

    def put_path(self, text: str, path: str) -> list[str]:
        """The files of a commit after one was put at that path."""
        commit = self.open(text)
        self.client.pfs.put_file_from_bytes(commit=commit, path=path, data=b"")
        return self.paths(commit.repo, commit.id)

    def on_finishing_parent(self, text: str) -> pfs.Commit:
        """An open commit on top of one that is finishing."""
        parent = self.open(text)
        self.client.pfs.put_file_from_bytes(commit=parent, path="/a", data=b"1" * 1_000_000)
        self.client.pfs.finish_commit(commit=parent)
        return self.client.pfs.start_commit(branch=self.branch(parent.repo))


def renew(world: World, seconds: int, file_set: str = "") -> Any:
    return world.client.pfs.renew_file_set(file_set_id=file_set or world.file_set(), ttl_seconds=seconds)


def renew_unknown(world: World) -> Any:
    return renew(world, 60, (MISSING_ID * 2)[: len(world.file_set())])


def add_expired(world: World) -> Any:
    commit, made = world.open("expired"), world.file_set()
    renew(world, 1, made)
    time.sleep(1.1)
    return world.client.pfs.add_file_set(commit=commit, file_set_id=made)


def finish_twice(world: World) -> None:
    commit = world.open("twice")
    for _ in range(2):
        world.client.pfs.finish_commit(commit=commit)


def branch_from_none(world: World, text: str) -> tuple[pfs.Branch, pfs.Branch]:
    """A branch made from one that is not there, and that one."""
    fresh, made = world.branch(world.repo(f"{text}-in"), "fresh"), world.branch(world.repo(text))
    world.client.pfs.create_branch(branch=made, provenance=[fresh])
    return made, fresh


def delete_upstream_repo(world: World, text: str, *, force: bool = False) -> Any:
    _, upstream = branch_from_none(world, text)
    return world.client.pfs.delete_repo(repo=upstream.repo, force=force)


def start_twice(world: World) -> None:
    world.client.pfs.start_commit(branch=world.branch(world.open("open").repo))


def delete_full_project(world: World) -> None:
    project = pfs.Project(name=world.name("p"))
    repo = pfs.Repo(name=world.name("p-a"), project=project)
    world.client.pfs.create_project(project=project)
    world.client.pfs.create_repo(repo=repo)
    try:
        world.client.pfs.delete_project(project=project)
    finally:
        world.client.pfs.delete_repo(repo=repo)


def create(world: World, spec: Mapping[str, Any] | str, **more: Any) -> dict[str, Any]:
    text = spec if isinstance(spec, str) else json.dumps(spec)
    reply = world.client.pps.create_pipeline_v2(create_pipeline_request_json=text, **more)
    effective: dict[str, Any] = json.loads(reply.effective_create_pipeline_request_json)
    if not more.get("dry_run"):
        world.client.pps.delete_pipeline(pipeline=pps.Pipeline(name=effective["pipeline"]["name"]))
    return effective


def is_effective(found: Mapping[str, Any]) -> bool:
    """Numbers of 64 bits are texts, the project and the cluster's defaults are filled in, and no defaults of the input are."""
    return (
        found["pipeline"]["project"] == {"name": "default"}
        and found["parallelismSpec"] == {"constant": "1"}
        and (found["outputBranch"], found["datumTries"], found["datumSetSpec"]) == ("master", "2", {"perWorker": "1"})
        and found["resourceRequests"] == {"cpu": 1, "memory": "256Mi", "disk": "1Gi"}
        and found["input"]["pfs"].keys() == {"repo", "glob"}
    )


def is_stored(info: pps.PipelineInfo) -> bool:
    """The stored effective spec is merged JSON: sorted, numbers stay numbers, no project."""
    found = json.loads(info.effective_spec_json)
    return (
        list(found) == sorted(found)
        and found["pipeline"] == {"name": info.pipeline.name}
        and found["parallelismSpec"] == {"constant": 1}
        and (found["outputBranch"], found["datumTries"], found["datumSetSpec"]) == ("master", 2, {"perWorker": 1})
    )


def delete_running(world: World, **more: Any) -> Any:
    pipeline, _ = world.running
    return world.client.pfs.delete_repo(repo=pfs.Repo(name=pipeline), **more)


def delete_input(world: World, text: str, **more: Any) -> Any:
    """Deletes the repo that a pipeline reads."""
    repo = world.repo(f"{text}-in")
    world.pipeline(text, ["true"], repo)
    return world.client.pfs.delete_repo(repo=repo, **more)


def delete_made(world: World) -> Any:
    name = world.pipeline("gone", ["true"], world.input)
    return world.client.pps.delete_pipeline(pipeline=pps.Pipeline(name=name))


def rerun_without_project(world: World) -> Any:
    return world.client.pps.rerun_pipeline(pipeline=pps.Pipeline(name=world.made), reprocess=False)


def logs_of_idle(world: World) -> None:
    name = world.pipeline("idle", "echo said", world.repo("idle-in"), autoscaling=True)
    job = world.put(pfs.Repo(name=world.name("idle-in")), {"/f": b"1"})
    assert world.wait(name, job).state == SUCCESS
    # The pod may be there for a while.
    eventually(lambda: _logs_end(world, world.job(name, job)))


def _logs_end(world: World, job: pps.Job) -> bool:
    list(world.client.pps.get_logs(job=job))
    return False


def logs_of_datum_alone(world: World) -> None:
    list(world.client.pps.get_logs(datum=pps.Datum(id="d" * 64)))


def logs_of_loki(world: World) -> None:
    query = logs.LogQuery(user=logs.UserLogQuery(pipeline=logs.PipelineLogQuery(project="default", pipeline=world.made)))
    with grpc.insecure_channel(world.address.removeprefix("grpc://")) as channel:
        list(logs.ApiStub(channel).get_logs(query=query))


def datums_on_open_base(world: World) -> None:
    pipeline, _ = world.running
    job = world.put(pfs.Repo(name=world.name("slow-in")), {"/f": b"2"})
    list(world.client.pps.list_datum(job=world.job(pipeline, job)))


@dataclass(frozen=True)
class Reply:
    call: str
    make: Callable[[World], Any]
    code: grpc.StatusCode = OK
    text: str = ""
    shows: Callable[[Any], bool] = lambda reply: True
    marks: tuple[pytest.MarkDecorator, ...] = ()


NOT_THERE = 'pipeline "default/{n}-none" not found'
UNFINISHED = "base commit default/{n}-…for commit default/{n}-…unfinished"
NOT_FINISHED = "parent commit default/{n}-…has not been finished"
BAD_NAME = "name ({0}) invalid: only alphanumeric characters, underscores, and dashes are allowed"
NO_FILE = "file /nope not found in repo default/{n}-a at commit"
PANIC = "panic: runtime error: invalid memory address or nil pointer dereference"
NO_JOB = "jobs default/{n}-d@" + MISSING_ID + " not found"

FILES = (
    Reply("renew a file set for 1801 s", lambda w: renew(w, 1801), UNKNOWN, "ttl (1801000000000) exceeds max ttl (1800000000000)"),
    Reply("renew a file set for 1800 s", lambda w: renew(w, 1800)),
    Reply("renew a file set for 0 s", lambda w: renew(w, 0), UNKNOWN, "ttl (0) must be at least one second"),
    Reply("renew an unknown file set", renew_unknown, NOT_FOUND, "tracker does not contain item: (fileset/"),
    Reply("add a file set that has just expired", add_expired),
    Reply(
        "delete / on a finishing parent",
        lambda w: w.client.pfs.delete_file(commit=w.on_finishing_parent("fin-delete"), path="/"),
        UNKNOWN,
        UNFINISHED,
    ),
    Reply(
        "list an open commit on a finishing parent",
        lambda w: list(w.client.pfs.list_file(file=pfs.File(commit=w.on_finishing_parent("fin-list"), path="/"))),
        UNKNOWN,
        UNFINISHED,
    ),
    Reply("finish a commit twice", finish_twice, UNKNOWN, "commit default/{n}-twice@…has already finished"),
    Reply(
        "inspect a missing commit by an id",
        lambda w: w.client.pfs.inspect_commit(commit=w.pick(id=MISSING_ID)),
        NOT_FOUND,
        "commit default/{n}-a@" + MISSING_ID + " not found",
    ),
    Reply(
        "inspect a missing branch",
        lambda w: w.client.pfs.inspect_branch(branch=w.branch(w.a, "nope")),
        NOT_FOUND,
        'branch "nope" not found in repo default/{n}-a',
    ),
    Reply("inspect a missing file", lambda w: w.client.pfs.inspect_file(file=w.file("/nope")), NOT_FOUND, NO_FILE),
    Reply("get a missing file", lambda w: list(w.client.pfs.get_file(file=w.file("/nope"))), NOT_FOUND, NO_FILE),
    Reply("get a missing file as TAR", lambda w: list(w.client.pfs.get_file_tar(file=w.file("/nope"))), NOT_FOUND, NO_FILE),
    Reply("list a missing folder", lambda w: list(w.client.pfs.list_file(file=w.file("/nope/"))), shows=lambda found: found == []),
    Reply("glob without a match", lambda w: list(w.client.pfs.glob_file(commit=w.head, pattern="/nope*")), shows=lambda found: found == []),
    Reply(
        "put a path with two dots",
        lambda w: w.put_path("dots", "/a/../b"),
        UNKNOWN,
        "path (/a/../b) invalid: relative file paths are not allowed",
    ),
    Reply("put a path with a slash behind", lambda w: w.put_path("slash", "/a/"), shows=lambda found: found == ["/a"]),
    Reply(
        "put a path with a control character",
        lambda w: w.put_path("control", "/a\x01b"),
        UNKNOWN,
        "path (/a…b) invalid: only printable ASCII characters allowed",
    ),
    Reply("get a folder", lambda w: list(w.client.pfs.get_file(file=w.file("/d"))), UNKNOWN, "cannot get directory or non-regular file"),
    Reply(
        "list files backwards without a number",
        lambda w: list(w.client.pfs.list_file(file=w.file("/"), reverse=True)),
        UNKNOWN,
        "number must be > 0 when reverse is true",
    ),
    Reply(
        "put a file from an ftp address",
        lambda w: w.client.pfs.put_file_from_url(commit=w.open("ftp"), path="/a", url="ftp://host/a"),
        UNKNOWN,
        "unrecognized object store: ftp",
    ),
    Reply(
        "modify files without a commit",
        lambda w: w.client.pfs.modify_file(iter([pfs.ModifyFileRequest(add_file=pfs.AddFile(path="/a", raw=b""))])),
        UNKNOWN,
        "first message must be a commit",
    ),
)
REPOS = (
    Reply("create a repo with a blank", lambda w: w.client.pfs.create_repo(repo=pfs.Repo(name="a b")), UNKNOWN, BAD_NAME.format("a b")),
    Reply("start a branch with a blank", lambda w: w.client.pfs.start_commit(branch=w.branch(w.a, "a b")), UNKNOWN, BAD_NAME.format("a b")),
    Reply("make a branch from one that is not there", lambda w: branch_from_none(w, "p")),
    Reply("create a repo again", lambda w: w.client.pfs.create_repo(repo=w.a), ALREADY_EXISTS, "repo default/{n}-a already exists"),
    Reply(
        "delete a missing repo",
        lambda w: w.client.pfs.delete_repo(repo=pfs.Repo(name=w.name("nope"))),
        shows=lambda reply: reply.deleted is False,
    ),
    Reply(
        "delete a repo that a branch is made from",
        lambda w: delete_upstream_repo(w, "down"),
        UNKNOWN,
        'delete repo: delete branch default/{n}-down-in@fresh: branch "default/{n}-down-in@fresh" cannot be deleted because it\'s in the '
        "direct provenance of [default/{n}-down@master]",
    ),
    Reply(
        "delete a pipeline's repo",
        delete_running,
        UNKNOWN,
        'delete repo: error checking whether repo "default/{n}-slow" can be deleted: cannot delete a repo associated with a pipeline - '
        "delete the pipeline instead",
        marks=(needs_workers,),
    ),
    Reply(
        "delete the input of a pipeline",
        lambda w: delete_input(w, "reads"),
        UNKNOWN,
        'delete repo: delete branch default/{n}-reads-in@master: branch "default/{n}-reads-in@master" cannot be deleted because '
        "it's in the direct provenance of [default/{n}-reads@master default/{n}-reads.meta@master",
    ),
    Reply("delete the input by force", lambda w: delete_input(w, "forced", force=True), shows=lambda reply: reply.deleted is True),
    Reply("inspect a repo without a name", lambda w: w.client.pfs.inspect_repo(repo=pfs.Repo()), NOT_FOUND, "repo default/ not found"),
    Reply(
        "delete a project with a repo",
        delete_full_project,
        FAILED_PRECONDITION,
        "cannot delete project {n}-p: repo {n}-p/{n}-p-a still exists",
    ),
)
COMMITS = (
    Reply("inspect a commit that is no id", lambda w: w.client.pfs.inspect_commit(commit=w.pick(id=NO_ID)), ABORTED, PANIC),
    Reply(
        "inspect a file of what is no id",
        lambda w: w.client.pfs.inspect_file(file=pfs.File(commit=w.pick(id=NO_ID), path="/a")),
        ABORTED,
        PANIC,
    ),
    Reply(
        "inspect the commit of a missing branch",
        lambda w: w.client.pfs.inspect_commit(commit=w.pick(branch="nope")),
        NOT_FOUND,
        'branch "nope" not found in repo default/{n}-a',
    ),
    Reply("start on an open head", start_twice, UNKNOWN, NOT_FINISHED),
    Reply("master^1^1", lambda w: w.client.pfs.inspect_commit(commit=w.pick(id="master^1^1")), UNKNOWN, "invalid ancestry format"),
    Reply(
        "master^5 of one commit",
        lambda w: w.client.pfs.inspect_commit(commit=w.pick(id="master^5")),
        UNKNOWN,
        "invalid offset for ancestor of commit: default/{n}-a.user@…, offset requested: 5, offset traversable: 0",
    ),
    Reply(
        "inspect a missing commit set",
        lambda w: list(w.client.pfs.inspect_commit_set(commit_set=pfs.CommitSet(id=MISSING_ID))),
        NOT_FOUND,
        f"no commits found for commitset {MISSING_ID}",
    ),
    Reply("drop a missing commit set", lambda w: w.client.pfs.drop_commit_set(commit_set=pfs.CommitSet(id=MISSING_ID))),
    Reply("squash a missing commit set", lambda w: w.client.pfs.squash_commit_set(commit_set=pfs.CommitSet(id=MISSING_ID))),
    Reply(
        "put a file into a pipeline's repo",
        lambda w: w.put(pfs.Repo(name=w.running[0]), {"/a": b"1"}),
        UNKNOWN,
        "parent commit default/{n}-slow@…has not been finished",
        marks=(needs_workers,),
    ),
)
SECRETS = (
    Reply(
        "inspect a missing secret",
        lambda w: w.client.pps.inspect_secret(secret=pps.Secret(name=w.name("none"))),
        UNKNOWN,
        'failed to get secret: secrets "{n}-none" not found',
    ),
    Reply(
        "delete a missing secret",
        lambda w: w.client.pps.delete_secret(secret=pps.Secret(name=w.name("none"))),
        UNKNOWN,
        'failed to delete secret: secrets "{n}-none" not found',
    ),
    Reply(
        "create a secret again",
        lambda w: w.client.pps.create_secret(name=w.secret, data={"a": "1"}),
        UNKNOWN,
        'failed to create secret: secrets "{n}-s" already exists',
    ),
)
PIPELINES = (
    Reply(
        "dry run with a missing secret",
        lambda w: create(w, w.with_secret({"name": w.name("none"), "envVar": "A", "key": "a"}), dry_run=True),
        shows=lambda found: "transform" in found,
    ),
    Reply(
        "create with a missing secret in the environment",
        lambda w: create(w, w.with_secret({"name": w.name("none"), "envVar": "A", "key": "a"})),
        UNKNOWN,
        "missing Kubernetes secret {n}-none",
    ),
    Reply(
        "create with a missing secret in a folder",
        lambda w: create(w, w.with_secret({"name": w.name("none"), "mountPath": "/secret"})),
        UNKNOWN,
        "missing Kubernetes secret {n}-none",
    ),
    Reply(
        "create with a key that the secret has not",
        lambda w: create(w, w.with_secret({"name": w.secret, "envVar": "B", "key": "b"})),
        UNKNOWN,
        "Kubernetes secret {n}-s missing key b",
    ),
    Reply(
        "dry run with a missing repo",
        lambda w: create(w, w.plain(w.name("x"), input={"pfs": {"repo": w.name("no"), "glob": "/*"}}), dry_run=True),
        shows=lambda found: "transform" in found,
    ),
    Reply(
        "create with a missing repo",
        lambda w: create(w, w.plain(w.name("x"), input={"pfs": {"repo": w.name("no"), "glob": "/*"}})),
        NOT_FOUND,
        "repo default/{n}-no not found",
    ),
    Reply(
        "create without a cmd",
        lambda w: create(w, w.plain(w.name("nocmd"), transform={"image": IMAGE})),
        shows=lambda found: found["pipeline"]["project"] == {"name": "default"},
    ),
    Reply(
        "create with an unknown field",
        lambda w: create(w, w.plain(w.name("x"), nonsense=1)),
        INVALID_ARGUMENT,
        'could not make effective spec: could not parse {{…}} as Create Pipeline Request message: …unknown field "nonsense"',
    ),
    Reply(
        "create with text that is no JSON",
        lambda w: create(w, "{"),
        INVALID_ARGUMENT,
        "could not make effective spec: could not parse {{ as Create Pipeline Request message: …unexpected EOF",
    ),
    Reply(
        "create with a glob that is none",
        lambda w: create(w, w.plain(w.name("x"), input={"pfs": {"repo": w.input.name, "glob": "["}})),
        shows=lambda found: found["input"]["pfs"]["glob"] == "[",
    ),
    Reply(
        "create with a blank in the name",
        lambda w: create(w, w.plain(w.name("x y"))),
        UNKNOWN,
        "invalid pipeline name: " + BAD_NAME.format("{n}-x y"),
    ),
    Reply("the effective spec of a dry run", lambda w: create(w, w.plain(w.name("dry")), dry_run=True), shows=is_effective),
    Reply("the effective spec of a new pipeline", lambda w: create(w, w.plain(w.name("new"))), shows=is_effective),
    Reply(
        "create a pipeline again",
        lambda w: w.create(w.plain(w.made)),
        ALREADY_EXISTS,
        'pipeline "default/{n}-d" already exists',
    ),
    Reply(
        "the effective spec of an update that changes nothing",
        lambda w: w.create(w.plain(w.made), update=True),
        shows=lambda found: is_effective(found) and found["update"] is True,
    ),
    Reply("the effective spec that is stored", lambda w: w.updated, shows=is_stored),
    Reply(
        "the spec of the user",
        lambda w: (w.updated.user_spec_json, json.dumps(w.plain(w.name("same")))),
        shows=lambda found: found[0] == found[1],
    ),
    Reply("the version after the same update", lambda w: w.updated.version, shows=lambda version: version == 2),
    Reply(
        "inspect a missing pipeline",
        lambda w: w.client.pps.inspect_pipeline(pipeline=pps.Pipeline(name=w.name("none"))),
        NOT_FOUND,
        NOT_THERE,
    ),
    Reply("delete a missing pipeline", lambda w: w.client.pps.delete_pipeline(pipeline=pps.Pipeline(name=w.name("none")))),
    Reply("stop a missing pipeline", lambda w: w.client.pps.stop_pipeline(pipeline=pps.Pipeline(name=w.name("none")))),
    Reply("delete a pipeline", delete_made),
    Reply(
        "rerun a pipeline without naming its project",
        rerun_without_project,
        UNKNOWN,
        'inspect pipeline "{n}-d": …project picker cannot be nil',
    ),
)
JOBS = (
    Reply("inspect a missing job", lambda w: w.client.pps.inspect_job(job=w.job(w.made, MISSING_ID)), NOT_FOUND, NO_JOB),
    Reply("stop a missing job", lambda w: w.client.pps.stop_job(job=w.job(w.made, MISSING_ID)), NOT_FOUND, NO_JOB),
    Reply("list the datums of a missing job", lambda w: list(w.client.pps.list_datum(job=w.job(w.made, MISSING_ID))), NOT_FOUND, NO_JOB),
    Reply(
        "list datums backwards without a number",
        lambda w: list(w.client.pps.list_datum(job=w.client.pps.inspect_job(job=w.jobs(w.made)[0].job).job, reverse=True)),
        UNKNOWN,
        "number must be > 0 when reverse is true",
    ),
    Reply(
        "list datums while the job before is not closed",
        datums_on_open_base,
        UNKNOWN,
        "base commit default/{n}-slow.meta@…for commit default/{n}-slow.meta@…unfinished",
        marks=(needs_workers,),
    ),
)
LOGS = (
    Reply(
        "logs of a missing pipeline",
        lambda w: list(w.client.pps.get_logs(pipeline=pps.Pipeline(name=w.name("none")))),
        NOT_FOUND,
        "could not get pipeline information for default/{n}-none: …" + NOT_THERE,
    ),
    Reply(
        "logs of a missing job",
        lambda w: list(w.client.pps.get_logs(job=w.job(w.made, MISSING_ID))),
        NOT_FOUND,
        f'could not get job information for "{MISSING_ID}": ' + NO_JOB,
    ),
    Reply(
        "logs of a datum alone", logs_of_datum_alone, UNKNOWN, "must specify the Job or Pipeline that the datum is from to get logs for it"
    ),
    Reply(
        "logs of a pipeline without a pod",
        logs_of_idle,
        UNKNOWN,
        'no pods belonging to the rc "default-{n}-idle-v1" were found',
        marks=(needs_workers, no_loki),
    ),
    Reply("logs by the other service", logs_of_loki, INTERNAL, "loki client error: loki not configured", marks=(no_loki,)),
)
REPLIES = (*FILES, *REPOS, *COMMITS, *SECRETS, *PIPELINES, *JOBS, *LOGS)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with pachd_address(tmp_path_factory.mktemp("pachd"), OPTIONS) as address:
        world = World(address)
        yield world
        world.clean_up()


def answer(make: Callable[[], Any]) -> tuple[grpc.StatusCode, str, Any]:
    """Status, text and reply of a call."""
    try:
        return OK, "", make()
    except grpc.RpcError as error:
        refusal: Any = error
        return refusal.code(), refusal.details(), None


def has_in_order(text: str, parts: str) -> bool:
    """Whether all that stands between the ``…`` is in the text, one after the other."""
    at = 0
    for part in parts.split("…"):
        found = text.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return True


@pytest.mark.parametrize("reply", [pytest.param(reply, id=reply.call, marks=reply.marks) for reply in REPLIES])
def test_a_call_is_replied_to_as_a_real_cluster_does(world: World, reply: Reply) -> None:
    code, text, found = answer(lambda: reply.make(world))
    expected = reply.text.format(n=world.name("")[:-1])
    assert (code, text if not has_in_order(text, expected) else expected) == (reply.code, expected)
    if code is OK:
        assert reply.shows(found), found
