"""What the sensors do: ignoring and reporting objects, repairing records, heartbeats, and surviving a misbehaving bucket."""

import io
import itertools
import logging
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
import pytest
from dagster._core.remote_origin import GrpcServerCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage

from qa_platform.batches import pending
from qa_platform.batches.archive import archive_file
from qa_platform.batches.intake import set_aside, split_file
from qa_platform.batches.locate import correct_missing_source
from qa_platform.batches.pending import (
    BATCHES_PER_LOOK,
    Look,
    _may_get_content,
    archive_done,
    claim,
    keep_claims,
    look,
    reconcile,
    record_unchanged,
    tidy,
)
from qa_platform.batches.plan import Plan
from qa_platform.clients import bucket
from qa_platform.clients.bucket import archive, archived_name, is_there, list_incoming, open_version, upload, why_ignored
from qa_platform.clients.postgres import connect
from qa_platform.clients.services import Services
from qa_platform.clients.source import SourceChanged
from qa_platform.contract import INCOMING, FileReason, FileStatus, FileVersion
from qa_platform.definitions import defs
from qa_platform.errors import InputError, TransientError
from qa_platform.ingest import FileRejected
from qa_platform.ledger import Ledger
from qa_platform.ledger.records import Deferred, FileRecord
from qa_platform.loading import migrate
from qa_platform.orchestration.catalog import ANSWERED_QUESTIONS, QUESTION_ANSWER
from qa_platform.orchestration.partitions import BATCH_TAG
from qa_platform.orchestration.reports.uploads import uploaded
from qa_platform.orchestration.sensors.heartbeat import HEARTBEAT, beat, summary
from qa_platform.orchestration.sensors.incoming import keys_to_move, new_run_key, queued_run_keys, seconds_to_begin
from qa_platform.orchestration.sensors.reconcile import vanished_runs
from qa_platform.settings import ExecutionSettings, IngestSettings, ModelSettings, PachydermSettings, PostgresSettings, WorkSettings
from qa_platform_tests.conftest import Database
from qa_platform_tests.faults.proxies import FaultyBucket

_LOG = logging.getLogger(__name__)
# Of a run that a daemon launched.
REMOTE = RemoteJobOrigin(RemoteRepositoryOrigin(GrpcServerCodeLocationOrigin("localhost", 4000), "__repository__"), "answer_pending_files")
CONTENT = b"question,context\nWhere?,Here.\n"


@pytest.fixture
def services(bucket: storage.Bucket, database: Database) -> Services:
    settings = PostgresSettings(host=database.host, port=database.port, user=database.user, dbname=database.dbname)
    migrate.upgrade(settings)
    work = WorkSettings(batch_files=3, lease_seconds=10)
    return Services(bucket, PachydermSettings(), settings, ModelSettings().pinned, IngestSettings(), work)


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def put(services: Services, name: str, content: bytes = CONTENT) -> FileVersion:
    return upload(services.bucket, name, io.BytesIO(content))


def record(services: Services, version: FileVersion) -> FileRecord:
    with Ledger(services.postgres) as ledger:
        return ledger.records([version])[version.name, version.generation]


def set_status(services: Services, version: FileVersion, status: FileStatus) -> None:
    with Ledger(services.postgres) as ledger, connect(services.postgres) as connection:
        ledger.claim([version], owner="test", lease_seconds=10)
        error = {FileStatus.REJECTED: "binary: it is a photo", FileStatus.FAILED: "no memory"}.get(status, "")
        connection.execute("UPDATE question_file SET status = %s, error = %s WHERE source_file = %s", [str(status), error, version.name])
        ledger.release("test")


def planned(found: Look) -> list[FileVersion]:
    return [version for batch in found.plan.batches for version in batch.versions]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("a.csv", ""),
        ("folder/A.CSV", ""),
        ("folder/", "folder marker"),
        ("a.txt", "other suffix"),
        ("a.csv.part", "temporary name"),
        ("a.csv~", "temporary name"),
        ("x/.a.csv.swp", "temporary name"),
        ("x/~$a.csv", "temporary name"),
        ("a.csv.TMP", "temporary name"),
        ("a\0b.csv", "NUL in the name"),
    ],
)
def test_an_object_that_is_no_upload_is_ignored_for_a_reason(name: str, why: str) -> None:
    assert why_ignored(INCOMING + name, (".csv",)) == why


def test_suffixes_are_taken_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QA_SUFFIXES", ".CSV,.Tsv")
    suffixes = WorkSettings().suffixes
    assert [why_ignored(INCOMING + name, suffixes) for name in ("a.csv", "A.CSV", "b.tsv", "c.txt")] == ["", "", "", "other suffix"]


