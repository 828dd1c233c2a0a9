"""Finished files whose source cannot be archived: why, for how long, and what else is affected."""

import io
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from google.api_core.exceptions import PreconditionFailed
from google.cloud import storage

from qa_platform.batches.archive import archive_files
from qa_platform.batches.at_once import FILES_AT_ONCE
from qa_platform.batches.pending import UNREPORTED_SECONDS, archive_done, tidy
from qa_platform.batches.plan import Plan
from qa_platform.batches.retry import request_retries
from qa_platform.cli.status.observe import FileState
from qa_platform.clients.bucket import archive, archived_name, upload
from qa_platform.clients.postgres import connect
from qa_platform.clients.services import Services
from qa_platform.contract import INCOMING, FileStatus, FileVersion
from qa_platform.errors import InputError, TransientError
from qa_platform.ledger import FileRecord, Ledger
from qa_platform.loading import migrate
from qa_platform.settings import IngestSettings, ModelSettings, PachydermSettings, PostgresSettings, WorkSettings
from qa_platform_tests.conftest import Database
from qa_platform_tests.ledger.helpers import NOT_UTF8

CONTENT = b"question,context\nWhere?,Here.\n"
LOG = logging.getLogger(__name__)


@pytest.fixture
def services(bucket: storage.Bucket, database: Database) -> Services:
    settings = PostgresSettings(host=database.host, port=database.port, user=database.user, dbname=database.dbname)
    migrate.upgrade(settings)
    return Services(bucket, PachydermSettings(), settings, ModelSettings().pinned, IngestSettings(), WorkSettings())


def done(services: Services, name: str, status: FileStatus = FileStatus.LOADED) -> FileVersion:
    """Upload a file, and record that it is done."""
    version = upload(services.bucket, name, io.BytesIO(CONTENT))
    with Ledger(services.postgres) as ledger, connect(services.postgres) as connection:
        ledger.claim([version], owner="test", lease_seconds=10)
        connection.execute("UPDATE question_file SET status = %s, error = 'not_utf8: no' WHERE source_file = %s", [str(status), name])
        ledger.release("test")
    return version


def record(services: Services, version: FileVersion) -> FileRecord:
    with Ledger(services.postgres) as ledger:
        return ledger.records([version])[version.name, version.generation]


def hold(services: Services, version: FileVersion, kind: str = "temporary_hold") -> Callable[[], None]:
    blob = services.bucket.get_blob(INCOMING + version.name)

    def put(*, on: bool) -> None:
        setattr(blob, kind, on)
        blob.patch()

    put(on=True)
    return partial(put, on=False)


def retain(services: Services, version: FileVersion) -> Callable[[], None]:
    bucket = services.bucket.client.get_bucket(services.bucket.name)
    bucket.retention_period = 3600
    bucket.patch()

    def release() -> None:
        bucket.retention_period = None
        bucket.patch()

    return release


def take_the_role(services: Services, version: FileVersion) -> Callable[[], None]:
    grant(services.bucket, "roles/storage.objectViewer", "roles/storage.objectCreator")
    return lambda: grant(services.bucket, "roles/storage.objectAdmin")


def grant(bucket: storage.Bucket, *roles: str) -> None:
    policy = bucket.get_iam_policy()
    policy.bindings = [{"role": role, "members": {"allUsers"}} for role in roles]
    bucket.set_iam_policy(policy)


def stand_in_the_way(services: Services, version: FileVersion) -> Callable[[], None]:
    other = services.bucket.blob(archived_name(version, rejected=False))
    other.upload_from_string(b"something else")
    return lambda: other.delete()


@pytest.mark.parametrize(
    ("refuse", "why", "advice"),
    [
        (hold, "under active Temporary hold", "--no-temporary-hold"),
        (partial(hold, kind="event_based_hold"), "under active Event-Based hold", "--no-event-based-hold"),
        (retain, "retention policy", "--retention-period"),
        (take_the_role, "storage.objects.delete", "roles/storage.objectUser"),
        (stand_in_the_way, "another object lies", "away"),
    ],
)
def test_a_file_that_cannot_be_archived_says_why_and_is_archived_once_it_can(
    services: Services, refuse: Callable[[Services, FileVersion], Callable[[], None]], why: str, advice: str
) -> None:
    stuck = done(services, "a.csv")
    allow = refuse(services, stuck)
    told: list[str] = []
    tidy(services, Plan(), LOG, report=lambda records: told.extend(r.version.name for r in records))

    found = record(services, stuck)
    assert (found.status, found.attempts, found.place) == (FileStatus.LOADED, 0, INCOMING + "a.csv")
    assert why in found.archive_error
    assert advice in found.archive_error
    state = FileState(stuck, found)
    assert why in state.note
    assert not state.in_progress, "a watch of it ends"
    with Ledger(services.postgres) as ledger:
        assert ledger.pending_archive(limit=5) == [], "it waits for its next try"
        assert [r.version for r in ledger.unarchived_files(limit=5)] == [stuck]

    allow()
    its_time_has_come(services)
    tidy(services, Plan(), LOG, report=lambda records: told.extend(r.version.name for r in records))
    found = record(services, stuck)
    assert (found.status, found.archive_error) == (FileStatus.FINISHED, "")
    assert services.bucket.blob(found.place).download_as_bytes() == CONTENT
    assert not services.bucket.blob(INCOMING + "a.csv").exists()
    assert told == ["a.csv"] * 2, "at every try; who is told knows what was reported"


