"""Manual runs, re-executed runs and retried steps: none succeeds without its files, and none takes only part of them."""

import time
from collections.abc import Callable
from typing import Any

import dagster as dg
import pytest
from dagster._core.execution.backfill import PartitionBackfill
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecordStatus

from qa_platform.batches import intake
from qa_platform.batches.pending import Look, look
from qa_platform.batches.retry import request_retries
from qa_platform.clients.postgres import connect
from qa_platform.clients.services import Services
from qa_platform.contract import INCOMING, FileStatus, partition_key
from qa_platform.definitions import defs
from qa_platform.errors import TransientError
from qa_platform.ledger import FileRecord, Ledger
from qa_platform.orchestration.catalog import ANSWERED_QUESTIONS, QUESTION_ANSWER
from qa_platform.orchestration.jobs import answer_pending_files_job
from qa_platform.orchestration.partitions import RANGE_END_TAG, RANGE_START_TAG
from qa_platform.orchestration.reports.checks import COMPLETE, REVIEW
from qa_platform.orchestration.reports.events import Reporter
from qa_platform.orchestration.resources import platform_resource
from qa_platform.settings import BucketSettings, ExecutionSettings, PostgresSettings
from qa_platform_tests.flow import Flow, bridge, csv_of, flow

__all__ = ["flow"]

pytestmark = pytest.mark.slow


