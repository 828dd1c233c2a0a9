"""Databases that are not UTF8: every entry point refuses them by name, and says what to do."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from click.testing import CliRunner

from qa_platform.cli.doctor import dagster, postgres
from qa_platform.cli.doctor.findings import Result, State, Wrong
from qa_platform.cli.main import main
from qa_platform.clients.postgres import WrongEncoding, connect
from qa_platform.contract import DatumFault, FileVersion, ModelChoice, file_id
from qa_platform.ledger import Ledger
from qa_platform.loading.load import load_file
from qa_platform.provisioning.project_files import project_file
from qa_platform.results.facts import count_rows, gather
from qa_platform.settings import CheckSettings, PostgresSettings
from qa_platform_tests.conftest import Database, new_database
from qa_platform_tests.ledger.helpers import known
from qa_platform_tests.loading_helpers import ANSWERED_BY, AnsweredRow, AnsweredUpload, migrated_database

OTHERS = ["LATIN1", "SQL_ASCII", "EUC_JP"]
FILE = AnsweredUpload([AnsweredRow("Wo?", "Zürich \N{GRINNING FACE} 日本 liegt", end=11)], name="é日.csv")


@pytest.fixture(params=OTHERS)
def other(request: pytest.FixtureRequest, postgres_socket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    """A database of another encoding, which the environment names."""
    with new_database(postgres_socket, encoding=request.param) as database:
        for name, value in database.environment.items():
            monkeypatch.setenv(name, value)
        yield database


@pytest.fixture
def encoding(request: pytest.FixtureRequest, other: Database) -> str:
    return str(request.node.callspec.params["other"])


def tables(database: Database) -> list[str]:
    with database.connect() as connection:
        return [name for (name,) in connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")]


def test_a_connection_is_refused_and_closed(other: Database, encoding: str) -> None:
    with pytest.raises(WrongEncoding, match=f"encoded in {encoding}, and must be in UTF8") as caught:
        connect(PostgresSettings())
    assert other.dbname in caught.value.where
    assert "CREATE DATABASE" in caught.value.advice
    with other.connect() as connection:
        rest = connection.execute("SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()", [other.dbname])
        assert rest.fetchone() == (0,)


@pytest.mark.parametrize("command", [["db", "upgrade"], ["status"], ["retry", "a.csv"]])
def test_a_command_says_it_and_changes_nothing(
    other: Database, encoding: str, command: list[str], gcs_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A bucket that needs no credentials, and answers at once.
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{gcs_address}")
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    assert f"encoded in {encoding}" in result.output
    assert "ENCODING 'UTF8'" in result.output
    assert tables(other) == []


def test_the_doctor_names_it_with_its_fix(other: Database, encoding: str) -> None:
    (finding,) = _results(postgres.PART.examine())
    assert finding.state is State.WRONG
    assert f"encoded in {encoding}" in finding.detail
    assert "ENCODING 'UTF8'" in finding.fix


def test_the_doctor_names_the_encoding_of_dagsters_storage(
    other: Database, encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dagster.yaml").write_text(project_file("dagster.yaml").read_text())
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.setenv("DAGSTER_PG_URL", other.url)
    _, finding, _ = dagster.PART.examine()
    assert finding.state is State.WRONG
    assert f"encoded in {encoding}" in finding.detail
    assert "ENCODING 'UTF8'" in finding.fix


def test_the_loader_says_it_and_that_no_file_is_to_blame(other: Database, encoding: str, tmp_path: Path) -> None:
    folder = FILE.write(tmp_path / "question_answer" / file_id(FILE.name))
    (tmp_path / "out").mkdir()
    environment = {**other.environment, "QA_PFS_ROOT": str(tmp_path), "question_answer": str(folder), "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-m", "qa_platform.loading.worker"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    fault = DatumFault.of_reason(done.stderr.strip().splitlines()[-1].partition(": ")[2])
    assert fault is not None
    assert fault.blameless
    assert f"encoded in {encoding}" in fault.cause
    assert "dbaccess" in fault.cause
    assert tables(other) == []


def test_in_utf8_every_check_counts_characters(postgres_socket: str, tmp_path: Path) -> None:
    settings = migrated_database(postgres_socket)
    with connect(settings) as connection, Ledger(settings) as ledger:
        load_file(connection, FILE.write(tmp_path / "answered"))
        version = FileVersion(FILE.name, 1)
        assert count_rows(connection, version).wrong_spans == 0
        (facts,) = gather(ledger, connection, [known(ledger, version)], CheckSettings())
        assert ModelChoice(facts.record.model, facts.record.model_revision, facts.record.model_precision) == ANSWERED_BY
        assert facts.first[0].passage.piece == facts.first[0].answer == "Zürich \N{GRINNING FACE} 日本"
        _shift_offsets(connection)
        assert count_rows(connection, version).wrong_spans == 1


def _shift_offsets(connection: psycopg.Connection) -> None:
    connection.execute("UPDATE question_answer SET answer_end = answer_end + 1")


def _results(results: Iterator[Result]) -> list[Result]:
    """What a part yields, and what ends it."""
    found = []
    try:
        found += list(results)
    except Wrong as error:
        found.append(error.result)
    return found
