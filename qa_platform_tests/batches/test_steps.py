"""The steps of a run one by one: which commit it adopts, which open head it drops, which files it still owns.

The pipelines here are shell commands. They answer no files.
"""

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import psycopg
import pytest
from pachyderm_sdk.api import pfs

from qa_platform.batches import commits
from qa_platform.batches import run as running
from qa_platform.batches.blame import Verdict
from qa_platform.batches.failure import JobFailure
from qa_platform.batches.plan import Batch, batch_id
from qa_platform.batches.run import BatchRun
from qa_platform.batches.settle import Settlement
from qa_platform.clients.services import Services
from qa_platform.contract import ANSWER_PIPELINE, LOAD_PIPELINE, QUESTIONS_REPO, FileStatus, FileVersion, file_id
from qa_platform.errors import TransientError
from qa_platform.ingest import Write
from qa_platform.ledger import Ledger
from qa_platform.settings import IngestSettings, ModelSettings, PachydermSettings, PostgresSettings, WorkSettings
from qa_platform_tests.ledger.helpers import A1, B1, EXPIRED, HELD, WORK, charge, claimed_by_run, known, load
from qa_platform_tests.pachd_helpers import KILLED, SUCCESS, UNRUNNABLE, Pachd, needs_workers

QUESTIONS = pfs.Repo.from_uri(QUESTIONS_REPO)


@pytest.fixture
def ledger(migrated: PostgresSettings) -> Iterator[Ledger]:
    with Ledger(migrated) as ledger:
        yield ledger
        ledger.release("run")
        ledger.release("other")


@pytest.fixture
def pachd(clean_pachyderm: PachydermSettings) -> Iterator[Pachd]:
    pachd = Pachd(clean_pachyderm.pachd_address)
    pachd.client.pfs.create_repo(repo=QUESTIONS)
    pachd.client.pfs.create_branch(branch=pfs.Branch.from_uri(f"{QUESTIONS_REPO}@master"))
    yield pachd
    pachd.clean_up()


def run_over(ledger: Ledger, *versions: FileVersion, name: str = "run", pachyderm: PachydermSettings | None = None) -> BatchRun:
    """A run over a batch. None of the steps here needs a bucket or waits for jobs."""
    services = Services(
        bucket=None,
        pachyderm=pachyderm or PachydermSettings(),
        postgres=PostgresSettings(),
        model=ModelSettings().pinned,
        ingest=IngestSettings(),
        work=WorkSettings(),
    )
    return BatchRun(services, ledger, Batch(f"batch of {name}", versions), name, logging.getLogger(), lambda **_: None)


def begin(ledger: Ledger, run: BatchRun, *, lease_seconds: int = HELD) -> None:
    assert [record.version for record in run.claim(run.run_id, ())] == list(run.batch.versions)
    ledger.start(run.run_id, run.batch.versions, run_id=run.run_id, batch_id=run.batch.id)
    ledger.renew(run.run_id, lease_seconds)


def fill(write: Write) -> None:
    write("part-00000/questions.csv", [b"question,context\r\n"])


def commit(pachd: Pachd, batch_id: str) -> str:
    with commits.FileSets(pachd.client) as file_sets:
        file_sets.make("a", fill)
        made = commits.commit_batch(pachd.client, batch_id, file_sets.ids)
    assert made
    return made


def open_head(pachd: Pachd, description: str) -> str:
    return str(pachd.client.pfs.start_commit(branch=pfs.Branch.from_uri(f"{QUESTIONS_REPO}@master"), description=description).id)


def is_there(pachd: Pachd, commit_id: str) -> bool:
    try:
        pachd.client.pfs.inspect_commit(commit=pfs.Commit(repo=QUESTIONS, id=commit_id))
    except grpc.RpcError:
        return False
    return True


# Which files are its own


def test_a_run_that_lost_its_claim_settles_nothing_of_what_another_runs(ledger: Ledger) -> None:
    late, run = run_over(ledger, A1, name="other"), run_over(ledger, A1)
    begin(ledger, late, lease_seconds=EXPIRED)
    assert [record.version for record in late._running([A1])] == [A1], "nobody has taken it over"
    begin(ledger, run)
    before = known(ledger, A1)
    assert late.settle([A1], None) is None
    assert known(ledger, A1) == before
    assert run.settle([A1], None) is not None, "its own file is not loaded"


