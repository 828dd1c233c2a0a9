"""The asset `platform_status`: what it says about files that were loaded, have failed, or wait."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage

from qa_platform.clients.services import Services
from qa_platform.contract import FileReason, FileVersion
from qa_platform.ingest import FileRejection
from qa_platform.ledger import Ledger
from qa_platform.loading.load import load_file
from qa_platform.orchestration.reports.markdown import INLINE_LIMIT
from qa_platform.orchestration.reports.status import read_figures, status_event
from qa_platform.settings import CheckSettings, IngestSettings, ModelSettings, PachydermSettings, PostgresSettings, WorkSettings
from qa_platform_tests.ledger.helpers import A1, A2, B1, C1, WORK, charge, claimed_by_run
from qa_platform_tests.loading_helpers import AnsweredRow, AnsweredUpload, answered_rows

CHECKS = CheckSettings(low_score=0.1)


@pytest.fixture
def services(postgres: PostgresSettings) -> Services:
    bucket = storage.Client("test", AnonymousCredentials()).bucket("b")
    return Services(bucket, PachydermSettings(), postgres, ModelSettings().pinned, IngestSettings(), WorkSettings())


def load(connection: psycopg.Connection, folder: Path, name: str, rows: list[AnsweredRow], *, days_ago: int = 0) -> None:
    load_file(connection, AnsweredUpload(rows, name=name).write(folder / name))
    connection.execute(
        """
        UPDATE question_file SET loaded_at = t, answered_at = t - interval '5 s', started_at = t - interval '25 s',
            created_at = t - interval '125 s'
        FROM (SELECT now() - make_interval(days => %s) AS t) AS loaded WHERE source_file = %s
        """,
        [days_ago, name],
    )


def shown(services: Services) -> dict[str, Any]:
    return {label: entry.value for label, entry in status_event(read_figures(services, CHECKS), CHECKS).metadata.items()}


def test_a_platform_without_files_is_well_and_shows_no_empty_tables(services: Services) -> None:
    assert shown(services) == {
        "in short": "**All is well.** Nothing was answered in the last 24 hours.",
        "files a day": 0,
        "rows a day": 0,
        "files rejected a day": 0,
        "files in work": 0,
        "files that failed": 0,
        "longest wait, minutes": 0.0,
    }


def test_what_was_answered_is_shown_by_day_with_its_times_and_scores(
    services: Services, connection: psycopg.Connection, tmp_path: Path
) -> None:
    load(connection, tmp_path, "new.csv", [*answered_rows(3), AnsweredRow("", "c", error="empty_question")])
    load(connection, tmp_path, "older.csv", answered_rows(5), days_ago=3)
    load(connection, tmp_path, "oldest.csv", answered_rows(7), days_ago=14)
    values = shown(services)
    assert values["in short"] == "**All is well.** Answered in the last 24 hours: 1 file with 4 rows. 75.0 % of their rows have an answer."
    assert (values["files a day"], values["rows a day"], values["rows with an answer, percent"]) == (1, 4, 75.0)
    days = [line.split(" | ")[1:] for line in values["by day"].splitlines()[2:]]
    assert days == [["1", "4", "75.0 % |"], ["1", "5", "100.0 % |"]]
    assert values["rows by day"].count("M") == 4, "answered today, the others of today, answered three days ago, and the axis"
    assert [line.split(" | ")[0:2] for line in values["time per file, last 24 hours"].splitlines()[2:]] == [
        ["| waiting", "0:01:40"],
        ["| answering", "20.0 s"],
        ["| loading", "5.0 s"],
    ]
    assert (values["seconds waiting, nine of ten files"], values["seconds answering, nine of ten files"]) == (100, 20)
    assert 0 < values["mean score"] < 1
    assert values["scores below 0.1, percent"] == 0
    assert values["scores, last 24 hours"].startswith("![answers by score, at most 3]")


def test_uploads_that_were_rejected_are_said(services: Services, connection: psycopg.Connection) -> None:
    with Ledger(services.postgres) as ledger:
        for version in (A1, B1):
            claimed_by_run(ledger, version)
            ledger.reject_file(version, FileRejection(FileReason.BINARY, "it is a photo"))
    connection.execute("UPDATE question_file SET created_at = now() - interval '25 hours' WHERE source_file = %s", [B1.name])
    values = shown(services)
    said = "**All is well.** Nothing was answered in the last 24 hours. Uploads that were rejected, for their owners to correct: 1."
    assert (values["in short"], values["files rejected a day"]) == (said, 1)
    assert values["which files, and why"] == "qa-platform status"


def test_files_that_need_a_person_are_counted_and_not_named(services: Services, connection: psycopg.Connection) -> None:
    with Ledger(services.postgres) as ledger:
        claimed_by_run(ledger, A1)
        for _ in range(WORK.max_attempts):
            charge(ledger, A1, "the *bridge* is | broken")
            connection.execute("UPDATE question_file SET retry_at = NULL")
            claimed_by_run(ledger, *[A1] * (ledger.records([A1])[A1.name, 1].status == "pending"))
        claimed_by_run(ledger, B1)
        ledger.defer("run", [B1], error="PostgreSQL is unavailable", work=WORK)
        ledger.claim([C1], owner="gone", lease_seconds=0)
    connection.execute("UPDATE question_file SET created_at = now() - interval '26 hours' WHERE source_file = %s", [C1.name])
    values = shown(services)
    assert values["in short"].startswith(
        "**1 file failed for good. 1 file waits for something outside it to be fixed. One file has waited for 1 day, 2:00:0"
    )
    assert values["which files, and why"] == "qa-platform status"
    assert "a.csv" not in str(values)
    assert "bridge" not in str(values)
    assert (values["files that failed"], values["files in work"]) == (1, 2)
    assert values["longest wait, minutes"] == pytest.approx(26 * 60, abs=1)
    with Ledger(services.postgres) as ledger:
        ledger.claim([A2], owner="run", lease_seconds=60)
    assert shown(services)["files that failed"] == 0, "it was uploaded again"


def test_files_that_stay_in_incoming_are_said(services: Services, connection: psycopg.Connection, tmp_path: Path) -> None:
    load(connection, tmp_path, A1.name, answered_rows(3))
    with Ledger(services.postgres) as ledger:
        ledger.record_archive_failure(A1, error="a hold", work=WORK)
    values = shown(services)
    assert values["in short"].startswith("**1 file cannot be moved out of incoming/.** ")
    assert values["which files, and why"] == "qa-platform status"


def test_a_busy_platform_is_still_shown_in_place(services: Services) -> None:
    figures = read_figures(services, CHECKS)
    days = [replace(day, files=10**6, answered=10**9, no_answer=10**8, rejected=10**7) for day in figures.days]
    event = status_event(replace(figures, days=days), CHECKS)
    assert all(len(str(event.metadata[label].value)) < INLINE_LIMIT for label in ("rows by day", "by day"))
    assert "more" not in str(event.metadata["by day"].value)


def test_what_happens_to_a_file_changes_the_version_and_time_alone_does_not(services: Services) -> None:
    before = read_figures(services, CHECKS).version
    with Ledger(services.postgres) as ledger:
        ledger.claim([FileVersion("a.csv", 1)], owner="run", lease_seconds=60)
    after = read_figures(services, CHECKS)
    assert after.version != before
    assert replace(after, totals=replace(after.totals, oldest_seconds=1e6)).version == after.version


def test_files_that_wait_do_not_hide_those_that_were_loaded(services: Services, connection: psycopg.Connection, tmp_path: Path) -> None:
    load(connection, tmp_path, "loaded.csv", answered_rows(3))
    with Ledger(services.postgres) as ledger:
        for batch in range(4):
            ledger.claim([FileVersion(f"{batch}-{n}.csv", 10**6 + n, 1) for n in range(300)], owner=f"run-{batch}", lease_seconds=600)
    figures = read_figures(services, CHECKS)
    assert (figures.recent.files, figures.scores.rows, sorted(figures.stages)) == (1, 3, ["answering", "loading", "waiting"])