def test_what_is_ignored_is_counted_and_said(services: Services) -> None:
    version = put(services, "a.csv")
    for name in ("b.txt", "c.csv.part", "d/"):
        put(services, name)
    found = look(services)
    assert planned(found) == [version]
    assert found.ignored == {"other suffix": 1, "temporary name": 1, "folder marker": 1}
    assert "1 (temporary name)" in summary(found)


def test_an_empty_upload_waits_for_its_content_and_not_for_ever(services: Services) -> None:
    put(services, "a.csv", b"")
    put(services, "b.csv", b"")
    written = put(services, "b.csv")
    found = look(services)
    assert (planned(found), found.plan.waiting) == ([written], 2)
    late = replace(services, work=services.work.model_copy(update={"empty_seconds": 0.001}))
    assert {version.name for version in planned(look(late))} == {"a.csv", "b.csv"}
    assert not _may_get_content(FileVersion("a.csv", 2**62), datetime.now(UTC), 60), "a generation that is no time"


def test_of_many_new_files_the_oldest_are_planned_and_all_are_counted(services: Services) -> None:
    most = services.work.batch_files * BATCHES_PER_LOOK
    versions = [put(services, f"{100 - number}.csv") for number in range(most + 5)]
    found = look(services)
    assert sorted(planned(found), key=lambda version: version.generation) == versions[:most]
    assert found.plan.waiting == most + 5


def test_uploads_of_claimed_files_take_no_place_of_others(services: Services) -> None:
    most = services.work.batch_files * BATCHES_PER_LOOK
    claimed = [put(services, f"{number}.csv") for number in range(most)]
    with Ledger(services.postgres) as ledger:
        ledger.claim(claimed, owner="run", lease_seconds=60)
    for version in claimed:
        put(services, version.name, CONTENT + b"Who?,He.\n")
    other = put(services, "other.csv")
    found = look(services)
    assert planned(found) == [other]
    assert len(found.claimed) == most


