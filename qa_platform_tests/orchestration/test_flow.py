"""The whole flow on the real embedded stack: sensor, run, Pachyderm jobs, table, archive."""

import csv
import io
import json
import re
import signal
import subprocess
import sys
import urllib.request
from dataclasses import asdict
from functools import partial
from typing import Any
from urllib.parse import quote

import dagster as dg
import pytest
from click.testing import CliRunner
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from dagster._core.loader import LoadingContextForTest
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecordStatus

from qa_platform.answering.version import current_code_version
from qa_platform.cli.main import main
from qa_platform.clients.postgres import connect
from qa_platform.contract import ANSWER_COLUMNS, FileStatus, FileVersion, partition_key
from qa_platform.definitions import defs
from qa_platform.embedded.stack import Stack
from qa_platform.ledger import Ledger
from qa_platform.orchestration.assets.model_quality import gold_check
from qa_platform.orchestration.catalog import (
    ANSWERED_QUESTIONS,
    MODEL_QUALITY,
    PLATFORM_STATUS,
    QUESTION_ANSWER,
    RAW_QUESTIONS,
)
from qa_platform.orchestration.partitions import BATCH_TAG, PARTITIONS, RANGE_END_TAG, RANGE_START_TAG
from qa_platform.orchestration.reports.checks import COMPLETE, RECORDED, SPANS, file_evaluations
from qa_platform.orchestration.reports.gold import GOOD_ENOUGH
from qa_platform.orchestration.resources import platform_resource
from qa_platform.results.facts import gather
from qa_platform.settings import BucketSettings, CheckSettings, ExecutionSettings, ModelSettings, PostgresSettings
from qa_platform_tests.batches.test_pending import event_of
from qa_platform_tests.flow import Flow, bridge, csv_of, flow, let_the_claim_run_out, wait_until

__all__ = ["flow"]

pytestmark = pytest.mark.slow


def test_new_files_are_answered_by_one_run_and_rejected_ones_do_not_hold_the_others(flow: Flow) -> None:
    good = [flow.upload(f"batch/{town}.csv", csv_of(bridge(town), bridge(town, 1900))) for town in ("Ulm", "Graz")]
    photo = flow.upload("batch/photo.csv", b"\x89PNG\r\n\x1a\n" + bytes(100))
    requests = flow.tick()
    assert len(requests) == 1
    assert flow.tick() == [], "what is claimed must not be requested again"
    result = flow.run(requests[0])
    assert result.success
    for version in good:
        record = flow.record(version)
        assert (record.status, record.rows, record.answered, record.rejected) == (FileStatus.FINISHED, 2, 2, 0)
        assert [answer for _, answer in flow.rows(version.name)] == ["1872", "1900"]
        for asset in (ANSWERED_QUESTIONS, QUESTION_ANSWER):
            assert flow.materializations(asset, version.name) == 1
        assert flow.objects(f"processed/{version.name}") == [record.place]
    rejected = flow.record(photo)
    assert rejected.status is FileStatus.REJECTED
    assert "binary" in rejected.error
    assert flow.materializations(ANSWERED_QUESTIONS, photo.name) == flow.materializations(QUESTION_ANSWER, photo.name) == 0
    assert len(flow.objects("rejected/batch/photo.csv/")) == 2, "the file and a report"
    assert flow.objects("incoming/batch/") == []
    (observed,) = flow.instance.fetch_observations(dg.AssetRecordsFilter(RAW_QUESTIONS, asset_partitions=[photo.name]), limit=2).records
    assert observed.asset_observation
    (place,) = (name for name in flow.objects("rejected/batch/photo.csv/") if name.endswith(".report.csv"))
    assert f"/o/{quote(place, safe='')}?" in str(observed.asset_observation.metadata["report"].value)
    checks = {e.check_name: e.passed for e in result.get_asset_check_evaluations() if e.partition is None}
    assert checks
    assert all(checks.values())
    lines = [entry.user_message for entry in flow.instance.all_logs(result.run_id)]
    assert any("question_answer | " in line for line in lines), "the Pachyderm job's log is in the run"


