"""The first line of a failed run says what to do."""

from types import SimpleNamespace
from typing import Any, cast

import dagster as dg
import pytest
from dagster._utils.error import serializable_error_info_from_exc_info
from google.auth.exceptions import DefaultCredentialsError

from qa_platform.batches.blame import Verdict
from qa_platform.batches.failure import JobFailure
from qa_platform.batches.run import Outcome
from qa_platform.contract import FileStatus, FileVersion, file_id
from qa_platform.definitions import defs
from qa_platform.errors import InputError, TransientError
from qa_platform.ledger.records import FileRecord
from qa_platform.orchestration.failures import batch_failure, failures_for_people
from qa_platform.orchestration.housekeeping import housekeeping_job
from qa_platform.orchestration.resources import platform_resource
from qa_platform.settings import BucketSettings, ExecutionSettings, PostgresSettings


def outcome(**statuses: FileStatus) -> Outcome:
    """Files that are parked were charged."""
    records = [
        SimpleNamespace(version=FileVersion(f"{name}.csv", 1), status=status, attempts=int(status is FileStatus.FAILED))
        for name, status in statuses.items()
    ]
    return Outcome(tuple(cast("list[FileRecord]", records)))


def first_line(failure: dg.Failure) -> str:
    return str(failure.description).splitlines()[0]


def test_files_that_are_tried_again_and_files_that_are_parked_are_told_apart() -> None:
    failed = outcome(good=FileStatus.FINISHED, soon=FileStatus.PENDING, never=FileStatus.FAILED)
    failure = batch_failure(failed, JobFailure("the job ended as failure\n--- why", Verdict({"never": "why", "soon": "why"})))
    assert first_line(failure) == (
        "What to do: see below why 'never.csv' failed for the last time; fix that, then `qa-platform retry FILE`. "
        "Nothing else: the sensor answers 'soon.csv' again."
    )
    assert "--- why" in str(failure.description)
    assert not failure.allow_retries


def test_where_no_file_is_to_blame_the_cause_is_in_the_first_line() -> None:
    failure = batch_failure(outcome(a=FileStatus.PENDING), JobFailure("ended", Verdict(cause="its workers\ncannot pull the image")))
    assert "its workers cannot pull the image. No file is charged" in first_line(failure)


def test_a_suspect_is_not_told_that_it_will_not_be_charged() -> None:
    died = "its worker process died without reporting a reason: exit status 9"
    verdict = Verdict(suspects={file_id("a.csv"): died}, cause=died)
    waits, parked = (
        first_line(batch_failure(outcome(a=status), JobFailure("ended", verdict))) for status in (FileStatus.PENDING, FileStatus.FAILED)
    )
    assert f"{died}. A file that may be to blame is answered alone, and charged if it fails again." in waits
    assert "why 'a.csv' failed for the last time" in parked
    assert "charged" not in parked
    assert "No file is charged" not in waits


def test_many_files_are_counted() -> None:
    waiting = outcome(**{f"f{n}": FileStatus.PENDING for n in range(30)})
    assert " and 20 more again" in first_line(batch_failure(waiting, JobFailure("x", Verdict({"f1": "why"}))))


@dg.op
def fails(context: dg.OpExecutionContext) -> None:
    errors = {
        "input": InputError("no file"),
        "unavailable": TransientError("pachd is unavailable"),
        "credentials": DefaultCredentialsError('File {"private_key": "not-shown"} was not found.'),
        "bug": KeyError("x"),
    }
    with failures_for_people(context, ExecutionSettings()):
        if context.run.tags["error"] == "settings":
            PostgresSettings()
        raise errors[context.run.tags["error"]]


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        ("input", "fix what is described here"),
        ("unavailable", "`qa-platform doctor`"),
        ("credentials", "GOOGLE_APPLICATION_CREDENTIALS"),
        ("settings", "correct the variables"),
        ("bug", "it is a bug"),
    ],
)
def test_each_kind_of_error_ends_the_run_with_its_advice(error: str, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QA_STEP_RETRIES", "3")
    monkeypatch.setenv("QA_STEP_RETRY_SECONDS", "0")
    monkeypatch.setenv("PG_PORT", "not-shown")

    @dg.job(tags={"error": error})
    def job() -> None:
        fails()

    with dg.DagsterInstance.ephemeral() as instance:
        result = job.execute_in_process(instance=instance, raise_on_error=False)
    (event,) = (e for e in result.all_events if e.event_type is dg.DagsterEventType.STEP_FAILURE)
    data: Any = event.step_failure_data
    assert data.user_failure_data.description.startswith("What to do: ")
    assert advice in data.user_failure_data.description.splitlines()[0]
    assert "not-shown" not in str(data), "values of settings may be secrets"
    tries = sum(e.event_type is dg.DagsterEventType.STEP_UP_FOR_RETRY for e in result.all_events)
    assert tries == (3 if error == "unavailable" else 0), "only an unavailable service is worth a retry"


def test_housekeeping_that_fails_says_what_to_do_and_what_happens_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    monkeypatch.setenv("PG_PORT", "not-shown")
    with dg.DagsterInstance.ephemeral() as instance:
        resources = {"platform": platform_resource(BucketSettings())}
        result = housekeeping_job(ExecutionSettings()).execute_in_process(instance=instance, resources=resources, raise_on_error=False)
    failures: list[Any] = [e.step_failure_data for e in result.all_events if e.event_type is dg.DagsterEventType.STEP_FAILURE]
    assert [f.user_failure_data.description.splitlines()[0] for f in failures] == [
        "What to do: fix what is described here. Then the next night's run does the rest, and no file waits for it."
    ] * 3
    assert all("PG_PORT" in f.user_failure_data.description for f in failures)


@pytest.mark.parametrize(
    "variables",
    [
        {"PACH_TOKEN": "\ufeffnot-shown", "STORAGE_EMULATOR_HOST": "http://127.0.0.1:9"},
        {"GOOGLE_APPLICATION_CREDENTIALS": '{"private_key": "not-shown"}'},
    ],
)
@pytest.mark.parametrize("name", ["incoming_files", "done_files", "reconcile", "platform_status"])
def test_a_tick_shows_no_secret_that_is_set_wrongly(name: str, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    sensor = defs.get_repository_def().get_sensor_def(name)
    resources = {"platform": platform_resource(BucketSettings())}
    with (
        dg.DagsterInstance.ephemeral() as instance,
        dg.build_sensor_context(instance=instance, definitions=defs, resources=resources, sensor_name=name) as context,
        pytest.raises(InputError, match=next(iter(variables))) as caught,
    ):
        sensor.evaluate_tick(context)
    assert "not-shown" not in serializable_error_info_from_exc_info((caught.type, caught.value, caught.tb)).to_string()
