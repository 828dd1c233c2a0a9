"""Pipelines, jobs, datums, logs and secrets, on any pachd with workers."""

import base64
import json
import os
import textwrap
import time
from datetime import datetime
from typing import Any

import betterproto
import grpc
import pytest
from pachyderm_sdk.api import pfs, pps

from qa_platform_tests.embedded.specifications import BATCH
from qa_platform_tests.pachd_helpers import (
    CLUSTER,
    FAILURE,
    KILLED,
    SUCCESS,
    UNRUNNABLE,
    Pachd,
    eventually,
    needs_workers,
    refused,
)

NOT_FOUND, UNKNOWN, ALREADY_EXISTS, INVALID = (
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.INVALID_ARGUMENT,
)
DatumState = pps.DatumState
# The states of a pipeline that was just made.
NEW = (pps.PipelineState.PIPELINE_STARTING, pps.PipelineState.PIPELINE_RUNNING, pps.PipelineState.PIPELINE_STANDBY)
# Prints which datum it works on and copies it.
COPY = 'echo "did $(basename $source)"\ncp -r $source $pfs/out/'


def named(pipeline: str) -> pps.Pipeline:
    return pps.Pipeline(name=pipeline)


def states(pachd: Pachd, pipeline: str, job: str) -> dict[str, pps.DatumState]:
    return {path.strip("/"): info.state for path, info in pachd.datums(pipeline, job).items()}


def meta(pachd: Pachd, pipeline: str, job: str, path: str) -> dict[str, Any]:
    """What the meta repo says of the datum of that path."""
    [datum] = [info.datum.id for info in pachd.datums(pipeline, job).values() if info.data[0].file.path == path]
    found: dict[str, Any] = json.loads(pachd.read(pfs.Repo(name=pipeline, type="meta"), job, f"/meta/{datum}/meta"))
    return found


def skip_without_private_files(pachd: Pachd, repo: pfs.Repo) -> None:
    """Skips the test where workers have no ``/pfs`` of their own, nor anything else mounted."""
    probe = pachd.pipeline("probe", ["test", "-d", "/pfs/out"], repo)
    if pachd.wait(probe, pachd.put(repo, {"/probe": b""}, delete=["/"])).state != SUCCESS:
        pytest.skip("workers here have no file system of their own")


