"""Work on files: starts, charges, deferrals."""

from pathlib import Path

import psycopg
import pytest

from qa_platform.clients.postgres import only_row
from qa_platform.contract import FileStatus, FileVersion
from qa_platform.ledger import Ledger
from qa_platform.settings import PostgresSettings
from qa_platform.text import escaped_lines
from qa_platform_tests.ledger.helpers import A1, B1, C1, EXPIRED, HELD, NOT_UTF8, WORK, charge, claimed_by_run, known, load, wait_of
from qa_platform_tests.processes import until


def test_only_what_the_owner_holds_is_started(ledger: Ledger) -> None:
    ledger.claim([A1], owner="run", lease_seconds=HELD)
    ledger.claim([B1], owner="other", lease_seconds=HELD)
    ledger.start("run", [A1, B1], run_id="run-id", batch_id="batch")

    found = known(ledger, A1)
    assert (found.status, found.dagster_run, found.batch_id) == (FileStatus.RUNNING, "run-id", "batch")
    assert found.started_at is not None
    assert known(ledger, B1).status is FileStatus.PENDING
    assert ledger.batch_is_claimed("batch")
    assert not ledger.batch_is_claimed("another")


def test_what_is_done_is_not_started_deferred_or_requeued_by_its_owner(
    ledger: Ledger, connection: psycopg.Connection, tmp_path: Path
) -> None:
    claimed_by_run(ledger, A1)
    load(connection, tmp_path, A1)
    before = known(ledger, A1)
    ledger.start("run", [A1], run_id="again", batch_id="another")
    ledger.defer("run", [A1], error="away", work=WORK)
    ledger.defer_run("run", error="away", work=WORK)
    ledger.requeue("run", [A1])
    ledger.note_waiting("run", "a secret")
    assert known(ledger, A1) == before
    assert (before.status, before.claim_owner) == (FileStatus.LOADED, "run")


def test_an_owners_other_files_are_left_as_they_are(ledger: Ledger) -> None:
    ledger.claim([A1, B1], owner="run", lease_seconds=HELD)
    before = known(ledger, B1)
    ledger.start("run", [A1], run_id="run", batch_id="batch")
    ledger.record_commit("run", [A1], commit="commit", job="job")
    ledger.defer("run", [A1], error="away", work=WORK)
    claimed_by_run(ledger, A1)
    ledger.requeue("run", [A1])
    claimed_by_run(ledger, A1)
    charge(ledger, A1, "damaged")
    assert known(ledger, A1).attempts == 1
    assert known(ledger, B1) == before
    ledger.record_archived(A1, place="processed/a.csv")
    ledger.mark_superseded(C1)
    ledger.request_retries(["a.csv"])
    assert known(ledger, B1) == before


def test_what_a_job_waits_for_is_noted_on_the_running_files_of_its_run_only(ledger: Ledger) -> None:
    claimed_by_run(ledger, A1)
    claimed_by_run(ledger, B1, run="other")
    ledger.claim([C1], owner="run", lease_seconds=HELD)
    ledger.note_waiting("run", "a secret")
    assert [known(ledger, version).error for version in (A1, B1, C1)] == ["a secret", "", ""]
    ledger.note_waiting("run", "")
    assert known(ledger, A1).error == ""


@pytest.mark.parametrize("what", ["a\0b", "a\ud800b", "a\x1b[2Jb"])
def test_an_error_in_any_characters_is_recorded(ledger: Ledger, what: str) -> None:
    shown = escaped_lines(what)
    claimed_by_run(ledger, A1)
    ledger.note_waiting("run", what)
    assert known(ledger, A1).error == shown
    ledger.defer("run", [A1], error=what, work=WORK)
    assert known(ledger, A1).error.endswith(shown)
    claimed_by_run(ledger, B1)
    ledger.defer_run("run", error=what, work=WORK)
    assert known(ledger, B1).error.endswith(shown)
    claimed_by_run(ledger, C1, run="other")
    assert charge(ledger, C1, what, owner="other") is FileStatus.PENDING
    assert known(ledger, C1).error == shown
    ledger.reject_file(C1, NOT_UTF8)
    ledger.record_archive_failure(C1, error=what, work=WORK)
    assert known(ledger, C1).archive_error == shown


