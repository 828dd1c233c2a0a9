"""Reading records, and asking for retries."""

from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from qa_platform.contract import FileStatus, FileVersion, ModelChoice, partition_key
from qa_platform.errors import InputError
from qa_platform.ledger import Ledger
from qa_platform.ledger.states import Known
from qa_platform_tests.ledger.helpers import A1, A2, B1, EXPIRED, HELD, NOT_UTF8, charge, claimed_by_run, known, load
from qa_platform_tests.loading_helpers import BUNDLED


def test_the_answers_in_the_table_are_known_by_model_and_only_while_nobody_wants_them_anew(
    ledger: Ledger, connection: psycopg.Connection, tmp_path: Path
) -> None:
    def answered(model: ModelChoice = BUNDLED) -> dict[str, int]:
        found = ledger.latest_answered(["a.csv", "b.csv"], model=model)
        return {name: version.generation for name, version in found.items()}

    assert answered() == {}
    load(connection, tmp_path, A1)
    assert answered() == {"a.csv": 1}
    assert answered(ModelChoice("bundled", "", "bf16")) == {}
    ledger.record_archived(A1, place="processed/a.csv")
    load(connection, tmp_path, A2, wanted=ModelChoice("other"))
    assert answered() == {}
    assert answered(ModelChoice("other")) == {"a.csv": 2}
    ledger.request_retries(["a.csv"])
    assert answered(ModelChoice("other")) == {}


def test_answers_are_those_of_a_model_with_its_threshold_for_no_answer(
    ledger: Ledger, connection: psycopg.Connection, tmp_path: Path
) -> None:
    with_threshold = replace(BUNDLED, no_answer_threshold=-0.1)

    def answered(model: ModelChoice) -> bool:
        return "a.csv" in ledger.latest_answered(["a.csv"], model=model)

    load(connection, tmp_path, A1)
    assert known(ledger, A1).wanted_no_answer_threshold is None
    assert answered(BUNDLED)
    assert not answered(with_threshold)
    load(connection, tmp_path, A1, load_id=2, wanted=with_threshold)
    assert known(ledger, A1).wanted_no_answer_threshold == -0.1
    assert answered(with_threshold)
    assert not answered(BUNDLED)
    assert not answered(replace(BUNDLED, no_answer_threshold=0.0))


def test_a_retry_asks_for_the_newest_generation_under_a_new_load_id(ledger: Ledger, connection: psycopg.Connection, tmp_path: Path) -> None:
    load(connection, tmp_path, A1)
    ledger.record_archived(A1, place="processed/a.csv/1.csv")
    ledger.claim([A2], owner="run", lease_seconds=EXPIRED)
    charge(ledger, A2, "bad")
    connection.execute("UPDATE question_file SET batch_id = 'batch'")

    found = ledger.request_retries(["a.csv"])[0]

    assert (found.version, found.status, found.load_id, found.attempts, found.error, found.due) == (A2, FileStatus.PENDING, 2, 0, "", True)
    assert found.batch_id == "", "it is not a part of what an earlier run left behind"
    assert known(ledger, A1).status is FileStatus.FINISHED
    assert list(ledger.waiting_elsewhere()) == []


def test_a_retry_of_an_archived_file_waits_where_no_listing_shows_it(
    ledger: Ledger, connection: psycopg.Connection, tmp_path: Path
) -> None:
    load(connection, tmp_path, A1)
    ledger.record_archived(A1, place="processed/a.csv/1.csv")
    ledger.request_retries(["a.csv"])
    assert [version.name for version in ledger.waiting_elsewhere()] == ["a.csv"]
    load(connection, tmp_path, A1, load_id=2)
    assert list(ledger.waiting_elsewhere()) == []


def test_a_retry_of_a_file_that_was_never_seen_says_so(ledger: Ledger) -> None:
    with pytest.raises(InputError, match=r"'nothing\.csv'"):
        ledger.request_retries(["nothing.csv"])