class TestPipelines:
    @needs_workers
    def test_creation_makes_repos_and_a_job_at_once(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", COPY, repo)
        [job] = pachd.jobs(name)
        info = pachd.wait(name, job.job.id)
        assert info.state == SUCCESS
        assert (info.data_total, info.data_processed, info.data_skipped, info.data_failed) == (0, 0, 0, 0)
        types = {info.repo.type for info in pachd.client.pfs.list_repo() if info.repo.name == name}
        assert types == {"user", "meta", "spec"}
        assert pachd.client.pfs.branch_exists(pachd.branch(repo))

    def test_defaults_are_filled_in(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.name("p")
        source = {"pfs": {"repo": repo.name, "glob": "/*/"}}
        effective = pachd.create({"pipeline": {"name": name}, "transform": {"cmd": ["true"]}, "input": source})
        assert effective["input"]["pfs"] == {"repo": repo.name, "glob": "/*/"}, "inputs get their defaults only in the pipeline"
        assert effective["pipeline"]["project"]["name"] == "default"
        assert effective["datumTries"] == "3"
        assert (effective["outputBranch"], effective["reprocessSpec"]) == ("master", "until_success")
        assert effective["resourceRequests"]["memory"] == "256Mi"
        info = pachd.client.pps.inspect_pipeline(pipeline=named(name), details=True)
        assert info.version == 1
        assert info.state in NEW
        assert info.details.input.pfs.name == repo.name
        assert info.details.input.pfs.branch == "master"
        assert info.details.input.pfs.glob == "/*"
        assert info.details.datum_tries == 3
        assert info.details.reprocess_spec == "until_success"
        assert info.parallelism == 1

    def test_the_effective_spec_of_a_pipeline_is_what_the_user_wrote_over_the_defaults(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.name("p")
        spec = {
            "pipeline": {"name": name}, "transform": {"cmd": ["true"], "image": "i:1", "env": {"A_b": "c"}}, "datum_tries": 2,
            "input": {"pfs": {"repo": repo.name, "glob": "/"}}, "parallelism_spec": {"constant": 1},
        }  # fmt: skip
        effective = pachd.create(spec)
        assert (effective["datumTries"], effective["parallelismSpec"]["constant"]) == ("2", "1"), "64-bit numbers are text in the reply"
        info = pachd.client.pps.inspect_pipeline(pipeline=named(name))
        assert json.loads(info.user_spec_json) == spec
        assert info.effective_spec_json == json.dumps(json.loads(info.effective_spec_json), sort_keys=True, separators=(",", ":"))
        stored = json.loads(info.effective_spec_json)
        assert (stored["datumTries"], stored["parallelismSpec"]["constant"]) == (2, 1)
        assert stored["pipeline"] == {"name": name}
        assert stored["transform"]["env"] == {"A_b": "c"}
        assert stored["reprocessSpec"] == "until_success"

    def test_details_come_only_on_request_but_always_in_lists(self, pachd: Pachd) -> None:
        name = pachd.pipeline("p", COPY, pachd.repo())
        assert bytes(pachd.client.pps.inspect_pipeline(pipeline=named(name)).details) == b""
        # As pachctl asks: with a commit set that names none.
        [listed] = pachd.client.pps.list_pipeline(pipeline=named(name), commit_set=pfs.CommitSet())
        assert listed.details.transform.cmd

    def test_a_missing_pipeline_is_not_found(self, pachd: Pachd) -> None:
        name = pachd.name("none")
        with refused(NOT_FOUND, f'pipeline "default/{name}" not found'):
            pachd.client.pps.inspect_pipeline(pipeline=named(name))
        with refused(NOT_FOUND, "not found"):
            pachd.client.pps.delete_pipeline(pipeline=named(name), must_exist=True)
        pachd.client.pps.delete_pipeline(pipeline=named(name))

    def test_a_second_pipeline_of_that_name_already_exists(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", COPY, repo)
        with refused(ALREADY_EXISTS, "already exists"):
            pachd.create(pachd.spec(name, COPY, repo))

    def test_a_repo_of_that_name_is_in_the_way(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        with refused(UNKNOWN, "a repo with the same name already exists"):
            pachd.client.pps.create_pipeline_v2(create_pipeline_request_json=json.dumps(pachd.spec(repo.name, COPY, repo)))

    @pytest.mark.parametrize(
        "text",
        [
            "{",
            "[]",
            '{"pipeline": {"name": "p"}, "unknown": 1}',
            '{"pipeline": {"name": "p"}, "transform": {"cmd": "text"}}',
            '{"pipeline": {"name": "p"}, "datumTimeout": "30"}',
        ],
    )
    def test_a_spec_that_is_none_is_an_invalid_argument(self, pachd: Pachd, text: str) -> None:
        with refused(INVALID, "could not make effective spec") as caught:
            pachd.client.pps.create_pipeline_v2(create_pipeline_request_json=text)
        assert b"google.rpc.BadRequest" in dict(caught.value.trailing_metadata())["grpc-status-details-bin"]

    def test_snake_and_camel_case_are_both_read(self, pachd: Pachd) -> None:
        name = pachd.name("p")
        spec = pachd.spec(name, COPY, pachd.repo(), datum_set_spec={"per_worker": 1}, jobTimeout="30s", parallelism_spec={"constant": "2"})
        pachd.create(spec)
        info = pachd.client.pps.inspect_pipeline(pipeline=named(name), details=True)
        assert info.details.datum_set_spec.per_worker == 1
        assert info.details.job_timeout.total_seconds() == 30
        assert info.parallelism == 2

    @pytest.mark.parametrize("name", ["out", ".env"])
    def test_forbidden_input_names_are_refused(self, pachd: Pachd, name: str) -> None:
        spec = pachd.spec(pachd.name("p"), COPY, pachd.repo())
        spec["input"]["pfs"]["name"] = name
        with refused(UNKNOWN, name):
            pachd.client.pps.create_pipeline_v2(create_pipeline_request_json=json.dumps(spec))

    @pytest.mark.parametrize(("field", "said"), [("pod_spec", "malformed PodSpec"), ("pod_patch", "malformed PodPatch")])
    def test_a_change_of_the_pod_that_is_no_json_is_refused(self, pachd: Pachd, field: str, said: str) -> None:
        spec = pachd.spec(pachd.name("p"), COPY, pachd.repo()) | {field: "{"}
        with refused(UNKNOWN, said):
            pachd.client.pps.create_pipeline_v2(create_pipeline_request_json=json.dumps(spec))

    def test_a_long_name_is_refused(self, pachd: Pachd) -> None:
        spec = pachd.spec(pachd.name("p" * 51), COPY, pachd.repo())
        with refused(UNKNOWN, "longer than the 51 max"):
            pachd.client.pps.create_pipeline_v2(create_pipeline_request_json=json.dumps(spec))

    def test_a_missing_input_repo_is_not_found(self, pachd: Pachd) -> None:
        spec = pachd.spec(pachd.name("p"), COPY, pachd.name("none"))
        with refused(NOT_FOUND, "not found"):
            pachd.client.pps.create_pipeline_v2(create_pipeline_request_json=json.dumps(spec))

    def test_a_dry_run_changes_nothing(self, pachd: Pachd) -> None:
        name = pachd.name("p")
        spec = pachd.spec(name, COPY, pachd.repo())
        reply = pachd.client.pps.create_pipeline_v2(create_pipeline_request_json=json.dumps(spec), dry_run=True)
        assert json.loads(reply.effective_create_pipeline_request_json)["pipeline"]["name"] == name
        assert not pachd.client.pps.pipeline_exists(named(name))

    def test_a_dry_run_checks_nothing_outside_the_spec(self, pachd: Pachd) -> None:
        uses = [{"name": pachd.name("none"), "envVar": "A", "key": "key"}]
        spec = pachd.spec(pachd.name("p"), COPY, pachd.name("none"), transform={"secrets": uses})
        pachd.client.pps.create_pipeline_v2(create_pipeline_request_json=json.dumps(spec), dry_run=True)

    @needs_workers
    def test_the_first_version_of_create_pipeline_works_too(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.name("p")
        pachd.client.pps.create_pipeline(
            pipeline=named(name),
            transform=pps.Transform(cmd=["sh"], stdin=["cp $source ${QA_PFS_ROOT:-/pfs}/out/"]),
            input=pps.Input(pfs=pps.PfsInput(repo=repo.name, name="source", glob="/*")),
        )
        commit = pachd.put(repo, {"/a": b"1"})
        assert pachd.wait(name, commit).state == SUCCESS
        assert pachd.read(name, commit, "/a") == b"1"

    @needs_workers
    def test_an_update_makes_a_new_version_and_a_job_that_skips_everything(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", COPY, repo)
        commit = pachd.put(repo, {"/a": b"1"})
        assert pachd.wait(name, commit).state == SUCCESS
        pachd.create(pachd.spec(name, "echo changed > $pfs/out/a", repo), update=True)
        [job] = pachd.jobs(name)
        info = pachd.wait(name, job.job.id)
        assert info.pipeline_version == 2
        assert (info.data_skipped, info.data_processed) == (1, 0)
        assert pachd.read(name, job.job.id, "/a") == b"1"
        assert len(pachd.jobs(name, history=-1)) == 3

    @needs_workers
    def test_reprocess_does_everything_again(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", COPY, repo)
        assert pachd.wait(name, pachd.put(repo, {"/a": b"1"})).state == SUCCESS
        pachd.create(pachd.spec(name, "echo changed > $pfs/out/a", repo), update=True, reprocess=True)
        [job] = pachd.jobs(name)
        info = pachd.wait(name, job.job.id)
        assert (info.data_skipped, info.data_processed) == (0, 1)
        assert pachd.read(name, job.job.id, "/a") == b"changed\n"

    def test_an_update_of_a_missing_pipeline_creates_it(self, pachd: Pachd) -> None:
        name = pachd.name("p")
        pachd.create(pachd.spec(name, COPY, pachd.repo()), update=True)
        assert pachd.client.pps.inspect_pipeline(pipeline=named(name)).version == 1

    @needs_workers
    def test_an_update_kills_what_runs(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", "echo begun\nsleep 600", repo)
        commit = pachd.put(repo, {"/a": b"1"})
        eventually(lambda: pachd.lines(name, commit))
        pachd.create(pachd.spec(name, COPY, repo), update=True)
        assert pachd.wait(name, commit).state == KILLED
        assert pachd.wait(name, pachd.jobs(name)[0].job.id).state == SUCCESS

    @needs_workers
    def test_a_stopped_pipeline_does_nothing_until_it_is_started(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", COPY, repo)
        pachd.client.pps.stop_pipeline(pipeline=named(name))
        info = pachd.client.pps.inspect_pipeline(pipeline=named(name))
        assert info.stopped, "the state follows"
        eventually(lambda: pachd.client.pps.inspect_pipeline(pipeline=named(name)).state == pps.PipelineState.PIPELINE_PAUSED)
        before = len(pachd.jobs(name))
        commit = pachd.put(repo, {"/a": b"1"})
        with refused(NOT_FOUND, f"jobs default/{name}@{commit} not found"):
            pachd.client.pps.inspect_job(job=pachd.job(name, commit))
        pachd.create(pachd.spec(name, COPY, repo), update=True)
        assert pachd.client.pps.inspect_pipeline(pipeline=named(name)).stopped
        pachd.client.pps.start_pipeline(pipeline=named(name))
        jobs = pachd.jobs(name, history=-1)
        assert len(jobs) == before + 1, "starting makes a job at once"
        assert pachd.wait(name, jobs[0].job.id).data_processed == 1

    @needs_workers
    def test_stopping_a_pipeline_kills_its_jobs(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", "echo begun\nsleep 600", repo)
        commit = pachd.put(repo, {"/a": b"1"})
        eventually(lambda: pachd.lines(name, commit))
        pachd.client.pps.stop_pipeline(pipeline=named(name))
        assert pachd.wait(name, commit).state == KILLED

    def test_the_pipelines_and_repos_of_a_project_are_deleted_together(self, pachd: Pachd) -> None:
        project = pfs.Project(name=pachd.name("project"))
        pachd.client.pfs.create_project(project=project)
        repo = pfs.Repo(name="r", project=project)
        pachd.client.pfs.create_repo(repo=repo)
        first, second = (
            {
                "pipeline": {"name": name, "project": {"name": project.name}},
                "transform": {"cmd": ["true"]},
                "input": {"pfs": {"repo": source, "glob": "/"}},
            }
            for name, source in (("first", "r"), ("second", "first"))
        )
        for spec in (first, second):
            pachd.client.pps.create_pipeline_v2(create_pipeline_request_json=json.dumps(spec))
        gone = pachd.client.pps.delete_pipelines(projects=[project]).pipelines
        assert {pipeline.name for pipeline in gone} == {"first", "second"}
        assert [one.name for one in pachd.client.pfs.delete_repos(projects=[project]).repos] == ["r"]
        assert list(pachd.client.pfs.list_repo(projects=[project])) == []
        pachd.client.pfs.delete_project(project=project)

    @needs_workers
    def test_a_rerun_is_a_new_version_with_a_new_job(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", COPY, repo)
        assert pachd.wait(name, pachd.put(repo, {"/a": b"1"})).state == SUCCESS
        with refused(UNKNOWN, "project picker cannot be nil"):
            pachd.client.pps.rerun_pipeline(pipeline=named(name), reprocess=True)
        in_project = pps.Pipeline(name=name, project=pfs.Project(name="default"))
        pachd.client.pps.rerun_pipeline(pipeline=in_project, reprocess=True)
        [job] = pachd.jobs(name)
        assert job.pipeline_version == 2
        assert pachd.wait(name, job.job.id).data_processed == 1

    def test_deletion_removes_repos_and_jobs(self, pachd: Pachd) -> None:
        name = pachd.pipeline("p", COPY, pachd.repo())
        with refused(UNKNOWN, "pipeline"):
            pachd.client.pfs.delete_repo(repo=pfs.Repo(name=name))
        pachd.client.pps.delete_pipeline(pipeline=named(name))
        assert not pachd.client.pps.pipeline_exists(named(name))
        assert name not in {info.repo.name for info in pachd.client.pfs.list_repo()}

    @needs_workers
    def test_a_pipeline_that_was_deleted_can_be_made_anew(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", "echo 1 > $pfs/out/a", repo)
        pachd.wait(name, pachd.put(repo, {"/a": b"1"}))
        pachd.client.pps.delete_pipeline(pipeline=named(name))
        pachd.create(pachd.spec(name, "echo 2 > $pfs/out/a", repo))
        [job] = pachd.jobs(name)
        assert pachd.wait(name, job.job.id).data_processed == 1
        assert pachd.read(name, job.job.id, "/a") == b"2\n"

    @needs_workers
    def test_deletion_can_keep_the_output(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", COPY, repo)
        commit = pachd.put(repo, {"/a": b"1"})
        assert pachd.wait(name, commit).state == SUCCESS
        pachd.client.pps.delete_pipeline(pipeline=named(name), keep_repo=True)
        assert pachd.read(name, commit, "/a") == b"1"
        pachd.client.pfs.delete_repo(repo=pfs.Repo(name=name))

    def test_the_output_belongs_to_the_pipeline(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", "sleep 600", repo)
        output = pachd.branch(pfs.Repo(name=name))
        with pytest.raises(grpc.RpcError, match=r"cannot start a commit on an output branch|has not been finished") as caught:
            pachd.client.pfs.start_commit(branch=output)
        assert caught.value.code() == UNKNOWN
        commit = pachd.put(repo, {"/a": b"1"})
        with refused(UNKNOWN, "use 'stop job' instead"):
            pachd.client.pfs.finish_commit(commit=pachd.commit(name, commit))


@needs_workers
class TestJobs:
    def test_a_job_has_the_id_of_the_commit_and_exists_as_soon_as_it_is_started(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", COPY, repo)
        commit = pachd.client.pfs.start_commit(branch=pachd.branch(repo))
        info = pachd.client.pps.inspect_job(job=pachd.job(name, commit.id), details=True)
        assert info.state in (pps.JobState.JOB_CREATED, pps.JobState.JOB_STARTING)
        assert info.output_commit.branch.name == "master"
        assert info.output_commit.id == commit.id
        assert info.details.transform.cmd
        pachd.client.pfs.finish_commit(commit=commit)
        assert pachd.wait(name, commit.id).state == SUCCESS

    def test_what_clients_look_into_unasked_is_there_and_nothing_else(self, pachd: Pachd) -> None:
        name = pachd.pipeline("p", COPY, pachd.repo())
        [job] = pachd.jobs(name)
        assert betterproto.serialized_on_wire(job.stats)
        assert not betterproto.serialized_on_wire(job.details), "details come only on request"
        assert job.job.pipeline.project.name == "default"

    def test_a_chain_runs_under_one_id(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        first = pachd.pipeline("first", COPY, repo)
        second = pachd.pipeline("second", "cat $source/* > $pfs/out/all", first, glob="/")
        commit = pachd.put(repo, {"/a": b"1", "/b": b"2"})
        assert pachd.wait(second, commit).state == SUCCESS
        assert pachd.read(second, commit, "/all") == b"12"
        in_set = list(pachd.client.pps.inspect_job_set(job_set=pps.JobSet(id=commit), wait=True))
        assert [(info.job.pipeline.name, info.state) for info in in_set] == [(first, SUCCESS), (second, SUCCESS)]
        assert commit in [info.job_set.id for info in pachd.client.pps.list_job_set()]
        commits = list(pachd.client.pfs.inspect_commit_set(commit_set=pfs.CommitSet(id=commit), wait=True))
        order = [info.commit.repo.name for info in commits if info.commit.id == commit and info.commit.repo.type == "user"]
        assert order == [repo.name, first, second]
        assert {info.commit.repo.type for info in commits} == {"user", "meta", "spec"}

    def test_a_repo_without_that_commit_answers_with_the_one_in_its_provenance(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", COPY, repo)
        commit = pachd.put(repo, {"/a": b"1"})
        pachd.create(pachd.spec(name, COPY, repo), update=True)
        job = pachd.jobs(name)[0].job.id
        assert job != commit
        assert pachd.client.pfs.inspect_commit(commit=pachd.commit(repo, job)).commit.id == commit

    def test_a_missing_job_is_not_found(self, pachd: Pachd) -> None:
        name = pachd.pipeline("p", COPY, pachd.repo())
        with refused(NOT_FOUND, f"jobs default/{name}@"):
            pachd.client.pps.inspect_job(job=pachd.job(name, "0" * 12 + "4" + "0" * 19))

    def test_a_stopped_job_is_killed_and_so_are_its_processes(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", "echo begun\nsleep 600 &\nsleep 600", repo)
        commit = pachd.put(repo, {"/a": b"1"})
        eventually(lambda: pachd.lines(name, commit))
        pachd.client.pps.stop_job(job=pachd.job(name, commit))
        info = pachd.wait(name, commit)
        assert info.state == KILLED
        assert "job stopped" in info.reason
        after = pachd.put(repo, {}, delete=["/"])
        assert pachd.wait(name, after).state == SUCCESS

    def test_jobs_are_listed_newest_first_and_only_of_the_current_version(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", COPY, repo)
        made = [pachd.put(repo, {f"/{number}": b""}) for number in range(2)]
        assert [info.job.id for info in pachd.jobs(name)][:2] == made[::-1]
        pachd.create(pachd.spec(name, COPY, repo), update=True)
        assert len(pachd.jobs(name)) == 1
        assert [info.job.id for info in pachd.jobs(name, history=-1)][1:3] == made[::-1]

    def test_a_subscription_follows_jobs(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", "sleep 0.2", repo)
        pachd.wait(name, pachd.jobs(name)[0].job.id)
        commit = pachd.client.pfs.start_commit(branch=pachd.branch(repo))
        stream = pachd.client.pps.subscribe_job(pipeline=named(name), details=True)
        assert next(stream).job.id == commit.id
        pachd.client.pfs.finish_commit(commit=commit)
        pachd.wait(name, commit.id)
        later = pachd.client.pfs.start_commit(branch=pachd.branch(repo))
        assert next(stream).job.id == later.id

    def test_jobs_overlap_where_their_datums_differ(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        script = 'echo $source\n[ "$(basename $source)" = slow ] && sleep 600\ncp $source $pfs/out/'
        name = pachd.pipeline("p", script, repo, parallelismSpec={"constant": 2})
        first = pachd.put(repo, {"/slow": b""})
        eventually(lambda: pachd.lines(name, first))
        second = pachd.put(repo, {"/quick": b"1"}, delete=["/"])
        running = pachd.job(name, second)
        eventually(lambda: pachd.client.pps.inspect_job(job=running).data_processed == 1)
        with refused(UNKNOWN, "unfinished"):
            list(pachd.client.pps.list_datum(job=pachd.job(name, second)))
        assert pachd.client.pps.inspect_job(job=pachd.job(name, first)).state == pps.JobState.JOB_RUNNING
        pachd.client.pps.stop_job(job=pachd.job(name, first))
        assert pachd.wait(name, second).state == SUCCESS

    def test_a_failed_datum_does_not_stop_the_others_but_fails_the_job(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", 'echo $source\n[ "$(basename $source)" != bad ]\ncp $source $pfs/out/', repo)
        down = pachd.pipeline("down", COPY, name)
        commit = pachd.put(repo, {"/a": b"1", "/bad": b"2", "/c": b"3"})
        info = pachd.wait(name, commit)
        assert info.state == FAILURE
        assert (info.data_total, info.data_processed, info.data_failed) == (3, 2, 1)
        guilty = pachd.datums(name, commit)["/bad"]
        assert guilty.state == DatumState.FAILED
        assert f"datum {guilty.datum.id} failed" in info.reason
        assert pachd.paths(name, commit) == ["/a", "/c"]
        assert pachd.client.pfs.inspect_branch(branch=pachd.branch(pfs.Repo(name=name))).head.id == commit
        after = pachd.wait(down, commit)
        assert after.state == UNRUNNABLE
        assert "unrunnable because the following upstream pipelines failed: source" in after.reason, "inputs are named, not pipelines"

    def test_a_job_goes_through_its_states_in_order_and_ends_with_a_finished_commit(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", "sleep 1", repo)
        commit = pachd.client.pfs.start_commit(branch=pachd.branch(repo))
        pachd.client.pfs.put_file_from_bytes(commit=commit, path="/a", data=b"1")
        job, state = pachd.job(name, commit.id), pps.JobState
        output = pachd.commit(name, commit.id)
        assert pachd.client.pps.inspect_job(job=job).state in (state.JOB_CREATED, state.JOB_STARTING)
        pachd.client.pfs.finish_commit(commit=commit)
        eventually(lambda: pachd.client.pps.inspect_job(job=job).state == state.JOB_RUNNING)
        assert pachd.client.pfs.inspect_commit(commit=output).finished.year == 1970
        info = pachd.wait(name, commit.id)
        assert info.state == SUCCESS
        assert info.created <= info.started <= info.finished
        assert pachd.client.pfs.inspect_commit(commit=output).finished.year > 2000

    def test_a_deleted_job_is_gone(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", COPY, repo)
        commit = pachd.put(repo, {"/a": b"1"})
        assert pachd.wait(name, commit).state == SUCCESS
        pachd.client.pps.delete_job(job=pachd.job(name, commit))
        with refused(NOT_FOUND, f"jobs default/{name}@{commit} not found"):
            pachd.client.pps.inspect_job(job=pachd.job(name, commit))

    def test_lists_of_jobs_and_datums_come_in_pages(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", "true", repo)
        made = [pachd.put(repo, {f"/{number}": b""}) for number in range(2)]
        pachd.wait(name, made[1])
        jobs = pachd.jobs(name)

        def listed(**more: object) -> list[str]:
            return [info.job.id for info in pachd.client.pps.list_job(pipeline=named(name), **more)]

        assert listed(number=1) == [made[1]]
        assert listed(number=1, pagination_marker=jobs[0].created) == [made[0]]
        assert listed(reverse=True)[-1] == made[1]
        ids = [info.datum.id for info in pachd.client.pps.list_datum(job=pachd.job(name, made[1]))]
        page = pachd.client.pps.list_datum(job=pachd.job(name, made[1]), pagination_marker=ids[0], number=5)
        assert [info.datum.id for info in page] == ids[1:]

    def test_the_same_output_path_from_two_datums_fails_the_job(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", "cat $source > $pfs/out/same", repo)
        info = pachd.wait(name, pachd.put(repo, {"/a": b"1", "/b": b"2"}))
        assert info.state == FAILURE
        assert "duplicate path output by different datums" in info.reason

    def test_a_job_that_takes_too_long_is_killed(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", "sleep 600", repo, jobTimeout="0.5s")
        assert pachd.wait(name, pachd.put(repo, {"/a": b"1"})).state == KILLED

    def test_a_job_of_a_dropped_commit_set_is_killed_and_goes_later(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", COPY, repo)
        commit = pachd.client.pfs.start_commit(branch=pachd.branch(repo))
        pachd.client.pfs.drop_commit_set(commit_set=pfs.CommitSet(id=commit.id))
        job = pachd.job(name, commit.id)
        try:
            info = pachd.client.pps.inspect_job(job=job)
            assert (info.state, info.reason) == (KILLED, "output commit removed")
        except grpc.RpcError as error:
            assert error.code() == NOT_FOUND  # noqa: PT017
        eventually(lambda: not pachd.client.pps.job_exists(job))
        after = pachd.put(repo, {"/a": b"1"})
        assert pachd.wait(name, after).state == SUCCESS


@needs_workers
class TestDatums:
    def test_ids_are_made_of_name_repo_branch_and_path(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", COPY, repo)
        pachd.wait(name, pachd.put(repo, {"/a": b"1"}))
        commit = pachd.put(repo, {"/a": b"2"})
        pachd.wait(name, commit)
        from hashlib import blake2b

        total = blake2b(digest_size=32)
        for text in (b"source", repo.name.encode(), b"master", b"/a"):
            total.update(text + len(text).to_bytes(8, "big"))
        assert pachd.datums(name, commit)["/a"].datum.id == total.hexdigest()

    def test_each_match_of_the_glob_is_a_datum_and_lies_at_its_full_path(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", "(cd $pfs/source; find . -type f | sort) > $pfs/out/$PACH_DATUM_ID", repo, glob="/*/*")
        commit = pachd.put(repo, {"/f/manifest": b"1", "/f/part/q": b"2", "/f/part/s": b"3"})
        assert pachd.wait(name, commit).data_total == 2
        found = sorted(pachd.read(name, commit, path) for path in pachd.paths(name, commit))
        assert found == [b"./f/manifest\n", b"./f/part/q\n./f/part/s\n"]

    def test_the_root_is_one_datum_unless_the_commit_is_empty(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", "ls $source > $pfs/out/list", repo, glob="/")
        empty = pachd.put(repo, {})
        assert pachd.wait(name, empty).data_total == 0
        commit = pachd.put(repo, {"/a": b"1", "/b": b"2"})
        assert pachd.wait(name, commit).data_total == 1
        assert pachd.read(name, commit, "/list") == b"a\nb\n"

    def test_user_code_sees_the_documented_environment(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", "env > $pfs/out/env", repo, transform={"env": {"MINE": "yes"}})
        commit = pachd.put(repo, {"/a": b"1"})
        assert pachd.wait(name, commit).state == SUCCESS
        env = dict(line.split("=", 1) for line in pachd.read(name, commit, "/env").decode().splitlines() if "=" in line)
        assert env["source"].endswith("/source/a")
        assert env["source_COMMIT"] == commit
        assert env["PACH_JOB_ID"] == env["PACH_OUTPUT_COMMIT_ID"] == commit
        assert env["PACH_DATUM_ID"] == pachd.datums(name, commit)["/a"].datum.id
        assert env["PPS_PIPELINE_NAME"] == name
        assert env["PPS_PROJECT_NAME"] == "default"
        assert env["PACH_IN_WORKER"] == "true"
        assert env["PPS_SPEC_COMMIT"]
        assert env["PPS_POD_NAME"]
        assert env["PPS_WORKER_IP"]
        assert env["PPS_WORKER_GRPC_PORT"]
        assert env["MINE"] == "yes"
        assert "PACH_PIPELINE_NAME" not in env

    def test_unchanged_datums_are_skipped_and_vanished_outputs_deleted(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", COPY, repo)
        first = pachd.put(repo, {"/same": b"1", "/changed": b"1", "/gone": b"1"})
        assert pachd.wait(name, first).data_processed == 3
        second = pachd.put(repo, {"/changed": b"2", "/new": b"1"}, delete=["/gone"])
        info = pachd.wait(name, second)
        assert (info.data_total, info.data_processed, info.data_skipped) == (3, 2, 1)
        assert states(pachd, name, second) == {"same": DatumState.SKIPPED, "changed": DatumState.SUCCESS, "new": DatumState.SUCCESS}
        assert pachd.paths(name, second) == ["/changed", "/new", "/same"]
        assert pachd.read(name, second, "/changed") == b"2"
        assert sorted(pachd.lines_once(name, second, 2)) == ["did changed", "did new"]

    def test_a_folder_with_other_names_but_the_same_content_is_skipped(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", "ls $source > $pfs/out/names", repo)
        assert pachd.wait(name, pachd.put(repo, {"/d/old": b"1"})).data_processed == 1
        renamed = pachd.put(repo, {"/d/young": b"1"}, delete=["/d/old"])
        assert pachd.wait(name, renamed).data_skipped == 1
        assert pachd.read(name, renamed, "/names") == b"old\n"

    def test_the_skip_base_is_the_last_successful_job(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", f'[ "$(basename $source)" != bad ]\n{COPY}', repo)
        assert pachd.wait(name, pachd.put(repo, {"/a": b"1"})).state == SUCCESS
        failed = pachd.wait(name, pachd.put(repo, {"/b": b"1", "/bad": b"1"}))
        assert failed.state == FAILURE
        assert (failed.data_total, failed.data_processed, failed.data_skipped, failed.data_failed) == (3, 1, 0, 1)
        info = pachd.wait(name, pachd.put(repo, {}, delete=["/bad"]))
        assert (info.data_skipped, info.data_processed) == (1, 1)

    def test_every_job_can_do_everything_again(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", COPY, repo, reprocessSpec="every_job")
        pachd.wait(name, pachd.put(repo, {"/a": b"1"}))
        assert pachd.wait(name, pachd.put(repo, {"/b": b"1"})).data_processed == 2

    def test_a_datum_is_tried_as_often_as_the_spec_says(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", "echo try\nls $pfs/out\ntouch $pfs/out/left\nexit 3", repo, datumTries=3)
        commit = pachd.put(repo, {"/a": b"1"})
        assert pachd.wait(name, commit).state == FAILURE
        assert pachd.lines_once(name, commit, 3) == ["try"] * 3

    def test_err_cmd_runs_after_every_failed_attempt_and_recovers_the_datum(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        transform = {"errCmd": ["sh"], "errStdin": ["echo mended"]}
        name = pachd.pipeline("p", '[ "$(basename $source)" != bad ]\ncp $source $pfs/out/', repo, datumTries=2, transform=transform)
        commit = pachd.put(repo, {"/a": b"1", "/bad": b"2"})
        info = pachd.wait(name, commit)
        assert info.state == SUCCESS
        assert (info.data_processed, info.data_recovered) == (1, 1)
        assert pachd.lines_once(name, commit, 2) == ["mended", "mended"]
        assert pachd.paths(name, commit) == ["/a"]
        again = pachd.wait(name, pachd.put(repo, {"/c": b"1"}))
        assert (again.data_skipped, again.data_recovered) == (1, 1)

    def test_a_datum_that_takes_too_long_counts_as_a_failed_attempt(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", "echo try\nsleep 600", repo, datumTries=2, datumTimeout="0.5s")
        commit = pachd.put(repo, {"/a": b"1"})
        assert pachd.wait(name, commit).state == FAILURE
        assert pachd.lines_once(name, commit, 2) == ["try", "try"]

    def test_a_datum_that_is_restarted_begins_again_without_losing_a_try(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", "echo try\nsleep 600", repo, datumTries=1)
        commit = pachd.put(repo, {"/a": b"1"})
        eventually(lambda: pachd.lines(name, commit))
        with refused(UNKNOWN, "could not be found"):
            pachd.client.pps.restart_datum(job=pachd.job(name, commit), data_filters=["/b"])
        pachd.client.pps.restart_datum(job=pachd.job(name, commit), data_filters=["/a"])
        eventually(lambda: pachd.lines(name, commit) == ["try", "try"])
        assert pachd.client.pps.inspect_job(job=pachd.job(name, commit)).state == pps.JobState.JOB_RUNNING
        pachd.client.pps.stop_job(job=pachd.job(name, commit))

    def test_an_accepted_return_code_is_a_success(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", "exit 7", repo, transform={"acceptReturnCode": [7]})
        assert pachd.wait(name, pachd.put(repo, {"/a": b"1"})).state == SUCCESS

    def test_links_into_inputs_are_taken_as_what_they_point_to(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", "ln -s $source $pfs/out/link\nmkdir $pfs/out/d\nln -s $source $pfs/out/d/c", repo)
        commit = pachd.put(repo, {"/a/b": b"1"})
        assert pachd.wait(name, commit).state == SUCCESS
        assert pachd.paths(name, commit) == ["/d/c/b", "/link/b"]
        assert pachd.read(name, commit, "/link/b") == b"1"

    @pytest.mark.parametrize("link", ["ln -s . $pfs/out/here", "echo 1 > $pfs/out/a\nln -s $pfs/out/a $pfs/out/b"])
    def test_relative_links_and_links_into_the_output_make_the_job_begin_again_for_ever(self, pachd: Pachd, link: str) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", link, repo)
        commit = pachd.put(repo, {"/a": b"1"})
        job = pachd.job(name, commit)
        eventually(lambda: pachd.client.pps.inspect_job(job=job).restart >= 2)
        assert pachd.client.pps.inspect_job(job=job).state == pps.JobState.JOB_RUNNING
        pachd.client.pps.stop_job(job=job)

    def test_datums_are_sorted_by_id_filtered_and_inspected(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", '[ "$(basename $source)" != bad ]', repo)
        commit = pachd.put(repo, {f"/{name}": b"1" for name in ("a", "b", "c", "bad")})
        pachd.wait(name, commit)
        job = pachd.job(name, commit)
        ids = [info.datum.id for info in pachd.client.pps.list_datum(job=job)]
        assert ids == sorted(ids)
        assert len(ids) == 4
        [failed] = pachd.client.pps.list_datum(job=job, filter=pps.ListDatumRequestFilter(state=[DatumState.FAILED]))
        assert failed.data[0].file.path == "/bad"
        assert pachd.client.pps.inspect_datum(datum=failed.datum).state == DatumState.FAILED
        with refused(UNKNOWN, "not found in job"):
            pachd.client.pps.inspect_datum(datum=pps.Datum(job=job, id="0" * 64))
        with refused(UNKNOWN, "number must be > 0 when reverse is true"):
            list(pachd.client.pps.list_datum(job=job, reverse=True))
        assert [info.datum.id for info in pachd.client.pps.list_datum(job=job, reverse=True, number=2)] == ids[:1:-1]

    def test_datums_of_an_input_can_be_listed_without_a_pipeline(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        pachd.put(repo, {"/a": b"1", "/b": b"2"})
        source = pps.Input(pfs=pps.PfsInput(repo=repo.name, glob="/*"))
        assert {info.data[0].file.path for info in pachd.client.pps.list_datum(input=source)} == {"/a", "/b"}

    def test_cross_and_union_inputs(self, pachd: Pachd) -> None:
        repos = [pachd.repo("left"), pachd.repo("right")]
        for repo in repos:
            pachd.put(repo, {"/a": b"1", "/b": b"2"})
        inputs = [pps.Input(pfs=pps.PfsInput(repo=repo.name, glob="/*")) for repo in repos]
        assert len(list(pachd.client.pps.list_datum(input=pps.Input(cross=inputs)))) == 4
        assert len(list(pachd.client.pps.list_datum(input=pps.Input(union=inputs)))) == 4
        joined = [pps.Input(pfs=pps.PfsInput(repo=repo.name, glob="/(*)", join_on="$1")) for repo in repos]
        assert len(list(pachd.client.pps.list_datum(input=pps.Input(join=joined)))) == 2
        pachd.put(repos[0], {"/c": b"3"})
        assert len(list(pachd.client.pps.list_datum(input=pps.Input(join=joined)))) == 2
        joined[0].pfs.outer_join = True
        assert len(list(pachd.client.pps.list_datum(input=pps.Input(join=joined)))) == 3
        grouped = [pps.Input(pfs=pps.PfsInput(repo=repo.name, glob="/(*)", group_by="$1")) for repo in repos]
        assert sorted(len(info.data) for info in pachd.client.pps.list_datum(input=pps.Input(group=grouped))) == [1, 2, 2]


@needs_workers
class TestLogs:
    def test_lines_carry_where_they_come_from(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", "echo out\necho err >&2", repo)
        commit = pachd.put(repo, {"/a": b"1"})
        pachd.wait(name, commit)
        assert pachd.lines_once(name, commit, 2) == ["out", "err"]
        [datum] = pachd.datums(name, commit).values()
        first = next(line for line in pachd.client.pps.get_logs(job=pachd.job(name, commit)) if line.user)
        assert (first.project_name, first.pipeline_name, first.job_id, first.datum_id) == ("default", name, commit, datum.datum.id)
        assert first.worker_id
        assert first.data[0].path == "/a"
        assert first.data[0].hash == datum.data[0].hash
        assert first.ts.year > 2000

    def test_lines_are_filtered(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", "echo $source", repo)
        commit = pachd.put(repo, {"/a": b"1", "/b": b"2"})
        pachd.wait(name, commit)
        assert len(pachd.lines_once(name, commit, 2)) == 2
        datum = pachd.datums(name, commit)["/b"].datum

        def lines(**query: object) -> list[str]:
            return [line.message.rpartition("/")[2] for line in pachd.client.pps.get_logs(**query) if line.user]

        assert lines(job=pachd.job(name, commit), datum=datum) == ["b"]
        with refused(UNKNOWN, "must specify the Job or Pipeline that the datum is from to get logs for it"):
            lines(datum=datum)
        assert lines(job=pachd.job(name, commit), data_filters=["/a"]) == ["a"]
        assert lines(pipeline=named(name)) == ["a", "b"]
        assert lines(pipeline=named(name), master=True) == []
        assert len(list(pachd.client.pps.get_logs(pipeline=named(name), tail=1))) == 1

    def test_lines_come_while_the_process_works(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", "echo one\nsleep 0.3\necho two\nsleep 600", repo)
        commit = pachd.put(repo, {"/a": b"1"})
        # Until its pod is there a job has no log.
        assert pachd.lines_once(name, commit, 1)
        stream = pachd.client.pps.get_logs(job=pachd.job(name, commit), follow=True)
        user = (line.message for line in stream if line.user)
        assert next(user) == "one"
        assert next(user) == "two"
        assert pachd.client.pps.inspect_job(job=pachd.job(name, commit)).state == pps.JobState.JOB_RUNNING
        pachd.client.pps.stop_job(job=pachd.job(name, commit))

    @pytest.mark.skipif(bool(CLUSTER) or os.environ.get("QA_PACHD_LOKI") == "0", reason="needs a cluster with Loki")
    def test_the_other_log_service_answers_too(self, pachd: Pachd) -> None:
        from pachyderm_sdk.api import logs

        repo = pachd.repo()
        name = pachd.pipeline("p", "echo here", repo)
        commit = pachd.put(repo, {"/a": b"1"})
        pachd.wait(name, commit)
        of_pipeline = logs.PipelineLogQuery(project="default", pipeline=name)
        of_job = logs.PipelineJobLogQuery(pipeline=of_pipeline, job=commit)
        query = logs.LogQuery(user=logs.UserLogQuery(pipeline_job=of_job))
        replies = pachd.client.logs.get_logs(query=query, filter=logs.LogFilter(user_logs_only=True))
        assert [reply.log.pps_log_message.message for reply in replies] == ["here"]
        for pattern, found in (("^he", ["here"]), ("there", [])):
            wanted = logs.LogFilter(user_logs_only=True, regex=logs.RegexLogFilter(pattern=pattern))
            assert [one.log.pps_log_message.message for one in pachd.client.logs.get_logs(query=query, filter=wanted)] == found
        following = pachd.client.logs.get_logs(query=query, filter=logs.LogFilter(user_logs_only=True), tail=True)
        assert next(following).log.verbatim.line == b"here"

    def test_logs_of_a_missing_pipeline_are_not_found(self, pachd: Pachd) -> None:
        with refused(NOT_FOUND, "not found"):
            list(pachd.client.pps.get_logs(pipeline=named(pachd.name("none"))))


@needs_workers
class TestSpecsOfOldDeployments:
    def test_a_cron_input_with_a_shell_and_its_lines(self, pachd: Pachd) -> None:
        secret = pachd.name("gcsaccess")
        pachd.client.pps.create_secret(name=secret, data={"creds": base64.b64encode(b"{}").decode(), "storage_bucket": "b"})
        name = pachd.name("answer")
        spec = {
            "pipeline": {"name": name},
            "description": "Answers questions.",
            "transform": {
                "cmd": ["/bin/bash"],
                "stdin": ["echo $ACCESS | base64 --decode", "echo $BUCKET > ${QA_PFS_ROOT:-/pfs}/out/bucket"],
                "image": "registry/answer:f181c0c6",
                "secrets": [
                    {"name": secret, "env_var": "ACCESS", "key": "creds"},
                    {"name": secret, "env_var": "BUCKET", "key": "storage_bucket"},
                ],
            },
            "input": {"cron": {"name": "tick", "spec": "@every 60s"}},
        }
        pachd.create(spec)
        loader = pachd.pipeline("load", "cat $source/* > $pfs/out/all", name, glob="/")
        pachd.client.pps.run_cron(pipeline=named(name))
        job = pachd.jobs(name)[0].job.id
        assert pachd.wait(loader, job).state == SUCCESS
        assert pachd.read(loader, job, "/all") == b"b\n"
        assert pachd.lines_once(name, job, 1) == ["{}"]


class TestSecrets:
    @needs_workers
    def test_a_secret_reaches_the_environment_and_nothing_else(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        secret = pachd.name("secret")
        pachd.client.pps.create_secret(name=secret, data={"key": "planted"})
        assert pachd.client.pps.inspect_secret(secret=pps.Secret(name=secret)).secret.name == secret
        assert secret in [info.secret.name for info in pachd.client.pps.list_secret().secret_info]
        uses = [{"name": secret, "envVar": "PLANTED", "key": "key"}]
        name = pachd.pipeline("p", 'printf %s "$PLANTED" > $pfs/out/a', repo, transform={"secrets": uses})
        commit = pachd.put(repo, {"/a": b"1"})
        assert pachd.wait(name, commit).state == SUCCESS
        assert pachd.read(name, commit, "/a") == b"planted"
        assert "planted" not in pachd.client.pps.inspect_pipeline(pipeline=named(name), details=True).to_json()
        pachd.client.pps.delete_secret(secret=pps.Secret(name=secret))

    @needs_workers
    def test_a_secret_is_mounted_as_a_folder_with_a_file_per_key(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        skip_without_private_files(pachd, repo)
        secret = pachd.name("secret")
        pachd.client.pps.create_secret(name=secret, data={"a": "1", "b": "2"})
        uses = [{"name": secret, "mountPath": "/tmp/qa-mounted-secret"}]
        name = pachd.pipeline("p", "cat /tmp/qa-mounted-secret/a /tmp/qa-mounted-secret/b > $pfs/out/ab", repo, transform={"secrets": uses})
        commit = pachd.put(repo, {"/a": b""}, delete=["/"])
        assert pachd.wait(name, commit).state == SUCCESS
        assert pachd.read(name, commit, "/ab") == b"12"

    def test_kubernetes_documents_are_taken_with_data_and_string_data(self, pachd: Pachd) -> None:
        secret = pachd.name("secret")
        document = {
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": secret}, "type": "Opaque",
            "stringData": {"a": "1"}, "data": {"b": base64.b64encode(b"2").decode()},
        }  # fmt: skip
        from pachyderm_sdk.api.pps import ApiStub

        ApiStub.create_secret(pachd.client.pps, file=json.dumps(document).encode())
        assert pachd.client.pps.inspect_secret(secret=pps.Secret(name=secret)).type == "Opaque"
        with refused(UNKNOWN, "failed to create secret"):
            ApiStub.create_secret(pachd.client.pps, file=json.dumps(document).encode())
        pachd.client.pps.delete_secret(secret=pps.Secret(name=secret))
        with refused(UNKNOWN, "failed to get secret"):
            pachd.client.pps.inspect_secret(secret=pps.Secret(name=secret))

    def test_a_pipeline_is_not_made_without_its_secrets(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        secret = pachd.name("secret")
        spec = pachd.spec(pachd.name("p"), COPY, repo, transform={"secrets": [{"name": secret, "envVar": "A", "key": "key"}]})
        with refused(UNKNOWN, f"missing Kubernetes secret {secret}"):
            pachd.client.pps.create_pipeline_v2(create_pipeline_request_json=json.dumps(spec))
        pachd.client.pps.create_secret(name=secret, data={"other": "1"})
        with refused(UNKNOWN, f"Kubernetes secret {secret} missing key key"):
            pachd.client.pps.create_pipeline_v2(create_pipeline_request_json=json.dumps(spec))
        pachd.client.pps.delete_secret(secret=pps.Secret(name=secret))


@needs_workers
class TestCron:
    def cron(self, pachd: Pachd, **cron: object) -> str:
        spec = pachd.spec(pachd.name("p"), COPY.replace("$source", "$tick"), "unused")
        spec["input"] = {"cron": {"name": "tick", **cron}}
        pachd.create(spec)
        return str(spec["pipeline"]["name"])

    def ticks(self, pachd: Pachd, name: str) -> list[pps.JobInfo]:
        """The jobs with datums, oldest first, all over."""
        return [info for job in pachd.jobs(name)[::-1] if (info := pachd.wait(name, job.job.id)).data_total]

    def test_a_schedule_makes_files_named_by_their_time(self, pachd: Pachd) -> None:
        name = self.cron(pachd, spec="@every 1s")
        eventually(lambda: len(self.ticks(pachd, name)) >= 3)
        pachd.client.pps.stop_pipeline(pipeline=named(name))
        jobs = self.ticks(pachd, name)
        assert (jobs[1].data_total, jobs[1].data_processed, jobs[1].data_skipped) == (2, 1, 1)
        paths = pachd.paths(f"{name}_tick", jobs[1].job.id)
        assert all(datetime.strptime(path, "/%Y-%m-%dT%H:%M:%S%z") for path in paths)
        assert len(paths) == 2

    def test_a_stopped_pipeline_has_no_ticks(self, pachd: Pachd) -> None:
        name = self.cron(pachd, spec="@every 1s", overwrite=True)
        pachd.client.pps.stop_pipeline(pipeline=named(name))
        before = pachd.client.pfs.inspect_branch(branch=pachd.branch(pfs.Repo(name=f"{name}_tick"))).head.id
        time.sleep(2.2)
        assert pachd.client.pfs.inspect_branch(branch=pachd.branch(pfs.Repo(name=f"{name}_tick"))).head.id == before

    def test_overwriting_leaves_one_file(self, pachd: Pachd) -> None:
        name = self.cron(pachd, spec="@never", overwrite=True)
        for _ in range(2):
            pachd.client.pps.run_cron(pipeline=named(name))
            time.sleep(1.1)
        jobs = self.ticks(pachd, name)
        assert [(job.data_total, job.data_processed) for job in jobs] == [(1, 1), (1, 1)]
        assert len(pachd.paths(name, jobs[-1].job.id)) == 1

    def test_deletion_takes_the_ticks_along(self, pachd: Pachd) -> None:
        name = self.cron(pachd, spec="@never")
        ticks = pfs.Repo(name=f"{name}_tick")
        assert pachd.client.pfs.repo_exists(ticks)
        pachd.client.pps.delete_pipeline(pipeline=named(name))
        assert not pachd.client.pfs.repo_exists(ticks)

    def test_a_pipeline_without_a_cron_input_cannot_be_ticked(self, pachd: Pachd) -> None:
        name = pachd.pipeline("p", COPY, pachd.repo())
        with refused(UNKNOWN, "doesn't have a cron input"):
            pachd.client.pps.run_cron(pipeline=named(name))

    @pytest.mark.parametrize("spec", ["every minute", "@every x", "61 * * * *"])
    def test_a_schedule_that_is_none_is_refused(self, pachd: Pachd, spec: str) -> None:
        source = {"cron": {"name": "tick", "spec": spec}}
        document = {"pipeline": {"name": pachd.name("p")}, "transform": {"cmd": ["true"]}, "input": source}
        with refused(UNKNOWN, "cron-spec"):
            pachd.client.pps.create_pipeline_v2(create_pipeline_request_json=json.dumps(document))


HELPER = textwrap.dedent(
    """
    import os, shutil
    from pachyderm_sdk import batch_all_datums

    print("started", flush=True)

    @batch_all_datums
    def work():
        name = os.path.basename(os.environ["source"])
        print("did", name, os.environ["PACH_DATUM_ID"], flush=True)
        if name == "bad":
            raise ValueError("bad datum")
        shutil.copy(os.environ["source"], "/pfs/out/")

    work()
    """
)


@needs_workers
class TestBatching:
    def test_a_job_without_datums_starts_the_process_all_the_same(self, pachd: Pachd) -> None:
        name = self.batch(pachd, pachd.repo())
        [job] = pachd.jobs(name)
        info = pachd.wait(name, job.job.id)
        assert (info.state, info.data_total, info.reason) == (SUCCESS, 0, "there were no datums to process")
        assert pachd.lines_once(name, job.job.id, 2) == ["started", "started"], "the second phase of a job starts it too"

    def test_a_process_that_does_not_ask_for_a_datum_holds_its_job_up(self, pachd: Pachd) -> None:
        name = pachd.pipeline("p", ["sh", "-c", "echo started; sleep 600"], pachd.repo(), transform={"datumBatching": True})
        [job] = pachd.jobs(name)
        eventually(lambda: pachd.lines(name, job.job.id))
        assert pachd.client.pps.inspect_job(job=job.job).state == pps.JobState.JOB_RUNNING

    def test_lines_carry_the_job_but_no_datum(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = self.batch(pachd, repo)
        commit = pachd.put(repo, {"/a": b"1"})
        assert pachd.wait(name, commit).state == SUCCESS
        found = eventually(lambda: list(pachd.client.pps.get_logs(job=pachd.job(name, commit))))
        assert {(line.job_id, line.datum_id) for line in found} == {(commit, "")}
        assert found[0].message == "started process datum set task"

    def test_the_helper_of_the_sdk_works_unmodified(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        skip_without_private_files(pachd, repo)
        transform = {"datumBatching": True}
        name = pachd.pipeline("p", ["python", "-c", HELPER], repo, transform=transform, datumSetSpec={"perWorker": 1})
        commit = pachd.put(repo, {"/a": b"1", "/b": b"2", "/bad": b"3"}, delete=["/"])
        assert pachd.wait(name, commit).state == FAILURE
        datums = pachd.datums(name, commit)
        assert pachd.lines_once(name, commit, 3)[:3] == ["started", f"did a {datums['/a'].datum.id}", f"did b {datums['/b'].datum.id}"]
        assert pachd.paths(name, commit) == ["/a", "/b", "/probe"], "a job that failed at new datums has not looked at what is gone"
        assert states(pachd, name, commit)["bad"] == DatumState.FAILED

    def batch(self, pachd: Pachd, repo: pfs.Repo, **more: object) -> str:
        more = {"datumSetSpec": {"perWorker": 1}, **more}
        return pachd.pipeline("p", ["python", "-c", BATCH], repo, transform={"datumBatching": True}, **more)

    def test_one_process_does_all_datums_of_a_set(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = self.batch(pachd, repo)
        commit = pachd.put(repo, {f"/{letter}": letter.encode() for letter in "abc"})
        info = pachd.wait(name, commit)
        assert info.state == SUCCESS
        assert info.data_processed == 3
        assert pachd.lines_once(name, commit, 5) == ["started", "did a", "did b", "did c", "started"]
        assert pachd.read(name, commit, "/b") == b"b" + pachd.datums(name, commit)["/b"].datum.id.encode()

    def test_a_set_ends_when_it_is_big_enough(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = self.batch(pachd, repo, datumSetSpec={"sizeBytes": 15})
        commit = pachd.put(repo, {f"/{letter}": b"x" * 10 for letter in "abc"})
        assert pachd.wait(name, commit).state == SUCCESS
        assert pachd.lines_once(name, commit, 6) == ["started", "did a", "did b", "started", "did c", "started"]

    def test_a_reported_error_fails_the_datum_and_restarts_the_process(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = self.batch(pachd, repo, datumTries=2)
        commit = pachd.put(repo, {"/a": b"1", "/bad": b"2", "/c": b"3"})
        assert pachd.wait(name, commit).state == FAILURE
        assert pachd.lines_once(name, commit, 7) == ["started", "did a", "did bad", "started", "did bad", "started", "did c"]
        assert pachd.paths(name, commit) == ["/a", "/c"]

    def test_leaving_is_a_failure_even_with_status_zero(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = self.batch(pachd, repo)
        commit = pachd.put(repo, {"/leave": b"1"})
        assert pachd.wait(name, commit).state == FAILURE
        assert "user code exited prematurely" in meta(pachd, name, commit, "/leave")["reason"]

    def test_a_datum_that_takes_too_long_restarts_the_process(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline(
            "p",
            ["python", "-c", BATCH.replace("sys.exit(0)", "__import__('time').sleep(600)")],
            repo,
            transform={"datumBatching": True},
            datumSetSpec={"perWorker": 1},
            datumTimeout="6s",
        )
        commit = pachd.put(repo, {"/a": b"1", "/leave": b"2"})
        assert pachd.wait(name, commit).state == FAILURE
        assert states(pachd, name, commit) == {"a": DatumState.SUCCESS, "leave": DatumState.FAILED}
        assert meta(pachd, name, commit, "/leave")["reason"] == "context deadline exceeded"