def test_what_another_run_has_claimed_is_left_alone(ledger: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    begin(ledger, run_over(ledger, A1, name="other"))
    owned = run_over(ledger, A1, B1).claim("token", ())
    assert [record.version for record in owned] == [B1]
    assert "a.csv is skipped: another run has claimed it" in caplog.text


# What becomes of the files of a failed job


@pytest.fixture
def empty_ledger(postgres: PostgresSettings) -> Iterator[Ledger]:
    with Ledger(postgres) as ledger:
        yield ledger


def settle(ledger: Ledger, failure: JobFailure, *versions: FileVersion) -> None:
    settlement = Settlement(ledger, WORK, "run", logging.getLogger(), alone=len(versions) == 1)
    assert settlement.settle([known(ledger, version) for version in versions], failure) is failure


def test_a_guilty_file_is_charged_a_suspect_goes_alone_and_any_other_goes_on_at_once(empty_ledger: Ledger) -> None:
    c1 = FileVersion("c.csv", 1)
    claimed_by_run(empty_ledger, A1, B1, c1)
    settle(empty_ledger, JobFailure("", Verdict(guilty={file_id("a.csv"): "row 7"}, suspects={file_id("b.csv"): "died"})), A1, B1, c1)
    guilty, suspect, other = (known(empty_ledger, version) for version in (A1, B1, c1))
    assert [record.attempts for record in (guilty, suspect, other)] == [1, 0, 0]
    assert (suspect.batch_id, suspect.was_deferred, suspect.error) == (batch_id([(B1, 1)]), True, "retried alone: died")
    assert (other.batch_id, other.due, other.was_deferred, other.claim_owner) == ("", True, False, "")


def test_a_suspect_is_charged_where_it_was_alone_and_has_failed_before(empty_ledger: Ledger) -> None:
    failure = JobFailure("", Verdict(suspects={file_id("a.csv"): "died", file_id("b.csv"): "died"}))
    for versions, charged in (([A1, B1], 0), ([A1, B1], 0), ([A1], 1)):
        claimed_by_run(empty_ledger, *versions)
        settle(empty_ledger, failure, *versions)
        assert known(empty_ledger, A1).attempts == charged
    claimed_by_run(empty_ledger, c1 := FileVersion("c.csv", 1))
    charge(empty_ledger, c1, "row 7")
    claimed_by_run(empty_ledger, c1)
    settle(empty_ledger, JobFailure("", Verdict(suspects={file_id("c.csv"): "died"})), c1)
    assert known(empty_ledger, c1).attempts == 2, "a charge ends the deferral, and counts as a failure too"


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (JobFailure("failed"), FileStatus.FAILED),
        (JobFailure("failed", Verdict(blameless=True)), FileStatus.FAILED),
        (JobFailure("failed", killed=True), FileStatus.PENDING),
        (JobFailure("failed", not_started=True), FileStatus.PENDING),
        (JobFailure("failed", missing={"a": frozenset({"part-00000"})}), FileStatus.PENDING),
    ],
)
def test_what_was_stopped_or_lost_is_never_held_against_a_file(
    empty_ledger: Ledger, connection: psycopg.Connection, tmp_path: Path, failure: JobFailure, status: FileStatus
) -> None:
    claimed_by_run(empty_ledger, A1)
    connection.execute("UPDATE question_file SET put_off_since = now() - interval '1 hour', attempts = %s", [WORK.max_attempts - 1])
    load(connection, tmp_path, B1)
    settle(empty_ledger, failure, A1)
    assert known(empty_ledger, A1).status is status


def test_a_retry_is_not_charged_for_the_job_that_failed(empty_ledger: Ledger) -> None:
    claimed_by_run(empty_ledger, A1)
    failed = known(empty_ledger, A1)
    empty_ledger.request_retries(["a.csv"])
    Settlement(empty_ledger, WORK, "run", logging.getLogger(), alone=True).settle(
        [failed], JobFailure("", Verdict(guilty={file_id("a.csv"): "row 7"}))
    )
    assert (known(empty_ledger, A1).load_id, known(empty_ledger, A1).attempts) == (2, 0)


# Which open head is dropped


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "_OPEN_HEAD_SECONDS", 0.2)


@pytest.mark.usefixtures("impatient")
def test_the_open_head_of_its_own_batch_is_dropped_although_it_is_claimed(pachd: Pachd, ledger: Ledger) -> None:
    run = run_over(ledger, A1)
    begin(ledger, run)
    left = open_head(pachd, run.batch.id)
    run.clear_the_head(pachd.client)
    assert not is_there(pachd, left)


def test_the_open_head_of_a_run_that_holds_no_claim_any_more_is_dropped(pachd: Pachd, ledger: Ledger) -> None:
    other = run_over(ledger, B1, name="other")
    begin(ledger, other, lease_seconds=EXPIRED)
    left = open_head(pachd, other.batch.id)
    run_over(ledger, A1).clear_the_head(pachd.client)
    assert not is_there(pachd, left)


@pytest.mark.usefixtures("impatient")
def test_the_open_head_of_a_run_that_works_on_it_is_waited_for(pachd: Pachd, ledger: Ledger) -> None:
    other = run_over(ledger, B1, name="other")
    begin(ledger, other)
    left = open_head(pachd, other.batch.id)
    with pytest.raises(TransientError, match=f"commit {left} in questions has been open"):
        run_over(ledger, A1).clear_the_head(pachd.client)
    assert is_there(pachd, left)