def test_an_upload_of_a_file_whose_run_ends_during_the_look_is_not_taken_for_done(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = put(services, "a.csv")
    with Ledger(services.postgres) as ledger:
        ledger.claim([before], owner="run", lease_seconds=60)
    put(services, "a.csv", CONTENT + b"Who?,He.\n")

    def list_slowly(*args: Any, **options: Any) -> Iterator[FileVersion]:
        with Ledger(services.postgres) as ledger:
            ledger.release("run")
        return list_incoming(*args, **options)

    monkeypatch.setattr(bucket, "list_incoming", list_slowly)
    assert look(services).claimed == {"a.csv"}
    assert len(planned(look(services))) == 1


def test_an_upload_with_a_lower_generation_than_the_loaded_one_is_told(services: Services) -> None:
    version = put(services, "a.csv")
    newer = replace(version, generation=version.generation + 1)
    set_status(services, version, FileStatus.SUPERSEDED)
    set_status(services, newer, FileStatus.FINISHED)
    with connect(services.postgres) as connection:
        connection.execute("UPDATE question_file SET status = 'superseded' WHERE generation = %s", [version.generation])
    found = look(services)
    assert planned(found) == []
    assert "1 (superseded)" in summary(found)


def test_a_look_where_everything_is_done_lists_once_and_plans_nothing(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        set_status(services, put(services, f"{number}.csv"), FileStatus.FINISHED)
    requests: list[str] = []
    connection = services.bucket.client._connection
    ask = connection.api_request

    def noted(**options: Any) -> Any:
        requests.append(options["path"])
        return ask(**options)

    monkeypatch.setattr(connection, "api_request", noted)
    found = look(services)
    assert (found.plan, found.objects) == (Plan(), 3)
    assert requests == [f"/b/{services.bucket.name}/o"]


def test_a_file_that_cannot_be_looked_up_does_not_hide_those_behind_it(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    refused, gone = put(services, "refused.csv"), put(services, "gone.csv")
    for version in (refused, gone):
        set_status(services, version, FileStatus.PENDING)
        services.bucket.blob(INCOMING + version.name).delete()
    correct = correct_missing_source

    def refuse(gcs_bucket: storage.Bucket, ledger: Ledger, record: FileRecord) -> bool:
        if record.version == refused:
            raise InputError("not allowed", where=refused.name)
        return correct(gcs_bucket, ledger, record)

    monkeypatch.setattr(pending, "correct_missing_source", refuse)
    assert reconcile(services, _LOG) == 1
    assert record(services, gone).status is FileStatus.SUPERSEDED


def test_files_without_a_fault_do_not_hide_those_behind_them(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        set_status(services, put(services, f"{number}.txt"), FileStatus.PENDING)
    gone = put(services, "gone.csv")
    set_status(services, gone, FileStatus.PENDING)
    services.bucket.blob(INCOMING + gone.name).delete()
    # One file a call: the clock goes on by a second whenever it is asked.
    monkeypatch.setattr(pending, "TIDY_SECONDS", 1.5)
    clock = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    calls = 0
    while record(services, gone).status is not FileStatus.SUPERSEDED:
        calls += 1
        assert calls < 200
        reconcile(services, _LOG)


def test_an_upload_that_counts_as_superseded_and_is_there_is_answered_after_all(services: Services) -> None:
    version = put(services, "a.csv")
    with Ledger(services.postgres) as ledger:
        ledger.mark_superseded(version)
    assert planned(look(services)) == []
    assert reconcile(services, _LOG) == 1
    assert planned(look(services)) == [version]
    assert reconcile(services, _LOG) == 0


@pytest.mark.parametrize("overwritten", [True, False])
def test_a_file_that_failed_and_was_taken_away_does_not_wait_for_ever(services: Services, overwritten: bool) -> None:
    version, other = put(services, "a.csv"), put(services, "b.csv")
    for each in (version, other):
        set_status(services, each, FileStatus.PENDING)
    if overwritten:
        put(services, "a.csv", CONTENT + b"Who?,She.\n")
    else:
        services.bucket.blob(INCOMING + "a.csv").delete()
    assert reconcile(services, _LOG) == 1
    assert record(services, version).status is FileStatus.SUPERSEDED
    assert record(services, other).status is FileStatus.PENDING


@pytest.mark.parametrize("status", [FileStatus.FAILED, FileStatus.REJECTED, FileStatus.FORGOTTEN])
def test_an_upload_without_answers_does_not_hide_an_older_generation_that_is_to_be_answered_again(
    services: Services, status: FileStatus
) -> None:
    old = put(services, "a.csv")
    set_status(services, old, FileStatus.LOADED)
    with Ledger(services.postgres) as ledger:
        archive_file(services, ledger, record(services, old), log=logger())
        ledger.request_retries(["a.csv"])
        new = put(services, "a.csv", CONTENT + b"Who?,She.\n")
        ledger.claim([new], owner="run", lease_seconds=10)
        with connect(services.postgres) as connection:
            connection.execute("UPDATE question_file SET status = %s WHERE generation = %s", [str(status), new.generation])
        ledger.release("run")
    assert planned(look(services)) == [old]


def test_a_parked_file_whose_source_is_deleted_needs_nobody_any_more(services: Services) -> None:
    deleted, kept, archived = (put(services, name) for name in ("deleted.csv", "kept.csv", "archived.csv"))
    with Ledger(services.postgres) as ledger:
        for version in (deleted, kept, archived):
            set_status(services, version, FileStatus.FAILED)
        assert reconcile(services, _LOG) == 0
        place = archived_name(archived, rejected=False)
        services.bucket.rename_blob(services.bucket.blob(INCOMING + archived.name), place)
        services.bucket.blob(INCOMING + deleted.name).delete()
        assert ledger.count_failed(seconds=60) == 3
        assert reconcile(services, _LOG) == 2
        assert ledger.count_failed(seconds=60) == 2
    gone = record(services, deleted)
    assert (gone.status, gone.error) == (FileStatus.SUPERSEDED, "it was overwritten or deleted after it had failed: no memory")
    assert record(services, archived).place == place
    put(services, "kept.csv", CONTENT + b"Who?,She.\n")
    services.bucket.blob(place).delete()
    assert reconcile(services, _LOG) == 2
    assert [record(services, version).status for version in (kept, archived)] == [FileStatus.SUPERSEDED] * 2


def test_an_overwritten_generation_stays_superseded(services: Services) -> None:
    old, new = put(services, "a.csv"), put(services, "a.csv", CONTENT + b"Who?,She.\n")
    with Ledger(services.postgres) as ledger:
        ledger.mark_superseded(old)
    assert reconcile(services, _LOG) == 0
    assert planned(look(services)) == [new]


@pytest.mark.parametrize("status", [FileStatus.LOADED, FileStatus.REJECTED, FileStatus.UNCHANGED])
def test_an_archived_file_that_is_under_incoming_is_archived_again(services: Services, status: FileStatus) -> None:
    version = put(services, "a.csv")
    set_status(services, version, status)
    with Ledger(services.postgres) as ledger:
        ledger.record_archived(version, place="processed/elsewhere.csv")
    assert reconcile(services, _LOG) == 1
    tidy(services, Plan(), logger(), report=lambda records: None)
    kept = record(services, version)
    assert kept.status is (FileStatus.FINISHED if status is FileStatus.LOADED else status)
    assert services.bucket.blob(kept.place).download_as_bytes() == CONTENT
    assert not services.bucket.blob(INCOMING + "a.csv").exists()


def test_a_file_that_is_kept_under_incoming_stays_archived(services: Services) -> None:
    services = replace(services, work=services.work.model_copy(update={"archive": "keep"}))
    version = put(services, "a.csv")
    set_status(services, version, FileStatus.LOADED)
    archive_done(services, logger())
    assert reconcile(services, _LOG) == 0
    assert record(services, version).status is FileStatus.FINISHED


def test_a_file_that_cannot_be_archived_does_not_hold_the_others(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = [put(services, f"{number}.csv") for number in range(3)]
    for version in versions:
        set_status(services, version, FileStatus.LOADED)

    def fails_once(bucket: storage.Bucket, version: FileVersion, **options: Any) -> str | None:
        if version == versions[0]:
            raise TransientError("not now")
        return archive(bucket, version, **options)

    monkeypatch.setattr("qa_platform.clients.bucket.archive", fails_once)
    tidy(services, Plan(), logger(), report=lambda records: None)
    assert [record(services, version).status for version in versions] == [FileStatus.LOADED, FileStatus.FINISHED, FileStatus.FINISHED]


def test_many_files_that_cannot_be_archived_do_not_keep_another_from_it_for_ever(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qa_platform.batches.pending.TIDIED_PER_LOOK", 3)
    stuck = [put(services, f"{number}.csv") for number in range(6)]
    for version in stuck:
        services.bucket.blob(archived_name(version, rejected=False)).upload_from_string(b"something else")
        set_status(services, version, FileStatus.LOADED)
    last = put(services, "last.csv")
    set_status(services, last, FileStatus.LOADED)
    looks = 0
    while record(services, last).status is FileStatus.LOADED:
        looks += 1
        assert looks < 100
        assert archive_done(services, logger()) in (6, 7), "those that wait for their next try are counted, too"
    assert {record(services, version).status for version in stuck} == {FileStatus.LOADED}


def test_an_upload_that_cannot_be_recorded_as_unchanged_does_not_hold_the_others(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = [put(services, f"{number}.csv") for number in range(3)]
    recorded: list[FileVersion] = []

    def mark(ledger: Ledger, version: FileVersion) -> bool:
        if version == versions[0]:
            raise InputError("PostgreSQL refuses the data")
        recorded.append(version)
        return True

    monkeypatch.setattr(Ledger, "mark_unchanged", mark)
    assert not record_unchanged(services, Plan(unchanged=tuple(versions)), logger())
    assert recorded == versions[1:]


def test_a_look_tidies_no_longer_than_it_may(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qa_platform.batches.pending.TIDY_SECONDS", -1)
    monkeypatch.setattr(Ledger, "mark_unchanged", lambda ledger, version: True)
    version = put(services, "a.csv")
    set_status(services, version, FileStatus.LOADED)
    assert archive_done(services, logger()) == 1
    assert record(services, version).status is FileStatus.LOADED
    assert not record_unchanged(services, Plan(unchanged=(version,)), logger())


def test_a_file_that_cannot_be_reported_does_not_hold_the_others(services: Services) -> None:
    versions = [put(services, f"{number}.csv") for number in range(3)]
    for version in versions:
        set_status(services, version, FileStatus.LOADED)
    told: list[FileVersion] = []

    def report(records: Sequence[FileRecord]) -> None:
        told.extend(record.version for record in records)
        if versions[0] in told[-1:]:
            raise ValueError("nobody can tell")

    tidy(services, Plan(), logger(), report=report)
    assert sorted(told) == sorted(versions)
    assert [record(services, version).status for version in versions] == [FileStatus.FINISHED] * 3


def test_an_upload_that_the_bucket_has_again_is_answered_from_there(services: Services) -> None:
    """The bucket was restored to before the source was archived, while the file waited to be answered from its copy."""
    version = put(services, "a.csv")
    set_status(services, version, FileStatus.LOADED)
    with Ledger(services.postgres) as ledger:
        archive_file(services, ledger, record(services, version), log=logger())
        ledger.request_retries(["a.csv"])
        copy = services.bucket.blob(record(services, version).place)
        services.bucket.rename_blob(copy, INCOMING + version.name)
        with connect(services.postgres) as connection:
            # A restored bucket has the old generation, which only a bucket can give.
            version = next(list_incoming(services.bucket, services.work.suffixes))
            connection.execute("UPDATE question_file SET generation = %s", [version.generation])
        ledger.claim([version], owner="run", lease_seconds=10)
        (started,) = ledger.start("run", [version], run_id="run", batch_id="batch")
        with pytest.raises(TransientError):
            set_aside(services, ledger, started, SourceChanged("gone"), logger())
        ledger.release("run")
    assert record(services, version).place == INCOMING + "a.csv"
    assert planned(look(services)) == [version]


def test_a_superseded_file_that_is_there_is_answered_from_where_it_is(services: Services) -> None:
    version = put(services, "a.csv")
    with Ledger(services.postgres) as ledger, connect(services.postgres) as connection:
        ledger.mark_superseded(version)
        connection.execute("UPDATE question_file SET place = 'processed/gone.csv'")
    assert reconcile(services, _LOG) == 1
    assert record(services, version).place == INCOMING + "a.csv"


def test_an_upload_takes_the_place_of_an_older_generation_that_is_to_be_answered_again(services: Services) -> None:
    old = put(services, "a.csv")
    set_status(services, old, FileStatus.LOADED)
    with Ledger(services.postgres) as ledger:
        archive_file(services, ledger, record(services, old), log=logger())
        ledger.request_retries(["a.csv"])
    assert planned(look(services)) == [old]
    new = put(services, "a.csv", CONTENT + b"Who?,She.\n")
    assert planned(look(services)) == [new]


def test_a_batch_of_which_somebody_holds_a_part_is_not_claimed_at_all(services: Services) -> None:
    versions = [put(services, name) for name in ("a.csv", "b.csv")]
    (batch,) = look(services).plan.batches
    with Ledger(services.postgres) as ledger:
        ledger.claim(versions[:1], owner="stranger", lease_seconds=10)
        assert not claim(services, batch, token="key")
        assert ledger.claimed() == {"a.csv": "stranger"}
        ledger.release("stranger")
        assert claim(services, batch, token="key")
        assert ledger.claimed() == {"a.csv": "key", "b.csv": "key"}


def test_names_are_escaped_in_logs_and_in_what_dagster_shows(services: Services, caplog: pytest.LogCaptureFixture) -> None:
    name, shown = "a\u2028b\u202ec\x1b.csv", r"a\u2028b\u202ec\x1b.csv"
    version = put(services, name)
    event = uploaded(services.bucket, version, services.work)
    texts = [str(value.value) for value in event.metadata.values()]
    assert all(text.isprintable() for text in texts)
    assert event.metadata["name"].value == shown
    assert shown.replace("\\", "\\\\") in str(event.metadata["object, until it is answered"].value)
    assert str(event.metadata["its answers, once answered"].value).isprintable()
    set_status(services, version, FileStatus.REJECTED)
    with caplog.at_level(logging.INFO), Ledger(services.postgres) as ledger:
        archive_file(services, ledger, record(services, version), log=logging.getLogger())
        put(services, name, CONTENT * 2)
        set_aside(services, ledger, record(services, version), FileRejected(FileReason.BINARY, "it is a photo"), logging.getLogger())
    assert len(caplog.messages) == 2
    assert all(shown in message and message.isprintable() for message in caplog.messages)
    told = summary(replace(look(services), deferred=Deferred(1, datetime.now(UTC), f"{name} waits")))
    assert f"{shown} waits\n" in told


def test_a_run_that_waits_in_the_queue_keeps_its_claims(services: Services) -> None:
    put(services, "a.csv")
    batch = look(services).plan.batches[0]
    assert claim(services, batch, token="key")
    with connect(services.postgres) as connection:
        connection.execute("UPDATE question_file SET claim_until = now() - interval '1 second'")
    keep_claims(services, ["key", "another"])
    assert look(services).plan.batches == ()
    assert look(services).claimed == {"a.csv"}


def run_of(instance: dg.DagsterInstance, batch: str, *, run_key: str = "") -> dg.DagsterRun:
    tags = {BATCH_TAG: batch} | ({"dagster/run_key": run_key} if run_key else {})
    return instance.create_run_for_job(defs.resolve_job_def("answer_questions"), tags=tags)


def test_a_run_key_was_never_used_although_earlier_runs_were_deleted(services: Services, instance: dg.DagsterInstance) -> None:
    put(services, "a.csv")
    batch = look(services).plan.batches[0]
    keys = []
    for _ in range(3):
        keys.append(new_run_key(instance, batch))
        run = run_of(instance, batch.id, run_key=keys[-1])
    instance.delete_run(instance.get_runs(limit=1, ascending=True)[0].run_id)
    assert run.tags["dagster/run_key"] == keys[-1]
    assert len({*keys, new_run_key(instance, batch)}) == 4


def test_a_started_run_without_claims_that_says_nothing_has_vanished(instance: dg.DagsterInstance) -> None:
    silent, at_work, talking = (run_of(instance, name) for name in ("a", "b", "c"))
    ci, working_ci, materialized = (
        instance.create_run_for_job(defs.resolve_job_def(name))
        for name in ("answer_pending_files", "answer_pending_files", "answer_questions")
    )
    launched = instance.create_run_for_job(defs.resolve_job_def("answer_pending_files"), remote_job_origin=REMOTE)
    other = instance.create_run_for_job(defs.resolve_job_def("housekeeping"))
    for run in (silent, at_work, ci, working_ci, materialized, launched, other):
        instance.report_engine_event("begun", run)
        instance.handle_new_event(event_of(run, "PIPELINE_START"))
    time.sleep(1.1)
    instance.handle_new_event(event_of(talking, "PIPELINE_START"))
    owners = {at_work.run_id, working_ci.run_id}
    found = vanished_runs(instance, owners, silent_seconds=1)
    assert {run.run_id for run in found} == {silent.run_id, ci.run_id, materialized.run_id}
    for run in found:
        instance.report_run_failed(run)
    assert vanished_runs(instance, owners, silent_seconds=1) == []


def test_a_started_run_whose_step_has_not_taken_its_claims_over_has_not_vanished(instance: dg.DagsterInstance) -> None:
    run = run_of(instance, "batch", run_key="key")
    instance.handle_new_event(event_of(run, "PIPELINE_START"))
    time.sleep(1.1)
    assert vanished_runs(instance, {"key"}, silent_seconds=1) == []
    assert len(vanished_runs(instance, {"another"}, silent_seconds=1)) == 1


def event_of(run: dg.DagsterRun, kind: str) -> dg.EventLogEntry:
    from dagster._core.events import DagsterEvent

    event = DagsterEvent(event_type_value=kind, job_name=run.job_name)
    return dg.EventLogEntry(
        error_info=None, level="info", user_message="", run_id=run.run_id, timestamp=time.time(), job_name=run.job_name, dagster_event=event
    )


def test_the_heart_beats_with_a_look_and_not_with_every_look(instance: dg.DagsterInstance) -> None:
    found = Look(Plan(waiting=2), frozenset({"a.csv"}), 3, {"other suffix": 4})
    [event] = beat(instance, found, every_seconds=60)
    assert event.asset_key == HEARTBEAT
    assert {name: value.value for name, value in event.metadata.items()} == {
        "files": 3,
        "waiting": 2,
        "deferred": 0,
        "being answered": 1,
        "ignored: other suffix": 4,
    }
    instance.report_runless_asset_event(event)
    assert beat(instance, found, every_seconds=60) == []


def test_what_a_heartbeat_quotes_is_text_and_no_markdown(instance: dg.DagsterInstance) -> None:
    off = Deferred(1, datetime.now(UTC), "![](https://evil.example/x) .csv\n<b>cannot be read</b>")
    [event] = beat(instance, Look(Plan(), frozenset(), 1, {}, off), every_seconds=60)
    assert "evil.example" in str(event.description)
    assert "![" not in str(event.description)
    assert "<b>" not in str(event.description).replace("\\<", "")


def test_a_sensor_that_sees_nothing_for_long_is_not_fresh() -> None:
    spec = next(spec for spec in defs.resolve_all_asset_specs() if spec.key == HEARTBEAT)
    policy = spec.freshness_policy
    assert policy is not None
    assert timedelta(minutes=5) < policy.fail_window.to_timedelta() <= timedelta(hours=1)  # type: ignore[attr-defined]


@pytest.fixture
def spoilt(services: Services, gcs_address: str) -> Iterator[tuple[FaultyBucket, storage.Bucket]]:
    """The test's bucket once more, through a proxy that can be told to spoil requests."""
    proxy = FaultyBucket(gcs_address, random.Random(0))
    client = storage.Client("test", AnonymousCredentials(), client_options={"api_endpoint": f"http://{proxy.address}"})
    yield proxy, client.bucket(services.bucket.name)
    proxy.close()


def test_a_copy_that_is_refused_for_no_reason_deletes_nothing(services: Services, spoilt: tuple[FaultyBucket, storage.Bucket]) -> None:
    version = put(services, "a.csv")
    proxy, bucket = spoilt
    proxy.arm("412", on="copy", count=1)
    with pytest.raises(TransientError, match="nothing is in the way"):
        archive(bucket, version, mode="move")
    assert is_there(services.bucket, version, INCOMING + "a.csv")
    place = archive(bucket, version, mode="move")
    assert services.bucket.blob(place).download_as_bytes() == CONTENT


def test_an_object_that_lies_where_the_copy_goes_is_not_taken_for_it(services: Services) -> None:
    version = put(services, "a.csv")
    place = services.bucket.blob(archived_name(version, rejected=False))
    place.upload_from_string(b"something else")
    with pytest.raises(InputError, match="another object lies"):
        archive(services.bucket, version, mode="move")
    assert is_there(services.bucket, version, INCOMING + "a.csv")
    place.upload_from_string(CONTENT)
    assert archive(services.bucket, version, mode="move") == place.name, "that is its copy, of an archiving that was cut off"
    assert not is_there(services.bucket, version, INCOMING + "a.csv")


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("kind", ["429", "500", "503"])
@pytest.mark.parametrize("on", ["copy", "delete"])
def test_archiving_outlasts_a_bucket_that_is_away_for_a_moment(
    services: Services, spoilt: tuple[FaultyBucket, storage.Bucket], kind: str, on: str
) -> None:
    version = put(services, "a.csv")
    proxy, bucket = spoilt
    proxy.arm(kind, on=on, count=2)
    place = archive(bucket, version, mode="move")
    assert proxy.spoilt == [on, on]
    assert services.bucket.blob(place).download_as_bytes() == CONTENT
    assert not is_there(services.bucket, version, INCOMING + "a.csv")


def test_a_download_that_breaks_off_is_trouble_that_passes_and_never_a_shorter_file(
    services: Services, spoilt: tuple[FaultyBucket, storage.Bucket]
) -> None:
    version = put(services, "a.csv", CONTENT * 1000)
    proxy, bucket = spoilt
    for count in (1, 2, 3):
        proxy.arm("cut", on=None, count=count)
        with suppress(TransientError), open_version(bucket, version, INCOMING + "a.csv") as source:
            content = b""
            while piece := source.read(10**4):
                content += piece
            assert content == CONTENT * 1000
        assert proxy.spoilt
    proxy.disarm()
    with open_version(bucket, version, INCOMING + "a.csv") as source:
        assert source.read(10**6) == CONTENT * 1000


def test_bytes_that_are_not_what_was_uploaded_are_trouble_that_passes_and_never_a_file(services: Services) -> None:
    version = put(services, "a.csv")
    with open_version(services.bucket, version, INCOMING + "a.csv") as source:
        source.read_to_the_end()
    with open_version(services.bucket, version, INCOMING + "a.csv") as source:
        source._reader = io.BytesIO(CONTENT.replace(b"Here", b"hero"))
        with pytest.raises(TransientError, match="checksum"):
            source.read_to_the_end()


def test_a_download_that_went_wrong_is_not_taken_for_a_file_that_is_wrong(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    version = put(services, "a.csv", CONTENT * 10)
    damaged = (CONTENT * 10).replace(b"question", b"qu\xffstion", 1)
    monkeypatch.setattr(storage.Blob, "open", lambda *arguments, **options: io.BytesIO(damaged))
    with Ledger(services.postgres) as ledger:
        ledger.claim([version], owner="run", lease_seconds=10)
    with pytest.raises(TransientError, match="checksum"):
        split_file(services, record(services, version), lambda path, chunks: None, logging.getLogger())


def test_a_rejected_download_is_read_to_its_end_before_it_is_believed(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    # Larger than what is read at a time: the damage is found long before the checksum can be.
    content = CONTENT + CONTENT.partition(b"\n")[2] * 200_000
    version = put(services, "a.csv", content)
    with Ledger(services.postgres) as ledger:
        ledger.claim([version], owner="run", lease_seconds=10)
    damaged = content.replace(b"question", b"qu\xffstion", 1)
    monkeypatch.setattr(storage.Blob, "open", lambda *arguments, **options: io.BytesIO(damaged))
    with pytest.raises(TransientError, match="checksum"):
        split_file(services, record(services, version), lambda path, chunks: None, logging.getLogger())


@pytest.mark.parametrize("name", ["a.csv", "a\u2028\x1b[31mb.csv"], ids=["plain", "hostile"])
def test_a_file_that_the_bucket_calls_gone_and_has_is_not_superseded(services: Services, name: str) -> None:
    version = put(services, name)
    with Ledger(services.postgres) as ledger:
        ledger.claim([version], owner="run", lease_seconds=10)
        before, gone = record(services, version), SourceChanged("it is gone")
        with pytest.raises(TransientError, match="as gone, but it exists"):
            set_aside(services, ledger, before, gone, logger())
        assert record(services, version).status is FileStatus.PENDING
        services.bucket.blob(before.place).delete()
        set_aside(services, ledger, before, gone, logger())
        assert record(services, version).status is FileStatus.SUPERSEDED


def test_a_file_whose_copy_lies_in_the_archive_is_not_superseded_but_read_from_there(services: Services) -> None:
    version = put(services, "a.csv")
    set_status(services, version, FileStatus.PENDING)
    # As after the tables were restored from before it was archived.
    before = record(services, version)
    assert archive(services.bucket, version, mode="move")
    with pytest.raises(SourceChanged) as gone:
        split_file(services, before, lambda path, chunks: None, logging.getLogger())
    with pytest.raises(TransientError, match="was archived meanwhile"):
        set_aside(services, Ledger(services.postgres), before, gone.value, logger())
    assert record(services, version).status is FileStatus.PENDING
    assert planned(look(services)) == [version]


@pytest.mark.parametrize("mode", ["move", "delete"])
def test_a_generation_that_was_overwritten_while_it_was_worked_on_lies_nowhere_and_the_new_one_stays(services: Services, mode: str) -> None:
    old, new = put(services, "a.csv"), put(services, "a.csv", CONTENT * 2)
    assert archive(services.bucket, old, mode=mode) == ""
    assert planned(look(services)) == [new]
    assert services.bucket.blob(INCOMING + "a.csv").download_as_bytes() == CONTENT * 2


def test_what_is_put_off_is_said_with_its_reason_where_there_is_nothing_to_request(services: Services) -> None:
    versions = [put(services, f"{number}.csv") for number in range(2)]
    with Ledger(services.postgres) as ledger:
        ledger.claim(versions, owner="run", lease_seconds=10)
        ledger.defer("run", versions, error="the model 'x' cannot be loaded", work=services.work)
    found = look(services)
    assert (found.plan.batches, found.plan.waiting) == ((), 2)
    assert "2 files wait until " in summary(found)
    assert "the model 'x' cannot be loaded" in summary(found)


def test_a_run_whose_pod_starts_slowly_keeps_its_claims_for_as_long_as_dagster_waits(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(instance, "batch", run_key="key")
    instance.report_engine_event("starting", run)
    instance.handle_new_event(event_of(run, "PIPELINE_STARTING"))
    assert queued_run_keys(instance, "answer_questions", beginning_seconds=0) == ["key"]
    monkeypatch.setattr(dg.DagsterInstance, "run_monitoring_start_timeout_seconds", 0)
    assert queued_run_keys(instance, "answer_questions", beginning_seconds=60) == [], "what started it is gone"


def test_a_run_whose_step_starts_in_a_pod_of_its_own_keeps_its_claims_as_one_that_is_starting(instance: dg.DagsterInstance) -> None:
    work = WorkSettings(lease_seconds=10)
    assert seconds_to_begin(instance, work, ExecutionSettings(executor="in_process")) == 10
    seconds = seconds_to_begin(instance, work, ExecutionSettings(executor="kubernetes"))
    assert seconds == instance.run_monitoring_start_timeout_seconds > 10


def test_a_run_that_has_begun_keeps_its_claims_until_it_renews_them_itself(instance: dg.DagsterInstance) -> None:
    run = run_of(instance, "batch", run_key="key")
    instance.handle_new_event(event_of(run, "PIPELINE_START"))
    assert queued_run_keys(instance, "answer_questions", beginning_seconds=60) == ["key"]
    assert queued_run_keys(instance, "answer_questions", beginning_seconds=0) == []


@pytest.mark.parametrize(
    ("present", "keys", "moved"),
    [
        ([], ["a", "b"], set()),
        (["a", "b", "c"], ["a", "b"], set()),
        (["x", "b", "a"], ["b", "a"], set()),
        (["a", "b"], ["b", "a"], {"a", "b"}),
        (["a", "x", "b"], ["a", "b"], {"a", "b"}),
        (["a", "x"], ["a", "b"], {"a"}),
        (["a", *"12345"], ["a"], {"a"}),
        (["1", "a", *"2345"], ["a"], set()),
    ],
)
def test_partitions_move_only_where_they_are_not_a_batchs_range_already(present: list[str], keys: list[str], moved: set[str]) -> None:
    assert keys_to_move(present, keys, kept=10) == moved


def logger() -> dg.DagsterLogManager:
    with dg.build_op_context() as context:
        return context.log


def test_the_sensor_and_its_asset_are_part_of_the_definitions() -> None:
    names = {sensor.name for sensor in defs.get_repository_def().sensor_defs}
    assert names == {"incoming_files", "done_files", "reconcile", "platform_status"}
    assert {ANSWERED_QUESTIONS, QUESTION_ANSWER} <= {spec.key for spec in defs.resolve_all_asset_specs()}
