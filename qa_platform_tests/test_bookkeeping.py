"""Claims, charges and the history of files, on a real PostgreSQL. A lease of 0 seconds is one that has expired."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qa_platform import bookkeeping
from qa_platform.bookkeeping import FileRecord
from qa_platform.contract import FileStatus, FileVersion, ModelChoice, partition_key
from qa_platform.database import connect
from qa_platform.errors import InputError
from qa_platform.loading.load import load_file
from qa_platform.planning import Known
from qa_platform.settings import PostgresSettings, WorkSettings
from qa_platform_tests.loading_helpers import BUNDLED, CRC32C, SIZE, AnsweredRow, AnsweredUpload, answered_rows, migrated_database

A1 = FileVersion("a.csv", 1, 10, "aaaa")
A2 = FileVersion("a.csv", 2, 11, "bbbb")
B1 = FileVersion("b.csv", 1, 20, "cccc")
HELD = 60
WORK = WorkSettings(max_attempts=3, retry_first_seconds=8, retry_most_seconds=100)
EXPIRED = 0


@pytest.fixture(scope="module")
def migrated(postgres_socket: str) -> PostgresSettings:
    return migrated_database(postgres_socket)


@pytest.fixture
def connection(migrated: PostgresSettings) -> Iterator[psycopg.Connection]:
    with connect(migrated) as found:
        for name in ("question_answer", "question_answer_reject", "question_file"):
            found.execute(f"DELETE FROM {name}")  # noqa: S608
        yield found


def known(connection: psycopg.Connection, version: FileVersion) -> FileRecord:
    return bookkeeping.records(connection, [version])[version.name, version.generation]


def load(connection: psycopg.Connection, folder: Path, version: FileVersion, *, load_id: int = 1, wanted: ModelChoice = BUNDLED) -> None:
    upload = AnsweredUpload(answered_rows(2), name=version.name, generation=version.generation, load_id=load_id, wanted=wanted)
    load_file(connection, upload.write(folder / f"{version.name}-{version.generation}-{load_id}"))


# Claims


def test_a_claim_makes_an_unknown_version_known_and_pending(connection: psycopg.Connection) -> None:
    assert bookkeeping.claim(connection, [A1], owner="run", lease_seconds=HELD) == [A1]
    found = known(connection, A1)
    assert (found.version, found.status, found.claim_owner, found.place, found.load_id) == (
        *(A1, FileStatus.PENDING, "run", "incoming/a.csv", 1),
    )
    assert bookkeeping.claimed(connection) == {"a.csv": "run"}


def test_a_name_is_claimed_whatever_the_generation(connection: psycopg.Connection) -> None:
    bookkeeping.claim(connection, [A1], owner="one", lease_seconds=HELD)
    assert bookkeeping.claim(connection, [A2, B1], owner="two", lease_seconds=HELD) == [B1]
    assert bookkeeping.claimed(connection) == {"a.csv": "one", "b.csv": "two"}


def test_an_expired_claim_is_taken(connection: psycopg.Connection) -> None:
    bookkeeping.claim(connection, [A1], owner="one", lease_seconds=EXPIRED)
    assert bookkeeping.claimed(connection) == {}
    assert bookkeeping.claim(connection, [A1], owner="two", lease_seconds=HELD) == [A1]
    assert bookkeeping.renew(connection, "one", HELD) == 0
    assert bookkeeping.claimed(connection) == {"a.csv": "two"}


def test_the_same_owner_claims_again_and_may_move_to_a_newer_generation(connection: psycopg.Connection) -> None:
    assert bookkeeping.claim(connection, [A1, B1], owner="run", lease_seconds=HELD) == [A1, B1]
    assert bookkeeping.claim(connection, [A1, B1], owner="run", lease_seconds=HELD) == [A1, B1]
    assert bookkeeping.claim(connection, [A2], owner="run", lease_seconds=HELD) == [A2]
    assert (known(connection, A1).claim_owner, known(connection, A2).claim_owner) == ("", "run")


def test_of_two_generations_in_one_claim_the_newest_is_claimed(connection: psycopg.Connection) -> None:
    assert bookkeeping.claim(connection, [A2, B1, A1], owner="run", lease_seconds=HELD) == [A2, B1]


@pytest.mark.parametrize("done", ["finished", "loaded", "rejected", "unchanged", "superseded", "failed"])
def test_what_is_done_or_parked_is_not_claimed(connection: psycopg.Connection, done: str) -> None:
    bookkeeping.claim(connection, [A1], owner="one", lease_seconds=EXPIRED)
    connection.execute("UPDATE question_file SET status = %s", [done])
    assert bookkeeping.claim(connection, [A1], owner="two", lease_seconds=HELD) == []
    assert [r.status for r in bookkeeping.take_over(connection, [A1], token="x", owner="two", lease_seconds=HELD)] == [done]


def test_a_takeover_passes_on_what_the_token_holds_and_what_is_free(connection: psycopg.Connection) -> None:
    other = FileVersion("c.csv", 1)
    bookkeeping.claim(connection, [A1], owner="token", lease_seconds=HELD)
    bookkeeping.claim(connection, [other], owner="stranger", lease_seconds=HELD)

    owned = bookkeeping.take_over(connection, [B1, other, A1], token="token", owner="run", lease_seconds=HELD)

    assert [record.version for record in owned] == [B1, A1]
    assert {record.claim_owner for record in owned} == {"run"}
    assert bookkeeping.claimed(connection) == {"a.csv": "run", "b.csv": "run", "c.csv": "stranger"}


def test_a_claim_is_renewed_by_its_owner_only(connection: psycopg.Connection) -> None:
    bookkeeping.claim(connection, [A1, B1], owner="run", lease_seconds=EXPIRED)
    assert bookkeeping.renew(connection, "stranger", HELD) == 0
    assert bookkeeping.renew(connection, "run", HELD) == 2
    assert bookkeeping.claimed(connection) == {"a.csv": "run", "b.csv": "run"}


def test_a_release_gives_back_ones_own_and_what_ran_waits_with_its_batch(connection: psycopg.Connection) -> None:
    bookkeeping.claim(connection, [A1], owner="run", lease_seconds=HELD)
    bookkeeping.claim(connection, [B1], owner="other", lease_seconds=HELD)
    bookkeeping.start(connection, "run", [A1], run_id="run", batch_id="batch")

    bookkeeping.release(connection, "run")

    found = known(connection, A1)
    assert (found.status, found.claim_owner, found.batch_id, found.attempts) == (FileStatus.PENDING, "", "batch", 0)
    assert bookkeeping.claimed(connection) == {"b.csv": "other"}


def test_a_release_of_some_names_keeps_the_others(connection: psycopg.Connection) -> None:
    bookkeeping.claim(connection, [A1, B1], owner="run", lease_seconds=HELD)
    bookkeeping.release(connection, "run", ["a.csv"])
    assert bookkeeping.claimed(connection) == {"b.csv": "run"}


def test_of_many_that_claim_the_same_files_at_once_each_file_has_one_owner(
    migrated: PostgresSettings, connection: psycopg.Connection
) -> None:
    versions = [FileVersion(f"{n}.csv", 1) for n in range(30)]

    def claim(owner: int) -> list[FileVersion]:
        with connect(migrated) as own:
            some = versions[owner::2] + versions[::3] if owner % 2 else list(reversed(versions[owner:]))
            return bookkeeping.claim(own, some, owner=str(owner), lease_seconds=HELD)

    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(claim, range(6)))

    taken = [version for versions in won for version in versions]
    assert len(taken) == len(set(taken))
    assert bookkeeping.claimed(connection) == {version.name: str(owner) for owner, versions in enumerate(won) for version in versions}


_ACTIONS = st.one_of(
    st.tuples(
        st.just("claim"), st.sampled_from("xyz"), st.lists(st.sampled_from([A1, A2, B1]), max_size=3), st.sampled_from([HELD, EXPIRED])
    ),
    st.tuples(st.just("take_over"), st.sampled_from("xyz"), st.lists(st.sampled_from([A1, A2, B1]), max_size=3), st.sampled_from("xyz")),
    st.tuples(st.just("release"), st.sampled_from("xyz")),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=st.lists(_ACTIONS, max_size=12))
def test_whatever_is_claimed_in_whatever_order_nobody_loses_a_live_claim_but_by_its_token(
    connection: psycopg.Connection, actions: list[tuple]
) -> None:
    connection.execute("DELETE FROM question_file")
    owners: dict[str, str] = {}
    for action, who, *rest in actions:
        if action == "claim":
            won = bookkeeping.claim(connection, rest[0], owner=who, lease_seconds=rest[1])
            newest = {version.name: version for version in sorted(rest[0])}
            assert set(won) == {version for name, version in newest.items() if owners.get(name, who) == who}
            for version in won:
                owners.pop(version.name, None)
                if rest[1] == HELD:
                    owners[version.name] = who
        elif action == "take_over":
            owned = bookkeeping.take_over(connection, rest[0], token=rest[1], owner=who, lease_seconds=HELD)
            assert {r.version.name for r in owned} == {v.name for v in rest[0] if owners.get(v.name, who) in (who, rest[1])}
            owners.update({record.version.name: who for record in owned})
        else:
            bookkeeping.release(connection, who)
            owners = {name: owner for name, owner in owners.items() if owner != who}
        assert bookkeeping.claimed(connection) == owners


# Work


def test_only_what_the_owner_holds_is_started(connection: psycopg.Connection) -> None:
    bookkeeping.claim(connection, [A1], owner="run", lease_seconds=HELD)
    bookkeeping.claim(connection, [B1], owner="other", lease_seconds=HELD)
    bookkeeping.start(connection, "run", [A1, B1], run_id="run-id", batch_id="batch")

    found = known(connection, A1)
    assert (found.status, found.dagster_run, found.batch_id) == (FileStatus.RUNNING, "run-id", "batch")
    assert found.started_at is not None
    assert known(connection, B1).status is FileStatus.PENDING
    assert bookkeeping.batch_is_claimed(connection, "batch")
    assert not bookkeeping.batch_is_claimed(connection, "another")


def test_a_batch_whose_claims_expired_is_not_claimed(connection: psycopg.Connection) -> None:
    bookkeeping.claim(connection, [A1], owner="run", lease_seconds=EXPIRED)
    bookkeeping.start(connection, "run", [A1], run_id="run", batch_id="batch")
    assert not bookkeeping.batch_is_claimed(connection, "batch")


def test_the_commit_of_a_batch_is_recorded(connection: psycopg.Connection) -> None:
    bookkeeping.claim(connection, [A1], owner="run", lease_seconds=HELD)
    bookkeeping.claim(connection, [B1], owner="other", lease_seconds=HELD)
    bookkeeping.record_commit(connection, "run", [A1, B1], commit="commit", job="job")
    bookkeeping.record_commit(connection, "stranger", [A1], commit="another", job="another")
    assert (known(connection, A1).pachyderm_commit, known(connection, A1).pachyderm_job) == ("commit", "job")
    assert known(connection, B1).pachyderm_commit == ""


def claimed_by_run(connection: psycopg.Connection, *versions: FileVersion, run: str = "run") -> None:
    assert bookkeeping.claim(connection, versions, owner=run, lease_seconds=HELD) == list(versions)
    bookkeeping.start(connection, run, versions, run_id=run, batch_id="batch")


def charge(connection: psycopg.Connection, version: FileVersion, error: str, *, owner: str = "run") -> FileStatus | None:
    return bookkeeping.charge(connection, owner, version, error=error, work=WORK)


def wait_of(connection: psycopg.Connection, version: FileVersion) -> float:
    query = "SELECT extract(epoch FROM retry_at - now())::float FROM question_file WHERE source_file = %s AND generation = %s"
    row = connection.execute(query, [version.name, version.generation]).fetchone()
    assert row
    return float(row[0])


def test_a_file_is_parked_after_its_last_attempt_and_waits_before(connection: psycopg.Connection) -> None:
    for attempt in (1, 2):
        claimed_by_run(connection, A1)
        assert charge(connection, A1, str(attempt)) is FileStatus.PENDING
        found = known(connection, A1)
        assert (found.attempts, found.error, found.claim_owner, found.batch_id, found.due) == (attempt, str(attempt), "", "", False)
    claimed_by_run(connection, A1)
    assert charge(connection, A1, "last") is FileStatus.FAILED
    assert bookkeeping.names_with_status(connection, [FileStatus.FAILED]) == {"a.csv"}


def test_the_wait_after_a_failure_doubles_up_to_a_bound_less_at_most_a_half(connection: psycopg.Connection) -> None:
    waits: list[float] = []
    for _ in range(12):
        claimed_by_run(connection, A1)
        connection.execute("UPDATE question_file SET attempts = %s", [len(waits)])
        bookkeeping.charge(connection, "run", A1, error="again", work=WORK.model_copy(update={"max_attempts": 1000}))
        waits.append(wait_of(connection, A1))
    bounds = [min(100, 8 * 2**attempt) for attempt in range(12)]
    assert all(bound / 2 - 1 < wait <= bound for wait, bound in zip(waits, bounds, strict=True))
    assert len({round(wait, 2) for wait in waits[4:]}) > 1, "not all at the same time"


def test_a_charge_that_comes_after_the_load_changes_nothing(connection: psycopg.Connection, tmp_path: Path) -> None:
    claimed_by_run(connection, A1)
    load(connection, tmp_path, A1)
    assert charge(connection, A1, "too late") is None
    assert (known(connection, A1).status, known(connection, A1).attempts) == (FileStatus.LOADED, 0)


def test_a_run_that_lost_its_claim_neither_charges_nor_requeues_nor_puts_off_what_another_works_on(connection: psycopg.Connection) -> None:
    bookkeeping.claim(connection, [A1], owner="late", lease_seconds=EXPIRED)
    bookkeeping.start(connection, "late", [A1], run_id="late", batch_id="batch")
    claimed_by_run(connection, A1)
    before = known(connection, A1)
    assert charge(connection, A1, "mine", owner="late") is None
    bookkeeping.requeue(connection, "late", [A1])
    bookkeeping.put_off(connection, "late", [A1], error="mine", work=WORK)
    bookkeeping.put_off_run(connection, "late", error="mine", work=WORK)
    bookkeeping.record_commit(connection, "late", [A1], commit="mine", job="mine")
    assert known(connection, A1) == before
    assert (before.status, before.claim_owner) == (FileStatus.RUNNING, "run")


def test_a_file_that_is_not_to_blame_waits_uncharged_for_another_batch(connection: psycopg.Connection) -> None:
    claimed_by_run(connection, A1)
    bookkeeping.requeue(connection, "run", [A1])
    found = known(connection, A1)
    assert (found.status, found.attempts, found.batch_id, found.claim_owner, found.due) == (FileStatus.PENDING, 0, "", "", True)


def test_what_is_put_off_is_due_together_uncharged_and_says_why(connection: psycopg.Connection) -> None:
    assert bookkeeping.files_put_off(connection) is None
    claimed_by_run(connection, A1, B1)
    bookkeeping.put_off(connection, "run", [A1, B1], error="the model is gone", work=WORK)
    for version in (A1, B1):
        found = known(connection, version)
        assert (found.status, found.attempts, found.batch_id, found.claim_owner, found.due) == (FileStatus.PENDING, 0, "", "", False)
    assert wait_of(connection, A1) == pytest.approx(wait_of(connection, B1), abs=0.2)
    told = bookkeeping.files_put_off(connection)
    assert told is not None
    assert (told.files, told.why) == (2, "the model is gone")
    bookkeeping.request_retry(connection, "a.csv")
    assert known(connection, A1).due, "who asks for a retry does not wait"


@pytest.mark.parametrize(("since", "least", "most"), [(0, 4, 8), (30, 15, 31), (1000, 50, 100)])
def test_a_file_waits_as_long_as_it_was_put_off_already_up_to_a_bound(
    connection: psycopg.Connection, since: int, least: float, most: float
) -> None:
    claimed_by_run(connection, A1)
    bookkeeping.put_off(connection, "run", [A1], error="away", work=WORK)
    connection.execute("UPDATE question_file SET put_off_since = now() - make_interval(secs => %s)", [since])
    claimed_by_run(connection, A1)
    bookkeeping.put_off(connection, "run", [A1], error="away", work=WORK)
    assert least - 1 < wait_of(connection, A1) <= most


@pytest.mark.parametrize(("suspect_after", "charged"), [(0, True), (3000, True), (4000, False), (None, False)])
def test_a_suspect_that_fails_on_while_others_are_loaded_is_charged(
    connection: psycopg.Connection, tmp_path: Path, suspect_after: float | None, charged: bool
) -> None:
    def fails(*versions: FileVersion) -> list[int]:
        claimed_by_run(connection, *versions)
        bookkeeping.put_off(connection, "run", versions, error="away", work=WORK, suspect_after=suspect_after)
        return [known(connection, version).attempts for version in versions]

    load(connection, tmp_path, FileVersion("before.csv", 1))
    for _ in range(2):
        assert fails(A1, B1) == [0, 0]
        # As long ago as an hour, and after the first load.
        connection.execute("UPDATE question_file SET put_off_since = now() - interval '1 hour' WHERE put_off_since IS NOT NULL")
        connection.execute("UPDATE question_file SET loaded_at = now() - interval '2 hours' WHERE loaded_at IS NOT NULL")
    load(connection, tmp_path, FileVersion("meanwhile.csv", 1))
    assert fails(A1) == [0], "its wait was not over"
    connection.execute("UPDATE question_file SET retry_at = now()")
    assert fails(A1) == [1 if charged else 0]
    assert known(connection, B1).attempts == 0


def test_a_file_whose_workers_always_call_it_innocent_is_parked_in_the_end(connection: psycopg.Connection, tmp_path: Path) -> None:
    statuses = []
    for _ in range(WORK.max_attempts):
        for _ in range(2):
            claimed_by_run(connection, A1)
            bookkeeping.put_off(connection, "run", [A1], error="disk full", work=WORK, suspect_after=WORK.retry_most_seconds)
            statuses.append(known(connection, A1).status)
            connection.execute("UPDATE question_file SET retry_at = now(), put_off_since = put_off_since - interval '1 hour'")
            load(connection, tmp_path / str(len(statuses)), FileVersion(f"{len(statuses)}.csv", 1))
    assert statuses == [FileStatus.PENDING] * 5 + [FileStatus.FAILED]


def test_what_a_run_leaves_behind_an_outage_is_put_off_with_its_batch(connection: psycopg.Connection) -> None:
    claimed_by_run(connection, A1)
    bookkeeping.put_off_run(connection, "run", error="away", work=WORK)
    bookkeeping.release(connection, "run")
    found = known(connection, A1)
    assert (found.status, found.attempts, found.batch_id, found.due, found.error) == (FileStatus.PENDING, 0, "batch", False, "away")


def test_commits_of_files_that_are_not_done_are_in_use(connection: psycopg.Connection, tmp_path: Path) -> None:
    claimed_by_run(connection, A1, B1)
    bookkeeping.record_commit(connection, "run", [A1], commit="one", job="one")
    bookkeeping.record_commit(connection, "run", [B1], commit="two", job="two")
    load(connection, tmp_path, A1)
    assert bookkeeping.commits_in_use(connection, ["one", "two", "three"]) == {"one", "two"}, "the run may still read both"
    bookkeeping.release(connection, "run")
    assert bookkeeping.commits_in_use(connection, ["one", "two", "three"]) == {"two"}


# Ends


def test_a_rejected_file_keeps_its_reason(connection: psycopg.Connection) -> None:
    bookkeeping.reject_file(connection, A1, error="not_utf8: byte 17")
    found = known(connection, A1)
    assert (found.status, found.error, found.archived_at) == (FileStatus.REJECTED, "not_utf8: byte 17", None)
    assert [record.version for record in bookkeeping.pending_archive(connection, limit=5)] == [A1]


def test_a_loaded_file_is_finished_by_being_archived_and_another_keeps_its_status(connection: psycopg.Connection, tmp_path: Path) -> None:
    load(connection, tmp_path, A1)
    bookkeeping.reject_file(connection, B1, error="binary")
    for version in (A1, B1):
        bookkeeping.archived(connection, version, place=f"elsewhere/{version.name}")

    assert [known(connection, version).status for version in (A1, B1)] == [FileStatus.FINISHED, FileStatus.REJECTED]
    assert known(connection, A1).place == "elsewhere/a.csv"
    assert known(connection, A1).archived_at is not None
    assert bookkeeping.pending_archive(connection, limit=5) == []


def test_what_is_being_worked_on_is_not_up_for_archiving_by_others(connection: psycopg.Connection, tmp_path: Path) -> None:
    bookkeeping.claim(connection, [A1], owner="run", lease_seconds=HELD)
    load(connection, tmp_path, A1)
    assert bookkeeping.pending_archive(connection, limit=5) == []
    bookkeeping.release(connection, "run")
    assert [record.version.name for record in bookkeeping.pending_archive(connection, limit=5)] == ["a.csv"]


def test_an_unchanged_upload_shows_the_figures_of_the_answers_that_stand_for_it(connection: psycopg.Connection, tmp_path: Path) -> None:
    load(connection, tmp_path, A1)
    same = replace(A2, size=SIZE, crc32c=CRC32C)
    bookkeeping.claim(connection, [same], owner="run", lease_seconds=HELD)
    connection.execute("UPDATE question_file SET pachyderm_commit = 'commit' WHERE generation = 1")
    assert bookkeeping.mark_unchanged(connection, same)
    found = known(connection, same)
    assert (found.status, found.rows, found.answered, found.model, found.pachyderm_commit) == (
        *(FileStatus.UNCHANGED, 2, 2, "minilm-squad", "commit"),
    )


def test_an_upload_is_not_unchanged_any_more_when_a_late_job_has_loaded_another_content(
    connection: psycopg.Connection, tmp_path: Path
) -> None:
    upload = FileVersion("a.csv", 3, SIZE, CRC32C)
    load(connection, tmp_path, A1)
    # Recorded when it was seen, which is where a load takes its size and checksum from.
    bookkeeping.claim(connection, [A2], owner="lost", lease_seconds=EXPIRED)
    load(connection, tmp_path, A2)
    assert not bookkeeping.mark_unchanged(connection, upload), "the table holds what was uploaded in between"
    assert known(connection, upload).status is FileStatus.PENDING


def test_an_upload_is_not_recorded_as_unchanged_while_its_file_is_being_loaded(
    migrated: PostgresSettings, connection: psycopg.Connection, tmp_path: Path
) -> None:
    upload = FileVersion("a.csv", 3, SIZE, CRC32C)
    load(connection, tmp_path, A1)
    with connect(migrated) as other, other.transaction():
        load(other, tmp_path, A2)
        assert not bookkeeping.mark_unchanged(connection, upload), "whatever the load is of"
    assert bookkeeping.mark_unchanged(connection, upload)


@pytest.mark.parametrize("end", [bookkeeping.mark_superseded, bookkeeping.mark_unchanged])
def test_what_is_loaded_is_not_turned_into_something_else(connection: psycopg.Connection, tmp_path: Path, end) -> None:  # type: ignore[no-untyped-def]
    load(connection, tmp_path, A1)
    end(connection, A1)
    assert known(connection, A1).status is FileStatus.LOADED


# Looking


def test_the_answers_in_the_table_are_known_by_model_and_only_while_nobody_wants_them_anew(
    connection: psycopg.Connection, tmp_path: Path
) -> None:
    def answered(model: ModelChoice = BUNDLED) -> dict[str, int]:
        found = bookkeeping.latest_answered(connection, ["a.csv", "b.csv"], model=model)
        return {name: version.generation for name, version in found.items()}

    assert answered() == {}
    load(connection, tmp_path, A1)
    assert answered() == {"a.csv": 1}
    assert answered(ModelChoice("bundled", "", "bf16")) == {}
    bookkeeping.archived(connection, A1, place="processed/a.csv")
    load(connection, tmp_path, A2, wanted=ModelChoice("other"))
    assert answered() == {}
    assert answered(ModelChoice("other")) == {"a.csv": 2}
    bookkeeping.request_retry(connection, "a.csv")
    assert answered(ModelChoice("other")) == {}


def test_a_retry_asks_for_the_newest_generation_under_a_new_load_id(connection: psycopg.Connection, tmp_path: Path) -> None:
    load(connection, tmp_path, A1)
    bookkeeping.archived(connection, A1, place="processed/a.csv/1.csv")
    bookkeeping.claim(connection, [A2], owner="run", lease_seconds=EXPIRED)
    charge(connection, A2, "bad")

    found = bookkeeping.request_retry(connection, "a.csv")

    assert (found.version, found.status, found.load_id, found.attempts, found.error, found.due) == (A2, FileStatus.PENDING, 2, 0, "", True)
    assert known(connection, A1).status is FileStatus.FINISHED
    assert bookkeeping.waiting_elsewhere(connection) == []


def test_a_retry_of_an_archived_file_waits_where_no_listing_shows_it(connection: psycopg.Connection, tmp_path: Path) -> None:
    load(connection, tmp_path, A1)
    bookkeeping.archived(connection, A1, place="processed/a.csv/1.csv")
    bookkeeping.request_retry(connection, "a.csv")
    assert [version.name for version in bookkeeping.waiting_elsewhere(connection)] == ["a.csv"]
    load(connection, tmp_path, A1, load_id=2)
    assert bookkeeping.waiting_elsewhere(connection) == []


def test_a_retry_of_a_file_that_was_never_seen_says_so(connection: psycopg.Connection) -> None:
    with pytest.raises(InputError, match=r"'nothing\.csv'"):
        bookkeeping.request_retry(connection, "nothing.csv")


def test_retries_are_asked_for_together_or_not_at_all(connection: psycopg.Connection, tmp_path: Path) -> None:
    load(connection, tmp_path, A1)
    load(connection, tmp_path, B1)
    found = bookkeeping.request_retries(connection, ["b.csv", "a.csv", "b.csv"])
    assert [(record.version.name, record.load_id) for record in found] == [("b.csv", 2), ("a.csv", 2), ("b.csv", 2)]
    connection.execute("UPDATE question_file SET place = '' WHERE source_file = 'b.csv'")
    with pytest.raises(InputError, match=r"'nothing\.csv'.*'b\.csv' is gone"):
        bookkeeping.request_retries(connection, ["a.csv", "nothing.csv", "b.csv"])
    assert known(connection, A1).load_id == 2


def test_the_history_is_newest_first_and_bounded(connection: psycopg.Connection) -> None:
    for version in (A1, B1, A2):
        bookkeeping.claim(connection, [version], owner="run", lease_seconds=EXPIRED)
    assert [record.version for record in bookkeeping.history(connection)] == [A2, B1, A1]
    assert [record.version for record in bookkeeping.history(connection, name="a.csv")] == [A2, A1]
    assert [record.version for record in bookkeeping.history(connection, limit=1)] == [A2]


def test_partitions_find_the_newest_generation_of_their_file(connection: psycopg.Connection) -> None:
    odd = FileVersion("x,y...\n%\U0001f642" + "é" * 490, 7)
    for version in (A2, A1, odd):
        bookkeeping.claim(connection, [version], owner="run", lease_seconds=EXPIRED)
    keys = [partition_key(version.name) for version in (A1, odd, B1)]
    found = bookkeeping.newest_by_partition(connection, keys)
    assert {key: record.version for key, record in found.items()} == {keys[0]: A2, keys[1]: odd}


def test_records_of_many_versions_are_found_and_unknown_ones_left_out(connection: psycopg.Connection) -> None:
    versions = [FileVersion(f"folder/{n}.csv", n, n, "sum") for n in range(12_000)]
    connection.execute(
        "INSERT INTO question_file (source_file, generation, size, crc32c, file_id, partition_key, place) "
        "SELECT format('folder/%s.csv', n), n, n, 'sum', '', '', '' FROM generate_series(0, 11000) n"
    )
    found = bookkeeping.records(connection, versions)
    assert [record.version for record in found.values()] == versions[:11_001]
    assert set(bookkeeping.known(connection, versions)) == set(found)


def test_what_a_plan_has_to_know_agrees_with_the_records(connection: psycopg.Connection, tmp_path: Path) -> None:
    load(connection, tmp_path, A1)
    bookkeeping.request_retry(connection, "a.csv")
    bookkeeping.claim(connection, [B1], owner="run", lease_seconds=HELD)
    bookkeeping.start(connection, "run", [B1], run_id="run", batch_id="batch")
    bookkeeping.reject_file(connection, FileVersion("c.csv", 1), error="binary")
    bookkeeping.claim(connection, [FileVersion("d.csv", 1)], owner="run", lease_seconds=HELD)
    charge(connection, FileVersion("d.csv", 1), "?")

    found = bookkeeping.known(connection, [A1, A2, B1, FileVersion("c.csv", 1), FileVersion("d.csv", 1)])

    assert found == {
        ("a.csv", 1): Known(FileStatus.PENDING, load_id=2),
        ("b.csv", 1): Known(FileStatus.RUNNING, batch_id="batch"),
        ("c.csv", 1): Known(FileStatus.REJECTED),
        ("d.csv", 1): Known(FileStatus.PENDING, attempts=1, due=False),
    }


# Evidence


def test_the_check_counts_what_the_tables_hold(connection: psycopg.Connection, tmp_path: Path) -> None:
    rows = [*answered_rows(4, context="Zoë 🙂 answered."), AnsweredRow("?", "Nothing here.", error="no_answer")]
    load_file(connection, AnsweredUpload(rows, name="a.csv").write(tmp_path / "file"))
    assert bookkeeping.check_file(connection, A1) == bookkeeping.FileCheck(4, 1, 0, 0)
    assert bookkeeping.check_file(connection, A2) == bookkeeping.FileCheck(0, 0, 0, 0)


@pytest.mark.parametrize(
    ("damage", "without_answer", "wrong_spans"),
    [
        ("answer = NULL", 1, 1),
        ("answer = '', answer_end = answer_start", 1, 0),
        ("answer = 'Something else'", 0, 1),
        ("answer_start = answer_start + 1", 0, 1),
        ("answer_end = answer_start - 3", 0, 1),
        ("answer_start = NULL", 0, 1),
        ("context = NULL", 0, 1),
    ],
)
def test_the_check_sees_an_answer_that_is_missing_or_not_where_it_should_be(
    connection: psycopg.Connection, tmp_path: Path, damage: str, without_answer: int, wrong_spans: int
) -> None:
    load(connection, tmp_path, A1)
    connection.execute(f"UPDATE question_answer SET {damage} WHERE row_number = 2")  # noqa: S608
    counted = bookkeeping.check_file(connection, A1)
    assert (counted.answered_rows, counted.without_answer, counted.wrong_spans) == (2, without_answer, wrong_spans)
