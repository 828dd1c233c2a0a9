"""The cron variant, without Dagster: a single tick, and ticks of a real server."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from google.cloud import storage
from pachyderm_sdk.api import pps
from pydantic import SecretStr

from qa_platform import cron
from qa_platform.answering.shard import answer_shard
from qa_platform.batches.file_commits import FileCommit, find_file_commits
from qa_platform.batches.retry import request_retries
from qa_platform.cli.main import main
from qa_platform.clients import bucket
from qa_platform.clients.pachyderm import job_of, session
from qa_platform.clients.postgres import connect, only_row
from qa_platform.clients.services import Services
from qa_platform.contract import ANSWER_PIPELINE, FileStatus, FileVersion, ModelChoice, file_id
from qa_platform.embedded.stack import BUCKET, open_stack
from qa_platform.errors import DeviceFailed, InputError, TransientError
from qa_platform.ledger import FileRecord, Ledger
from qa_platform.loading import migrate
from qa_platform.loading.load import load_file
from qa_platform.provisioning.project_files import project_file
from qa_platform.settings import IngestSettings, ModelSettings, PachydermSettings, PostgresSettings, WorkSettings
from qa_platform_tests.conftest import Database
from qa_platform_tests.flow import bridge, csv_of, wait_until

pytestmark = pytest.mark.slow


class Here:
    """A bucket and a database of a test's own; `tick` is one run of the pipeline's program, `load` the other pipeline."""

    def __init__(self, opened: storage.Bucket, database: Database, folder: Path) -> None:
        postgres = PostgresSettings(host=database.host, port=database.port, user=database.user, dbname=database.dbname)
        migrate.upgrade(postgres)
        work = WorkSettings(lease_seconds=10, max_attempts=2)
        self.services = Services(opened, PachydermSettings(), postgres, ModelSettings().pinned, IngestSettings(shard_rows=2), work)
        self.folder = folder

    def limit(self, **changes: int) -> None:
        self.services = replace(self.services, work=self.services.work.model_copy(update=changes))

    def upload(self, name: str, content: bytes) -> FileVersion:
        with (self.folder / "upload").open("w+b") as file:
            file.write(content)
            return bucket.upload(self.services.bucket, name, file)

    def tick(self, job: str) -> list[str]:
        return [version.name for version in cron.tick(self.services, self.folder / job, job_id=job)]

    def load(self, job: str) -> None:
        with connect(self.services.postgres) as connection:
            for folder in (self.folder / job).iterdir():
                load_file(connection, folder, job_id=job, commit_id=job)

    def record(self, version: FileVersion) -> FileRecord:
        with Ledger(self.services.postgres) as ledger:
            return ledger.records([version])[version.name, version.generation]

    def expire_claims(self) -> None:
        with connect(self.services.postgres) as connection:
            connection.execute("UPDATE question_file SET claim_until = now() - interval '1 second', retry_at = NULL")

    def objects(self) -> list[str]:
        return [blob.name for blob in self.services.bucket.list_blobs()]


@pytest.fixture
def here(bucket: storage.Bucket, database: Database, tmp_path: Path) -> Here:
    return Here(bucket, database, tmp_path)


def failing_on(text: bytes, error: BaseException) -> Callable[[Any, Path, Path], Any]:
    """What answers shards, and raises an error for those that contain a text."""

    def answer(answerer: Any, source: Path, target: Path) -> Any:
        if text in (source / "questions.csv").read_bytes():
            raise error
        return answer_shard(answerer, source, target)

    return answer


def test_a_tick_answers_what_is_new_once_and_a_later_one_archives_it(here: Here) -> None:
    content = csv_of(bridge("Ulm"), bridge("Graz"), ("", "no question"), ("", ""))
    versions = [here.upload(f"{number}.csv", content) for number in range(2)]
    photo = here.upload("photo.csv", b"\x89PNG\r\n\x1a\n" + bytes(100))
    assert here.tick("job1") == ["0.csv", "1.csv"]
    assert sorted(p.name for p in (here.folder / "job1").iterdir()) == sorted(file_id(v.name) for v in versions)
    assert here.record(photo).status is FileStatus.REJECTED
    assert here.tick("job2") == [], "what is not loaded yet is not answered again"
    assert here.record(versions[0]).attempts == 0
    here.load("job1")
    assert here.tick("job3") == []
    for version in versions:
        record = here.record(version)
        assert (record.status, record.answered, record.rejected, record.pachyderm_job) == (FileStatus.FINISHED, 2, 1, "job1")
        assert (record.blank, record.delimiter) == (1, ",")
    assert [name for name in here.objects() if name.startswith("incoming/")] == []


def test_an_equal_upload_is_answered_again_under_another_threshold_for_no_answer(here: Here) -> None:
    content, plain = csv_of(bridge("Ulm"), bridge("Graz")), here.services.model
    outcomes = []
    for number, threshold in enumerate((None, -1000.0, -1000.0, 1000.0)):
        here.services = replace(here.services, model=replace(plain, no_answer_threshold=threshold))
        version = here.upload("a.csv", content)
        if here.tick(f"job{number}"):
            here.load(f"job{number}")
        record = here.record(version)
        outcomes.append((record.status, record.answered, record.no_answer, record.wanted_no_answer_threshold))
        here.tick("archiving")
    loaded, unchanged = FileStatus.LOADED, FileStatus.UNCHANGED
    assert outcomes == [(loaded, 2, 0, None), (loaded, 0, 2, -1000.0), (unchanged, 0, 2, -1000.0), (loaded, 2, 0, 1000.0)]


def test_a_tick_without_its_device_answers_nothing_and_charges_no_file(here: Here) -> None:
    here.upload("a.csv", csv_of(bridge("Ulm")))
    with pytest.raises(InputError, match="device 'cuda:99'"):
        cron.tick(here.services, here.folder / "job1", job_id="job1", device="cuda:99")
    assert here.tick("job2") == ["a.csv"]


@pytest.mark.parametrize(("failing", "at_first"), [(3, ["0.csv"]), (1, [])])
def test_a_device_that_fails_ends_the_tick_and_charges_no_file(
    here: Here, monkeypatch: pytest.MonkeyPatch, failing: int, at_first: list[str]
) -> None:
    # Of two shards each.
    versions = [here.upload(f"{number}.csv", csv_of(bridge("Ulm"), bridge("Hof"), bridge(f"Graz{number}"))) for number in range(3)]
    asked = 0

    def on_a_failing_device(answerer: Any, source: Path, target: Path) -> Any:
        nonlocal asked
        asked += 1
        # It fails for good, as a GPU does for a whole process.
        if asked > failing:
            raise DeviceFailed("the device failed: CUDA error: unspecified launch failure", where="cuda")
        return answer_shard(answerer, source, target)

    with monkeypatch.context() as patched:
        patched.setattr(cron, "answer_shard", on_a_failing_device)
        with nullcontext() if at_first else pytest.raises(DeviceFailed):
            assert here.tick("job1") == at_first
    assert asked == failing + 1, "the device is not tried again"
    assert [path.name for path in (here.folder / "job1").glob("*")] == [file_id(name) for name in at_first]
    failed, *others = versions[len(at_first) :]
    record = here.record(failed)
    assert (record.status, record.attempts) == (FileStatus.PENDING, 0)
    assert "unspecified launch failure" in record.error
    assert here.tick("job2") == [version.name for version in others]
    here.expire_claims()
    assert failed.name in here.tick("job3")


def test_a_file_on_which_the_device_fails_does_not_hold_up_the_others(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    here.upload("a-poison.csv", csv_of(bridge("Ulm")))
    here.upload("b.csv", csv_of(bridge("Hof")))

    error = DeviceFailed("the device failed: CUDA error: an illegal memory access was encountered", where="cuda")
    monkeypatch.setattr(cron, "answer_shard", failing_on(b"Ulm", error))
    with pytest.raises(DeviceFailed):
        here.tick("job1")
    assert here.tick("job1") == ["b.csv"], "Pachyderm's second attempt at the datum"


def test_a_file_on_which_the_device_always_fails_is_charged_once_others_are_loaded(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    poison = here.upload("a-poison.csv", csv_of(bridge("Ulm")))
    monkeypatch.setattr(cron, "answer_shard", failing_on(b"Ulm", DeviceFailed("CUDA error", where="cuda")))
    for number in range(2):
        with pytest.raises(DeviceFailed):
            here.tick(f"job{number}")
        assert here.record(poison).attempts == number
        here.upload(f"b{number}.csv", csv_of(bridge(f"Hof{number}")))
        assert here.tick(f"good{number}") == [f"b{number}.csv"]
        here.load(f"good{number}")
        here.expire_claims()


def test_an_unexpected_error_is_charged_and_does_not_hold_up_the_others(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    bad, good = here.upload("bad.csv", csv_of(bridge("Ulm"))), here.upload("good.csv", csv_of(bridge("Hof")))
    monkeypatch.setattr(cron, "answer_shard", failing_on(b"Ulm", KeyError("x")))
    assert here.tick("job1") == ["good.csv"]
    assert (here.record(bad).attempts, here.record(bad).error, here.record(good).attempts) == (1, "KeyError: 'x'", 0)


@pytest.mark.parametrize(("attempts", "status"), [(1, FileStatus.PENDING), (2, FileStatus.FAILED)])
def test_a_file_that_waits_or_is_parked_is_superseded_once_its_upload_is_deleted(
    here: Here, monkeypatch: pytest.MonkeyPatch, attempts: int, status: FileStatus
) -> None:
    version = here.upload("deleted.csv", csv_of(bridge("Ulm")))
    monkeypatch.setattr(cron, "answer_shard", failing_on(b"Ulm", KeyError("x")))
    for number in range(attempts):
        here.tick(f"job{number}")
        here.expire_claims()
    assert here.record(version).status is status
    here.services.bucket.delete_blob("incoming/deleted.csv")
    assert here.tick("next") == []
    assert here.record(version).status is FileStatus.SUPERSEDED


def test_a_tick_that_ends_with_an_error_charges_no_file(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    version = here.upload("a.csv", csv_of(bridge("Ulm")))

    def unavailable(*_: Any, **__: Any) -> None:
        raise TransientError("PostgreSQL cannot be reached")

    with monkeypatch.context() as patched:
        patched.setattr(cron, "answer_shard", failing_on(b"Ulm", KeyError("x")))
        patched.setattr(Ledger, "charge", unavailable)
        with pytest.raises(TransientError):
            here.tick("job1")
    assert here.tick("job1") == ["a.csv"], "Pachyderm's second attempt at the datum"
    assert here.record(version).attempts == 0


def test_a_file_that_cannot_be_set_aside_is_deferred_and_does_not_hold_up_the_others(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    photo = here.upload("a-photo.csv", b"\x89PNG\r\n\x1a\n" + bytes(100))
    here.upload("b.csv", csv_of(bridge("Ulm")))

    def refused(*_: Any) -> None:
        raise InputError("the bucket denies access")

    with monkeypatch.context() as patched:
        patched.setattr(cron, "set_aside", refused)
        assert here.tick("job1") == ["b.csv"]
    assert (here.record(photo).status, here.record(photo).attempts) == (FileStatus.PENDING, 0)
    here.expire_claims()
    here.tick("job2")
    assert here.record(photo).status is FileStatus.REJECTED


def test_the_file_that_a_worker_dies_of_is_charged_and_the_others_are_answered(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad, late = (here.upload(f"{name}.csv", csv_of(bridge(name))) for name in ("good", "bad", "late"))

    class Died(BaseException):
        """What nothing of the worker's own code survives."""

    monkeypatch.setattr(cron, "answer_shard", failing_on(b"bad", Died()))
    with pytest.raises(Died):
        here.tick("job1")
    # The datum's second try, in the same job.
    assert here.tick("job1") == ["good.csv", "late.csv"]
    assert [here.record(v).attempts for v in (good, bad, late)] == [0, 1, 0]
    here.load("job1")
    here.expire_claims()
    with pytest.raises(Died):
        here.tick("job2")
    # Another tick: the dead one's claims have run out.
    here.expire_claims()
    assert here.tick("job3") == []
    assert (here.record(bad).status, here.record(bad).attempts) == (FileStatus.FAILED, 2)
    assert here.record(good).status is FileStatus.FINISHED
    assert "incoming/bad.csv" in here.objects()


