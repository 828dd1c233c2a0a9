"""The services ``pps_v2.API`` and ``logs.API``."""

import itertools
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import betterproto
from betterproto.lib.google.protobuf import Empty
from pachyderm_sdk.api import logs as pl
from pachyderm_sdk.api import pps as pp

from qa_platform.embedded.pachd import spec as specs
from qa_platform.embedded.pachd.errors import Internal, InvalidArgument, NotFound, PachError, Unimplemented
from qa_platform.embedded.pachd.execution.datums import Source, enumerate_datums
from qa_platform.embedded.pachd.pfs import BranchKey
from qa_platform.embedded.pachd.pps import Datum, DatumState, Job, Pipeline, PipelineKey, Pps
from qa_platform.embedded.pachd.protocol import convert, pipeline_spec, protojson
from qa_platform.embedded.pachd.protocol.rpc import Call, Entries, Method, named
from qa_platform.embedded.pachd.secrets import Secret
from qa_platform.embedded.pachd.storage.logs import LogQuery


class Workers(Protocol):
    """The executor of the jobs."""

    def restart_datum(self, job: Job, filters: Sequence[str]) -> None: ...

    def pods(self, key: PipelineKey) -> list[str]:
        """The names of a pipeline's current workers."""
        ...


class PpsApi:
    """The methods of both services. Each takes a request and the call."""

    def __init__(self, pps: Pps, workers: Workers, *, loki: bool = True) -> None:
        self._pps = pps
        self._workers = workers
        self._loki = loki

    def methods(self) -> dict[str, Method]:
        unary: Entries = [
            ("CreatePipeline", pp.CreatePipelineRequest, self.create_pipeline),
            ("CreatePipelineV2", pp.CreatePipelineV2Request, self.create_pipeline_v2),
            ("InspectPipeline", pp.InspectPipelineRequest, self.inspect_pipeline),
            ("DeletePipeline", pp.DeletePipelineRequest, self.delete_pipeline),
            ("DeletePipelines", pp.DeletePipelinesRequest, self.delete_pipelines),
            ("StartPipeline", pp.StartPipelineRequest, self.start_pipeline),
            ("StopPipeline", pp.StopPipelineRequest, self.stop_pipeline),
            ("RunCron", pp.RunCronRequest, self.run_cron),
            ("RerunPipeline", pp.RerunPipelineRequest, self.rerun_pipeline),
            ("InspectJob", pp.InspectJobRequest, self.inspect_job),
            ("StopJob", pp.StopJobRequest, self.stop_job),
            ("DeleteJob", pp.DeleteJobRequest, self.delete_job),
            ("InspectDatum", pp.InspectDatumRequest, self.inspect_datum),
            ("RestartDatum", pp.RestartDatumRequest, self.restart_datum),
            ("CreateSecret", pp.CreateSecretRequest, self.create_secret),
            ("InspectSecret", pp.InspectSecretRequest, self.inspect_secret),
            ("DeleteSecret", pp.DeleteSecretRequest, self.delete_secret),
            ("ListSecret", Empty, self.list_secret),
        ]
        streaming: Entries = [
            ("ListPipeline", pp.ListPipelineRequest, self.list_pipeline),
            ("ListJob", pp.ListJobRequest, self.list_job),
            ("InspectJobSet", pp.InspectJobSetRequest, self.inspect_job_set),
            ("ListJobSet", pp.ListJobSetRequest, self.list_job_set),
            ("SubscribeJob", pp.SubscribeJobRequest, self.subscribe_job),
            ("ListDatum", pp.ListDatumRequest, self.list_datum),
            ("GetLogs", pp.GetLogsRequest, self.get_logs),
        ]
        logs: Entries = [("GetLogs", pl.GetLogsRequest, self.get_logs_2)]
        return named("pps_v2.API", unary) | named("pps_v2.API", streaming, streams_out=True) | named("logs.API", logs, streams_out=True)

    # Pipelines

    def create_pipeline(self, request: pp.CreatePipelineRequest, call: Call) -> Empty:
        self._create(json.dumps(protojson.to_dict(request)))
        return convert.EMPTY

    def create_pipeline_v2(self, request: pp.CreatePipelineV2Request, call: Call) -> pp.CreatePipelineV2Response:
        orders = {"update": request.update, "reprocess": request.reprocess, "dry_run": request.dry_run}
        return pp.CreatePipelineV2Response(
            effective_create_pipeline_request_json=self._create(request.create_pipeline_request_json, **orders)
        )

    def _create(self, text: str, **orders: bool) -> str:
        """Create a pipeline, unless it is a dry run. Returns the effective spec for the reply."""
        asked = pipeline_spec.read(text, **orders)
        if not asked.dry_run:
            self._pps.pipelines.create(asked.spec, text, update=asked.update, reprocess=asked.reprocess)
        return asked.reply_json

    def inspect_pipeline(self, request: pp.InspectPipelineRequest, call: Call) -> pp.PipelineInfo:
        return self._pipeline_info(self._pps.pipelines.get(convert.pipeline_key(request.pipeline)), details=request.details)

    def list_pipeline(self, request: pp.ListPipelineRequest, call: Call) -> Iterator[pp.PipelineInfo]:
        _no_jq(request.jq_filter)
        key = convert.pipeline_key(request.pipeline) if request.pipeline.name else None
        found = self._pps.pipelines.pipelines(key=key, history=request.history, projects=[project.name for project in request.projects])
        return (self._pipeline_info(pipeline, details=True) for pipeline in found)

    def _pipeline_info(self, found: Pipeline, *, details: bool) -> pp.PipelineInfo:
        return convert.pipeline_info(found, details=details, last_job=self._pps.jobs.last_state(found.pk))

    def delete_pipeline(self, request: pp.DeletePipelineRequest, call: Call) -> Empty:
        keys = [pipeline.key for pipeline in self._pps.pipelines.pipelines()] if request.all else [convert.pipeline_key(request.pipeline)]
        for key in keys:
            self._pps.pipelines.delete(key, force=request.force or request.all, keep_repo=request.keep_repo, must_exist=request.must_exist)
        return convert.EMPTY

    def delete_pipelines(self, request: pp.DeletePipelinesRequest, call: Call) -> pp.DeletePipelinesResponse:
        projects = [project.name for project in request.projects]
        # The newest first: no other pipeline depends on them.
        found = self._pps.pipelines.pipelines(projects=projects) if projects or request.all else []
        for pipeline in found:
            self._pps.pipelines.delete(pipeline.key, force=request.force, keep_repo=request.keep_repo, must_exist=False)
        return pp.DeletePipelinesResponse(pipelines=[convert.pipeline(pipeline.key) for pipeline in found])

    def start_pipeline(self, request: pp.StartPipelineRequest, call: Call) -> Empty:
        self._pps.pipelines.start(convert.pipeline_key(request.pipeline))
        return convert.EMPTY

    def stop_pipeline(self, request: pp.StopPipelineRequest, call: Call) -> Empty:
        self._pps.pipelines.stop(convert.pipeline_key(request.pipeline))
        return convert.EMPTY

    def rerun_pipeline(self, request: pp.RerunPipelineRequest, call: Call) -> Empty:
        key = convert.pipeline_key(request.pipeline)
        if not request.pipeline.project.name:
            raise PachError(f'inspect pipeline "{key.name}": pick pipeline: project picker cannot be nil')
        self._pps.pipelines.rerun(key, reprocess=request.reprocess)
        return convert.EMPTY

    def run_cron(self, request: pp.RunCronRequest, call: Call) -> Empty:
        self._pps.pipelines.run_cron(convert.pipeline_key(request.pipeline))
        return convert.EMPTY

    # Jobs

    def inspect_job(self, request: pp.InspectJobRequest, call: Call) -> pp.JobInfo:
        job = self._pps.jobs.job(*convert.job_key(request.job))
        if request.wait:
            job = self._pps.jobs.wait(job, alive=call.alive)
        return self._job_info(job, details=request.details)

    def list_job(self, request: pp.ListJobRequest, call: Call) -> Iterator[pp.JobInfo]:
        _no_jq(request.jq_filter)
        key = convert.pipeline_key(request.pipeline) if request.pipeline.name else None
        if key is not None:
            self._pps.pipelines.get(key)
        wanted = {commit.id for commit in request.input_commit}
        jobs = self._pps.jobs.jobs(key=key, history=request.history, projects=[project.name for project in request.projects])
        found = [job for job in jobs if not wanted or wanted & {commit.id for commit in self._pps.pfs.provenance(job.commit)}]
        marker = convert.seconds(request.pagination_marker)
        if marker > 0:
            # The protocol has times in microseconds.
            found = [job for job in found if (round(job.created, 6) > marker if request.reverse else round(job.created, 6) < marker)]
        if request.reverse:
            found.reverse()
        return (self._job_info(job, details=request.details) for job in found[: request.number or None])

    def inspect_job_set(self, request: pp.InspectJobSetRequest, call: Call) -> Iterator[pp.JobInfo]:
        jobs = self._pps.jobs.job_set(request.job_set.id)
        if not jobs:
            self._pps.pfs.commit_set(request.job_set.id)
        for job in jobs:
            found = self._pps.jobs.wait(job, alive=call.alive) if request.wait else job
            yield self._job_info(found, details=request.details)

    def list_job_set(self, request: pp.ListJobSetRequest, call: Call) -> Iterator[pp.JobSetInfo]:
        for jobs in self._pps.jobs.job_sets([project.name for project in request.projects])[: request.number or None]:
            infos = [self._job_info(job, details=request.details) for job in jobs]
            yield pp.JobSetInfo(job_set=pp.JobSet(id=jobs[0].id), jobs=infos)

    def subscribe_job(self, request: pp.SubscribeJobRequest, call: Call) -> Iterator[pp.JobInfo]:
        key = convert.pipeline_key(request.pipeline)
        self._pps.pipelines.get(key)
        return (self._job_info(job, details=request.details) for job in self._pps.jobs.subscribe(key, alive=call.alive))

    def stop_job(self, request: pp.StopJobRequest, call: Call) -> Empty:
        self._pps.jobs.stop(*convert.job_key(request.job), request.reason or "job stopped")
        return convert.EMPTY

    def delete_job(self, request: pp.DeleteJobRequest, call: Call) -> Empty:
        self._pps.jobs.delete(*convert.job_key(request.job))
        return convert.EMPTY

    def _job_info(self, job: Job, *, details: bool) -> pp.JobInfo:
        return convert.job_info(job, self._pps.pipelines.get(job.pipeline, job.version), details=details)

    # Datums

    def list_datum(self, request: pp.ListDatumRequest, call: Call) -> Iterator[pp.DatumInfo]:
        if request.reverse and request.number <= 0:
            raise PachError("number must be > 0 when reverse is true")
        job = self._pps.jobs.job(*convert.job_key(request.job)) if request.job.id else None
        found = self._pps.datums.listed(job) if job else self._input_datums(request.input)
        states = {DatumState(int(state)) for state in request.filter.state}
        if request.reverse:
            found.reverse()
        if marker := request.pagination_marker:
            found = [one for one in found if (one.id < marker if request.reverse else one.id > marker)]
        found = [one for one in found if not states or one.state in states]
        image = self._image(job) if job else ""
        return (convert.datum_info(job, one, image=image) for one in found[: request.number or None])

    def _image(self, job: Job) -> str:
        return self._pps.pipelines.get(job.pipeline, job.version).spec.image

    def _input_datums(self, node: pp.Input) -> list[Datum]:
        pipeline = {"pipeline": {"name": "list-datum"}, "input": protojson.to_dict(node)}
        parsed = specs.parse(specs.with_defaults(pipeline, now=0))
        pfs = self._pps.pfs

        def source(branch: BranchKey) -> Source:
            commit = pfs.commit_by_pk(pfs.branch(branch).head)
            return Source(commit.id, pfs.readable_root(commit, alive=lambda: True), commit.finished)

        found = enumerate_datums(self._pps.store.trees, parsed.input, source, "")
        return sorted((replace(one, state=DatumState.UNKNOWN) for one in found), key=lambda one: one.id)

    def inspect_datum(self, request: pp.InspectDatumRequest, call: Call) -> pp.DatumInfo:
        job = self._pps.jobs.job(*convert.job_key(request.datum.job))
        found = next((one for one in self._pps.datums.listed(job) if one.id == request.datum.id), None)
        if found is None:
            raise PachError(f"datum {request.datum.id} not found in job {job.pipeline}@{job.id}")
        return convert.datum_info(job, found, image=self._image(job), inspected=True)

    def restart_datum(self, request: pp.RestartDatumRequest, call: Call) -> Empty:
        self._workers.restart_datum(self._pps.jobs.job(*convert.job_key(request.job)), request.data_filters)
        return convert.EMPTY

    # Secrets

    def create_secret(self, request: pp.CreateSecretRequest, call: Call) -> Empty:
        self._pps.secrets.create(request.file)
        return convert.EMPTY

    def inspect_secret(self, request: pp.InspectSecretRequest, call: Call) -> pp.SecretInfo:
        return _secret_info(self._pps.secrets.inspect(request.secret.name))

    def list_secret(self, request: Empty, call: Call) -> pp.SecretInfos:
        return pp.SecretInfos(secret_info=[_secret_info(secret) for secret in self._pps.secrets.list()])

    def delete_secret(self, request: pp.DeleteSecretRequest, call: Call) -> Empty:
        self._pps.secrets.delete(request.secret.name)
        return convert.EMPTY

    # Logs

    def get_logs(self, request: pp.GetLogsRequest, call: Call) -> Iterator[pp.LogMessage]:
        if not request.pipeline.name and not request.job.id and (request.data_filters or request.datum.id):
            raise PachError("must specify the Job or Pipeline that the datum is from to get logs for it")
        key = self._logged_pipeline(request)
        since = request.since.total_seconds()
        query = LogQuery(
            project=key.project if key else "",
            pipeline=key.name if key else "",
            job=request.job.id,
            datum=request.datum.id,
            data=tuple(request.data_filters),
            master=request.master,
            since=time.time() - since if since else 0.0,
            tail=request.tail,
            workers=self._pods(key) if key and not self._loki else (),
        )
        return map(convert.log_message, self._pps.store.logs.read(query, follow=request.follow, alive=call.alive))

    def _logged_pipeline(self, request: pp.GetLogsRequest) -> PipelineKey | None:
        if request.job.id:
            if not request.job.pipeline.name:
                raise PachError("pipeline must be specified for the given job")
            try:
                return self._pps.jobs.job(*convert.job_key(request.job)).pipeline
            except NotFound as error:
                raise NotFound(f'could not get job information for "{request.job.id}": {error}') from error
        if not request.pipeline.name:
            return None
        key = convert.pipeline_key(request.pipeline)
        try:
            return self._pps.pipelines.get(key).key
        except NotFound as error:
            raise NotFound(f"could not get pipeline information for {key}: {error}") from error

    def _pods(self, key: PipelineKey) -> tuple[str, ...]:
        """The current workers, whose lines are the only ones available without Loki."""
        pods = self._workers.pods(key)
        if not pods:
            version = self._pps.pipelines.get(key).version
            raise PachError(f'no pods belonging to the rc "{key.project}-{key.name}-v{version}" were found')
        return tuple(pods)

    def get_logs_2(self, request: pl.GetLogsRequest, call: Call) -> Iterator[pl.GetLogsResponse]:
        if not self._loki:
            raise Internal("loki client error: loki not configured, is it running in the same namespace as pachd?")
        query: Any
        kind, query = betterproto.which_one_of(request.query, "query_type")
        if kind == "admin":
            kind, query = betterproto.which_one_of(query, "admin_type")
        if not isinstance(query, pl.UserLogQuery):
            raise PachError(f"cannot read logs by {kind or 'an empty query'}")
        limits = request.filter
        since, until = convert.seconds(limits.time_range.from_), convert.seconds(limits.time_range.until)
        user_only = True if limits.user_logs_only else None
        found = LogQuery(since=max(0.0, since), until=max(0.0, until), user=user_only, **_user_query(query))
        lines = self._pps.store.logs.read(found, follow=request.tail, alive=call.alive)
        if limits.regex.pattern:
            try:
                pattern = re.compile(limits.regex.pattern)
            except re.error as error:
                raise InvalidArgument(f"validate request: invalid RegexLogFilter: {error}") from error
            lines = (line for line in lines if bool(pattern.search(line.message)) != limits.regex.negate)
        for line in itertools.islice(lines, limits.limit or None):
            message = pl.LogMessage(
                verbatim=pl.VerbatimLogMessage(line=line.message.encode(), timestamp=convert.when(line.time)),
                pps_log_message=convert.log_message(line),
            )
            yield pl.GetLogsResponse(log=message)


def _no_jq(text: str) -> None:
    if text:
        raise Unimplemented("the embedded server does not support jq_filter")


def _user_query(query: pl.UserLogQuery) -> dict[str, Any]:
    value: Any
    kind, value = betterproto.which_one_of(query, "user_type")
    if kind == "project":
        return {"project": value}
    if kind == "pipeline":
        return {"project": value.project or "default", "pipeline": value.pipeline}
    if kind in ("datum", "job"):
        return {kind: value}
    if kind == "pipeline_job":
        return {"project": value.pipeline.project or "default", "pipeline": value.pipeline.pipeline, "job": value.job}
    if kind == "job_datum":
        return {"job": value.job, "datum": value.datum}
    if kind == "pipeline_datum":
        return {"project": value.pipeline.project or "default", "pipeline": value.pipeline.pipeline, "datum": value.datum}
    raise NotFound("the log query names neither project, pipeline, job nor datum")


def _secret_info(secret: Secret) -> pp.SecretInfo:
    return pp.SecretInfo(secret=pp.Secret(name=secret.name), type=secret.type, creation_timestamp=convert.when(secret.created))