def its_time_has_come(services: Services) -> None:
    with connect(services.postgres) as connection:
        connection.execute("UPDATE question_file SET retry_at = now() WHERE retry_at IS NOT NULL")


def test_a_file_that_cannot_be_archived_holds_no_other_and_its_waits_grow(services: Services) -> None:
    stuck, free = done(services, "a.csv"), done(services, "b.csv")
    hold(services, stuck)
    with Ledger(services.postgres) as ledger:
        archive_files(services, ledger, [record(services, stuck), record(services, free)], log=LOG)
    assert record(services, free).status is FileStatus.FINISHED
    first = wait_of(services)
    with connect(services.postgres) as connection:
        connection.execute("UPDATE question_file SET put_off_since = now() - interval '1 day'")
    with Ledger(services.postgres) as ledger:
        archive_files(services, ledger, [record(services, stuck)], log=LOG)
    work = services.work
    assert 0 < first <= work.retry_first_seconds
    assert work.retry_most_seconds / 3 < wait_of(services) <= work.retry_most_seconds


def test_a_failure_that_cannot_be_recorded_holds_no_other_either(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck, free = done(services, "a.csv"), done(services, "b.csv")
    hold(services, stuck)

    def unavailable(*_: Any, **__: Any) -> None:
        raise TransientError("PostgreSQL is unavailable")

    monkeypatch.setattr(Ledger, "record_archive_failure", unavailable)
    with Ledger(services.postgres) as ledger:
        archive_files(services, ledger, [record(services, stuck), record(services, free)], log=LOG)
    assert record(services, free).status is FileStatus.FINISHED


def wait_of(services: Services) -> float:
    with connect(services.postgres) as connection:
        row = connection.execute("SELECT max(extract(epoch FROM retry_at - now()))::float FROM question_file").fetchone()
    assert row
    return float(row[0])


def test_a_rejected_file_that_must_stay_has_its_report_all_the_same(services: Services) -> None:
    stuck = done(services, "a.csv", FileStatus.REJECTED)
    release = hold(services, stuck)
    tidy(services, Plan(), LOG)
    report = services.bucket.get_blob(archived_name(stuck, rejected=True).removesuffix(".csv") + ".report.csv")
    assert b"not_utf8" in report.download_as_bytes()
    assert services.bucket.blob(INCOMING + "a.csv").exists()
    assert "hold" in record(services, stuck).archive_error
    assert record(services, stuck).error == "not_utf8: no", "why it is rejected stays"

    release()
    its_time_has_come(services)
    tidy(services, Plan(), LOG)
    again = services.bucket.get_blob(report.name)
    assert again.generation == report.generation, "it is not written once more, which a retention policy would refuse"
    assert not services.bucket.blob(INCOMING + "a.csv").exists()


def test_a_retry_forgets_why_a_file_could_not_be_archived(services: Services) -> None:
    stuck = done(services, "a.csv")
    hold(services, stuck)
    tidy(services, Plan(), LOG)
    with Ledger(services.postgres) as ledger:
        ledger.request_retries(["a.csv"])
    assert record(services, stuck).archive_error == ""


def test_the_wait_for_an_archiving_does_not_go_on_from_that_for_an_answer(services: Services) -> None:
    version = upload(services.bucket, "a.csv", io.BytesIO(CONTENT))
    with Ledger(services.postgres) as ledger, connect(services.postgres) as connection:
        ledger.claim([version], owner="run", lease_seconds=10)
        ledger.defer("run", [version], error="Pachyderm is unavailable", work=services.work)
        connection.execute("UPDATE question_file SET put_off_since = now() - interval '1 day', retry_at = now() + interval '1 day'")
        ledger.reject_file(version, NOT_UTF8)
        assert not record(services, version).was_deferred
        assert [waiting.version.name for waiting in ledger.pending_archive(limit=2)] == ["a.csv"]
        hold(services, version)
        archive_files(services, ledger, [record(services, version)], log=LOG)
    assert 0 < wait_of(services) <= services.work.retry_first_seconds


@pytest.mark.parametrize("mode", ["move", "delete"])
def test_an_archiving_that_died_before_the_deletion_is_finished_by_the_next(services: Services, mode: str) -> None:
    services = replace(services, work=WorkSettings.model_validate({"archive": mode}))
    version = done(services, "a.csv")
    place = archived_name(version, rejected=False) if mode == "move" else ""

    def die() -> bool:
        with Ledger(services.postgres) as ledger:
            return ledger.begin_archiving(version, source=INCOMING + "a.csv", place=place) and False

    archive(services.bucket, version, mode=mode, may_delete=die)
    assert record(services, version).place == place
    archive_done(services, LOG)
    assert (record(services, version).status, record(services, version).place) == (FileStatus.FINISHED, place)
    assert not services.bucket.blob(INCOMING + "a.csv").exists()


def test_a_retry_of_a_file_whose_deletion_is_under_way_says_so(services: Services) -> None:
    version = done(services, "a.csv")
    with Ledger(services.postgres) as ledger:
        ledger.begin_archiving(version, source=INCOMING + "a.csv", place="")
        with pytest.raises(InputError, match="is being archived right now"):
            request_retries(services.bucket, ledger, ["a.csv"])


def test_a_precondition_of_the_buckets_own_is_not_taken_for_a_deleted_source(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    version = done(services, "a.csv")

    def refuse(*_: Any, **__: Any) -> None:
        raise PreconditionFailed("constraint orgpolicy")

    monkeypatch.setattr(storage.Blob, "delete", refuse)
    tidy(services, Plan(), LOG)
    found = record(services, version)
    assert (found.status, found.place) == (FileStatus.LOADED, INCOMING + "a.csv")
    assert "constraint orgpolicy" in found.archive_error


def test_an_outage_of_the_bucket_ends_the_archiving_of_a_run(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [record(services, done(services, f"{number}.csv")) for number in range(3 * FILES_AT_ONCE)]
    tried: list[str] = []

    def unavailable(bucket: storage.Bucket, version: FileVersion, **_: Any) -> None:
        tried.append(version.name)
        raise TransientError("the bucket cannot be reached")

    monkeypatch.setattr("qa_platform.clients.bucket.archive", unavailable)
    with Ledger(services.postgres) as ledger:
        archive_files(services, ledger, records, log=LOG)
        assert len(tried) <= FILES_AT_ONCE, "each would wait as long"
        assert len(ledger.pending_archive(limit=100)) == len(records) - len(tried), "the others are tried at the next look"


def test_a_failure_does_not_undo_what_another_run_has_begun(
    services: Services, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    version = done(services, "a.csv")
    stale, place = record(services, version), archived_name(version, rejected=False)

    def unavailable(*_: Any, **__: Any) -> None:
        raise TransientError("the bucket \x1b[2J cannot be reached")

    monkeypatch.setattr("qa_platform.clients.bucket.archive", unavailable)
    with Ledger(services.postgres) as ledger:
        assert ledger.begin_archiving(version, source=stale.place, place=place)
        archive_files(services, ledger, [stale], log=LOG)
    assert record(services, version).place == place
    assert all(message.isprintable() for message in caplog.messages if "could not be archived" in message), "a terminal obeys nothing"


def test_files_are_archived_at_once(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [record(services, done(services, f"{number}.csv")) for number in range(FILES_AT_ONCE)]
    together = threading.Barrier(FILES_AT_ONCE, timeout=30)

    def all_together(*arguments: Any, **options: Any) -> Any:
        together.wait()
        return archive(*arguments, **options)

    monkeypatch.setattr("qa_platform.clients.bucket.archive", all_together)
    with Ledger(services.postgres) as ledger:
        archive_files(services, ledger, records, log=LOG)
        assert {found.status for found in ledger.records([each.version for each in records]).values()} == {FileStatus.FINISHED}


def load(services: Services, version: FileVersion, seconds_ago: float = 0) -> None:
    with connect(services.postgres) as connection:
        connection.execute(
            "UPDATE question_file SET loaded_at = now() - make_interval(secs => %s) WHERE generation = %s",
            [seconds_ago, version.generation],
        )


@pytest.mark.parametrize("held", [True, False])
def test_a_file_that_cannot_be_reported_is_reported_later(services: Services, held: bool) -> None:
    version = done(services, "a.csv")
    load(services, version)
    release = hold(services, version) if held else lambda: None
    told: list[str] = []

    def fails(records: Sequence[FileRecord]) -> None:
        raise RuntimeError("Dagster's storage is full")

    archive_done(services, LOG, report=fails)
    assert record(services, version).status is FileStatus.LOADED
    assert "Dagster's storage is full" in record(services, version).archive_error
    release()
    its_time_has_come(services)
    archive_done(services, LOG, report=lambda records: told.extend(r.version.name for r in records))
    assert (told, record(services, version).status) == (["a.csv"], FileStatus.FINISHED)


def test_a_file_that_can_never_be_reported_is_archived_in_the_end(services: Services) -> None:
    version = done(services, "a.csv")
    load(services, version, UNREPORTED_SECONDS + 1)

    def fails(records: Sequence[FileRecord]) -> None:
        raise RuntimeError("never")

    archive_done(services, LOG, report=fails)
    assert record(services, version).status is FileStatus.FINISHED


def test_a_file_whose_rows_were_replaced_is_not_reported_as_if_it_had_the_newer_ones(services: Services) -> None:
    old = done(services, "a.csv")
    load(services, old)
    load(services, done(services, "a.csv"))
    told: list[int] = []
    archive_done(services, LOG, report=lambda records: told.extend(r.version.generation for r in records))
    assert old.generation not in told
    assert record(services, old).status is FileStatus.FINISHED
