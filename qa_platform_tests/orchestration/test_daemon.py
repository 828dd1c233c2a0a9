"""What Dagster's daemon does with the sensors' ticks if a file, a report or a request fails."""

import io
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.event_api import PartitionKeyFilter
from dagster._core.execution.backfill import BulkActionStatus, PartitionBackfill
from dagster._core.scheduler.instigation import TickStatus
from dagster._daemon.backfill import execute_backfill_iteration
from google.cloud import storage

from qa_platform.clients.bucket import archived_name, upload
from qa_platform.clients.postgres import connect
from qa_platform.contract import FileStatus, FileVersion, partition_key
from qa_platform.definitions import defs
from qa_platform.ledger import FileRecord, Ledger
from qa_platform.loading import migrate
from qa_platform.orchestration import housekeeping, notifications
from qa_platform.orchestration.catalog import ANSWERED_QUESTIONS, QUESTION_ANSWER, RAW_QUESTIONS
from qa_platform.orchestration.housekeeping import housekeeping_job
from qa_platform.orchestration.partitions import PARTITIONS, RANGE_END_TAG, RANGE_START_TAG
from qa_platform.orchestration.reports.checks import CHECK_SPECS, COMPLETE
from qa_platform.orchestration.resources import platform_resource
from qa_platform.orchestration.sensors import incoming
from qa_platform.settings import BucketSettings, ExecutionSettings, PostgresSettings, WorkSettings
from qa_platform_tests.conftest import Database, new_database
from qa_platform_tests.daemon import Daemon, daemon
from qa_platform_tests.flow import wait_until
from qa_platform_tests.ledger.helpers import load

pytestmark = pytest.mark.slow

CONTENT = b"question,context\nWhere?,Here.\n"


