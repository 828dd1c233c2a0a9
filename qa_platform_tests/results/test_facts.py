"""The report on a loaded file, from a real PostgreSQL, and every check with a file that fails it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from qa_platform.clients.postgres import connect
from qa_platform.contract import FileVersion, Rejection, RowReason
from qa_platform.ledger import FileRecord, Ledger
from qa_platform.loading import migrate
from qa_platform.loading.load import load_file
from qa_platform.orchestration.reports import checks
from qa_platform.orchestration.reports.markdown import cell
from qa_platform.results.facts import BUCKETS, SHOWN_ROWS, FileFacts, gather
from qa_platform.results.passage import Passage
from qa_platform.settings import CheckSettings, PostgresSettings
from qa_platform_tests.conftest import Database
from qa_platform_tests.loading_helpers import AnsweredRow, AnsweredUpload

SETTINGS = CheckSettings(low_score=0.1, review_share=0.25, drift_files=20, drift_deviations=3)


@pytest.fixture
def postgres(database: Database) -> PostgresSettings:
    settings = PostgresSettings(host=database.host, port=database.port, user=database.user, dbname=database.dbname)
    migrate.upgrade(settings)
    return settings


@pytest.fixture
def answers(postgres: PostgresSettings) -> Iterator[psycopg.Connection]:
    with connect(postgres) as connection:
        yield connection


class Files:
    """Loaded files whose scores the test chooses."""

    def __init__(self, ledger: Ledger, connection: psycopg.Connection, folder: Path) -> None:
        self.ledger = ledger
        self.connection = connection
        self._folder = folder

    def load(self, name: str, scores: Sequence[float | None], *, rejected: int = 0) -> FileRecord:
        rows = [AnsweredRow(f"Question {n}?", f"word{n} and more of the context") for n in range(1, len(scores) + 1)]
        rows += [AnsweredRow("", "nothing is asked", error=RowReason.EMPTY_QUESTION) for _ in range(rejected)]
        rejections = {n: Rejection(n, n + 1, RowReason.EMPTY_QUESTION) for n in range(len(scores) + 1, len(rows) + 1)}
        upload = AnsweredUpload(rows, name=name, rejections=rejections)
        load_file(self.connection, upload.write(self._folder / name), job_id="job", commit_id="commit")
        for number, score in enumerate(scores, start=1):
            self.connection.execute(
                "UPDATE question_answer SET score = %s WHERE source_file = %s AND row_number = %s", [score, name, number]
            )
        return self.record(name)

    def record(self, name: str) -> FileRecord:
        return self.ledger.records([FileVersion(name, 1)])[name, 1]

    def facts(self, record: FileRecord) -> FileFacts:
        return next(gather(self.ledger, self.connection, [record], SETTINGS))

    def failed(self, record: FileRecord) -> set[str]:
        return {e.check_name for e in checks.file_evaluations(self.facts(record), SETTINGS) if not e.passed}


@pytest.fixture
def files(postgres: PostgresSettings, answers: psycopg.Connection, tmp_path: Path) -> Iterator[Files]:
    with Ledger(postgres) as ledger:
        yield Files(ledger, answers, tmp_path)


def test_scores_are_counted_by_the_database(files: Files) -> None:
    facts = files.facts(files.load("a.csv", [0.0, 0.04, 0.5, 0.97, 1.0, None, math.nan], rejected=2))
    counts = dict(enumerate(facts.scores.counts))
    assert {bucket: count for bucket, count in counts.items() if count} == {0: 2, 10: 1, BUCKETS - 1: 2}
    assert facts.scores.mean == pytest.approx(2.51 / 5)
    assert facts.scores.low == 2
    assert facts.reasons == {"empty_question": 2}


def test_the_first_and_the_lowest_answers_are_shown_and_no_more(files: Files) -> None:
    facts = files.facts(files.load("a.csv", [0.9 - n / 100 for n in range(20)]))
    assert [row.number for row in facts.first] == [1, 2, 3, 4, 5]
    assert [row.number for row in facts.lowest] == [20, 19, 18, 17, 16]
    assert len(facts.lowest) == SHOWN_ROWS
    assert facts.lowest[0].answer == "word20"
    assert facts.lowest[0].passage == Passage("", "word20", " and more of the context")


def test_what_stands_around_an_answer_is_shown_with_it(files: Files) -> None:
    record = files.load("a.csv", [0.5] * 3)
    context = "before " * 100 + "the answer" + " after" * 100
    files.connection.execute("UPDATE question_answer SET context = %s, answer_start = 700, answer_end = 710", [context])
    files.connection.execute("UPDATE question_answer SET answer_start = NULL, answer_end = NULL WHERE row_number = 2")
    files.connection.execute("UPDATE question_answer SET answer_start = -5, answer_end = -9 WHERE row_number = 3")
    within, without, wrong = files.facts(record).first
    assert cell(within.passage, characters=45) == "…before before the answer after after after…"
    assert cell(without.passage, characters=20) == "before before…"
    assert wrong.passage.piece == ""


def test_a_good_file_passes_every_check(files: Files) -> None:
    assert files.failed(files.load("a.csv", [0.5] * 8, rejected=1)) == set()
    assert files.failed(files.load("b.csv", [0.5] * 6 + [0.05] * 2)) == set(), "just as many as may need a look"


def test_shards_kept_from_an_earlier_revision_are_of_the_recorded_model(files: Files) -> None:
    record = files.load("a.csv", [0.5] * 8)
    files.connection.execute("UPDATE question_answer SET model_revision = 'earlier' WHERE row_number <= 3")
    assert files.failed(record) == {checks.RECORDED}
    files.connection.execute("UPDATE question_file SET model_revision = 'earlier, ' || model_revision")
    assert files.failed(files.record("a.csv")) == set()
    files.connection.execute("UPDATE question_answer SET model_revision = NULL WHERE row_number = 1")
    assert files.failed(files.record("a.csv")) == {checks.RECORDED}


@pytest.mark.parametrize(
    ("damage", "failed"),
    [
        ("DELETE FROM question_answer WHERE row_number = 1", {checks.COMPLETE, checks.RECORDED}),
        ("DELETE FROM question_answer_reject", {checks.COMPLETE, checks.RECORDED}),
        ("UPDATE question_answer_reject SET reason = 'no_answer'", {checks.RECORDED}),
        ("UPDATE question_answer SET generation = 7 WHERE row_number = 1", {checks.COMPLETE, checks.RECORDED}),
        (
            "INSERT INTO question_answer (source_file, generation, row_number, question, context, answer) "
            "VALUES ('a.csv', 7, 99, '', '', '')",
            {checks.RECORDED},
        ),
        (
            "INSERT INTO question_answer_reject (source_file, generation, load_id, row_number, reason) "
            "VALUES ('a.csv', 7, 1, 99, 'no_answer')",
            {checks.RECORDED},
        ),
        ("UPDATE question_answer SET model_revision = 'other' WHERE row_number = 1", {checks.RECORDED}),
        ("UPDATE question_answer SET answer = '', answer_end = 0 WHERE row_number = 1", {checks.ANSWERED}),
        ("UPDATE question_answer SET answer = 'never' WHERE row_number = 2", {checks.SPANS}),
        ("UPDATE question_answer SET score = 0.01 WHERE row_number <= 2", {checks.REVIEW}),
        ("UPDATE question_answer SET flag = 'low_score' WHERE row_number <= 2", {checks.REVIEW}),
    ],
)
def test_each_damage_fails_its_checks(files: Files, damage: str, failed: set[str]) -> None:
    record = files.load("a.csv", [0.5] * 8, rejected=1)
    files.connection.execute(damage)
    assert files.failed(record) == failed


def test_a_wrong_span_is_shown_with_its_row(files: Files) -> None:
    record = files.load("a.csv", [0.5] * 4)
    files.connection.execute("UPDATE question_answer SET answer = 'never' WHERE row_number = 3")
    (spans,) = (e for e in checks.file_evaluations(files.facts(record), SETTINGS) if e.check_name == checks.SPANS)
    assert "| 3 | Question 3? | never |" in str(spans.metadata["first of them"].value)


def test_scores_unlike_those_of_the_last_files_warn_and_small_differences_do_not(files: Files) -> None:
    for number in range(6):
        files.load(f"past{number}.csv", [0.7 + number / 100, 0.8])
    assert checks.DRIFT not in files.failed(files.load("like.csv", [0.76] * 10))
    odd = files.load("odd.csv", [0.3, 0.32, 0.28] * 5)
    assert files.failed(odd) == {checks.DRIFT}
    assert len(files.facts(odd).history) == 7


def test_however_regular_the_earlier_files_were_a_small_difference_does_not_matter(files: Files) -> None:
    for number in range(6):
        files.load(f"past{number}.csv", [0.75] * 5)
    assert files.failed(files.load("like.csv", [0.79] * 10)) == set()
    files.connection.execute("UPDATE question_answer SET score = 0.81 WHERE source_file = 'like.csv'")
    assert files.failed(files.record("like.csv")) == {checks.DRIFT}


def test_a_file_of_few_rows_may_differ_more(files: Files) -> None:
    for number in range(6):
        files.load(f"past{number}.csv", [0.75] * 5)
    assert files.failed(files.load("two.csv", [0.9, 0.2])) == set()


def test_scores_are_not_compared_without_enough_history_nor_across_models(files: Files) -> None:
    for number in range(4):
        files.load(f"past{number}.csv", [0.9] * 5)
    odd = files.load("odd.csv", [0.3] * 15)
    assert checks.DRIFT not in files.failed(odd)
    files.load("past4.csv", [0.9] * 5)
    assert files.failed(odd) == {checks.DRIFT}
    files.connection.execute("UPDATE question_file SET model_revision = 'older' WHERE source_file LIKE 'past%'")
    assert files.failed(odd) == set()


def test_files_of_one_batch_are_not_compared_with_each_other(files: Files) -> None:
    records = [files.load(f"{number}.csv", [0.5] * 2) for number in range(7)]
    assert [len(facts.history) for facts in gather(files.ledger, files.connection, records, SETTINGS)] == [0] * 7


def test_warnings_are_warnings_and_errors_are_errors(files: Files) -> None:
    evaluations = list(checks.file_evaluations(files.facts(files.load("a.csv", [0.5] * 3)), SETTINGS))
    assert {e.check_name for e in evaluations} == {spec.name for spec in checks.CHECK_SPECS}
    warned = {e.check_name for e in evaluations if e.severity.value == "WARN"}
    assert warned == {checks.REVIEW, checks.DRIFT}
    assert {r.check_name for r in checks.run_results(evaluations) if r.severity.value == "WARN"} == warned


def test_a_hostile_name_is_text_in_a_checks_description(files: Files) -> None:
    record = files.load("a.csv", [0.5])
    files.connection.execute("DELETE FROM question_answer")
    hostile = replace(record, version=FileVersion("![](https://evil.example/x) .csv", 1))
    evaluations = list(checks.file_evaluations(replace(files.facts(record), record=hostile), SETTINGS))
    results = {result.check_name: result for result in checks.run_results(evaluations)}
    for description in [*(e.description for e in evaluations), results[checks.COMPLETE].description]:
        assert "evil.example" in str(description)
        assert "![" not in str(description)
