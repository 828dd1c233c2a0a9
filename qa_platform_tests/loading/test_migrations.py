"""The migrations: from nothing, from the tables of deployments, up and down, and when several start at once."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory

from qa_platform.clients.postgres import connect
from qa_platform.errors import InputError, TransientError
from qa_platform.loading import migrate
from qa_platform.loading.load import load_file
from qa_platform.loading.worker import Loader
from qa_platform.settings import DatumSettings, PostgresSettings
from qa_platform_tests.conftest import Database
from qa_platform_tests.loading_helpers import AnsweredUpload, answered_rows

LEGACY_TABLE = (
    "CREATE TABLE question_answer (question varchar(10000), answer varchar(10000), context varchar(500000), "
    "model varchar(1000), qa_timestamp timestamp)"
)
FIVE = [
    ("question", "character varying", 10_000),
    ("answer", "character varying", 10_000),
    ("context", "character varying", 500_000),
    ("model", "character varying", 1_000),
    ("qa_timestamp", "timestamp without time zone", None),
]


@pytest.fixture
def empty(database: Database) -> PostgresSettings:
    return database.settings


def columns(connection: psycopg.Connection) -> list[tuple]:
    return connection.execute(
        "SELECT column_name, data_type, character_maximum_length FROM information_schema.columns "
        "WHERE table_name = 'question_answer' ORDER BY ordinal_position"
    ).fetchall()


def schema(connection: psycopg.Connection) -> list[tuple]:
    return connection.execute(
        "SELECT table_name, column_name, data_type, is_nullable, column_default FROM information_schema.columns "
        "WHERE table_schema = 'public' UNION ALL SELECT tablename, indexname, indexdef, '', '' FROM pg_indexes WHERE schemaname = 'public' "
        "ORDER BY 1, 2"
    ).fetchall()


def script() -> ScriptDirectory:
    config = Config()
    config.set_main_option("script_location", str(Path(migrate.__file__).with_name("migrations")))
    return ScriptDirectory.from_config(config)


def make_legacy(connection: psycopg.Connection) -> None:
    """What deployments had before: the five columns, and rows of which two are equal."""
    connection.execute(LEGACY_TABLE)
    connection.execute("INSERT INTO question_answer SELECT 'q', 'a', 'c', 'm', '2020-01-01' FROM generate_series(1, 3)")


def test_the_head_that_makes_a_start_cheap_is_the_newest_migration() -> None:
    assert script().get_current_head() == migrate.HEAD


def test_from_nothing_the_first_five_columns_are_those_that_readers_take_by_position(empty: PostgresSettings) -> None:
    migrate.upgrade(empty)
    with connect(empty) as connection:
        assert migrate.current(connection) == migrate.HEAD
        assert columns(connection)[:5] == FIVE
        assert {row[3] for row in schema(connection) if row[0] == "question_answer" and row[3]} == {"YES"}


def test_a_table_that_exists_keeps_its_rows_and_becomes_the_same(empty: PostgresSettings, tmp_path: Path) -> None:
    migrate.upgrade(empty)
    with connect(empty) as connection:
        from_nothing = schema(connection)
        connection.execute("DROP TABLE question_answer, question_answer_reject, question_file, question_answer_version")
        make_legacy(connection)
    migrate.upgrade(empty)
    with connect(empty) as connection:
        assert schema(connection) == from_nothing
        assert columns(connection)[:5] == FIVE
        rows = connection.execute("SELECT * FROM question_answer").fetchall()
        assert [(row[0], set(row[5:])) for row in rows] == [("q", {None})] * 3
        load_file(connection, AnsweredUpload(answered_rows(4)).write(tmp_path / "file"))
        assert connection.execute("SELECT count(*), count(source_file) FROM question_answer").fetchone() == (7, 4)


@pytest.mark.parametrize("older", [found.revision for found in script().walk_revisions()][1:])
def test_tables_of_each_older_revision_become_the_same_and_keep_their_rows(empty: PostgresSettings, older: str) -> None:
    migrate.upgrade(empty)
    with connect(empty) as connection:
        from_nothing = schema(connection)
        connection.execute("DROP TABLE question_answer, question_answer_reject, question_file, question_answer_version")
        migrate._migrate(empty, older)
        assert schema(connection) != from_nothing
        connection.execute("INSERT INTO question_answer (question, answer) VALUES ('q', 'a')")
        migrate.upgrade(empty)
        assert schema(connection) == from_nothing
        assert connection.execute("SELECT question, answer FROM question_answer").fetchall() == [("q", "a")]


def test_the_command_and_a_worker_that_start_at_once_on_a_table_with_rows_both_succeed(database: Database, tmp_path: Path) -> None:
    settings = database.settings
    with connect(settings) as connection:
        make_legacy(connection)
    folder = AnsweredUpload(answered_rows(4)).write(tmp_path / "question_answer" / "file")
    (tmp_path / "out").mkdir()
    datum = {"QA_PFS_ROOT": str(tmp_path), "question_answer": f"/pfs/question_answer/{folder.name}"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")} | database.environment | datum
    commands: list[list[str | Path]] = [
        [Path(sys.executable).with_name("qa-platform"), "db", "upgrade"],
        [sys.executable, "-m", "qa_platform.loading.worker"],
    ]
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for command in commands]
    said = [process.communicate(timeout=60)[0].decode() for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert said[0] == "the tables are up to date\n"
    with connect(settings) as connection:
        assert migrate.current(connection) == migrate.HEAD
        assert connection.execute("SELECT count(*), count(source_file) FROM question_answer").fetchone() == (7, 4)


def test_several_that_start_at_once_all_find_the_tables_up_to_date(empty: PostgresSettings) -> None:
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda _: migrate.upgrade(empty), range(4)):
            pass
    with connect(empty) as connection:
        assert migrate.current(connection) == migrate.HEAD
        assert connection.execute("SELECT count(*) FROM question_answer_version").fetchone() == (1,)


def test_a_start_with_tables_up_to_date_is_cheap(empty: PostgresSettings) -> None:
    migrate.upgrade(empty)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        migrate.upgrade(empty)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.2


def test_a_migration_that_fails_leaves_nothing_behind_and_says_why(empty: PostgresSettings) -> None:
    with connect(empty) as connection:
        connection.execute("CREATE TABLE question_file (mine integer)")
    with pytest.raises(InputError, match='relation "question_file" already exists'):
        migrate.upgrade(empty)
    with connect(empty) as connection:
        assert connection.execute("SELECT to_regclass('question_answer'), to_regclass('question_answer_version')").fetchone() == (
            None,
            None,
        )


def test_a_user_who_may_not_alter_the_table_is_told_so(empty: PostgresSettings) -> None:
    with connect(empty) as connection:
        connection.execute(LEGACY_TABLE)
        connection.execute("DROP ROLE IF EXISTS reader")
        connection.execute("CREATE ROLE reader LOGIN")
        connection.execute("GRANT CREATE ON SCHEMA public TO reader")
    try:
        with pytest.raises(InputError, match="must be owner of table question_answer"):
            migrate.upgrade(empty.model_copy(update={"user": "reader"}))
    finally:
        with connect(empty) as connection:
            connection.execute("DROP OWNED BY reader")
            connection.execute("DROP ROLE reader")


def test_a_database_that_is_newer_than_the_program_is_refused(empty: PostgresSettings) -> None:
    migrate.upgrade(empty)
    with connect(empty) as connection:
        connection.execute("UPDATE question_answer_version SET version_num = '9999'")
    with pytest.raises(InputError, match="9999"):
        migrate.upgrade(empty)


def test_a_loader_works_on_while_newer_tables_are_rolled_out(empty: PostgresSettings, tmp_path: Path) -> None:
    migrate.upgrade(empty)
    with connect(empty) as connection:
        connection.execute("UPDATE question_answer_version SET version_num = '9999'")
        for table in ("question_answer", "question_answer_reject", "question_file"):
            connection.execute(f"ALTER TABLE {table} ADD COLUMN new text NOT NULL DEFAULT ''")
    folder = AnsweredUpload(answered_rows(4)).write(tmp_path / "question_answer" / "file")
    (tmp_path / "out").mkdir()
    Loader(tmp_path, empty).do(DatumSettings(question_answer=f"/pfs/{folder.relative_to(tmp_path)}"))
    with connect(empty) as connection:
        assert connection.execute("SELECT count(*) FROM question_answer").fetchone() == (4,)


@pytest.mark.parametrize(("accept_newer", "retries"), [(False, 4), (True, 0)])
def test_a_table_that_others_keep_busy_is_waited_for_only_so_long(
    empty: PostgresSettings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, accept_newer: bool, retries: int
) -> None:
    monkeypatch.setattr(migrate, "_LOCK_TIMEOUT", "200ms")
    monkeypatch.setattr(migrate, "_PAUSE_SECONDS", 0)
    with connect(empty) as connection:
        connection.execute(LEGACY_TABLE)
        with connection.transaction():
            connection.execute("SELECT * FROM question_answer")
            with pytest.raises(TransientError, match=r"the tables are busy: .*lock timeout.*pg_stat_activity"):
                migrate.upgrade(empty, accept_newer=accept_newer)
    assert [record.getMessage().rpartition("; ")[2] for record in caplog.records if record.name == migrate.__name__] == [
        "trying again"
    ] * retries


def test_a_table_that_is_busy_for_a_while_is_migrated_afterwards(empty: PostgresSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrate, "_LOCK_TIMEOUT", "200ms")
    monkeypatch.setattr(migrate, "_PAUSE_SECONDS", 0)
    with connect(empty) as connection:
        connection.execute(LEGACY_TABLE)
        connection.autocommit = False
        connection.execute("SELECT * FROM question_answer")
        monkeypatch.setattr(migrate.logger, "warning", lambda *_: connection.rollback())
        migrate.upgrade(empty)
        assert migrate.current(connection) == migrate.HEAD


def test_tables_that_are_missing_are_named_with_what_to_do(empty: PostgresSettings, tmp_path: Path) -> None:
    folder = AnsweredUpload(answered_rows(4)).write(tmp_path / "file")
    with connect(empty) as connection, pytest.raises(InputError, match="qa-platform db upgrade"):
        load_file(connection, folder)


def test_a_partitioned_table_is_refused_with_a_message(database: Database) -> None:
    with connect(database.settings) as connection:
        connection.execute(
            "CREATE TABLE question_answer (question varchar(10000), answer varchar(10000), context varchar(500000), "
            "model varchar(1000), qa_timestamp timestamp) PARTITION BY RANGE (qa_timestamp)"
        )
    with pytest.raises(InputError, match="cannot be migrated"):
        migrate.upgrade(database.settings)


@pytest.mark.parametrize(
    ("before", "advice"),
    [
        ("CREATE TABLE question_answer (question text, score text)", "rename your own column"),
        ("CREATE VIEW question_answer AS SELECT 1 AS question", "must be an ordinary table"),
        ("CREATE TABLE question_answer (question text) PARTITION BY LIST (question)", "must be an ordinary table"),
    ],
)
def test_a_table_that_cannot_be_migrated_comes_with_what_to_do(database: Database, before: str, advice: str) -> None:
    with database.connect(autocommit=True) as connection:
        connection.execute(before)
    with pytest.raises(InputError, match=advice) as caught:
        migrate.upgrade(database.settings)
    assert caught.value.where == f"{database.host}, database {database.dbname}"


def test_no_empty_table_is_made_in_front_of_one_in_another_schema(database: Database) -> None:
    with database.connect(autocommit=True) as connection:
        columns = "question varchar, answer varchar, context varchar, model varchar, qa_timestamp timestamp"
        connection.execute(f"CREATE TABLE public.question_answer ({columns})")
        connection.execute('CREATE SCHEMA "My Own"')
        connection.execute(f'ALTER DATABASE {database.dbname} SET search_path = "My Own", public')
    with pytest.raises(InputError, match='in the schema public, and new tables would be made in "My Own"'):
        migrate.upgrade(database.settings)
    with database.connect(autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {database.dbname} RESET search_path")
    migrate.upgrade(database.settings)
