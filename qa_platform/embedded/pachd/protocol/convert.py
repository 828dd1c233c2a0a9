"""Converts between the messages of ``pachyderm_sdk`` and the dataclasses of ``pfs`` and ``pps``."""

import functools
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import betterproto
from betterproto.lib.google.protobuf import Empty
from pachyderm_sdk.api import pfs as pb
from pachyderm_sdk.api import pps as pp

from qa_platform.embedded.pachd.errors import InvalidArgument, PachError
from qa_platform.embedded.pachd.pfs import Branch, BranchKey, Commit, CommitRef, Pfs, Repo, RepoKey
from qa_platform.embedded.pachd.pps import Datum, DatumInput, DatumState, Job, JobState, Pipeline, PipelineKey, PipelineState, Stats
from qa_platform.embedded.pachd.pps.meta import image_id
from qa_platform.embedded.pachd.protocol import protojson
from qa_platform.embedded.pachd.storage.logs import LogLine
from qa_platform.embedded.pachd.storage.trees import Found

M = TypeVar("M", bound=betterproto.Message)
EMPTY = Empty()
_CREATED_BY = "pach:root"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def is_set(message: betterproto.Message) -> bool:
    """Whether a message field was sent, even if it contains only defaults."""
    return betterproto.serialized_on_wire(message) or bytes(message) != b""


def present(message: M) -> M:
    """Make sure that a message is sent even if it contains only defaults: clients read its fields without checking for it."""
    message._serialized_on_wire = True
    return message