def test_a_check_that_one_file_fails_is_shown_as_failed_whatever_file_comes_after_it(flow: Flow) -> None:
    flow.upload("1-bad.csv", csv_of(("", "a context"), ("", "a context")))
    flow.upload("2-good.csv", csv_of(bridge("Ulm")))
    (result,) = flow.tick_and_run()
    assert result.success
    key = dg.AssetCheckKey(QUESTION_ANSWER, "few_rows_need_a_look")
    (shown,) = flow.instance.event_log_storage.get_latest_asset_check_execution_by_key([key]).values()
    assert shown.partition == "1-bad.csv"
    assert shown.status is AssetCheckExecutionRecordStatus.FAILED


def test_the_same_upload_again_launches_no_run_and_is_unchanged(flow: Flow) -> None:
    content = csv_of(bridge("Linz"))
    flow.upload("same.csv", content)
    assert [r.success for r in flow.tick_and_run()] == [True]
    again = flow.upload("same.csv", content)
    assert flow.tick() == []
    assert flow.record(again).status is FileStatus.UNCHANGED
    assert flow.objects("incoming/same.csv") == []


def test_answers_are_found_below_any_number_of_identical_uploads(flow: Flow) -> None:
    flow.upload("often.csv", csv_of(bridge("Melk"), ("", "a context")))
    assert [r.success for r in flow.tick_and_run()] == [True]
    with connect(PostgresSettings()) as connection:
        connection.execute(
            """
            INSERT INTO question_file SELECT (jsonb_populate_record(f, jsonb_build_object(
                'generation', f.generation + n, 'status', 'unchanged', 'loaded_at', null))).*
            FROM question_file f, generate_series(1, 150) AS n WHERE f.source_file = 'often.csv'
            """
        )
    answered = CliRunner().invoke(main, ["answers", "often.csv"])
    assert [row["answer"] for row in csv.DictReader(io.StringIO(answered.stdout))] == ["1872", ""]
    rejected = CliRunner().invoke(main, ["answers", "often.csv", "--rejected"])
    assert [row["reason"] for row in csv.DictReader(io.StringIO(rejected.stdout))] == ["empty_question"]
    few, all_of_them = (CliRunner().invoke(main, ["status", "often.csv", "--json", "--limit", limit]) for limit in ("100", "151"))
    assert (len(few.stdout.splitlines()), len(all_of_them.stdout.splitlines())) == (100, 151)
    assert "--limit shows more" in few.stderr
    assert all_of_them.stderr == ""


def test_a_changed_file_replaces_its_rows(flow: Flow) -> None:
    flow.upload("changed.csv", csv_of(bridge("Bonn"), bridge("Jena"), bridge("Trier")))
    flow.tick_and_run()
    flow.upload("changed.csv", csv_of(bridge("Bonn"), bridge("Kiel", 1901)))
    assert [r.success for r in flow.tick_and_run()] == [True]
    assert flow.rows("changed.csv") == [
        ("When was the bridge of Bonn finished?", "1872"),
        ("When was the bridge of Kiel finished?", "1901"),
    ]


def test_what_is_loaded_is_in_step_with_its_upload_for_dagster(flow: Flow) -> None:
    version = flow.upload("in_step.csv", csv_of(bridge("Jena")))
    assert [result.success for result in flow.tick_and_run()] == [True]
    shown = CachingStaleStatusResolver(flow.instance, defs.resolve_asset_graph(), LoadingContextForTest(flow.instance))
    for asset in (ANSWERED_QUESTIONS, QUESTION_ANSWER):
        assert shown.get_status(asset, partition_key(version.name)) is StaleStatus.FRESH, shown.get_stale_causes(asset, version.name)


def test_a_retry_answers_an_archived_file_again(flow: Flow) -> None:
    version = flow.upload("again.csv", csv_of(bridge("Celle")))
    flow.tick_and_run()
    with Ledger(PostgresSettings()) as ledger:
        ledger.request_retries(["again.csv"])
    assert [r.success for r in flow.tick_and_run()] == [True]
    record = flow.record(version)
    assert (record.status, record.load_id) == (FileStatus.FINISHED, 2)
    assert len(flow.rows("again.csv")) == 1
    assert flow.materializations(QUESTION_ANSWER, "again.csv") == 2


