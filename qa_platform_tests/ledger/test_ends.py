"""The final states of files: rejected, archived, unchanged."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import psycopg
import pytest

from qa_platform.clients.postgres import connect, only_row
from qa_platform.contract import INCOMING, FileStatus, FileVersion
from qa_platform.errors import InputError
from qa_platform.ledger import FileRecord, Ledger
from qa_platform.ledger.restoring import AnsweredVersion, Presence
from qa_platform.settings import PostgresSettings
from qa_platform_tests.flow import wait_until
from qa_platform_tests.ledger.helpers import A1, A2, B1, EXPIRED, HELD, NOT_UTF8, WORK, claimed_by_run, known, load
from qa_platform_tests.loading_helpers import BUNDLED, CRC32C, SIZE


def test_a_rejected_file_keeps_its_reason(ledger: Ledger) -> None:
    ledger.reject_file(A1, NOT_UTF8)
    found = known(ledger, A1)
    assert (found.status, found.error, found.archived_at) == (FileStatus.REJECTED, str(NOT_UTF8), None)
    assert found.rejection == NOT_UTF8
    assert [record.version for record in ledger.pending_archive(limit=5)] == [A1]


def test_a_loaded_file_is_finished_by_being_archived_and_another_keeps_its_status(
    ledger: Ledger, connection: psycopg.Connection, tmp_path: Path
) -> None:
    load(connection, tmp_path, A1)
    ledger.reject_file(B1, NOT_UTF8)
    for version in (A1, B1):
        ledger.record_archived(version, place=f"elsewhere/{version.name}")

    assert [known(ledger, version).status for version in (A1, B1)] == [FileStatus.FINISHED, FileStatus.REJECTED]
    assert known(ledger, A1).place == "elsewhere/a.csv"
    assert known(ledger, A1).archived_at is not None
    assert ledger.pending_archive(limit=5) == []


def test_of_two_that_archive_a_file_at_once_one_may_delete_its_source(ledger: Ledger) -> None:
    ledger.reject_file(A1, NOT_UTF8)
    source, place = INCOMING + "a.csv", "rejected/a.csv/1.csv"
    assert ledger.begin_archiving(A1, source=source, place=place)
    assert not ledger.begin_archiving(A1, source=source, place=place)
    ledger.record_archived(A1, place=place)
    ledger.cancel_archiving(A1, source=source, place=place)
    assert known(ledger, A1).place == place, "it is archived"
    assert not ledger.begin_archiving(A1, source=place, place="")


def deferred_since(connection: psycopg.Connection) -> object:
    (since,) = only_row(connection.execute("SELECT put_off_since FROM question_file"))
    return since


def test_the_deferral_of_an_archiving_goes_on(ledger: Ledger, connection: psycopg.Connection, tmp_path: Path) -> None:
    load(connection, tmp_path, A1)
    ledger.record_archive_failure(A1, error="a hold", work=WORK)
    since = deferred_since(connection)
    ledger.record_archive_failure(A1, error="a hold", work=WORK)
    assert deferred_since(connection) == since is not None, "otherwise its waits would not grow"


def test_the_csv_of_a_file_that_could_not_be_archived_for_long_is_written_at_once(
    ledger: Ledger, connection: psycopg.Connection, tmp_path: Path
) -> None:
    load(connection, tmp_path, A1)
    ledger.record_archive_failure(A1, error="a hold", work=WORK)
    ledger.record_archived(A1, place="processed/a.csv/1.csv", owes_csv=True)
    assert [record.version.name for record in ledger.owed_csvs(limit=5)] == ["a.csv"]


@pytest.fixture
def owed(ledger: Ledger, connection: psycopg.Connection, tmp_path: Path) -> FileRecord:
    """A finished file whose answered CSV is to be written."""
    load(connection, tmp_path, A1)
    ledger.record_archived(A1, place="processed/a.csv/1.csv", owes_csv=True)
    return known(ledger, A1)


def test_one_process_at_a_time_writes_a_csv(ledger: Ledger, owed: FileRecord) -> None:
    assert ledger.begin_csv(owed)
    assert not ledger.begin_csv(owed)


def test_the_deferral_of_a_csv_goes_on(ledger: Ledger, connection: psycopg.Connection, owed: FileRecord) -> None:
    assert ledger.begin_csv(owed)
    since = deferred_since(connection)
    connection.execute("UPDATE question_file SET retry_at = now()")
    assert ledger.begin_csv(owed)
    assert deferred_since(connection) == since is not None


def test_the_csv_of_a_file_that_a_run_works_on_waits(ledger: Ledger, owed: FileRecord) -> None:
    ledger.take_over([owed.version], token="", owner="run", lease_seconds=HELD)
    assert ledger.owed_csvs(limit=5) == []
    ledger.release("run")
    assert [record.version for record in ledger.owed_csvs(limit=5)] == [owed.version]


def test_a_csv_of_older_answers_settles_no_debt(ledger: Ledger, connection: psycopg.Connection, owed: FileRecord, tmp_path: Path) -> None:
    ledger.request_retries(["a.csv"])
    load(connection, tmp_path, A1, load_id=2)
    ledger.record_archived(A1, place="processed/a.csv/1.csv", owes_csv=True)
    assert not ledger.clear_owed_csv(owed)
    assert ledger.count_owed_csvs() == 1


def test_a_retry_waits_for_a_source_that_is_just_being_given_up(
    migrated: PostgresSettings, ledger: Ledger, connection: psycopg.Connection, tmp_path: Path
) -> None:
    load(connection, tmp_path, A1)
    is_waiting = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock')"
    with connect(migrated) as archiving, ThreadPoolExecutor(1) as pool:
        with archiving.transaction():
            archiving.execute("UPDATE question_file SET place = ''")
            retried = pool.submit(ledger.request_retries, ["a.csv"])
            wait_until(lambda: connection.execute(is_waiting).fetchone() == (True,), "the retry waits", seconds=20)
        with pytest.raises(InputError, match="is gone"):
            retried.result()
    assert known(ledger, A1).status is FileStatus.LOADED


def test_what_is_being_worked_on_is_not_up_for_archiving_by_others(ledger: Ledger, connection: psycopg.Connection, tmp_path: Path) -> None:
    ledger.claim([A1], owner="run", lease_seconds=HELD)
    load(connection, tmp_path, A1)
    assert ledger.pending_archive(limit=5) == []
    ledger.release("run")
    assert [record.version.name for record in ledger.pending_archive(limit=5)] == ["a.csv"]


def test_an_unchanged_upload_shows_the_figures_of_the_answers_that_stand_for_it(
    ledger: Ledger, connection: psycopg.Connection, tmp_path: Path
) -> None:
    load(connection, tmp_path, A1, wanted=replace(BUNDLED, no_answer_threshold=-0.1))
    same = replace(A2, size=SIZE, crc32c=CRC32C, md5="md5")
    ledger.claim([same], owner="run", lease_seconds=HELD)
    connection.execute("UPDATE question_file SET pachyderm_commit = 'commit' WHERE generation = 1")
    assert not ledger.mark_unchanged(same), "nobody knows the MD5 of what is answered"
    assert not ledger.mark_unchanged(replace(same, md5="")), "nor that of the upload"
    connection.execute("UPDATE question_file SET md5 = 'md5' WHERE generation = 1")
    assert not ledger.mark_unchanged(replace(same, md5="other"))
    assert ledger.mark_unchanged(same)
    found = known(ledger, same)
    assert (found.status, found.rows, found.answered, found.model, found.pachyderm_commit) == (
        *(FileStatus.UNCHANGED, 2, 2, "minilm-squad", "commit"),
    )
    assert (found.wanted_model, found.wanted_no_answer_threshold) == ("bundled", -0.1)


def test_an_upload_is_not_unchanged_any_more_when_a_late_job_has_loaded_another_content(
    ledger: Ledger, connection: psycopg.Connection, tmp_path: Path
) -> None:
    upload = FileVersion("a.csv", 3, SIZE, CRC32C, "md5")
    load(connection, tmp_path, A1)
    connection.execute("UPDATE question_file SET md5 = 'md5'")
    # Recorded when it was seen, which is where a load takes its size and checksum from.
    ledger.claim([A2], owner="lost", lease_seconds=EXPIRED)
    load(connection, tmp_path, A2)
    assert not ledger.mark_unchanged(upload), "the table holds what was uploaded in between"
    assert known(ledger, upload).status is FileStatus.PENDING


def test_an_upload_is_not_recorded_as_unchanged_while_its_file_is_being_loaded(
    migrated: PostgresSettings, ledger: Ledger, connection: psycopg.Connection, tmp_path: Path
) -> None:
    upload = FileVersion("a.csv", 3, SIZE, CRC32C, "md5")
    load(connection, tmp_path, A1)
    connection.execute("UPDATE question_file SET md5 = 'md5'")
    with connect(migrated) as other, other.transaction():
        load(other, tmp_path, A2)
        other.execute("UPDATE question_file SET md5 = 'md5'")
        assert not ledger.mark_unchanged(upload), "whatever the load is of"
    assert ledger.mark_unchanged(upload)


def test_what_is_uploaded_again_after_its_successor_was_forgotten_is_answered_again(
    ledger: Ledger, connection: psycopg.Connection, tmp_path: Path
) -> None:
    upload = FileVersion("a.csv", 3, SIZE, CRC32C, "md5")
    load(connection, tmp_path, A1)
    connection.execute("UPDATE question_file SET md5 = 'md5'")
    load(connection, tmp_path, A2)
    assert [ledger.in_the_table("a.csv"), *ledger.latest_answered(["a.csv"], model=BUNDLED)] == [known(ledger, A2), "a.csv"]
    ledger.forget("a.csv", [2])
    assert connection.execute("SELECT count(*) FROM question_answer").fetchone() == (0,)
    assert (ledger.in_the_table("a.csv"), ledger.latest_answered(["a.csv"], model=BUNDLED)) == (None, {})
    assert not ledger.mark_unchanged(upload)
    # Nor does it count as lost: that would bring its rows back.
    older = AnsweredVersion(A1, "processed/a.csv/1.csv")
    assert ledger.presence([older]) == {("a.csv", 1): Presence.PRESENT}
    assert ledger.restore([older]) == set()


def test_a_claim_of_a_run_that_is_gone_keeps_nobody_from_forgetting(ledger: Ledger) -> None:
    ledger.claim([A1], owner="gone", lease_seconds=EXPIRED)
    ledger.forget("a.csv", [1])
    assert ledger.is_forgotten(A1)


def test_a_load_ends_the_wait_of_its_file(ledger: Ledger, connection: psycopg.Connection, tmp_path: Path) -> None:
    claimed_by_run(ledger, A1)
    ledger.defer("run", [A1], error="away", work=WORK)
    load(connection, tmp_path, A1)
    found = known(ledger, A1)
    assert (found.status, found.due, found.was_deferred, found.error) == (FileStatus.LOADED, True, False, "")


@pytest.mark.parametrize("end", [Ledger.mark_superseded, Ledger.mark_unchanged])
def test_what_is_loaded_is_not_turned_into_something_else(
    ledger: Ledger, connection: psycopg.Connection, tmp_path: Path, end: Callable[[Ledger, FileVersion], object]
) -> None:
    load(connection, tmp_path, A1)
    end(ledger, A1)
    assert known(ledger, A1).status is FileStatus.LOADED


def test_a_verdict_on_a_file_whose_source_has_moved_since_is_not_recorded(ledger: Ledger) -> None:
    ledger.claim([A1], owner="run", lease_seconds=EXPIRED)
    read = known(ledger, A1)
    assert ledger.relocate(read, place="processed/a.csv/1.csv")
    assert not ledger.mark_superseded(A1, as_read=read)
    assert not ledger.reject_file(A1, NOT_UTF8, as_read=read)
    assert known(ledger, A1).status is FileStatus.PENDING


def test_a_superseded_version_is_reopened_only_where_no_newer_one_is_known(ledger: Ledger) -> None:
    claimed_by_run(ledger, B1)
    for version in (A1, B1):
        ledger.mark_superseded(version)
    ledger.release("run")
    ledger.claim([A2], owner="run", lease_seconds=EXPIRED)
    assert ledger.reopen([A1, B1], archived=False, seen_after=datetime.now(UTC)) == 1
    assert [known(ledger, version).status for version in (A1, B1)] == [FileStatus.SUPERSEDED, FileStatus.PENDING]
    assert known(ledger, B1).batch_id == ""


def test_what_somebody_works_on_or_is_not_superseded_is_not_reopened(ledger: Ledger) -> None:
    ledger.claim([A1], owner="run", lease_seconds=HELD)
    ledger.mark_superseded(A1)
    ledger.reject_file(B1, NOT_UTF8)
    assert ledger.reopen([A1, B1], archived=True, seen_after=datetime.now(UTC)) == 0
    assert [known(ledger, version).status for version in (A1, B1)] == [FileStatus.SUPERSEDED, FileStatus.REJECTED]


def test_an_archived_version_is_to_be_archived_again_only_where_that_is_asked_for(
    ledger: Ledger, connection: psycopg.Connection, tmp_path: Path
) -> None:
    load(connection, tmp_path, A1)
    ledger.record_archived(A1, place="processed/a.csv")
    assert ledger.reopen([A1], archived=False, seen_after=datetime.now(UTC)) == 0
    assert known(ledger, A1).status is FileStatus.FINISHED
    # As that of an answered CSV that could not be written.
    connection.execute("UPDATE question_file SET put_off_since = now(), retry_at = now() + interval '1 hour'")
    assert ledger.reopen([A1], archived=True, seen_after=datetime.now(UTC)) == 1
    found = known(ledger, A1)
    assert (found.status, found.place, found.due, found.was_deferred) == (FileStatus.LOADED, "incoming/a.csv", True, False)


def test_equal_content_that_was_never_loaded_does_not_make_an_upload_unchanged(
    ledger: Ledger, connection: psycopg.Connection, tmp_path: Path
) -> None:
    upload = FileVersion("a.csv", 3, SIZE, CRC32C, "md5")
    ledger.mark_superseded(replace(A2, size=SIZE, crc32c=CRC32C, md5="md5"))
    assert not ledger.mark_unchanged(upload)
    load(connection, tmp_path, A1)
    connection.execute("UPDATE question_file SET md5 = 'md5'")
    assert ledger.mark_unchanged(upload)


@pytest.fixture
def one_second_a_statement(connection: psycopg.Connection, migrated: PostgresSettings) -> Iterator[None]:
    """A database whose owner limits statements."""
    connection.execute(f"ALTER DATABASE {migrated.dbname} SET statement_timeout = '1s'")
    yield
    connection.execute(f"ALTER DATABASE {migrated.dbname} RESET statement_timeout")


@pytest.mark.usefixtures("one_second_a_statement")
def test_forgetting_many_rows_has_no_time_limit_and_keeps_no_claim_waiting(
    ledger: Ledger, connection: psycopg.Connection, migrated: PostgresSettings, tmp_path: Path
) -> None:
    load(connection, tmp_path, A1)
    with ThreadPoolExecutor(1) as others, Ledger(migrated) as new, connect(migrated) as busy:
        with busy.transaction():
            # As long as this lasts, deleting the rows does.
            busy.execute("SELECT FROM question_answer WHERE source_file = 'a.csv' FOR UPDATE")
            forgetting = others.submit(new.forget, "a.csv", [1])
            wait_until(lambda: ledger.is_forgotten(A1), "its record is replaced")
            assert ledger.claim([B1], owner="run", lease_seconds=60)
            with pytest.raises(psycopg.errors.QueryCanceled), connect(migrated) as limited:
                limited.execute("SELECT pg_sleep(60)")
            assert not forgetting.done()
        forgetting.result(timeout=60)
    assert not ledger.holdings("a.csv").answers


@pytest.mark.usefixtures("one_second_a_statement")
def test_a_file_that_is_being_loaded_is_not_forgotten(
    ledger: Ledger, connection: psycopg.Connection, migrated: PostgresSettings, tmp_path: Path
) -> None:
    ledger.claim([A1], owner="run", lease_seconds=EXPIRED)
    with connect(migrated) as loading, loading.transaction():
        load(loading, tmp_path, A1)
        with pytest.raises(InputError, match="is being loaded right now"):
            ledger.forget("a.csv", [1])
    assert known(ledger, A1).status is FileStatus.LOADED
