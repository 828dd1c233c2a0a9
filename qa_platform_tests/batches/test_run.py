"""The Pipes client: progress and logs in the run, adoption, termination; and the jobs without Dagster."""

import json
import logging
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.pipes.reattach import PIPES_LAUNCH_HANDLE_METADATA_KEY
from pachyderm_sdk import Client
from pachyderm_sdk.api import pfs, pps

from qa_platform.batches import commits
from qa_platform.batches.blame import Verdict
from qa_platform.batches.failure import JobFailed, JobFailure
from qa_platform.batches.jobs import Watcher, follow_jobs
from qa_platform.batches.plan import Batch, batch_id
from qa_platform.batches.progress import Progress
from qa_platform.batches.reload import reload_files
from qa_platform.batches.run import answer_batch
from qa_platform.clients import pachyderm as pachd
from qa_platform.clients.pachyderm import IN_PROGRESS, job_of, user_lines
from qa_platform.clients.postgres import connect
from qa_platform.contract import ANSWER_PIPELINE, LOAD_PIPELINE, QUESTIONS_REPO, FileStatus, FileVersion, partition_key
from qa_platform.embedded.stack import Stack
from qa_platform.ledger import FileRecord, Ledger
from qa_platform.orchestration.catalog import QUESTION_ANSWER
from qa_platform.orchestration.pipes import PachydermPipesClient
from qa_platform.settings import PachydermSettings, PostgresSettings
from qa_platform_tests.flow import Flow, bridge, csv_of, flow, put_pipeline, wait_until

__all__ = ["flow"]

pytestmark = pytest.mark.slow

ROWS = 30
# The real worker, which begins when a file is there: until then the job is at work for sure.
HELD_WORKER = """
import time
from pathlib import Path
from qa_platform.answering import worker
do = worker.Worker.do
def held(self, datum):
    while not Path({go!r}).exists():
        time.sleep(0.05)
    do(self, datum)
worker.Worker.do = held
worker.main()
"""


def some_rows(town: str) -> bytes:
    return csv_of(*(bridge(f"{town}{i}") for i in range(ROWS)))


@pytest.fixture
def go(flow: Flow, tmp_path: Path) -> Iterator[Path]:
    """The file that the workers wait for."""
    file = tmp_path / "go"
    put_pipeline(cmd=["python", "-c", HELD_WORKER.format(go=str(file))])
    yield file
    file.touch()
    put_pipeline()


def batch_of(*versions: FileVersion) -> Batch:
    return Batch(batch_id([(version, 1) for version in versions]), versions)


def record_of(version: FileVersion) -> FileRecord | None:
    with Ledger(PostgresSettings()) as ledger:
        return ledger.records([version]).get((version.name, version.generation))


def running_job(version: FileVersion) -> str:
    """The id of the job that answers a file, once its worker is at work; "" before."""
    record = record_of(version)
    if record is None or not record.pachyderm_job:
        return ""
    with pachd.session(PachydermSettings(), "testing") as client:
        info = client.pps.inspect_job(job=job_of(ANSWER_PIPELINE, record.pachyderm_job))
    return record.pachyderm_job if info.state == pps.JobState.JOB_RUNNING else ""


def states(job_id: str) -> dict[str, pps.JobState]:
    with pachd.session(PachydermSettings(), "testing") as client:
        return {p: pps.JobState(client.pps.inspect_job(job=job_of(p, job_id)).state) for p in (ANSWER_PIPELINE, LOAD_PIPELINE)}


def jobs_in_progress() -> list[str]:
    with pachd.session(PachydermSettings(), "testing") as client:
        return [info.job.id for info in client.pps.list_job() if info.state in IN_PROGRESS]


