"""The commands that a file's pages suggest read that file, whatever its name."""

import shlex

import psycopg
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qa_platform.orchestration.reports.commands import answers_query, rejects_command


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example("o'brien; DROP TABLE question_answer --.csv")
@example("back\\slash \\' \u202e.csv")
@given(name=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40))
def test_the_query_of_a_file_is_printable_and_reads_its_rows_alone(connection: psycopg.Connection, name: str) -> None:
    query = str(answers_query(name).value)
    assert query.isprintable()
    with connection.transaction(force_rollback=True):
        for source in (name, name + "'"):
            connection.execute("INSERT INTO question_answer (question, source_file, row_number) VALUES (%s, %s, 1)", [source, source])
        assert [row[1] for row in connection.execute(query.encode()).fetchall()] == [name]


def test_the_command_of_a_file_is_one_argument_for_a_shell() -> None:
    assert shlex.split(str(rejects_command("my $(rm) 'file'.csv").value)) == ["qa-platform", "answers", "--rejected", "my $(rm) 'file'.csv"]
    assert shlex.split(str(rejects_command("-o.csv").value)) == ["qa-platform", "answers", "--rejected", "--", "-o.csv"]
