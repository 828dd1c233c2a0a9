"""Listings of any length, and finding one file among any number of its generations."""

from pathlib import Path

import psycopg
import pytest

from qa_platform.contract import FileVersion
from qa_platform.ledger import Ledger, listings
from qa_platform.ledger.conditions import IN_THE_TABLE
from qa_platform.ledger.restoring import _IS_ANSWERED
from qa_platform.settings import CheckSettings
from qa_platform_tests.ledger.helpers import A1, B1, HELD, load
from qa_platform_tests.loading_helpers import ANSWERED_BY

IDENTICAL = 1_200


def upload_again(connection: psycopg.Connection, version: FileVersion) -> None:
    """As many further generations of a loaded file, all of them unchanged."""
    connection.execute(
        """
        INSERT INTO question_file SELECT (jsonb_populate_record(f, jsonb_build_object(
            'generation', f.generation + n, 'status', 'unchanged', 'loaded_at', null, 'created_at', now() + n * interval '1 second'))).*
        FROM question_file f, generate_series(1, %s) AS n WHERE f.source_file = %s AND f.generation = %s
        """,
        [IDENTICAL, version.name, version.generation],
    )


def test_what_is_in_the_table_is_found_below_any_number_of_identical_uploads(
    ledger: Ledger, connection: psycopg.Connection, tmp_path: Path
) -> None:
    load(connection, tmp_path, A1)
    load(connection, tmp_path, B1)
    upload_again(connection, A1)
    in_the_table, newest = ledger.in_the_table("a.csv"), ledger.newest(["a.csv"]).get("a.csv")
    assert in_the_table is not None
    assert newest is not None
    assert (in_the_table.version.generation, newest.version.generation) == (A1.generation, A1.generation + IDENTICAL)
    assert ledger.in_the_table("never.csv") is ledger.newest(["never.csv"]).get("never.csv") is None
    past = ledger.recent_loads(ANSWERED_BY, without=[], limit=CheckSettings().drift_files)
    assert {record.version.name for record in past} == {"a.csv", "b.csv"}, "the usual scores are still known"


@pytest.mark.parametrize("page", [1, 3, 100])
def test_lists_are_whole_whatever_the_page(
    ledger: Ledger, connection: psycopg.Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: int
) -> None:
    monkeypatch.setattr(listings, "_PAGE", page)
    load(connection, tmp_path, A1)
    # In one transaction: all of them are equally old.
    waiting = [FileVersion(f"{number}.csv", number + 1) for number in range(7)]
    ledger.claim(waiting, owner="run", lease_seconds=HELD)
    assert [record.version.name for record in ledger.unfinished()] == [*(version.name for version in waiting), "a.csv"]
    assert list(ledger.waiting_uploads()) == []
    ledger.release("run")
    assert [record.version for record in ledger.waiting_uploads()] == waiting
    connection.execute("UPDATE question_file SET place = 'processed/' || source_file WHERE status = 'pending'")
    assert list(ledger.waiting_elsewhere()) == waiting


def test_claims_on_waiting_files_are_known_by_owner_for_a_while_after_they_have_expired(ledger: Ledger) -> None:
    ledger.claim([A1], owner="held", lease_seconds=HELD)
    ledger.claim([B1], owner="expired", lease_seconds=-HELD)
    assert ledger.waiting_claims(expired_for=0) == {"held": 1}
    assert ledger.waiting_claims(expired_for=2 * HELD) == {"held": 1, "expired": 1}
    ledger.start("held", [A1], run_id="run", batch_id="batch")
    assert ledger.waiting_claims(expired_for=0) == {}, "its run has begun"


@pytest.mark.parametrize("condition", [IN_THE_TABLE, _IS_ANSWERED])
def test_whether_a_file_is_in_the_table_never_reads_all_of_it(connection: psycopg.Connection, condition: str) -> None:
    # A few files of many rows each, in their order: a scan of the table meets a row of the first at once, of the last after all others.
    connection.execute(
        """
        INSERT INTO question_answer (question, source_file, generation, row_number)
        SELECT repeat('?', 100), 'region' || f || '.csv', 1, r FROM generate_series(1, 4) f, generate_series(1, 5000) r
        """
    )
    connection.execute(
        """
        INSERT INTO question_file (source_file, generation, file_id, partition_key, status, rows, answered, place, loaded_at)
        SELECT 'region' || f || '.csv', g, '', '', 'finished', 5000, 5000, '', now() FROM generate_series(1, 4) f, generate_series(1, 20) g
        """
    )
    connection.execute("ANALYZE question_answer, question_file")
    plan = "\n".join(line for (line,) in connection.execute(f"EXPLAIN SELECT FROM question_file f WHERE {condition}"))
    assert "question_answer_source" in plan
    assert "Seq Scan on question_answer" not in plan, plan