def test_a_run_by_hand_loads_the_table_again_from_the_recorded_commit(flow: Flow) -> None:
    flow.upload("reload.csv", csv_of(bridge("Hof")))
    flow.tick_and_run()
    with connect(PostgresSettings()) as connection:
        connection.execute("DELETE FROM question_answer WHERE source_file = 'reload.csv'")
    key = partition_key("reload.csv")
    job = defs.resolve_job_def("answer_questions")
    result = job.execute_in_process(
        tags={RANGE_START_TAG: key, RANGE_END_TAG: key}, asset_selection=[QUESTION_ANSWER], instance=flow.instance, raise_on_error=False
    )
    assert result.success
    assert flow.rows("reload.csv") == [("When was the bridge of Hof finished?", "1872")]


def test_a_batch_that_is_not_the_runs_partitions_fails_at_once(flow: Flow) -> None:
    flow.upload("shifted.csv", csv_of(bridge("Gera")))
    request = flow.tick()[0]
    other = partition_key("same.csv")
    tags = {**request.tags, RANGE_START_TAG: other, RANGE_END_TAG: other}
    result = flow.run(dg.RunRequest(run_key="x", run_config=request.run_config, tags=tags))
    assert not result.success
    assert flow.rows("shifted.csv") == []
    assert flow.run(request).success


@pytest.mark.parametrize("selected", [[ANSWERED_QUESTIONS, QUESTION_ANSWER], [QUESTION_ANSWER]])
def test_a_run_by_hand_whose_range_became_empty_says_so(flow: Flow, selected: list[dg.AssetKey]) -> None:
    keys = [partition_key(f"moved-{len(selected)}-{name}.csv") for name in ("first", "last")]
    flow.instance.add_dynamic_partitions(PARTITIONS, keys)
    # As when a new upload of the first moved it behind the last.
    result = defs.resolve_job_def("answer_questions").execute_in_process(
        tags={RANGE_START_TAG: keys[1], RANGE_END_TAG: keys[0]}, asset_selection=selected, instance=flow.instance, raise_on_error=False
    )
    assert not result.success
    (failed,) = (e for e in result.all_events if e.event_type is dg.DagsterEventType.STEP_FAILURE)
    assert "they have changed since they were selected; select them again" in str(failed.step_failure_data.user_failure_data)


KILLED_RUN = """
import json, sys
from qa_platform.batches.run import answer_batch
from qa_platform.contract import FileVersion
from qa_platform.batches.plan import Batch, batch_id
from qa_platform.orchestration.resources import platform_resource
from qa_platform.settings import BucketSettings
import dagster as dg, logging
version = FileVersion(**json.loads(sys.argv[1]))
with dg.build_resources({"platform": platform_resource(BucketSettings())}) as resources:
    batch = Batch(batch_id([(version, 1)]), (version,))
    answer_batch(resources.platform.services(), batch, token="", run_id="killed", log=logging.getLogger())
"""


# The report comes between load and archive.
KILLED_AFTER_LOAD = KILLED_RUN.replace("import json, sys", "import json, os, signal, sys").replace(
    "log=logging.getLogger())", "log=logging.getLogger(), report=lambda records: os.kill(os.getpid(), signal.SIGKILL))"
)


def kill_a_run_of(flow: Flow, stack: Stack, version: FileVersion) -> str:
    """Start a run of one file, kill it with -9 once it has made its commit, and let its claim run out; the commit."""
    run = subprocess.Popen([sys.executable, "-c", KILLED_RUN, json.dumps(asdict(version))], env=stack.environment)

    def commit() -> str:
        with Ledger(PostgresSettings()) as ledger:
            found = ledger.records([version])
        return found[version.name, version.generation].pachyderm_commit if found else ""

    launched = wait_until(commit, "the run has made its commit")
    run.kill()
    run.wait()
    return launched


@pytest.mark.faults
def test_a_batch_whose_run_was_killed_is_resumed_with_the_same_commit_and_jobs(flow: Flow, stack: Stack) -> None:
    version = flow.upload("killed.csv", csv_of(*(bridge(f"Ort{i}") for i in range(300))))
    launched = kill_a_run_of(flow, stack, version)
    let_the_claim_run_out(version)
    requests = flow.tick()
    assert flow.run(requests[0]).success
    record = flow.record(version)
    assert (record.status, record.pachyderm_commit, record.answered) == (FileStatus.FINISHED, launched, 300)
    assert len(flow.rows("killed.csv")) == 300


