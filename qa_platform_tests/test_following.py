"""What a worker's log says of whose fault a failure is."""

from qa_platform.contract import BLAMELESS
from qa_platform.following import said_blameless


def test_the_programs_of_both_pipelines_say_that_no_file_is_to_blame() -> None:
    assert said_blameless(f"reading\nERROR push-answers-to-sql: {BLAMELESS}the database is away\n") == "the database is away"
    assert said_blameless(f"2026-01-02 03:04:05,678 ERROR {BLAMELESS}no such model") == "no such model"


def test_a_files_name_does_not_say_so() -> None:
    name = f"{BLAMELESS}x.csv"
    assert said_blameless(f"ERROR push-answers-to-sql: {name!r} (generation 1) is not loaded") == ""
    assert said_blameless(f"2026-01-02 03:04:05,678 INFO {name}") == ""