def test_retries_are_asked_for_together_or_not_at_all(ledger: Ledger, connection: psycopg.Connection, tmp_path: Path) -> None:
    load(connection, tmp_path, A1)
    load(connection, tmp_path, B1)
    found = ledger.request_retries(["b.csv", "a.csv", "b.csv"])
    assert [(record.version.name, record.load_id) for record in found] == [("b.csv", 2), ("a.csv", 2), ("b.csv", 2)]
    connection.execute("UPDATE question_file SET place = '' WHERE source_file = 'b.csv'")
    with pytest.raises(InputError, match=r"'nothing\.csv'.*'b\.csv' is gone"):
        ledger.request_retries(["a.csv", "nothing.csv", "b.csv"])
    assert known(ledger, A1).load_id == 2


def test_a_retry_is_claimed_at_once_for_its_owner_except_where_somebody_else_works_on_the_file(
    ledger: Ledger, connection: psycopg.Connection, tmp_path: Path
) -> None:
    load(connection, tmp_path, A1)
    load(connection, tmp_path, B1)
    ledger.take_over([B1], token="", owner="other", lease_seconds=HELD)
    found = ledger.request_retries(["a.csv", "b.csv"], owner="run", lease_seconds=HELD)
    assert [(record.claim_owner, record.load_id) for record in found] == [("run", 2), ("other", 2)]
    assert ledger.claim([A1], owner="sensor", lease_seconds=HELD) == []


def test_a_run_knows_the_files_that_it_worked_on(ledger: Ledger) -> None:
    claimed_by_run(ledger, A1, run="first")
    claimed_by_run(ledger, B1, run="second")
    charge(ledger, A1, "bad", owner="first")
    assert ledger.names_of_run("first") == {"a.csv"}


def test_the_history_is_newest_first_and_bounded(ledger: Ledger) -> None:
    for version in (A1, B1, A2):
        ledger.claim([version], owner="run", lease_seconds=EXPIRED)
    assert [record.version for record in ledger.history(limit=5)] == [A2, B1, A1]
    assert [record.version for record in ledger.history(name="a.csv", limit=5)] == [A2, A1]
    assert [record.version for record in ledger.history(limit=1)] == [A2]


def test_partitions_find_the_newest_generation_of_their_file(ledger: Ledger) -> None:
    odd = FileVersion("x,y...\n%\U0001f642" + "é" * 490, 7)
    for version in (A2, A1, odd):
        ledger.claim([version], owner="run", lease_seconds=EXPIRED)
    keys = [partition_key(version.name) for version in (A1, odd, B1)]
    found = ledger.newest_by_partition(keys)
    assert {key: record.version for key, record in found.items()} == {keys[0]: A2, keys[1]: odd}


def test_records_of_many_versions_are_found_and_unknown_ones_left_out(ledger: Ledger, connection: psycopg.Connection) -> None:
    versions = [FileVersion(f"folder/{n}.csv", n, n, "sum") for n in range(12_000)]
    connection.execute(
        "INSERT INTO question_file (source_file, generation, size, crc32c, file_id, partition_key, place) "
        "SELECT format('folder/%s.csv', n), n, n, 'sum', '', '', '' FROM generate_series(0, 11000) n"
    )
    found = ledger.records(versions)
    assert [record.version for record in found.values()] == versions[:11_001]
    assert set(ledger.known(versions)) == set(found)


def test_what_a_plan_has_to_know_agrees_with_the_records(ledger: Ledger, connection: psycopg.Connection, tmp_path: Path) -> None:
    load(connection, tmp_path, A1)
    ledger.request_retries(["a.csv"])
    ledger.claim([B1], owner="run", lease_seconds=HELD)
    ledger.start("run", [B1], run_id="run", batch_id="batch")
    ledger.reject_file(FileVersion("c.csv", 1), NOT_UTF8)
    ledger.claim([FileVersion("d.csv", 1)], owner="run", lease_seconds=HELD)
    charge(ledger, FileVersion("d.csv", 1), "?")

    found = ledger.known([A1, A2, B1, FileVersion("c.csv", 1), FileVersion("d.csv", 1)])

    assert found == {
        ("a.csv", 1): Known(FileStatus.PENDING, load_id=2),
        ("b.csv", 1): Known(FileStatus.RUNNING, batch_id="batch"),
        ("c.csv", 1): Known(FileStatus.REJECTED),
        ("d.csv", 1): Known(FileStatus.PENDING, attempts=1, due=False),
    }