@pytest.mark.faults
def test_a_name_whose_run_is_killed_twice_between_load_and_archive_is_reported_by_the_sensor_each_time(flow: Flow, stack: Stack) -> None:
    for number in (1, 2):
        version = flow.upload("orphan.csv", csv_of(*(bridge(f"Ort{i}") for i in range(number))))
        run = subprocess.run([sys.executable, "-c", KILLED_AFTER_LOAD, json.dumps(asdict(version))], env=stack.environment, check=False)
        assert run.returncode == -signal.SIGKILL
        assert flow.record(version).status is FileStatus.LOADED
        let_the_claim_run_out(version)
        other = flow.upload(f"beside-orphan-{number}.csv", csv_of(bridge(f"Neu{number}")))
        assert [result.success for result in flow.tick_and_run()] == [True]
        assert [flow.record(v).status for v in (version, other)] == [FileStatus.FINISHED] * 2
        assert flow.materializations(QUESTION_ANSWER, "orphan.csv") == number


def test_the_checks_fail_when_the_table_does_not_hold_what_was_answered(flow: Flow) -> None:
    version = flow.upload("tampered.csv", csv_of(bridge("Pirna"), bridge("Aue")))
    flow.tick_and_run()
    with Ledger(PostgresSettings()) as ledger, connect(PostgresSettings()) as connection:
        connection.execute("DELETE FROM question_answer WHERE source_file = 'tampered.csv' AND row_number = 1")
        connection.execute("UPDATE question_answer SET answer = 'never' WHERE source_file = 'tampered.csv'")
        facts = next(gather(ledger, connection, [flow.record(version)], CheckSettings()))
    failed = {e.check_name for e in file_evaluations(facts, CheckSettings()) if not e.passed}
    assert {COMPLETE, RECORDED, SPANS} <= failed


def test_a_materialisation_shows_a_files_figures_picture_and_answers(flow: Flow) -> None:
    content = csv_of(bridge("Ulm <b>|</b>"), bridge("Graz", 1900), ("", "nothing is asked"), ("", ""))
    version = flow.upload("shown.csv", content)
    assert [r.success for r in flow.tick_and_run()] == [True]
    record = flow.record(version)
    for asset in (ANSWERED_QUESTIONS, QUESTION_ANSWER):
        (found,) = flow.instance.fetch_materializations(
            dg.AssetRecordsFilter(asset_key=asset, asset_partitions=[partition_key("shown.csv")]), limit=2
        ).records
        materialization = found.asset_materialization
        assert materialization
        shown: dict[str, Any] = {label: entry.value for label, entry in materialization.metadata.items()}
        # The table has no row that was rejected.
        assert shown["dagster/partition_row_count"] == (2 if asset == QUESTION_ANSWER else 3)
        assert (shown["rows"], shown["answered"], shown["rejected"], shown["blank rows, skipped"]) == (3, 2, 1, 1)
        assert shown["rejected rows, and why"] == "qa-platform answers --rejected shown.csv"
        with connect(PostgresSettings()) as connection:
            assert len(connection.execute(shown["its answers"]).fetchall()) == 2
        assert shown["seconds answering"] + shown["seconds loading"] == pytest.approx(shown["seconds"], abs=0.03)
        assert "| empty\\_question | 1 |" in shown["rows without an answer, by reason"]
        assert shown["scores"].startswith("![answers by score")
        assert "Ulm \\<b\\>&#124;\\</b\\>" in shown["first answers"]
        assert shown["lowest scores"].count("\n") == 3
        assert (shown["model"], shown["model revision"]) == (record.model, record.model_revision)
        assert shown["seconds"] > 0
        assert shown["rows per second"] > 0
        assert shown["Pachyderm commit"] == record.pachyderm_commit
        assert record.pachyderm_job in shown["Pachyderm job"]
        place, address = re.fullmatch(r"\[(.*)\]\(<(.*)>\)", shown["source"]).groups()  # type: ignore[union-attr]
        assert place.startswith("processed/shown.csv/")
        # As a browser opens it.
        opened = urllib.request.Request(address, headers={"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"})
        with urllib.request.urlopen(opened, timeout=10) as source:
            assert source.read() == content
        assert {"dagster/column_schema", "dagster/column_lineage", "documentation"} <= shown.keys()
        assert (materialization.tags or {})["dagster/code_version"] == current_code_version(ModelSettings().choice)


