"""Which files are to blame for a failed job, judged by the reasons of its failed datums."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qa_platform.batches.blame import FailedDatum, Verdict, judge
from qa_platform.contract import ANSWER_PIPELINE, LOAD_PIPELINE, DatumFault
from qa_platform.datum_batching import fault_of
from qa_platform.errors import InputError, TransientError
from qa_platform.loading.answered import MissingShards
from qa_platform.loading.worker import NoDatabase

KILLED = "error running user code: exit status 9"


def failed(file: str, reason: str, pipeline: str = ANSWER_PIPELINE) -> FailedDatum:
    return FailedDatum(pipeline, file, reason)


def said(file: str, cause: str, *, blameless: bool = False) -> FailedDatum:
    return failed(file, DatumFault(blameless, cause, "do this").to_json())


def test_a_file_that_the_program_blames_is_guilty_with_the_cause_and_what_to_do() -> None:
    assert judge([said("a", "row 7 is damaged")], something_worked=True).guilty == {"a": "row 7 is damaged; do this"}
    assert judge([said("a", "row 7 is damaged")], something_worked=False).guilty == {"a": "row 7 is damaged; do this"}


def test_what_pachyderm_adds_to_the_programs_reason_is_ignored() -> None:
    reason = DatumFault(blameless=False, cause="row 7 is damaged", advice="do this").to_json()
    both = failed("a", f"{reason}\nerror restarting user code: exit status 1")
    assert judge([both], something_worked=True).guilty == {"a": "row 7 is damaged; do this"}


def test_what_the_program_says_is_no_files_fault_blames_nobody_and_is_the_cause() -> None:
    verdict = judge([said(file, "the database is unavailable", blameless=True) for file in "ab"], something_worked=True)
    assert verdict == Verdict(blameless=True, cause="the database is unavailable; do this")


def test_a_guilty_file_is_told_from_one_that_failed_beside_it_through_no_fault_of_its_own() -> None:
    verdict = judge([said("a", "row 7 is damaged"), said("b", "the disk is full", blameless=True)], something_worked=False)
    assert verdict.guilty == {"a": "row 7 is damaged; do this"}
    assert (verdict.suspects, verdict.blameless) == ({}, False)


@pytest.mark.parametrize("reason", [KILLED, "", '{"v": 2, "cause": "x"}', '{"v": 1}', "[1]", "null"])
def test_a_file_whose_process_died_while_others_worked_is_suspected(reason: str) -> None:
    verdict = judge([failed("a", reason)], something_worked=True)
    assert (set(verdict.suspects), verdict.guilty, verdict.blameless) == ({"a"}, {}, False)


def test_a_file_that_took_longer_than_the_limit_is_guilty_and_is_told_of_the_limit() -> None:
    for reason in ("context deadline exceeded", "context deadline exceeded\nerror restarting user code: exit status 1"):
        verdict = judge([failed("a", reason)], something_worked=True)
        assert (set(verdict.guilty), verdict.suspects) == ({"a"}, {})
        assert "took longer than the pipeline's datum_timeout allows" in verdict.guilty["a"]
        assert "QA_SHARD_ROWS" in verdict.guilty["a"]


def test_loading_that_took_longer_than_the_limit_is_no_files_fault_and_the_database_is_named() -> None:
    verdict = judge([failed("a", "context deadline exceeded", LOAD_PIPELINE)], something_worked=True)
    assert (verdict.guilty, verdict.suspects, verdict.blameless) == ({}, {}, True)
    assert "PostgreSQL" in verdict.cause


def test_files_that_all_fail_alike_are_not_to_blame() -> None:
    both = [failed("file-0123456789abcdef", KILLED), failed("other-fedcba9876543210", KILLED)]
    verdict = judge(both, something_worked=False)
    assert (verdict.guilty, verdict.suspects) == ({}, {})
    assert verdict.cause.startswith("all 2 files failed for the same reason: ")
    assert KILLED in verdict.cause
    told = [said(file, f"KeyError: 'x' in '{file}', row {n}") for n, file in enumerate(("file-1", "file-2"))]
    assert judge(told, something_worked=False).guilty == {}
    lost = [failed(file, f"/pfs/out/{file}/part-00000: no such file") for file in ("history-0123456789abcdef", "towns-fedcba9876543210")]
    assert judge(lost, something_worked=False).suspects == {}
    assert set(judge(both, something_worked=True).suspects) == {"file-0123456789abcdef", "other-fedcba9876543210"}


def test_files_that_fail_differently_are_to_blame_each_for_itself() -> None:
    verdict = judge([said("a", "row 7 is damaged"), failed("b", KILLED)], something_worked=False)
    assert (set(verdict.guilty), set(verdict.suspects)) == ({"a"}, {"b"})


def test_a_file_is_guilty_where_one_of_its_shards_is() -> None:
    assert set(judge([failed("a", KILLED), said("a", "row 7 is damaged")], something_worked=True).guilty) == {"a"}


def test_a_job_without_failed_datums_blames_nobody() -> None:
    assert judge([], something_worked=False) == Verdict()


REASONS = st.one_of(st.text(), st.builds(DatumFault, st.booleans(), st.text(), st.text()))


@given(st.lists(st.tuples(st.sampled_from("abc"), REASONS)), st.booleans())
def test_whatever_the_reasons_are_no_file_is_both_guilty_and_suspected(found: list[tuple[str, object]], worked: bool) -> None:
    datums = [failed(file, why.to_json() if isinstance(why, DatumFault) else str(why)) for file, why in found]
    verdict = judge(datums, something_worked=worked)
    assert not verdict.guilty.keys() & verdict.suspects.keys()
    assert verdict.guilty.keys() | verdict.suspects.keys() <= {datum.file for datum in datums}
    if verdict.blameless:
        assert (verdict.guilty, verdict.suspects) == ({}, {})


@pytest.mark.parametrize(
    ("error", "blameless", "advice"),
    [
        (InputError("row 7 is damaged", advice="upload it again"), False, "upload it again"),
        (InputError("row 7 is damaged"), False, "see the file's error"),
        (TransientError("PostgreSQL is unavailable"), True, "the file is retried automatically"),
        (OSError(28, "No space left on device"), True, "the file is retried automatically"),
        (MissingShards("part-00001 is missing"), True, "the file is retried automatically"),
        (NoDatabase("no such database"), True, "the file is retried automatically"),
        (MemoryError(), True, "give the workers more memory"),
        (KeyError("x"), False, "report it"),
    ],
)
def test_the_programs_report_each_kind_of_error_in_a_form_that_is_read_back(error: Exception, blameless: bool, advice: str) -> None:
    fault = DatumFault.of_reason(fault_of(error).to_json())
    assert fault == fault_of(error)
    assert fault is not None
    assert fault.blameless is blameless
    assert fault.advice.startswith(advice)
    assert (error.what if isinstance(error, (InputError, TransientError)) else str(error)) in fault.cause