def test_a_run_shows_log_lines_progress_and_the_launched_job(flow: Flow) -> None:
    version = flow.upload("shown.csv", csv_of(*(bridge(f"Ort{i}") for i in range(40))))
    (result,) = flow.tick_and_run()
    assert result.success
    lines = [entry.user_message for entry in flow.instance.all_logs(result.run_id)]
    assert any(line.startswith("question_answer: success, 1 of 1 datums done, 40 of 40 rows") for line in lines)
    assert any(line.startswith("push-answers-to-sql: success, 1 of 1 datums done, 40 of 40 rows") for line in lines)
    assert any(line.startswith("question_answer | ") and "40 rows" in line for line in lines), "the worker's own line"
    handles = [
        entry.dagster_event.engine_event_data.metadata[PIPES_LAUNCH_HANDLE_METADATA_KEY].value
        for entry in flow.instance.all_logs(result.run_id, of_type=dg.DagsterEventType.ENGINE_EVENT)
        if entry.dagster_event and PIPES_LAUNCH_HANDLE_METADATA_KEY in entry.dagster_event.engine_event_data.metadata
    ]
    assert [json.loads(str(handle))["external_run_id"] for handle in handles] == [flow.record(version).pachyderm_job]


def test_the_client_keeps_the_pipes_contract_in_any_op(flow: Flow) -> None:
    version = flow.upload("contract.csv", csv_of(bridge("Olpe")))
    flow.tick_and_run()
    job_id = flow.record(version).pachyderm_job
    seen: list[dg.PipesClientCompletedInvocation] = []

    @dg.op
    def adopts(context: dg.OpExecutionContext) -> None:
        seen.append(PachydermPipesClient(PachydermSettings()).run(context=context, extras={"n": 1}, commit_id=job_id, adopted=True))

    @dg.job(executor_def=dg.in_process_executor)
    def adopting() -> None:
        adopts()

    result = adopting.execute_in_process(instance=flow.instance)
    assert result.success
    (invocation,) = seen
    assert invocation.metadata["Pachyderm job"].value == job_id
    last = invocation.get_custom_messages()[-1]
    assert (last["pipeline"], last["state"], last["rows"], last["rows_total"]) == (LOAD_PIPELINE, "success", 1, 1)
    lines = [entry.message for entry in flow.instance.all_logs(result.run_id)]
    assert any("Reattached" in line and job_id in line for line in lines)