def test_a_run_that_has_just_begun_is_not_taken_for_gone(flow: Flow) -> None:
    run = flow.instance.create_run_for_job(defs.resolve_job_def("answer_questions"), tags={BATCH_TAG: "batch"})
    try:
        flow.instance.handle_new_event(event_of(run, "PIPELINE_START"))
        flow._evaluate("reconcile")
        found = flow.instance.get_run_by_id(run.run_id)
        assert found
        assert found.status is dg.DagsterRunStatus.STARTED
    finally:
        flow.instance.delete_run(run.run_id)


def test_the_status_of_the_platform_is_reported_when_something_has_changed(flow: Flow) -> None:
    def report() -> dict[str, Any]:
        flow._evaluate("platform_status")
        event = flow.instance.get_latest_materialization_event(PLATFORM_STATUS)
        assert event
        assert event.asset_materialization
        return {"at": event.timestamp, **{label: entry.value for label, entry in event.asset_materialization.metadata.items()}}

    before = report()
    assert report() == before
    flow.upload("status.csv", csv_of(bridge("Ulm"), ("", "nothing is asked")))
    assert [r.success for r in flow.tick_and_run()] == [True]
    after = report()
    assert after["at"] > before["at"]
    assert (after["files a day"], after["rows a day"]) == (before["files a day"] + 1, before["rows a day"] + 2)