def test_a_file_that_is_never_loaded_is_answered_again(here: Here) -> None:
    version = here.upload("unloaded.csv", csv_of(bridge("Ulm")))
    assert here.tick("job1") == ["unloaded.csv"]
    here.expire_claims()
    assert here.tick("job2") == []
    here.expire_claims()
    assert here.tick("job3") == ["unloaded.csv"]
    here.load("job3")
    here.load("job1")
    assert (here.record(version).status, here.record(version).attempts) == (FileStatus.LOADED, 1)


def test_what_is_answered_stays_claimed_for_as_long_as_loading_may_take(here: Here) -> None:
    here.upload("a.csv", csv_of(bridge("Ulm")))
    assert here.tick("job1") == ["a.csv"]
    with connect(here.services.postgres) as connection:
        (left,) = only_row(connection.execute("SELECT extract(epoch FROM claim_until - now())::float FROM question_file"))
    assert left > cron.LOADING_SECONDS - 60 > here.services.work.lease_seconds


def test_a_file_that_is_answered_for_longer_than_a_lease_stays_claimed(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    here.limit(lease_seconds=1)
    here.upload("a.csv", csv_of(bridge("Ulm")))
    claimed: list[dict[str, str]] = []

    def slowly(answerer: Any, source: Path, target: Path) -> Any:
        time.sleep(2)
        with Ledger(here.services.postgres) as ledger:
            claimed.append(ledger.claimed())
        return answer_shard(answerer, source, target)

    monkeypatch.setattr(cron, "answer_shard", slowly)
    assert here.tick("job1") == ["a.csv"]
    assert claimed == [{"a.csv": "job1"}]


@pytest.mark.parametrize("limit", ["batch_files", "batch_bytes"])
def test_a_tick_takes_no_more_than_a_batch(here: Here, limit: str) -> None:
    here.limit(**{limit: 1})
    for name in ("a", "b"):
        here.upload(f"{name}.csv", csv_of(bridge(name)))
    assert here.tick("job1") == ["a.csv"]
    assert here.tick("job2") == ["b.csv"]


# What Google's client reads in the stack.
BY_GOOGLE = ("API_ENDPOINT_OVERRIDE", "GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_CLOUD_PROJECT")


def pachyderm_of(variables: Mapping[str, str]) -> PachydermSettings:
    return PachydermSettings(pachd_address=variables["PACHD_ADDRESS"], pach_token=SecretStr(variables["PACH_TOKEN"]))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A stack whose answering pipeline ticks by itself; its variables."""
    with open_stack(tmp_path / "stack") as stack:
        spec = json.loads((project_file("pachyderm") / "question_answer" / "pipeline_cron.json").read_text())
        spec["input"]["cron"]["spec"] = "@every 2s"
        spec["transform"]["env"] = {**{name: stack.variables[name] for name in BY_GOOGLE}, "QA_SHARD_ROWS": "2"}
        with session(pachyderm_of(stack.variables), "making pipelines") as client:
            client.pps.create_secret(name="gcsaccess", data={"creds": "", "storage_bucket": BUCKET})
            client.pps.create_pipeline_v2(create_pipeline_request_json=json.dumps(spec), update=True)
        yield stack.variables


def test_on_a_server_with_cron_files_go_from_the_bucket_to_the_table_and_the_archive(
    cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in BY_GOOGLE:
        monkeypatch.setenv(name, cluster[name])
    client = storage.Client()
    opened = client.bucket(BUCKET)
    with Path(__file__).open("rb") as not_a_table:
        rejected = bucket.upload(opened, "not-a-table.csv", not_a_table)
    towns = ("Ulm", "Graz", "Linz")
    for town in towns:
        opened.blob(f"incoming/{town}.csv").upload_from_string(csv_of(bridge(town), bridge(town, 1900), bridge(town)))
    for name in ("PG_HOST", "PG_PORT", "PG_USER", "PG_PASSWORD", "PG_DBNAME"):
        monkeypatch.setenv(name, cluster[name])
    postgres = PostgresSettings()

    def left() -> list[str]:
        return [blob.name for blob in opened.list_blobs(prefix="incoming/")]

    wait_until(lambda: not left(), "everything is archived")
    with Ledger(postgres) as ledger, connect(postgres) as connection:
        rows = connection.execute("SELECT source_file, answer FROM question_answer ORDER BY 1, row_number").fetchall()
        records = ledger.history(limit=100)
    assert rows == [(f"{town}.csv", answer) for town in sorted(towns) for answer in ("1872", "1900", "1872")]
    assert {r.version.name: r.status for r in records} == {
        rejected.name: FileStatus.REJECTED,
        **{f"{town}.csv": FileStatus.FINISHED for town in towns},
    }
    assert {r.attempts for r in records} == {0}
    with session(pachyderm_of(cluster), "looking") as pachd:
        job = pachd.pps.inspect_job(job=job_of(ANSWER_PIPELINE, next(r.pachyderm_job for r in records if r.answered)))
    assert job.state == pps.JobState.JOB_SUCCESS
    assert {ModelChoice(r.model, r.model_revision, r.model_precision).id for r in records if r.answered} == {"bundled"}


def test_on_a_server_with_cron_a_file_is_forgotten_without_a_dagster(cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in cluster.items():
        monkeypatch.setenv(name, value)
    # Without a home Dagster's history cannot be opened.
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    opened = storage.Client().bucket(BUCKET)
    for town in ("Ulm", "Graz"):
        opened.blob(f"incoming/{town}.csv").upload_from_string(csv_of(bridge(town)))
    wait_until(lambda: not list(opened.list_blobs(prefix="incoming/")), "everything is archived")

    def commits_of_ulm() -> list[FileCommit]:
        with session(pachyderm_of(cluster), "looking") as client:
            return find_file_commits(client, "Ulm.csv")

    assert commits_of_ulm()
    said = []

    def forget() -> bool:
        result = CliRunner().invoke(main, ["forget", "Ulm.csv", "--no-dagster"])
        said.append(result.output)
        return result.exit_code == 0

    wait_until(forget, "nothing is left")
    # The newest commit stays until a tick after it is done.
    assert all("after the pipeline's next tick" in output or "until child commit" in output for output in said[:-1]), said
    assert commits_of_ulm() == []
    with Ledger(PostgresSettings()) as ledger:
        assert not ledger.holdings("Ulm.csv").answers
        assert ledger.holdings("Graz.csv").answers
    assert not [blob.name for blob in opened.list_blobs(versions=True) if "Ulm" in blob.name]


def test_a_retry_that_comes_before_the_load_waits_for_the_next_tick_only(here: Here) -> None:
    version = here.upload("asked-again.csv", csv_of(bridge("Ulm")))
    assert here.tick("job1") == ["asked-again.csv"]
    with Ledger(here.services.postgres) as ledger:
        request_retries(here.services.bucket, ledger, [version.name])
    here.load("job1")
    assert here.record(version).status is FileStatus.PENDING
    assert here.tick("job2") == ["asked-again.csv"]