def run_worker(stack: Stack) -> "subprocess.Popen[str]":
    """A Dagster run in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "dagster", "job", "execute", "-m", "qa_platform.definitions", "-j", "answer_pending_files"],
        env={**stack.environment, "QA_LEASE_SECONDS": "10"},
        stderr=subprocess.PIPE,
        text=True,
    )


def commits_of(batch: str) -> list[str]:
    with pachd.session(PachydermSettings(), "testing") as client:
        infos = client.pfs.list_commit(repo=pfs.Repo.from_uri(QUESTIONS_REPO))
        return [info.commit.id for info in infos if info.description == batch]


@pytest.mark.faults
def test_the_job_of_a_run_worker_that_was_killed_is_adopted_and_nothing_is_launched_twice(flow: Flow, stack: Stack, go: Path) -> None:
    version = flow.upload("worker-killed.csv", some_rows("Bad"))
    run = run_worker(stack)
    job_id = wait_until(lambda: running_job(version), "the job runs")
    run.kill()
    run.communicate()
    (request,) = wait_until(flow.tick, "the claim has run out")
    go.touch()
    result = flow.run(request)
    assert result.success
    assert flow.record(version).pachyderm_job == job_id
    assert commits_of(batch_of(version).id) == [job_id]
    assert len(flow.rows(version.name)) == ROWS
    assert any("Reattached" in entry.message and job_id in entry.message for entry in flow.instance.all_logs(result.run_id))


def test_ten_files_of_a_batch_load_the_model_once(flow: Flow) -> None:
    versions = [flow.upload(f"ten/{i}.csv", csv_of(bridge(f"Ort{i}"))) for i in range(10)]
    (result,) = flow.tick_and_run()
    assert result.success
    (job_id,) = {flow.record(version).pachyderm_job for version in versions}
    job = job_of(ANSWER_PIPELINE, job_id)
    with pachd.session(PachydermSettings(), "testing") as client:
        lines = user_lines(client.pps.get_logs(pipeline=job.pipeline, job=job))
    assert len([line for line in lines if "1 rows in" in line]) == 10
    assert len([line for line in lines if "INFO model bundled" in line]) == 1


@pytest.mark.faults
def test_a_terminated_run_leaves_no_running_job_and_its_files_are_answered_later(flow: Flow, stack: Stack, go: Path) -> None:
    version = flow.upload("terminated.csv", some_rows("Ort"))
    run = run_worker(stack)
    job_id = wait_until(lambda: running_job(version), "the job runs")
    with dg.DagsterInstance.from_config(stack.variables["DAGSTER_HOME"]) as instance:
        # What Dagster's run launchers do to terminate a run: they say so, and signal its process.
        (dagster_run,) = instance.get_runs(limit=1)
        instance.report_run_canceling(dagster_run)
        run.send_signal(signal.SIGTERM)
        _, log = run.communicate(timeout=60)
        assert instance.get_runs(limit=1)[0].status is dg.DagsterRunStatus.CANCELED, log
    assert "stopping the Pachyderm jobs" in log
    assert job_id not in jobs_in_progress()
    assert states(job_id)[ANSWER_PIPELINE] == pps.JobState.JOB_KILLED
    record = flow.record(version)
    assert (record.status, record.claim_owner, record.attempts) == (FileStatus.PENDING, "", 0)
    go.touch()
    assert [r.success for r in flow.tick_and_run()] == [True]
    assert len(flow.rows(version.name)) == ROWS


@pytest.mark.faults
def test_a_run_that_is_interrupted_while_it_commits_leaves_no_open_commit(flow: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    version = flow.upload("interrupted.csv", csv_of(bridge("Unna")))
    batch = batch_of(version)

    def interrupted(client: Client, batch_id: str, file_sets: Sequence[str]) -> str:
        client.pfs.start_commit(branch=pfs.Branch.from_uri(f"{QUESTIONS_REPO}@master"), description=batch_id)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(commits, "commit_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            answer_batch(flow.services, batch, token="t", run_id="r", log=logging.getLogger())
    assert commits_of(batch.id) == []
    wait_until(lambda: not jobs_in_progress(), "the jobs of the dropped commit are gone")
    outcome = answer_batch(flow.services, batch, token="t", run_id="r2", log=logging.getLogger())
    assert [r.status for r in outcome.records] == [FileStatus.FINISHED]


@pytest.mark.faults
def test_a_killed_job_is_launched_again_by_the_same_run(flow: Flow, caplog: pytest.LogCaptureFixture) -> None:
    version = flow.upload("job-killed.csv", csv_of(bridge("Soest")))
    launched: list[str] = []

    def follow(*, commit_id: str, **_: object) -> None:
        launched.append(commit_id)
        if len(launched) == 1:
            with pachd.session(PachydermSettings(), "testing") as client:
                for pipeline in (ANSWER_PIPELINE, LOAD_PIPELINE):
                    client.pps.stop_job(job=job_of(pipeline, commit_id), reason="an update")
        follow_jobs(flow.services.pachyderm, commit_id, watcher=Watcher(logging.getLogger()))

    with caplog.at_level(logging.INFO):
        outcome = answer_batch(flow.services, batch_of(version), token="t", run_id="r", log=logging.getLogger(), follow=follow)
    assert outcome.failure is None
    assert [(r.status, r.attempts) for r in outcome.records] == [(FileStatus.FINISHED, 0)]
    assert len(set(launched)) == 2
    assert "an update" in caplog.text


def everything_of(flow: Flow, *versions: FileVersion) -> list[object]:
    """What is kept of files, but for which job and commit had them last, and when: their records, their rows as they lie in the tables,
    what Dagster was told, where the objects are.
    """
    kept: list[object] = []
    for version in versions:
        record = replace(flow.record(version), pachyderm_job="", pachyderm_commit="", loaded_at=None, answered_at=None)
        kept += [record, flow.objects(f"processed/{version.name}"), flow.materializations(QUESTION_ANSWER, version.name)]
    with connect(PostgresSettings()) as connection:
        for table in ("question_answer", "question_answer_reject"):
            # xmin is another after any write, even of the same values.
            query = f"SELECT xmin::text, * FROM {table} WHERE source_file = ANY(%s) ORDER BY source_file, row_number"  # noqa: S608
            kept += connection.execute(query, [[version.name for version in versions]]).fetchall()
    return kept


def jobs() -> set[tuple[str, str]]:
    with pachd.session(PachydermSettings(), "testing") as client:
        return {(info.job.pipeline.name, info.job.id) for info in client.pps.list_job(history=-1)}


def after_new_jobs_of(*pipelines: str, than: set[tuple[str, str]]) -> bool:
    """Whether each pipeline has got another job, and none is at work any more."""
    return {pipeline for pipeline, _ in jobs() - than} >= set(pipelines) and not jobs_in_progress()


def rerun(pipeline: str) -> None:
    with pachd.session(PachydermSettings(), "testing") as client:
        client.pps.rerun_pipeline(pipeline=job_of(pipeline, "").pipeline, reprocess=True)


@pytest.mark.faults
def test_jobs_that_no_run_launched_change_and_charge_nothing(flow: Flow) -> None:
    versions = [flow.upload(f"by-others/{town}.csv", csv_of(bridge(town), ("", "no question"))) for town in ("Ulm", "Graz")]
    assert [result.success for result in flow.tick_and_run()] == [True]
    before = everything_of(flow, *versions)
    for pipeline in (ANSWER_PIPELINE, LOAD_PIPELINE):
        known = jobs()
        rerun(pipeline)
        wait_until(partial(after_new_jobs_of, LOAD_PIPELINE, than=known), "its jobs are over")
        assert everything_of(flow, *versions) == before
        assert flow.tick() == []
    reloaded: list[FileRecord] = []
    keys = [partition_key(v.name) for v in versions]
    reload_files(flow.services, keys, run_id="r", log=logging.getLogger(), report=reloaded.extend)
    assert len(reloaded) == 2, "the commits that are recorded hold the answers"
    assert everything_of(flow, *versions) == before


@pytest.mark.faults
def test_a_job_that_no_run_launched_does_not_answer_for_a_retry(flow: Flow) -> None:
    version = flow.upload("asked-again.csv", csv_of(bridge("Ulm")))
    flow.tick_and_run()
    with Ledger(PostgresSettings()) as ledger:
        ledger.request_retries([version.name])
    before, waiting, known = everything_of(flow, version), flow.record(version), jobs()
    rerun(ANSWER_PIPELINE)
    wait_until(partial(after_new_jobs_of, LOAD_PIPELINE, than=known), "its jobs are over")
    assert (everything_of(flow, version), flow.record(version)) == (before, waiting)
    assert [result.success for result in flow.tick_and_run()] == [True]
    record = flow.record(version)
    assert (record.status, record.load_id, record.attempts) == (FileStatus.FINISHED, 2, 0)


def test_progress_says_what_is_left() -> None:
    progress = Progress(pipeline="p", job_id="j", state="running", datums=1, datums_total=4, rows=2000, rows_total=8000, seconds_left=61.2)
    assert str(progress) == "p: running, 1 of 4 datums done, 2000 of 8000 rows, about 61 s left"


def test_following_a_killed_job_says_so(flow: Flow) -> None:
    version = flow.upload("stopped.csv", some_rows("Weg"))
    seen: list[Progress] = []

    def stop_then_follow(*, commit_id: str, **_: object) -> None:
        with pachd.session(PachydermSettings(), "testing") as client:
            client.pps.stop_job(job=job_of(ANSWER_PIPELINE, commit_id), reason="enough")
        with pytest.raises(JobFailed, match="killed: enough") as failed:
            follow_jobs(flow.services.pachyderm, commit_id, watcher=Watcher(logging.getLogger(), seen.append))
        assert failed.value.failure.killed
        assert failed.value.failure.verdict == Verdict()
        raise JobFailed(JobFailure("not to be launched again"))

    outcome = answer_batch(flow.services, batch_of(version), token="t", run_id="r", log=logging.getLogger(), follow=stop_then_follow)
    assert [(r.status, r.attempts) for r in outcome.records] == [(FileStatus.PENDING, 0)]
    assert seen[-1].state == "killed"
    # Another run answers it: nothing is left for the next test.
    assert answer_batch(flow.services, batch_of(version), token="t2", run_id="r2", log=logging.getLogger()).failure is None
