"""Between the messages of ``pachyderm_sdk`` and the dataclasses of ``pfs`` and ``pps``."""

import json
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import betterproto
from betterproto.lib.google.protobuf import Empty
from pachyderm_sdk.api import pfs as pb
from pachyderm_sdk.api import pps as pp

from qa_platform.embedded.pachd.errors import InvalidArgument
from qa_platform.embedded.pachd.pfs import Branch, BranchKey, Commit, CommitRef, Pfs, Repo, RepoKey
from qa_platform.embedded.pachd.pps import Datum, DatumInput, DatumState, Job, Pipeline, PipelineKey, PipelineState
from qa_platform.embedded.pachd.protocol import protojson
from qa_platform.embedded.pachd.storage.logs import LogLine
from qa_platform.embedded.pachd.storage.trees import Found

M = TypeVar("M", bound=betterproto.Message)
EMPTY = Empty()
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def is_set(message: betterproto.Message) -> bool:
    """Whether a message field came over the wire, even if with nothing but defaults in it."""
    return betterproto.serialized_on_wire(message) or bytes(message) != b""


def present(message: M) -> M:
    """Makes sure that a message goes over the wire even with nothing but defaults in it: clients look into it unasked."""
    message._serialized_on_wire = True
    return message


def when(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def seconds(moment: datetime) -> float:
    """Zero where the field is unset."""
    return (moment - _EPOCH).total_seconds()


# Requests


def repo_key(repo: pb.Repo) -> RepoKey:
    if not repo.name:
        raise InvalidArgument("validate request: invalid request: repo is missing, or has no name")
    return RepoKey(repo.project.name or "default", repo.name, repo.type or "user")


def branch_key(branch: pb.Branch) -> BranchKey:
    if not branch.name:
        raise InvalidArgument("validate request: invalid request: branch is missing, or has no name")
    return BranchKey(repo_key(branch.repo), branch.name)


def commit_ref(commit: pb.Commit) -> CommitRef:
    repo = commit.repo if commit.repo.name else commit.branch.repo
    ref = CommitRef(repo_key(repo), commit.id, commit.branch.name)
    if not ref.id and not ref.branch:
        raise InvalidArgument("validate request: invalid request: commit has neither id nor branch")
    return ref


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
    """Without a branch, as it stands in every reply but a job's output commit."""
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
        direct_provenance=[commit(one.repo, one.id) for one in pfs.provenance(found.pk)],
        direct_subvenance=[commit(one.repo, one.id) for one in pfs.subvenance(found.pk)],
        error=found.error,
        size_bytes_upper_bound=found.size,
        details=present(pb.CommitInfoDetails(size_bytes=found.size)) if found.finished is not None else None,
        created_at=when(found.started),
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


def _stats(seconds_: float, downloaded: int, uploaded: int) -> pp.ProcessStats:
    return present(pp.ProcessStats(process_time=timedelta(seconds=seconds_), download_bytes=downloaded, upload_bytes=uploaded))


def create_request(found: Pipeline) -> pp.CreatePipelineRequest:
    """The effective spec as a message."""
    message = protojson.parse(pp.CreatePipelineRequest, found.effective_json)
    assert isinstance(message, pp.CreatePipelineRequest)
    return message


def job_info(found: Job, of: Pipeline, *, details: bool, output_branch: str) -> pp.JobInfo:
    key = RepoKey(found.pipeline.project, found.pipeline.name)
    info = pp.JobInfo(
        job=job(found),
        pipeline_version=found.version,
        output_commit=pb.Commit(repo=repo(key), id=found.id, branch=branch(BranchKey(key, output_branch))),
        restart=found.restarts,
        data_processed=found.counts.get(DatumState.SUCCESS, 0),
        data_skipped=found.counts.get(DatumState.SKIPPED, 0),
        data_total=found.total,
        data_failed=found.counts.get(DatumState.FAILED, 0),
        data_recovered=found.counts.get(DatumState.RECOVERED, 0),
        stats=_stats(found.seconds, found.downloaded, found.uploaded),
        state=pp.JobState(int(found.state)),
        reason=found.reason,
        created=when(found.created),
        started=when(found.started),
        finished=when(found.finished),
    )
    request = create_request(of) if details else None
    info.details = (
        present(pp.JobInfoDetails())
        if request is None
        else pp.JobInfoDetails(
            transform=request.transform,
            parallelism_spec=request.parallelism_spec,
            input=request.input,
            salt=of.salt,
            datum_set_spec=request.datum_set_spec if is_set(request.datum_set_spec) else None,
            datum_timeout=request.datum_timeout or None,
            job_timeout=request.job_timeout or None,
            datum_tries=request.datum_tries,
        )
    )
    return info


def pipeline_info(found: Pipeline, *, details: bool, last_job: Job | None) -> pp.PipelineInfo:
    request = create_request(found)
    state = PipelineState.PAUSED if found.stopped else PipelineState.RUNNING
    info = pp.PipelineInfo(
        pipeline=pipeline(found.key),
        version=found.version,
        spec_commit=commit(RepoKey(found.key.project, found.key.name, "spec"), found.spec_commit),
        stopped=found.stopped,
        state=pp.PipelineState(int(state)),
        reason=found.reason,
        last_job_state=pp.JobState(int(last_job.state)) if last_job else pp.JobState(0),
        parallelism=request.parallelism_spec.constant,
        type=pp.PipelineInfoPipelineType.PIPELINE_TYPE_TRANSFORM,
        user_spec_json=found.user_json,
        effective_spec_json=found.effective_json,
    )
    if details:
        info.details = pp.PipelineInfoDetails(
            transform=request.transform,
            parallelism_spec=request.parallelism_spec,
            created_at=when(found.created),
            updated_at=when(found.updated),
            output_branch=request.output_branch,
            input=request.input,
            description=request.description,
            salt=found.salt,
            reason=found.reason,
            datum_set_spec=request.datum_set_spec if is_set(request.datum_set_spec) else None,
            datum_timeout=request.datum_timeout or None,
            job_timeout=request.job_timeout or None,
            datum_tries=request.datum_tries,
            reprocess_spec=request.reprocess_spec,
            workers_requested=request.parallelism_spec.constant,
            workers_available=0 if found.stopped else request.parallelism_spec.constant,
            metadata=request.metadata if is_set(request.metadata) else None,
        )
    return info


def datum_info(of: Job | None, found: Datum) -> pp.DatumInfo:
    owner = job(of) if of is not None else pp.Job(pipeline=pp.Pipeline(project=pb.Project(name="default")))
    meta = None
    if of is not None:
        meta = pb.File(commit=commit(RepoKey(of.pipeline.project, of.pipeline.name, "meta"), of.id), path=f"/pfs/{found.id}")
    return pp.DatumInfo(
        datum=pp.Datum(job=owner, id=found.id),
        state=pp.DatumState(int(found.state)),
        stats=_stats(found.seconds, found.downloaded, found.uploaded),
        pfs_state=meta,
        data=[_input_info(one) for one in found.inputs],
    )


def _input_info(one: DatumInput) -> pb.FileInfo:
    return pb.FileInfo(
        file=pb.File(commit=commit(one.repo, one.commit), path=one.path),
        file_type=pb.FileType.DIR if one.path.endswith("/") else pb.FileType.FILE,
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


def spec_json(request: pp.CreatePipelineRequest) -> str:
    """What the user asked for, without what is no part of the spec."""
    values = protojson.to_dict(request)
    for key in ("update", "reprocess", "dryRun", "specCommit"):
        values.pop(key, None)
    return json.dumps(values)