def test_a_file_that_runs_again_does_not_say_why_it_waited(ledger: Ledger) -> None:
    claimed_by_run(ledger, A1)
    ledger.defer("run", [A1], error="away", work=WORK)
    claimed_by_run(ledger, A1)
    assert known(ledger, A1).error == ""


def test_a_batch_whose_claims_expired_is_not_claimed(ledger: Ledger) -> None:
    ledger.claim([A1], owner="run", lease_seconds=EXPIRED)
    ledger.start("run", [A1], run_id="run", batch_id="batch")
    assert not ledger.batch_is_claimed("batch")


def test_the_commit_of_a_batch_is_recorded(ledger: Ledger) -> None:
    ledger.claim([A1], owner="run", lease_seconds=HELD)
    ledger.claim([B1], owner="other", lease_seconds=HELD)
    ledger.record_commit("run", [A1, B1], commit="commit", job="job")
    ledger.record_commit("stranger", [A1], commit="another", job="another")
    assert (known(ledger, A1).pachyderm_commit, known(ledger, A1).pachyderm_job) == ("commit", "job")
    assert known(ledger, B1).pachyderm_commit == ""


def test_a_file_is_parked_after_its_last_attempt_and_waits_before(ledger: Ledger) -> None:
    for attempt in (1, 2):
        claimed_by_run(ledger, A1)
        assert charge(ledger, A1, str(attempt)) is FileStatus.PENDING
        found = known(ledger, A1)
        assert (found.attempts, found.error, found.claim_owner, found.batch_id, found.due) == (attempt, str(attempt), "", "", False)
    claimed_by_run(ledger, A1)
    assert charge(ledger, A1, "last") is FileStatus.FAILED
    assert known(ledger, A1).status is FileStatus.FAILED


def test_the_wait_after_a_failure_doubles_up_to_a_bound_less_at_most_a_half(ledger: Ledger, connection: psycopg.Connection) -> None:
    waits: list[float] = []
    # The last is more than a power of two in floating point allows.
    attempts = [*range(12), 2000]
    for number in attempts:
        claimed_by_run(ledger, A1)
        connection.execute("UPDATE question_file SET attempts = %s", [number])
        ledger.charge("run", A1, error="again", work=WORK.model_copy(update={"max_attempts": 10_000}))
        waits.append(wait_of(connection, A1))
    bounds = [min(100, 8 * 2**number) for number in attempts]
    assert all(bound / 2 - 1 < wait <= bound for wait, bound in zip(waits, bounds, strict=True))
    assert len({round(wait, 2) for wait in waits[4:]}) > 1, "not all at the same time"


def test_a_charge_that_comes_after_the_load_changes_nothing(ledger: Ledger, connection: psycopg.Connection, tmp_path: Path) -> None:
    claimed_by_run(ledger, A1)
    load(connection, tmp_path, A1)
    assert charge(ledger, A1, "too late") is None
    assert (known(ledger, A1).status, known(ledger, A1).attempts) == (FileStatus.LOADED, 0)


def test_a_run_that_lost_its_claim_neither_charges_nor_requeues_nor_puts_off_what_another_works_on(ledger: Ledger) -> None:
    ledger.claim([A1], owner="late", lease_seconds=EXPIRED)
    ledger.start("late", [A1], run_id="late", batch_id="batch")
    claimed_by_run(ledger, A1)
    before = known(ledger, A1)
    assert charge(ledger, A1, "mine", owner="late") is None
    ledger.requeue("late", [A1])
    ledger.defer("late", [A1], error="mine", work=WORK)
    ledger.defer_run("late", error="mine", work=WORK)
    ledger.record_commit("late", [A1], commit="mine", job="mine")
    assert known(ledger, A1) == before
    assert (before.status, before.claim_owner) == (FileStatus.RUNNING, "run")


