from qa_platform_tests.conftest import Database


def test_a_database_is_empty_and_of_the_tests_own(database: Database) -> None:
    with database.connect() as connection:
        assert connection.execute("select current_database(), count(*) from pg_tables where schemaname = 'public'").fetchone() == (
            database.dbname,
            0,
        )