def test_the_run_the_sensor_and_the_job_for_ci_write_answered_csvs_and_the_pages_link_to_them(
    flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QA_ANSWERED_PREFIX", "answered/")
    name = "written, \u2028.csv"
    flow.upload(name, csv_of(bridge("Ulm"), ("", "nothing is asked")))
    assert [r.success for r in flow.tick_and_run()] == [True]
    wanted = CliRunner().invoke(main, ["answers", name]).stdout_bytes
    for asset in (RAW_QUESTIONS, ANSWERED_QUESTIONS, QUESTION_ANSWER):
        (found,) = flow.instance.fetch_materializations(
            dg.AssetRecordsFilter(asset_key=asset, asset_partitions=[partition_key(name)]), limit=2
        ).records
        assert found.asset_materialization
        _, address = str(found.asset_materialization.metadata["answered CSV"].value).split("](")
        opened = urllib.request.Request(address.strip("<>)"), headers={"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"})
        with urllib.request.urlopen(opened, timeout=10) as written:
            assert written.read() == wanted
    for door in (flow.tick, partial(defs.resolve_job_def("answer_pending_files").execute_in_process, instance=flow.instance)):
        flow.services.bucket.delete_blob(f"answered/{name}")
        with connect(PostgresSettings()) as connection:
            connection.execute("UPDATE question_file SET csv_owed = true WHERE source_file = %s", [name])
        door()
        assert flow.services.bucket.blob(f"answered/{name}").download_as_bytes() == wanted


def test_a_gold_set_is_answered_like_any_file_and_its_quality_is_measured(flow: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    (question, context), other = bridge("Ulm"), bridge("Graz", 1900)
    gold = io.StringIO()
    csv.writer(gold).writerows([("question", "context", "answers"), (question, context, '["1872"]'), (*other, "1872")])
    flow.upload("gold/bridges.csv", gold.getvalue().encode())
    flow.upload("not-gold.csv", csv_of(bridge("Bonn")))
    (result,) = flow.tick_and_run()
    assert result.success
    (quality,) = flow.instance.fetch_materializations(MODEL_QUALITY, limit=2).records
    assert quality.asset_materialization
    shown: dict[str, Any] = {label: entry.value for label, entry in quality.asset_materialization.metadata.items()}
    assert (shown["questions"], shown["exact match"], shown["F1"]) == (2, 50.0, 50.0)
    assert "| 1900 | 1872 | 0.000 |" in shown["worst mistakes"]
    (check,) = (e for e in result.get_asset_check_evaluations() if e.check_name == GOOD_ENOUGH)
    assert not check.passed, "F1 is below its floor"
    assert check.severity is dg.AssetCheckSeverity.WARN
    # A floor that it reaches, and the check by hand.
    monkeypatch.setenv("QA_GOLD_F1", "50")
    by_hand = dg.materialize(
        [gold_check(ExecutionSettings())],
        instance=flow.instance,
        resources={"platform": platform_resource(BucketSettings())},
        selection=dg.AssetSelection.all_asset_checks(),
    )
    assert [e.passed for e in by_hand.get_asset_check_evaluations()] == [True]


def test_a_gold_set_without_answers_is_answered_and_warned_of(flow: Flow) -> None:
    version = flow.upload("gold/no-answers.csv", csv_of(bridge("Ulm")))
    (result,) = flow.tick_and_run()
    assert result.success
    assert flow.record(version).status is FileStatus.FINISHED
    (check,) = (e for e in result.get_asset_check_evaluations() if e.check_name == GOOD_ENOUGH)
    assert not check.passed
    assert "it has no column answers; a gold CSV has the columns question, context and answers" in str(check.metadata["not measured"].value)


def test_files_with_hostile_names_go_the_whole_way(flow: Flow) -> None:
    names = ["a b 'c' \"d\".csv", "../up.csv", "50%...,x.csv", "ü/ñ 🙂.csv", "x" * 1000 + ".csv"]
    versions = [flow.upload(name, csv_of(bridge("Calw"))) for name in names]
    assert all(r.success for r in flow.tick_and_run())
    assert [flow.record(v).status for v in versions] == [FileStatus.FINISHED] * len(names)
    assert [len(flow.rows(name)) for name in names] == [1] * len(names)


def test_the_job_for_ci_answers_all_that_waits_and_reports_the_same(flow: Flow) -> None:
    version = flow.upload("ci.csv", csv_of(bridge("Wien"), ("", "no question")))
    flow.upload("ci.txt", b"not a file of questions")
    result = defs.resolve_job_def("answer_pending_files").execute_in_process(instance=flow.instance)
    assert result.success
    record = flow.record(version)
    assert (record.status, record.answered, record.rejected) == (FileStatus.FINISHED, 1, 1)
    assert flow.materializations(QUESTION_ANSWER, "ci.csv") == 1
    assert flow.objects("incoming/ci") == ["incoming/ci.txt"]


def test_the_job_for_ci_fails_when_a_file_could_not_be_answered_and_says_why(flow: Flow) -> None:
    version = flow.upload("no-model.csv", csv_of(bridge("Genf")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QA_MODEL", "/no/such/model")
        result = defs.resolve_job_def("answer_pending_files").execute_in_process(instance=flow.instance, raise_on_error=False)
    assert not result.success
    record = flow.record(version)
    assert (record.status, record.attempts) == (FileStatus.PENDING, 0)
    assert "/no/such/model" in record.error
    assert flow.objects("incoming/no-model.csv")
    with Ledger(PostgresSettings()) as ledger:
        ledger.request_retries(["no-model.csv"])
    assert [r.success for r in flow.tick_and_run()] == [True]


def test_the_answers_command_prints_the_rows_in_their_order_with_the_contracts_columns(flow: Flow, stack: Stack) -> None:
    rows = [bridge("Ulm"), ("", "nothing is asked"), bridge("Graz", 1901)]
    flow.upload("printed.csv", csv_of(*rows))
    flow.tick_and_run()
    done = subprocess.run(["qa-platform", "answers", "printed.csv"], env=stack.environment, capture_output=True, text=True, check=True)
    header, *answered = csv.reader(io.StringIO(done.stdout))
    assert header == ["question", "context", *ANSWER_COLUMNS]
    assert [(row[0], row[1]) for row in answered] == rows
    assert [(row[2], row[-1]) for row in answered] == [("1872", ""), ("", "empty_question"), ("1901", "")]
    for row in answered:
        assert row[1][int(row[4] or 0) : int(row[5] or 0)] == row[2]
    status = subprocess.run(
        ["qa-platform", "status", "printed.csv", "--json"], env=stack.environment, capture_output=True, text=True, check=True
    )
    assert json.loads(status.stdout)["status"] == "finished"