def test_a_file_that_is_not_to_blame_waits_uncharged_for_another_batch(ledger: Ledger) -> None:
    claimed_by_run(ledger, A1)
    ledger.requeue("run", [A1])
    found = known(ledger, A1)
    assert (found.status, found.attempts, found.batch_id, found.claim_owner, found.due) == (FileStatus.PENDING, 0, "", "", True)


def test_what_is_put_off_is_due_together_uncharged_and_says_why(ledger: Ledger, connection: psycopg.Connection) -> None:
    assert ledger.deferred_files() is None
    claimed_by_run(ledger, A1, B1)
    ledger.defer("run", [A1, B1], error="the model is gone", work=WORK)
    for version in (A1, B1):
        found = known(ledger, version)
        assert (found.status, found.attempts, found.batch_id, found.claim_owner, found.due) == (FileStatus.PENDING, 0, "", "", False)
    assert wait_of(connection, A1) == pytest.approx(wait_of(connection, B1), abs=0.2)
    told = ledger.deferred_files()
    assert told is not None
    assert (told.files, told.why) == (2, "No file is to blame: the model is gone")
    ledger.request_retries(["a.csv"])
    assert known(ledger, A1).due, "who asks for a retry does not wait"


def test_a_charged_file_is_not_said_to_wait_for_something_else(ledger: Ledger) -> None:
    claimed_by_run(ledger, A1)
    charge(ledger, A1, "damaged")
    assert ledger.deferred_files() is None


@pytest.mark.parametrize(("since", "least", "most"), [(0, 4, 8), (30, 15, 31), (1000, 50, 100)])
def test_a_file_waits_as_long_as_it_was_put_off_already_up_to_a_bound(
    ledger: Ledger, connection: psycopg.Connection, since: int, least: float, most: float
) -> None:
    claimed_by_run(ledger, A1)
    ledger.defer("run", [A1], error="away", work=WORK)
    connection.execute("UPDATE question_file SET put_off_since = now() - make_interval(secs => %s)", [since])
    claimed_by_run(ledger, A1)
    ledger.defer("run", [A1], error="away", work=WORK)
    assert least - 1 < wait_of(connection, A1) <= most


@pytest.mark.parametrize(("suspect_after", "charged"), [(0, True), (3000, True), (4000, False), (None, False)])
def test_a_suspect_that_fails_on_while_others_are_loaded_is_charged(
    ledger: Ledger, connection: psycopg.Connection, tmp_path: Path, suspect_after: float | None, charged: bool
) -> None:
    def fails(*versions: FileVersion) -> list[int]:
        claimed_by_run(ledger, *versions)
        ledger.defer("run", versions, error="away", work=WORK, suspect_after=suspect_after)
        return [known(ledger, version).attempts for version in versions]

    load(connection, tmp_path, FileVersion("before.csv", 1))
    for _ in range(2):
        assert fails(A1, B1) == [0, 0]
        # As long ago as an hour, and after the first load.
        connection.execute("UPDATE question_file SET put_off_since = now() - interval '1 hour' WHERE put_off_since IS NOT NULL")
        connection.execute("UPDATE question_file SET loaded_at = now() - interval '2 hours' WHERE loaded_at IS NOT NULL")
    connection.execute("UPDATE question_file SET retry_at = now()")
    assert fails(A1, B1) == [0, 0], "nothing was loaded since"
    load(connection, tmp_path, FileVersion("meanwhile.csv", 1))
    assert fails(A1) == [0], "its wait was not over"
    connection.execute("UPDATE question_file SET retry_at = now()")
    assert fails(A1) == [1 if charged else 0]
    assert known(ledger, B1).attempts == 0