def when(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def seconds(moment: datetime) -> float:
    """Seconds since the epoch; zero if the field is unset."""
    return (moment - _EPOCH).total_seconds()


# Requests


def repo_key(repo: pb.Repo) -> RepoKey:
    """The key of a repo. A missing name is accepted: the client gets the error that the repo does not exist."""
    return RepoKey(repo.project.name or "default", repo.name, repo.type or "user")


def branch_key(branch: pb.Branch) -> BranchKey:
    if not branch.name:
        raise PachError("branch must be specified")
    return BranchKey(repo_key(branch.repo), branch.name)


def commit_ref(commit: pb.Commit) -> CommitRef:
    if not is_set(commit):
        raise PachError("commit cannot be nil")
    repo = commit.repo if commit.repo.name else commit.branch.repo
    return CommitRef(repo_key(repo), commit.id, commit.branch.name)


def pipeline_key(pipeline: pp.Pipeline) -> PipelineKey:
    if not pipeline.name:
        raise InvalidArgument("validate request: invalid request: pipeline is missing, or has no name")
    return PipelineKey(pipeline.project.name or "default", pipeline.name)


def job_key(job: pp.Job) -> tuple[PipelineKey, str]:
    if not job.id:
        raise InvalidArgument("validate request: invalid request: job is missing, or has no id")
    return pipeline_key(job.pipeline), job.id


# Replies of PFS


def repo(key: RepoKey) -> pb.Repo:
    return pb.Repo(name=key.name, type=key.type, project=pb.Project(name=key.project))


def branch(key: BranchKey) -> pb.Branch:
    return pb.Branch(repo=repo(key.repo), name=key.name)


def commit(key: RepoKey, commit_id: str) -> pb.Commit:
    """A commit without its branch, as in every reply except for a job's output commit."""
    return pb.Commit(repo=repo(key), id=commit_id)


def repo_info(found: Repo) -> pb.RepoInfo:
    return pb.RepoInfo(
        repo=repo(found.key),
        created=when(found.created),
        size_bytes_upper_bound=found.size,
        description=found.description,
        branches=[branch(BranchKey(found.key, name)) for name in found.branches],
        details=present(pb.RepoInfoDetails(size_bytes=found.size)),
    )


def branch_info(pfs: Pfs, found: Branch) -> pb.BranchInfo:
    return pb.BranchInfo(
        branch=branch(found.key),
        head=commit(found.key.repo, found.head_id),
        provenance=[branch(key) for key in pfs.closure(found, downstream=False)],
        subvenance=[branch(key) for key in pfs.closure(found, downstream=True)],
        direct_provenance=[branch(key) for key in pfs.upstream(found)],
        created_at=when(found.created),
        updated_at=when(found.updated),
    )


def commit_info(pfs: Pfs, found: Commit) -> pb.CommitInfo:
    return pb.CommitInfo(
        commit=commit(found.repo, found.id),
        origin=pb.CommitOrigin(kind=pb.OriginKind(int(found.kind))),
        description=found.description,
        parent_commit=commit(found.repo, found.parent_id) if found.parent_id else None,
        child_commits=[commit(child.repo, child.id) for child in pfs.children(found.pk)],
        started=when(found.started),
        finishing=when(found.finishing),
        finished=when(found.finished),
        direct_provenance=[
            pb.Commit(repo=repo(one.repo), id=one.id, branch=branch(BranchKey(one.repo, one.branch))) for one in pfs.provenance(found.pk)
        ],
        direct_subvenance=[commit(one.repo, one.id) for one in pfs.subvenance(found.pk)],
        error=found.error,
        size_bytes_upper_bound=found.size,
        details=present(pb.CommitInfoDetails(size_bytes=found.size)) if found.finished is not None else None,
        created_at=when(found.started),
        created_by=_CREATED_BY,
        updated_at=when(found.finished or found.finishing or found.started),
    )


def file_info(owner: Commit, found: Found) -> pb.FileInfo:
    return pb.FileInfo(
        file=pb.File(commit=commit(owner.repo, owner.id), path=found.path, datum="" if found.is_dir else found.entry.parts[0][0]),  # type: ignore[union-attr]
        file_type=pb.FileType.DIR if found.is_dir else pb.FileType.FILE,
        committed=when(owner.finished),
        size_bytes=found.entry.size,
        hash=bytes.fromhex(found.entry.digest),
    )


# Replies of PPS


def pipeline(key: PipelineKey) -> pp.Pipeline:
    return pp.Pipeline(project=pb.Project(name=key.project), name=key.name)


def job(found: Job) -> pp.Job:
    return pp.Job(pipeline=pipeline(found.pipeline), id=found.id)


def _stats(stats: Stats) -> pp.ProcessStats:
    return present(
        pp.ProcessStats(
            download_time=timedelta(seconds=stats.download_seconds),
            process_time=timedelta(seconds=stats.process_seconds),
            upload_time=timedelta(seconds=stats.upload_seconds),
            download_bytes=stats.downloaded,
            upload_bytes=stats.uploaded,
        )
    )


def create_request(found: Pipeline) -> pp.CreatePipelineRequest:
    """The effective spec as a message, with the defaults of the inputs."""
    return pp.CreatePipelineRequest.FromString(_request_bytes(found.filled_json))


@functools.lru_cache(256)
def _request_bytes(text: str) -> bytes:
    return bytes(protojson.parse(pp.CreatePipelineRequest, text))


def job_info(found: Job, of: Pipeline, *, details: bool) -> pp.JobInfo:
    key = RepoKey(found.pipeline.project, found.pipeline.name)
    return pp.JobInfo(
        job=job(found),
        pipeline_version=found.version,
        output_commit=pb.Commit(repo=repo(key), id=found.id, branch=branch(BranchKey(key, of.spec.output_branch))),
        restart=found.restarts,
        data_processed=found.counts.get(DatumState.SUCCESS, 0),
        data_skipped=found.counts.get(DatumState.SKIPPED, 0),
        data_total=found.total,
        data_failed=found.counts.get(DatumState.FAILED, 0),
        data_recovered=found.counts.get(DatumState.RECOVERED, 0),
        stats=_stats(found.stats),
        state=pp.JobState(int(found.state)),
        reason=found.reason,
        created=when(found.created),
        started=when(found.started),
        finished=when(found.finished),
        details=_job_details(found, of) if details else None,
    )


def _job_details(found: Job, of: Pipeline) -> pp.JobInfoDetails:
    request = create_request(of)
    _set_commits(request.input, found.id)
    return pp.JobInfoDetails(
        transform=request.transform,
        parallelism_spec=_given(request.parallelism_spec),
        resource_requests=_given(request.resource_requests),
        resource_limits=_given(request.resource_limits),
        sidecar_resource_limits=_given(request.sidecar_resource_limits),
        input=request.input,
        salt=of.salt,
        datum_set_spec=_given(request.datum_set_spec),
        datum_timeout=request.datum_timeout or None,
        job_timeout=request.job_timeout or None,
        datum_tries=request.datum_tries,
        sidecar_resource_requests=_given(request.sidecar_resource_requests),
    )


def _given(message: M) -> M | None:
    return message if is_set(message) else None


def _set_commits(node: pp.Input, commit_id: str) -> None:
    """Add the id of the commit set that the job reads to all of its inputs."""
    for leaf in (node.pfs, node.cron):
        if leaf.name:
            leaf.commit = commit_id
    for child in (*node.join, *node.group, *node.cross, *node.union):
        _set_commits(child, commit_id)


def pipeline_info(found: Pipeline, *, details: bool, last_job: JobState | None) -> pp.PipelineInfo:
    request = create_request(found)
    spec_branch = found.spec.spec_branch
    return pp.PipelineInfo(
        pipeline=pipeline(found.key),
        version=found.version,
        spec_commit=pb.Commit(repo=repo(spec_branch.repo), id=found.spec_commit, branch=branch(spec_branch)),
        stopped=found.stopped,
        state=pp.PipelineState(int(found.state)),
        reason=found.reason,
        last_job_state=pp.JobState(int(last_job or 0)),
        parallelism=found.spec.parallelism,
        type=pp.PipelineInfoPipelineType.PIPELINE_TYPE_TRANSFORM,
        user_spec_json=found.user_json,
        effective_spec_json=found.effective_json,
        details=_pipeline_details(found, request) if details else None,
    )


def _pipeline_details(found: Pipeline, request: pp.CreatePipelineRequest) -> pp.PipelineInfoDetails:
    idle = found.state in (PipelineState.PAUSED, PipelineState.STANDBY)
    return pp.PipelineInfoDetails(
        transform=request.transform,
        parallelism_spec=_given(request.parallelism_spec),
        created_at=when(found.created),
        updated_at=when(found.updated),
        created_by=_CREATED_BY,
        workers_requested=0 if idle else found.spec.parallelism,
        workers_available=found.spec.parallelism if found.state == PipelineState.RUNNING else 0,
        output_branch=request.output_branch,
        resource_requests=_given(request.resource_requests),
        resource_limits=_given(request.resource_limits),
        sidecar_resource_limits=_given(request.sidecar_resource_limits),
        input=request.input,
        description=request.description,
        salt=found.salt,
        datum_set_spec=_given(request.datum_set_spec),
        datum_timeout=request.datum_timeout or None,
        job_timeout=request.job_timeout or None,
        datum_tries=request.datum_tries,
        scheduling_spec=_given(request.scheduling_spec),
        pod_spec=request.pod_spec,
        pod_patch=request.pod_patch,
        metadata=_given(request.metadata),
        reprocess_spec=request.reprocess_spec,
        workers_started_at=None if idle else when(found.updated),
        autoscaling=request.autoscaling,
        tolerations=request.tolerations,
        sidecar_resource_requests=_given(request.sidecar_resource_requests),
    )


def datum_info(of: Job | None, found: Datum, *, image: str = "", inspected: bool = False) -> pp.DatumInfo:
    """A datum of a job, or of an input without a job. ``inspected`` adds the location of its files, which listings omit."""
    if of is None:
        owner = pp.Job(pipeline=pp.Pipeline(project=pb.Project(name="default")))
        return pp.DatumInfo(datum=pp.Datum(job=owner, id=found.id), data=[_input_info(one) for one in found.inputs])
    path = pb.File(commit=commit(RepoKey(of.pipeline.project, of.pipeline.name, "meta"), of.id), path=f"/pfs/{found.id}")
    return pp.DatumInfo(
        datum=pp.Datum(job=pp.Job(pipeline=pipeline(of.pipeline), id=found.origin or of.id), id=found.id),
        state=pp.DatumState(int(found.state)),
        stats=_stats(found.stats),
        pfs_state=path if inspected else None,
        data=[_input_info(one) for one in found.inputs],
        image_id=image_id(image),
    )


def _input_info(one: DatumInput) -> pb.FileInfo:
    return pb.FileInfo(
        file=pb.File(commit=commit(one.repo, one.commit), path=one.path, datum=one.tag),
        file_type=pb.FileType.DIR if one.path.endswith("/") else pb.FileType.FILE,
        committed=when(one.committed),
        size_bytes=one.size,
        hash=bytes.fromhex(one.digest),
    )


def log_message(line: LogLine) -> pp.LogMessage:
    return pp.LogMessage(
        project_name=line.project,
        pipeline_name=line.pipeline,
        job_id=line.job,
        worker_id=line.worker,
        datum_id=line.datum,
        master=line.master,
        data=[pp.InputFile(path=path, hash=bytes.fromhex(digest)) for path, digest in line.data],
        user=line.user,
        ts=when(line.time),
        message=line.message,
    )