@pytest.fixture(scope="module")
def ticking(postgres_socket: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for the module. Every test has other names of files."""
    with new_database(postgres_socket) as dagster_storage, daemon(dagster_storage.url, tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture(autouse=True)
def platform(bucket: storage.Bucket, gcs_address: str, database: Database, monkeypatch: pytest.MonkeyPatch) -> storage.Bucket:
    """The bucket of a platform whose services the environment names. Every look is to beat, and there is no Pachyderm."""
    variables = {**database.environment, "STORAGE_BUCKET": bucket.name, "STORAGE_EMULATOR_HOST": f"http://{gcs_address}"}
    for name, value in {**variables, "QA_HEARTBEAT_SECONDS": "1", "QA_BATCH_FILES": "1"}.items():
        monkeypatch.setenv(name, value)
    migrate.upgrade(PostgresSettings())
    return bucket


def put(bucket: storage.Bucket, name: str, content: bytes = CONTENT) -> FileVersion:
    return upload(bucket, name, io.BytesIO(content))


def loaded(bucket: storage.Bucket, name: str, folder: Path, content: bytes = CONTENT) -> FileVersion:
    """An upload whose run was killed after its rows had been loaded, and before anything was reported or archived."""
    version = put(bucket, name, content)
    with connect(PostgresSettings()) as connection:
        load(connection, folder, version)
    return version


def block_the_archive(bucket: storage.Bucket, version: FileVersion) -> None:
    bucket.blob(archived_name(version, rejected=False)).upload_from_string(b"something else")


def record(version: FileVersion) -> FileRecord:
    with Ledger(PostgresSettings()) as ledger:
        return ledger.records([version])[version.name, version.generation]


def let_the_claims_run_out() -> None:
    with connect(PostgresSettings()) as connection:
        connection.execute("UPDATE question_file SET claim_until = now() WHERE claim_owner IS NOT NULL")


def checks_of(running: Daemon, name: str) -> list[bool]:
    """Whether they passed: the newest evaluation of every check of a file."""
    storage = running.instance.event_log_storage
    keys = [dg.AssetCheckKey(QUESTION_ANSWER, spec.name) for spec in CHECK_SPECS]
    partition = PartitionKeyFilter(key=partition_key(name))
    newest = [storage.get_asset_check_execution_history(key, limit=1, partition_filter=partition) for key in keys]
    return [executions[0].status.value == "SUCCEEDED" for executions in newest if executions]


@pytest.fixture
def alerts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts of the notifications that are sent."""
    sent: list[str] = []

    def channels(*_: object) -> list[notifications.Channel]:
        return [notifications.Channel("a list", "", lambda subject, text: sent.append(text))]

    monkeypatch.setattr(notifications, "channels", channels)
    return sent


def test_a_file_that_cannot_be_archived_is_reported_once_and_new_uploads_get_their_runs(
    platform: storage.Bucket, ticking: Daemon, tmp_path: Path, alerts: list[str]
) -> None:
    stuck = loaded(platform, "stuck.csv", tmp_path)
    block_the_archive(platform, stuck)
    with connect(PostgresSettings()) as connection:
        connection.execute("DELETE FROM question_answer WHERE row_number = 1")
    for number in range(3):
        put(platform, f"after-stuck-{number}.csv", CONTENT * (number + 1))
        assert ticking.tick().status is TickStatus.SUCCESS
        assert f"after-stuck-{number}.csv" in ticking.queued()
        assert "1 files that are done are not archived yet" in str(ticking.last_tick("done_files").skip_reason)
    assert record(stuck).status is FileStatus.LOADED
    assert ticking.materializations(QUESTION_ANSWER, "stuck.csv") == 1
    assert len(checks_of(ticking, "stuck.csv")) == len(CHECK_SPECS)
    assert len([text for text in alerts if COMPLETE in text]) == 1, "one alert, not one each tick"


def test_a_tick_leaves_a_log_only_if_it_has_something_to_say(platform: storage.Bucket, ticking: Daemon, tmp_path: Path) -> None:
    def logs() -> dict[Path, str]:
        return {path: path.read_text() for path in Path(ticking.instance.storage_directory()).rglob("*.err")}

    put(platform, "quiet.csv")
    before = logs()
    for _ in range(2):
        ticking.tick()
        assert ticking.last_tick("done_files").status is TickStatus.SKIPPED
    assert logs() == before
    block_the_archive(platform, loaded(platform, "loud.csv", tmp_path))
    ticking.tick()
    said = [text for path, text in logs().items() if path not in before]
    assert len(said) == 1
    assert "loud.csv" in said[0]


def test_a_name_whose_run_is_killed_between_load_and_archive_again_and_again_goes_on(
    platform: storage.Bucket, ticking: Daemon, tmp_path: Path
) -> None:
    for number in range(1, 4):
        version = loaded(platform, "killed-again.csv", tmp_path, CONTENT * number)
        put(platform, f"beside-{number}.csv", CONTENT * number)
        assert ticking.tick().status is TickStatus.SUCCESS
        assert f"beside-{number}.csv" in ticking.queued()
        assert record(version).status is FileStatus.FINISHED
        assert ticking.materializations(QUESTION_ANSWER, "killed-again.csv") == number
        assert len(checks_of(ticking, "killed-again.csv")) == len(CHECK_SPECS)


def test_events_that_cannot_be_stored_cost_no_run(platform: storage.Bucket, ticking: Daemon, tmp_path: Path) -> None:
    done = loaded(platform, "untold.csv", tmp_path)
    put(platform, "unseen.csv")
    with ticking.storage_refuses("event_logs", "NEW.dagster_event_type = 'ASSET_MATERIALIZATION'"):
        assert ticking.tick().status is TickStatus.SUCCESS
    assert "unseen.csv" in ticking.queued()
    assert ticking.materializations(RAW_QUESTIONS, "unseen.csv") == ticking.materializations(QUESTION_ANSWER, "untold.csv") == 0
    assert (record(done).status, "could not be reported" in record(done).archive_error) == (FileStatus.LOADED, True)
    with connect(PostgresSettings()) as connection:
        connection.execute("UPDATE question_file SET retry_at = now() WHERE retry_at IS NOT NULL")
    ticking.tick()
    assert record(done).status is FileStatus.FINISHED
    assert ticking.materializations(QUESTION_ANSWER, "untold.csv") == 1
    assert len(checks_of(ticking, "untold.csv")) == len(CHECK_SPECS)


def test_a_heartbeat_that_fails_costs_no_run(platform: storage.Bucket, ticking: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no heart")

    monkeypatch.setattr(incoming, "beat", fails)
    put(platform, "heartless.csv")
    assert ticking.tick().status is TickStatus.SUCCESS
    assert "heartless.csv" in ticking.queued()


def test_a_batch_that_cannot_be_claimed_costs_no_other_batch_its_run(platform: storage.Bucket, ticking: Daemon) -> None:
    put(platform, "poison.csv")
    put(platform, "innocent.csv", CONTENT * 2)
    with connect(PostgresSettings()) as connection:
        connection.execute("ALTER TABLE question_file ADD CONSTRAINT poison CHECK (source_file <> 'poison.csv')")
    before = ticking.beats()
    assert ticking.tick().status is TickStatus.SUCCESS
    assert "innocent.csv" in ticking.queued()
    assert "poison.csv" not in ticking.queued()
    assert ticking.beats() == before, "an upload gets no run"


def test_the_heart_does_not_beat_while_requests_become_no_runs(platform: storage.Bucket, ticking: Daemon) -> None:
    put(platform, "requested-in-vain.csv")
    with ticking.storage_refuses("runs", "true"):
        assert ticking.tick().status is TickStatus.FAILURE
        before = ticking.beats()
        let_the_claims_run_out()
        # The daemon tries the requests of a failed tick once more before it lets the sensor look again.
        assert [ticking.tick().status for _ in range(3)] == [TickStatus.FAILURE] * 3, "the second of these requests the run again"
        skipped = ticking.tick()
        assert ticking.beats() == before
    assert "1 runs were requested but do not exist" in str(skipped.skip_reason)
    let_the_claims_run_out()
    ticking.tick()
    assert "requested-in-vain.csv" in ticking.queued()
    ticking.tick()
    assert ticking.beats() > before


def test_a_queued_run_keeps_its_files_until_it_is_cancelled(platform: storage.Bucket, ticking: Daemon) -> None:
    put(platform, "queued.csv")
    ticking.tick()
    run = ticking.queued()["queued.csv"]
    for _ in range(2):
        let_the_claims_run_out()
        assert ticking.tick().status is TickStatus.SKIPPED
    ticking.instance.report_run_canceled(run)
    ticking.tick()
    assert "queued.csv" not in ticking.queued(), "nobody renews the claim, and it still lasts"
    let_the_claims_run_out()
    ticking.tick()
    assert ticking.queued()["queued.csv"].run_id != run.run_id


def test_no_more_is_requested_while_many_runs_are_queued(
    platform: storage.Bucket, ticking: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(platform, "queued-first.csv")
    ticking.tick()
    monkeypatch.setattr(incoming, "_QUEUED_RUNS", len(ticking.queued()))
    put(platform, "queued-behind.csv")
    before = ticking.beats()
    tick = ticking.tick()
    assert f"{len(ticking.queued())} requested runs have not started" in str(tick.skip_reason)
    assert "queued-behind.csv" not in ticking.queued()

    def beats_again() -> bool:
        ticking.tick()
        return ticking.beats() > before

    # It beats once a second at most.
    wait_until(beats_again, "the heart beats, since nothing is broken")
    ticking.instance.report_run_canceled(ticking.queued()["queued-first.csv"])
    ticking.tick()
    assert "queued-behind.csv" in ticking.queued()


def backfill_of(running: Daemon, names: list[str]) -> str:
    """A backfill of these partitions, which the daemon has not looked at yet; its id."""
    backfill = PartitionBackfill.from_asset_partitions(
        backfill_id=f"backfill-of-{names[0]}",
        asset_graph=running.workspace.create_request_context().asset_graph,
        partition_names=names,
        asset_selection=[ANSWERED_QUESTIONS, QUESTION_ANSWER],
        backfill_timestamp=time.time(),
        tags={},
        dynamic_partitions_store=running.instance,
        all_partitions=False,
        title=None,
        description=None,
        run_config=None,
    )
    running.instance.add_backfill(backfill)
    return backfill.backfill_id


def status_after_a_look(running: Daemon, backfill_id: str) -> BulkActionStatus:
    list(execute_backfill_iteration(running.workspace, logging.getLogger(__name__)))
    backfill = running.instance.get_backfill(backfill_id)
    assert backfill
    return backfill.status


def test_partitions_that_move_with_a_new_upload_are_never_missing_for_a_backfill(
    platform: storage.Bucket, ticking: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QA_BATCH_FILES", "2")
    ticking.instance.add_dynamic_partitions(PARTITIONS, ["moved.csv", "between.csv"])
    backfill = backfill_of(ticking, ["moved.csv"])
    for name in ("moved.csv", "moved-too.csv"):
        put(platform, name)
    resources = {"platform": platform_resource(BucketSettings())}
    with dg.build_sensor_context(instance=ticking.instance, resources=resources) as context:
        # What the daemon stores of a tick comes later.
        tick = defs.resolve_sensor_def("incoming_files").evaluate_tick(context)
    assert [(r.tags[RANGE_START_TAG], r.tags[RANGE_END_TAG]) for r in tick.run_requests or ()] == [("moved.csv", "moved-too.csv")]
    assert list(ticking.instance.get_dynamic_partitions(PARTITIONS))[-3:] == ["between.csv", "moved.csv", "moved-too.csv"]
    assert status_after_a_look(ticking, backfill) is BulkActionStatus.REQUESTED


def test_a_backfill_of_many_files_becomes_runs_of_as_many_files_as_a_batch_has(ticking: Daemon) -> None:
    most = WorkSettings.model_fields["batch_files"].default
    names = [f"many-{number}.csv" for number in range(most + 1)]
    ticking.instance.add_dynamic_partitions(PARTITIONS, names)
    backfill = backfill_of(ticking, names)
    assert status_after_a_look(ticking, backfill) is BulkActionStatus.REQUESTED
    runs = ticking.instance.get_runs(dg.RunsFilter(tags={"dagster/backfill": backfill}))
    # A run of one partition has a key and no range.
    ranges = {(run.tags.get(RANGE_START_TAG, names[-1]), run.tags.get(RANGE_END_TAG, names[-1])) for run in runs}
    assert ranges == {(names[0], names[most - 1]), (names[most], names[most])}


@pytest.mark.parametrize("status", [BulkActionStatus.REQUESTED, BulkActionStatus.COMPLETED_SUCCESS])
def test_housekeeping_deletes_no_partition_while_a_backfill_is_in_progress(
    status: BulkActionStatus, platform: storage.Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QA_PARTITIONS_KEPT", "1")
    job = housekeeping_job(ExecutionSettings())
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions(PARTITIONS, ["old.csv", "new.csv"])
        instance.add_backfill(PartitionBackfill("backfill", status, from_failure=False, tags={}, backfill_timestamp=time.time()))
        resources = {"platform": platform_resource(BucketSettings())}
        assert job.execute_in_process(instance=instance, resources=resources, op_selection=["prune_partitions"]).success
        left = list(instance.get_dynamic_partitions(PARTITIONS))
    assert left == (["old.csv", "new.csv"] if status is BulkActionStatus.REQUESTED else ["new.csv"])


def test_housekeeping_stops_when_a_backfill_begins(platform: storage.Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QA_PARTITIONS_KEPT", "1")
    monkeypatch.setattr(housekeeping, "_DELETED_TOGETHER", 2)
    keys = [f"{number}.csv" for number in range(6)]
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions(PARTITIONS, keys)
        delete = dg.DagsterInstance.delete_dynamic_partition

        def begin(self: dg.DagsterInstance, name: str, key: str) -> None:
            delete(self, name, key)
            if key == keys[1]:
                requested = BulkActionStatus.REQUESTED
                self.add_backfill(PartitionBackfill("b", requested, from_failure=False, tags={}, backfill_timestamp=time.time()))

        monkeypatch.setattr(dg.DagsterInstance, "delete_dynamic_partition", begin)
        resources = {"platform": platform_resource(BucketSettings())}
        job = housekeeping_job(ExecutionSettings())
        assert job.execute_in_process(instance=instance, resources=resources, op_selection=["prune_partitions"]).success
        assert list(instance.get_dynamic_partitions(PARTITIONS)) == keys[2:]


def test_a_clock_that_is_set_back_does_not_stop_the_heart(
    platform: storage.Bucket, ticking: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticking.tick()
    beats, now = ticking.beats(), time.time
    monkeypatch.setattr(time, "time", lambda: now() - 6 * 3600)
    ticking.tick()
    monkeypatch.undo()
    assert ticking.beats() > beats
