"""The services ``pps_v2.API`` and ``logs.API``."""

import itertools
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import betterproto
from betterproto.lib.google.protobuf import Empty
from pachyderm_sdk.api import logs as pl
from pachyderm_sdk.api import pps as pp

from qa_platform.embedded.pachd.errors import InvalidArgument, NotFound, PachError, Unimplemented
from qa_platform.embedded.pachd.execution.datums import enumerate_datums
from qa_platform.embedded.pachd.pps import DatumState, Job, Pipeline, PipelineKey, Pps
from qa_platform.embedded.pachd.protocol import convert, protojson
from qa_platform.embedded.pachd.protocol.rpc import Call, Method
from qa_platform.embedded.pachd.secrets import Secret
from qa_platform.embedded.pachd.storage.logs import LogQuery


class PpsApi:
    """Every method takes a request and the call."""

    def __init__(self, pps: Pps, restart_datum: Callable[[Job, Sequence[str]], None]) -> None:
        self._pps = pps
        self._restart_datum = restart_datum

    def methods(self) -> dict[str, Method]:
        unary: list[tuple[str, type[betterproto.Message], Callable[[Any, Call], Any]]] = [
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
        streaming: list[tuple[str, type[betterproto.Message], Callable[[Any, Call], Any]]] = [
            ("ListPipeline", pp.ListPipelineRequest, self.list_pipeline),
            ("ListJob", pp.ListJobRequest, self.list_job),
            ("InspectJobSet", pp.InspectJobSetRequest, self.inspect_job_set),
            ("ListJobSet", pp.ListJobSetRequest, self.list_job_set),
            ("SubscribeJob", pp.SubscribeJobRequest, self.subscribe_job),
            ("ListDatum", pp.ListDatumRequest, self.list_datum),
            ("GetLogs", pp.GetLogsRequest, self.get_logs),
        ]
        methods = {f"/pps_v2.API/{name}": Method(request.FromString, run) for name, request, run in unary}
        methods |= {f"/pps_v2.API/{name}": Method(request.FromString, run, streams_out=True) for name, request, run in streaming}
        methods["/logs.API/GetLogs"] = Method(pl.GetLogsRequest.FromString, self.get_logs_2, streams_out=True)
        return methods

    # Pipelines

    def create_pipeline(self, request: pp.CreatePipelineRequest, call: Call) -> Empty:
        text = convert.spec_json(request)
        if request.dry_run:
            self._pps.effective(json.loads(text), update=request.update, reprocess=request.reprocess)
        else:
            self._pps.create(json.loads(text), text, update=request.update, reprocess=request.reprocess)
        return convert.EMPTY

    def create_pipeline_v2(self, request: pp.CreatePipelineV2Request, call: Call) -> pp.CreatePipelineV2Response:
        try:
            message = protojson.parse(pp.CreatePipelineRequest, request.create_pipeline_request_json)
        except ValueError as error:
            where, _, problem = str(error).partition(": ")
            raise InvalidArgument(f"could not make effective spec: {error}", field=where, problem=problem) from error
        assert isinstance(message, pp.CreatePipelineRequest)
        update, reprocess = request.update or message.update, request.reprocess or message.reprocess
        spec = json.loads(convert.spec_json(message))
        if request.dry_run or message.dry_run:
            effective = self._pps.effective(spec, update=update, reprocess=reprocess)
        else:
            effective = self._pps.create(spec, request.create_pipeline_request_json, update=update, reprocess=reprocess)
        return pp.CreatePipelineV2Response(effective_create_pipeline_request_json=json.dumps(effective))

    def inspect_pipeline(self, request: pp.InspectPipelineRequest, call: Call) -> pp.PipelineInfo:
        return self._pipeline_info(self._pps.pipeline(convert.pipeline_key(request.pipeline)), details=request.details)

    def list_pipeline(self, request: pp.ListPipelineRequest, call: Call) -> Iterator[pp.PipelineInfo]:
        _no_jq(request.jq_filter)
        key = convert.pipeline_key(request.pipeline) if request.pipeline.name else None
        found = self._pps.pipelines(key=key, history=request.history, projects=[project.name for project in request.projects])
        return (self._pipeline_info(pipeline, details=True) for pipeline in found)

    def _pipeline_info(self, found: Pipeline, *, details: bool) -> pp.PipelineInfo:
        last = next(self._pps.jobs(key=found.key, history=-1), None)
        return convert.pipeline_info(found, details=details, last_job=last)

    def delete_pipeline(self, request: pp.DeletePipelineRequest, call: Call) -> Empty:
        keys = [pipeline.key for pipeline in self._pps.pipelines()] if request.all else [convert.pipeline_key(request.pipeline)]
        for key in keys:
            self._pps.delete_pipeline(key, force=request.force or request.all, keep_repo=request.keep_repo, must_exist=request.must_exist)
        return convert.EMPTY

    def delete_pipelines(self, request: pp.DeletePipelinesRequest, call: Call) -> pp.DeletePipelinesResponse:
        projects = [project.name for project in request.projects]
        # The newest first: nothing is made from them yet.
        found = self._pps.pipelines(projects=projects) if projects or request.all else []
        for pipeline in found:
            self._pps.delete_pipeline(pipeline.key, force=request.force, keep_repo=request.keep_repo, must_exist=False)
        return pp.DeletePipelinesResponse(pipelines=[convert.pipeline(pipeline.key) for pipeline in found])

    def start_pipeline(self, request: pp.StartPipelineRequest, call: Call) -> Empty:
        self._pps.start_pipeline(convert.pipeline_key(request.pipeline))
        return convert.EMPTY

    def stop_pipeline(self, request: pp.StopPipelineRequest, call: Call) -> Empty:
        self._pps.stop_pipeline(convert.pipeline_key(request.pipeline))
        return convert.EMPTY

    def rerun_pipeline(self, request: pp.RerunPipelineRequest, call: Call) -> Empty:
        self._pps.rerun(convert.pipeline_key(request.pipeline), reprocess=request.reprocess)
        return convert.EMPTY

    def run_cron(self, request: pp.RunCronRequest, call: Call) -> Empty:
        self._pps.run_cron(convert.pipeline_key(request.pipeline))
        return convert.EMPTY

    # Jobs

    def inspect_job(self, request: pp.InspectJobRequest, call: Call) -> pp.JobInfo:
        job = self._pps.job(*convert.job_key(request.job))
        if request.wait:
            job = self._pps.wait_job(job, alive=call.alive)
        return self._job_info(job, details=request.details)

    def list_job(self, request: pp.ListJobRequest, call: Call) -> Iterator[pp.JobInfo]:
        _no_jq(request.jq_filter)
        key = convert.pipeline_key(request.pipeline) if request.pipeline.name else None
        if key is not None:
            self._pps.pipeline(key)
        wanted = {commit.id for commit in request.input_commit}
        jobs = self._pps.jobs(key=key, history=request.history, projects=[project.name for project in request.projects])
        found = [job for job in jobs if not wanted or wanted & {commit.id for commit in self._pps.pfs.provenance(job.commit)}]
        marker = convert.seconds(request.pagination_marker)
        if marker > 0:
            # Times travel in microseconds.
            found = [job for job in found if (round(job.created, 6) > marker if request.reverse else round(job.created, 6) < marker)]
        if request.reverse:
            found.reverse()
        return (self._job_info(job, details=request.details) for job in found[: request.number or None])

    def inspect_job_set(self, request: pp.InspectJobSetRequest, call: Call) -> Iterator[pp.JobInfo]:
        jobs = self._pps.job_set(request.job_set.id)
        if not jobs:
            self._pps.pfs.commit_set(request.job_set.id)
        for job in jobs:
            found = self._pps.wait_job(job, alive=call.alive) if request.wait else job
            yield self._job_info(found, details=request.details)

    def list_job_set(self, request: pp.ListJobSetRequest, call: Call) -> Iterator[pp.JobSetInfo]:
        for jobs in self._pps.job_sets([project.name for project in request.projects])[: request.number or None]:
            infos = [self._job_info(job, details=request.details) for job in jobs]
            yield pp.JobSetInfo(job_set=pp.JobSet(id=jobs[0].id), jobs=infos)

    def subscribe_job(self, request: pp.SubscribeJobRequest, call: Call) -> Iterator[pp.JobInfo]:
        found = self._pps.subscribe(convert.pipeline_key(request.pipeline), alive=call.alive)
        return (self._job_info(job, details=request.details) for job in found)

    def stop_job(self, request: pp.StopJobRequest, call: Call) -> Empty:
        self._pps.stop_job(*convert.job_key(request.job), request.reason or "job stopped")
        return convert.EMPTY

    def delete_job(self, request: pp.DeleteJobRequest, call: Call) -> Empty:
        self._pps.delete_job(*convert.job_key(request.job))
        return convert.EMPTY

    def _job_info(self, job: Job, *, details: bool) -> pp.JobInfo:
        pipeline = self._pps.pipeline(job.pipeline, job.version)
        return convert.job_info(job, pipeline, details=details, output_branch=pipeline.spec.output_branch)

    # Datums

    def list_datum(self, request: pp.ListDatumRequest, call: Call) -> Iterator[pp.DatumInfo]:
        if request.job.id:
            job = self._pps.job(*convert.job_key(request.job))
            found = [(job, datum) for datum in self._pps.datums(job.pk)]
        else:
            found = [(None, datum) for datum in self._input_datums(request.input)]  # type: ignore[misc]
        states = {DatumState(int(state)) for state in request.filter.state}
        if request.reverse:
            found.reverse()
        if marker := request.pagination_marker:
            found = [pair for pair in found if (pair[1].id < marker if request.reverse else pair[1].id > marker)]
        found = [pair for pair in found if not states or pair[1].state in states]
        return (convert.datum_info(owner, datum) for owner, datum in found[: request.number or None])

    def _input_datums(self, node: pp.Input) -> list[Any]:
        from qa_platform.embedded.pachd import spec as specs

        pipeline = {"pipeline": {"name": "list-datum"}, "input": protojson.to_dict(node)}
        parsed = specs.parse(specs.with_defaults(pipeline, now=0))
        pfs = self._pps.pfs

        def source(branch: Any) -> tuple[str, str | None]:
            commit = pfs.commit_by_pk(pfs.branch(branch).head)
            return commit.id, pfs.readable_root(commit, alive=lambda: True)

        found = enumerate_datums(self._pps.store.trees, parsed.input, source, "")
        return sorted(found, key=lambda datum: datum.id)

    def inspect_datum(self, request: pp.InspectDatumRequest, call: Call) -> pp.DatumInfo:
        job = self._pps.job(*convert.job_key(request.datum.job))
        return convert.datum_info(job, self._pps.datum(job, request.datum.id))

    def restart_datum(self, request: pp.RestartDatumRequest, call: Call) -> Empty:
        self._restart_datum(self._pps.job(*convert.job_key(request.job)), request.data_filters)
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
        key = self._logged_pipeline(request)
        job = request.job.id or request.datum.job.id
        if job and key is not None:
            self._pps.job(key, job)
        since = request.since.total_seconds()
        query = LogQuery(
            project=key.project if key else "",
            pipeline=key.name if key else "",
            job=job,
            datum=request.datum.id,
            data=tuple(request.data_filters),
            master=request.master,
            since=time.time() - since if since else 0.0,
            tail=request.tail,
        )
        return map(convert.log_message, self._pps.store.logs.read(query, follow=request.follow, alive=call.alive))

    def _logged_pipeline(self, request: pp.GetLogsRequest) -> PipelineKey | None:
        for named in (request.pipeline, request.job.pipeline, request.datum.job.pipeline):
            if named.name:
                return self._pps.pipeline(convert.pipeline_key(named)).key
        return None

    def get_logs_2(self, request: pl.GetLogsRequest, call: Call) -> Iterator[pl.GetLogsResponse]:
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
        raise Unimplemented("jq_filter is something that the embedded server does not do")


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