@pytest.fixture
def one_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QA_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("QA_STEP_RETRY_SECONDS", "0")


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of files whose reading fails with an error that nobody foresaw."""
    names: set[str] = set()
    split_file: Callable[..., object] = intake.split_file

    def split(services: Services, record: FileRecord, *arguments: Any, **options: Any) -> object:
        if record.version.name in names:
            raise RuntimeError("the reader has a bug")
        return split_file(services, record, *arguments, **options)

    monkeypatch.setattr(intake, "split_file", split)
    return names


def run_by_hand(flow: Flow, first: str, last: str) -> dg.ExecuteInProcessResult:
    tags = {RANGE_START_TAG: partition_key(first), RANGE_END_TAG: partition_key(last)}
    job = defs.resolve_job_def("answer_questions")
    return job.execute_in_process(tags=tags, instance=flow.instance, raise_on_error=False)


def answer_pending_files(flow: Flow) -> dg.ExecuteInProcessResult:
    # With this process's settings: those of `defs` are from before the test changed them.
    job, resources = answer_pending_files_job(ExecutionSettings()), {"platform": platform_resource(BucketSettings())}
    return job.execute_in_process(instance=flow.instance, resources=resources, raise_on_error=False)


def message_of(result: dg.ExecuteInProcessResult) -> str:
    data: Any = result.get_step_failure_events()[0].step_failure_data
    return str(data.user_failure_data.description)


def unavailable_at_the_second_look(patch: pytest.MonkeyPatch) -> list[Services]:
    """Let the job for CI fail once, when it has answered what its first look found; the looks."""
    looks = list[Services]()

    def look_or_fail(services: Services) -> Look:
        looks.append(services)
        if len(looks) == 2:
            raise TransientError("PostgreSQL is unavailable")
        return look(services)

    patch.setattr("qa_platform.orchestration.jobs.look", look_or_fail)
    return looks


@pytest.mark.usefixtures("one_attempt")
def test_a_file_that_is_parked_because_it_cannot_be_read_fails_its_run_also_when_that_is_run_again(
    flow: Flow, unreadable: set[str]
) -> None:
    unreadable.add("parked.csv")
    bad, good = flow.upload("parked.csv", csv_of(bridge("Ulm"))), flow.upload("beside-parked.csv", csv_of(bridge("Graz")))
    (request,) = flow.tick()
    # The second time, everything is done and nothing is read.
    for _ in range(2):
        result = flow.run(request)
        assert not result.success
        message = message_of(result)
        assert "'parked.csv' failed for the last time" in message.splitlines()[0]
        assert "`qa-platform retry FILE`" in message.splitlines()[0]
        assert "parked.csv: RuntimeError: the reader has a bug" in message
        assert "beside-parked.csv" not in message
    assert [flow.record(version).status for version in (bad, good)] == [FileStatus.FAILED, FileStatus.FINISHED]
    # The job for CI fails as long as a failed upload is there.
    flow.services.bucket.delete_blob(INCOMING + "parked.csv")


def test_a_sensor_takes_no_file_of_a_run_by_hand(flow: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"range/{number}.csv" for number in range(3)]
    for name in names:
        flow.upload(name, csv_of(bridge(name)))
    assert [result.success for result in flow.tick_and_run()] == [True]
    requests: list[dg.RunRequest] = []

    def then_tick(*arguments: Any, **options: Any) -> list[FileRecord]:
        records = request_retries(*arguments, **options)
        requests.extend(flow.tick())
        return records

    monkeypatch.setattr("qa_platform.orchestration.assets.answers.request_retries", then_tick)
    assert run_by_hand(flow, names[0], names[-1]).success
    assert requests == []
    assert [flow.materializations(QUESTION_ANSWER, name) for name in names] == [2, 2, 2]


def test_a_run_by_hand_asks_for_nothing_where_one_of_its_sources_is_gone(flow: Flow) -> None:
    versions = [flow.upload(f"half/{number}.csv", csv_of(bridge(f"Ort{number}"))) for number in range(2)]
    assert [result.success for result in flow.tick_and_run()] == [True]
    for place in flow.objects("processed/half/1.csv/"):
        flow.services.bucket.delete_blob(place)
    result = run_by_hand(flow, "half/0.csv", "half/1.csv")
    assert not result.success
    assert "the source of 'half/1.csv' is gone" in message_of(result)
    assert [(flow.record(v).status, flow.record(v).load_id) for v in versions] == [(FileStatus.FINISHED, 1)] * 2


@pytest.mark.usefixtures("one_attempt")
def test_the_job_for_ci_remembers_failed_files_when_its_step_is_tried_again(
    flow: Flow, monkeypatch: pytest.MonkeyPatch, unreadable: set[str]
) -> None:
    unreadable.add("ci-parked.csv")
    version, looks = flow.upload("ci-parked.csv", csv_of(bridge("Genf"))), unavailable_at_the_second_look(monkeypatch)
    result = answer_pending_files(flow)
    assert len(looks) > 2, "the step was tried again"
    assert flow.record(version).status is FileStatus.FAILED
    assert not result.success
    assert "1 files could not be answered: ci-parked.csv" in message_of(result)
    again = answer_pending_files(flow)
    assert not again.success, "nothing waits, and the file is still not answered"
    assert "1 files could not be answered: ci-parked.csv" in message_of(again)
    flow.services.bucket.delete_blob(INCOMING + version.name)
    assert answer_pending_files(flow).success, "its owner gave it up"
    assert flow.record(version).status is FileStatus.SUPERSEDED


def test_the_job_for_ci_needs_no_sensor_for_uploads_that_are_deleted_while_they_wait(flow: Flow) -> None:
    version = flow.upload("ci-deleted.csv", csv_of(bridge("Worms")))
    with Ledger(PostgresSettings()) as ledger:
        ledger.claim([version], owner="died", lease_seconds=-1)
    flow.services.bucket.delete_blob(INCOMING + version.name)
    assert answer_pending_files(flow).success
    assert flow.record(version).status is FileStatus.SUPERSEDED


def test_the_job_for_ci_fails_if_a_source_cannot_leave_incoming(flow: Flow) -> None:
    version = flow.upload("ci-held.csv", csv_of(bridge("Speyer")))
    held = flow.services.bucket.blob(INCOMING + version.name)
    held.temporary_hold = True
    held.patch()
    for _ in range(2):
        result = answer_pending_files(flow)
        assert not result.success
        assert "these files are answered or rejected, and their sources cannot leave incoming/: ci-held.csv" in message_of(result)
        assert flow.record(version).status is FileStatus.LOADED
    held.temporary_hold = False
    held.patch()
    with connect(PostgresSettings()) as connection:
        connection.execute("UPDATE question_file SET retry_at = now() WHERE source_file = %s", [version.name])
    assert answer_pending_files(flow).success
    assert flow.record(version).status is FileStatus.FINISHED


@pytest.mark.usefixtures("one_attempt")
def test_the_job_for_ci_remembers_failed_checks_when_its_step_is_tried_again(flow: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    flow.upload("ci-tampered.csv", csv_of(bridge("Pirna"), bridge("Aue")))
    report = Reporter.report

    def tampered_with(*arguments: Any, **options: Any) -> list[dg.AssetCheckEvaluation]:
        with connect(PostgresSettings()) as connection:
            connection.execute("DELETE FROM question_answer WHERE source_file = 'ci-tampered.csv' AND row_number = 1")
        return report(*arguments, **options)

    monkeypatch.setattr(Reporter, "report", tampered_with)
    looks = unavailable_at_the_second_look(monkeypatch)
    result = answer_pending_files(flow)
    assert len(looks) > 2, "the step was tried again"
    assert not result.success
    assert f"ci-tampered.csv ({COMPLETE})" in message_of(result)
    key = dg.AssetCheckKey(QUESTION_ANSWER, COMPLETE)
    (shown,) = flow.instance.event_log_storage.get_latest_asset_check_execution_by_key([key]).values()
    assert shown.event
    assert shown.event.get_dagster_event().asset_check_evaluation_data.partition is None, "the second attempt says it of the first one"
    assert shown.status is AssetCheckExecutionRecordStatus.FAILED


def test_the_job_for_ci_shows_a_failed_check_also_if_later_batches_pass_it(flow: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QA_BATCH_FILES", "1")
    bad = flow.upload("ci-1-bad.csv", csv_of(("", "a context"), ("", "a context")))
    good = flow.upload("ci-2-good.csv", csv_of(bridge("Rheine")))
    assert answer_pending_files(flow).success
    assert flow.record(bad).pachyderm_job != flow.record(good).pachyderm_job
    key = dg.AssetCheckKey(QUESTION_ANSWER, REVIEW)
    (shown,) = flow.instance.event_log_storage.get_latest_asset_check_execution_by_key([key]).values()
    assert shown.status is AssetCheckExecutionRecordStatus.FAILED
    assert shown.event
    assert "1 of 2 files: ci-1-bad.csv" in str(shown.event.get_dagster_event().asset_check_evaluation_data.description)


def test_a_run_of_a_backfill_answers_no_file_that_came_between_its_partitions(flow: Flow) -> None:
    chosen, others = [f"chosen/{n}.csv" for n in range(2)], [f"other/{n}.csv" for n in range(3)]
    versions = {name: flow.upload(name, csv_of(bridge(name))) for name in chosen}
    assert [r.success for r in flow.tick_and_run()] == [True]
    versions |= {name: flow.upload(name, csv_of(bridge(name))) for name in others}
    assert [r.success for r in flow.tick_and_run()] == [True]
    backfill = PartitionBackfill.from_asset_partitions(
        backfill_id="chosen",
        asset_graph=defs.resolve_asset_graph(),
        partition_names=chosen,
        asset_selection=[ANSWERED_QUESTIONS, QUESTION_ANSWER],
        backfill_timestamp=time.time(),
        tags={},
        dynamic_partitions_store=flow.instance,
        all_partitions=False,
        title=None,
        description=None,
        run_config=None,
    )
    flow.instance.add_backfill(backfill)
    # Uploaded again while its run waits in the queue: its partition is the last one now.
    for name in (chosen[1], "brand-new.csv"):
        flow.upload(name, csv_of(bridge(f"new {name}")))
    assert [r.success for r in flow.tick_and_run()] == [True]
    tags = {RANGE_START_TAG: partition_key(chosen[0]), RANGE_END_TAG: partition_key(chosen[1]), "dagster/backfill": "chosen"}
    job = defs.resolve_job_def("answer_questions")
    assert job.execute_in_process(tags=tags, instance=flow.instance, raise_on_error=False).success
    assert [flow.record(versions[name]).load_id for name in others] == [1, 1, 1]
    assert flow.record(versions[chosen[0]]).load_id == 2


def test_a_step_that_is_tried_again_asks_for_no_file_a_second_time(flow: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QA_STEP_RETRY_SECONDS", "0")
    names = [f"again/{n}.csv" for n in range(3)]
    versions = [flow.upload(name, csv_of(bridge(name))) for name in names]
    assert [r.success for r in flow.tick_and_run()] == [True]
    report, attempts = Reporter.report, list[int]()

    def report_or_fail(*arguments: Any, **options: Any) -> list[dg.AssetCheckEvaluation]:
        attempts.append(1)
        if len(attempts) == 1:
            raise TransientError("PostgreSQL is unavailable")
        return report(*arguments, **options)

    monkeypatch.setattr(Reporter, "report", report_or_fail)
    assert run_by_hand(flow, names[0], names[-1]).success
    assert len(attempts) == 2
    assert [flow.record(version).load_id for version in versions] == [2, 2, 2]
    assert [flow.materializations(QUESTION_ANSWER, name) for name in names] == [2, 2, 2]


def test_checks_alone_say_what_to_do_instead(flow: Flow) -> None:
    job = dg.define_asset_job("checks_only", selection=dg.AssetSelection.checks_for_assets(QUESTION_ANSWER))
    merged = dg.Definitions.merge(defs, dg.Definitions(jobs=[job]))
    result = merged.resolve_job_def("checks_only").execute_in_process(instance=flow.instance, raise_on_error=False)
    assert not result.success
    assert "it is a bug" not in message_of(result)
    assert "materialise question_answer" in message_of(result)


def test_a_run_without_loaded_files_says_nothing_of_the_checks(flow: Flow) -> None:
    flow.upload("no-header.csv", b"nothing\n")
    (result,) = flow.tick_and_run()
    assert result.success
    assert result.get_asset_check_evaluations() == []


@pytest.mark.usefixtures("one_attempt")
def test_a_failed_run_without_loaded_files_says_nothing_of_the_checks(flow: Flow, unreadable: set[str]) -> None:
    unreadable.add("unreadable.csv")
    flow.upload("unreadable.csv", csv_of(bridge("Ulm")))
    (result,) = flow.tick_and_run()
    assert not result.success
    assert result.get_asset_check_evaluations() == []