def test_a_file_whose_workers_always_call_it_innocent_is_parked_in_the_end(
    ledger: Ledger, connection: psycopg.Connection, tmp_path: Path
) -> None:
    statuses = []
    for _ in range(WORK.max_attempts):
        for _ in range(2):
            claimed_by_run(ledger, A1)
            ledger.defer("run", [A1], error="disk full", work=WORK, suspect_after=WORK.retry_most_seconds)
            statuses.append(known(ledger, A1).status)
            connection.execute("UPDATE question_file SET retry_at = now(), put_off_since = put_off_since - interval '1 hour'")
            load(connection, tmp_path / str(len(statuses)), FileVersion(f"{len(statuses)}.csv", 1))
    assert statuses == [FileStatus.PENDING] * 5 + [FileStatus.FAILED]


def test_what_a_run_leaves_behind_an_outage_is_put_off_with_its_batch(ledger: Ledger) -> None:
    claimed_by_run(ledger, A1)
    ledger.defer_run("run", error="away", work=WORK)
    ledger.release("run")
    found = known(ledger, A1)
    assert (found.status, found.attempts, found.batch_id, found.due, found.error) == (
        FileStatus.PENDING,
        0,
        "batch",
        False,
        "No file is to blame: away",
    )


def test_outages_in_a_row_make_a_run_wait_as_long_as_all_of_them(ledger: Ledger, connection: psycopg.Connection) -> None:
    ledger.claim([A1], owner="run", lease_seconds=HELD)
    ledger.defer_run("run", error="away", work=WORK)
    connection.execute("UPDATE question_file SET put_off_since = now() - interval '1 hour'")
    for _ in range(2):
        ledger.defer_run("run", error="away", work=WORK)
        assert wait_of(connection, A1) > WORK.retry_most_seconds / 2 - 1


def test_commits_of_files_that_are_not_done_are_in_use(ledger: Ledger, connection: psycopg.Connection, tmp_path: Path) -> None:
    claimed_by_run(ledger, A1, B1)
    ledger.record_commit("run", [A1], commit="one", job="one")
    ledger.record_commit("run", [B1], commit="two", job="two")
    load(connection, tmp_path, A1)
    assert ledger.commits_in_use(["one", "two", "three"]) == {"one", "two"}, "the run may still read both"
    ledger.release("run")
    assert ledger.commits_in_use(["one", "two", "three"]) == {"two"}


def test_files_that_never_loaded_are_suspected_in_one_reading_of_the_table(
    ledger: Ledger, postgres: PostgresSettings, connection: psycopg.Connection
) -> None:
    connection.execute(
        "INSERT INTO question_file (source_file, generation, file_id, partition_key, place, status, loaded_at) "
        "SELECT 'old-' || n, 1, '', 'old-' || n, '', 'finished', now() - interval '1 day' FROM generate_series(1, 20000) n"
    )
    waiting = [FileVersion(f"{n}.csv", 1, 1) for n in range(300)]
    ledger.claim(waiting, owner="run", lease_seconds=600)
    connection.execute("UPDATE question_file SET put_off_since = now() - interval '1 hour', retry_at = NULL WHERE status = 'pending'")
    connection.execute("ANALYZE question_file")
    before = rows_read(connection)
    # PostgreSQL counts what a session has read when the session ends, at the latest.
    with Ledger(postgres) as another:
        another.defer("run", waiting, error="e", work=WORK, suspect_after=0)
    until(lambda: rows_read(connection) > before)
    assert rows_read(connection) - before < 20 * 20_000


def rows_read(connection: psycopg.Connection) -> int:
    connection.execute("SELECT pg_stat_force_next_flush()")
    query = "SELECT seq_tup_read + coalesce(idx_tup_fetch, 0) FROM pg_stat_user_tables WHERE relname = 'question_file'"
    return int(only_row(connection.cursor().execute(query))[0])