@pytest.mark.usefixtures("impatient")
def test_an_open_head_that_no_run_made_is_never_dropped(pachd: Pachd, ledger: Ledger) -> None:
    left = open_head(pachd, "")
    with pytest.raises(TransientError, match="finish it or drop it with pachctl"):
        run_over(ledger, A1).clear_the_head(pachd.client)
    assert is_there(pachd, left)


def test_the_open_empty_commit_of_forget_is_waited_for(pachd: Pachd, ledger: Ledger) -> None:
    left = open_head(pachd, commits.FORGET)
    finishing = threading.Timer(1, lambda: pachd.client.pfs.finish_commit(commit=pfs.Commit(repo=QUESTIONS, id=left)))
    finishing.start()
    run_over(ledger, A1).clear_the_head(pachd.client)
    finishing.join()
    assert commits.head(pachd.client).commit.id == left


@pytest.mark.usefixtures("impatient")
def test_the_empty_commit_of_a_forget_that_is_gone_is_dropped_after_a_while(pachd: Pachd, ledger: Ledger) -> None:
    left = open_head(pachd, commits.FORGET)
    run_over(ledger, A1).clear_the_head(pachd.client)
    assert not is_there(pachd, left)


# Which commit is adopted


def put_pipelines(pachd: Pachd, answer: str, load: str = "true") -> None:
    pachd.create(pachd.spec(ANSWER_PIPELINE, answer, QUESTIONS_REPO, glob="/*/*"))
    pachd.create(pachd.spec(LOAD_PIPELINE, load, ANSWER_PIPELINE))


@needs_workers
@pytest.mark.parametrize(("answer", "load"), [("exit 1", "true"), ("cp -r $source $pfs/out/", "exit 1")])
def test_a_commit_of_which_a_job_failed_is_not_adopted(pachd: Pachd, ledger: Ledger, answer: str, load: str) -> None:
    put_pipelines(pachd, answer, load)
    run = run_over(ledger, A1)
    made = commit(pachd, run.batch.id)
    assert pachd.wait(LOAD_PIPELINE, made).state != SUCCESS
    assert run.adopt(pachd.client) is None
    assert is_there(pachd, made), "it is finished, and in nobody's way"


@needs_workers
def test_a_commit_of_which_only_the_loading_was_killed_is_not_adopted(pachd: Pachd, ledger: Ledger) -> None:
    put_pipelines(pachd, "cp -r $source $pfs/out/", "sleep 60")
    run = run_over(ledger, A1)
    made = commit(pachd, run.batch.id)
    assert pachd.wait(ANSWER_PIPELINE, made).state == SUCCESS
    assert run.adopt(pachd.client) == made, "it is at work"
    pachd.client.pps.stop_job(job=pachd.job(LOAD_PIPELINE, made), reason="an update")
    assert pachd.wait(LOAD_PIPELINE, made).state == KILLED
    assert run.adopt(pachd.client) is None


@needs_workers
def test_a_commit_that_was_finished_with_an_error_is_not_adopted(pachd: Pachd, ledger: Ledger) -> None:
    put_pipelines(pachd, "true")
    run = run_over(ledger, A1)
    left = open_head(pachd, run.batch.id)
    pachd.client.pfs.finish_commit(commit=pfs.Commit(repo=QUESTIONS, id=left), error="abandoned")
    assert {pachd.wait(pipeline, left).state for pipeline in (ANSWER_PIPELINE, LOAD_PIPELINE)} == {UNRUNNABLE}
    assert run.adopt(pachd.client) is None


@needs_workers
def test_a_commit_whose_jobs_are_done_is_adopted_and_one_of_another_batch_is_not(pachd: Pachd, ledger: Ledger) -> None:
    put_pipelines(pachd, "true")
    run = run_over(ledger, A1)
    made = commit(pachd, run.batch.id)
    assert pachd.wait(LOAD_PIPELINE, made).state == SUCCESS
    assert run.adopt(pachd.client) == made
    assert run_over(ledger, A1, name="other").adopt(pachd.client) is None


def test_a_commit_that_was_left_unfinished_is_dropped_and_not_adopted(pachd: Pachd, ledger: Ledger) -> None:
    run = run_over(ledger, A1)
    left = open_head(pachd, run.batch.id)
    assert run.adopt(pachd.client) is None
    assert not is_there(pachd, left)


def test_a_commit_that_is_older_than_the_pipelines_is_not_adopted(pachd: Pachd, ledger: Ledger) -> None:
    run = run_over(ledger, A1)
    commit(pachd, run.batch.id)
    put_pipelines(pachd, "true")
    assert run.adopt(pachd.client) is None
