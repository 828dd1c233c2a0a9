"""Reading a batch: several files in parallel, outages, and a run that is asked to end meanwhile."""

import io
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from google.cloud import storage

from qa_platform.batches import intake as module
from qa_platform.batches.at_once import FILES_AT_ONCE, threads
from qa_platform.batches.intake import Intake
from qa_platform.batches.pending import claim, look
from qa_platform.clients.bucket import upload
from qa_platform.clients.postgres import connect
from qa_platform.clients.services import Services
from qa_platform.contract import FileStatus
from qa_platform.errors import TransientError
from qa_platform.ingest import Write
from qa_platform.ledger import FileRecord, Ledger
from qa_platform.loading import migrate
from qa_platform.settings import IngestSettings, PachydermSettings, PostgresSettings, WorkSettings
from qa_platform_tests.conftest import Database
from qa_platform_tests.loading_helpers import BUNDLED

_LOG = logging.getLogger(__name__)
_LIMIT_SECONDS = 30


class FileSetsInMemory:
    """What was written of each file, by its folder."""

    def __init__(self) -> None:
        self.written: dict[str, dict[str, bytes]] = {}

    @property
    def ids(self) -> list[str]:
        return list(self.written)

    def make(self, folder: str, fill: Callable[[Write], object]) -> None:
        files: dict[str, bytes] = {}
        fill(lambda path, chunks: files.update({path: b"".join(chunks)}))
        self.written[folder] = files


class Batch:
    """A run over uploads, that is about to read them."""

    def __init__(self, services: Services, ledger: Ledger, files: int) -> None:
        versions = [upload(services.bucket, f"{number:02}.csv", io.BytesIO(b"question,context\nWhere?,Here.\n")) for number in range(files)]
        ledger.claim(versions, owner="run", lease_seconds=60)
        self.ledger = ledger
        self.files = ledger.start("run", versions, run_id="run", batch_id="batch")
        self.file_sets = FileSetsInMemory()
        self.intake = Intake(services, ledger, "run", _LOG, "launch", {})

    def read(self) -> None:
        self.intake.read(self.files, self.file_sets)  # type: ignore[arg-type]

    def statuses(self) -> list[FileStatus]:
        records = self.ledger.records([file.version for file in self.files])
        return [records[file.version.name, file.version.generation].status for file in self.files]


@pytest.fixture
def services(bucket: storage.Bucket, database: Database) -> Services:
    settings = PostgresSettings(host=database.host, port=database.port, user=database.user, dbname=database.dbname)
    migrate.upgrade(settings)
    return Services(bucket, PachydermSettings(), settings, BUNDLED, IngestSettings(), WorkSettings())


@pytest.fixture
def ledger(services: Services) -> Iterator[Ledger]:
    with Ledger(services.postgres) as ledger:
        yield ledger


def before_each(monkeypatch: pytest.MonkeyPatch, action: Callable[[FileRecord], object]) -> None:
    """Run ``action`` before each file is read, in the thread that reads it."""
    split_file = module.split_file

    def read(services: Services, record: FileRecord, *arguments: Any, **options: Any) -> Any:
        action(record)
        return split_file(services, record, *arguments, **options)

    monkeypatch.setattr(module, "split_file", read)


def test_files_are_read_at_once(services: Services, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch(services, ledger, 2 * FILES_AT_ONCE)
    together = threading.Barrier(FILES_AT_ONCE, timeout=_LIMIT_SECONDS)
    before_each(monkeypatch, lambda record: together.wait())
    batch.read()
    assert len(batch.file_sets.ids) == len(batch.files)
    assert {name for files in batch.file_sets.written.values() for name in files} == {
        "part-00000/questions.csv",
        "part-00000/shard.json",
        "part-00000/manifest.json",
    }


def test_an_outage_ends_the_reading_and_what_was_read_goes_on(services: Services, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch(services, ledger, 4 * FILES_AT_ONCE)
    tried = []

    def fail_after_the_first(record: FileRecord) -> None:
        tried.append(record.version.name)
        if record.version.name != "00.csv":
            raise TransientError("the bucket cannot be reached")

    before_each(monkeypatch, fail_after_the_first)
    batch.read()
    assert len(tried) <= 2 * FILES_AT_ONCE, "each would wait as long"
    assert len(batch.file_sets.ids) == 1
    assert batch.statuses() == [FileStatus.RUNNING] + [FileStatus.PENDING] * (len(batch.files) - 1)


def test_where_nothing_was_read_all_files_wait_and_the_run_fails(
    services: Services, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = Batch(services, ledger, 2 * FILES_AT_ONCE)

    def fail(record: FileRecord) -> None:
        raise TransientError("the bucket cannot be reached")

    before_each(monkeypatch, fail)
    with pytest.raises(TransientError, match="cannot be reached"):
        batch.read()
    records = ledger.records([file.version for file in batch.files]).values()
    assert {(record.status, "cannot be reached" in record.error) for record in records} == {(FileStatus.PENDING, True)}


def test_a_file_that_the_bucket_never_hands_out_is_charged_where_others_are_loaded(
    services: Services, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, other = Batch(services, ledger, 2), threading.Event()
    with connect(services.postgres) as connection:
        connection.execute("UPDATE question_file SET loaded_at = now() WHERE source_file = '00.csv'")
        connection.execute("UPDATE question_file SET put_off_since = now() - interval '1 hour' WHERE source_file = '01.csv'")

    def fail_beside_the_other(record: FileRecord) -> None:
        if record.version.name == "00.csv":
            other.set()
        else:
            assert other.wait(_LIMIT_SECONDS)
            raise TransientError("the bucket cannot be reached")

    before_each(monkeypatch, fail_beside_the_other)
    batch.read()
    records = ledger.records([file.version for file in batch.files]).values()
    assert [record.attempts for record in records] == [0, 1]


def test_what_has_not_begun_at_the_end_is_dropped() -> None:
    ended = threading.Event()
    with threads() as pool:
        begun = [pool.submit(ended.wait, _LIMIT_SECONDS) for _ in range(FILES_AT_ONCE)]
        waiting = pool.submit(pytest.fail, "it was begun")
        waiting.add_done_callback(lambda _: ended.set())
    assert waiting.cancelled()
    assert [future.result() for future in begun] == [True] * FILES_AT_ONCE


def test_a_run_that_is_told_to_end_does_not_read_a_large_file_to_its_end(
    services: Services, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = Batch(services, ledger, 2)
    large = threading.Event()

    def split(source: object, *, version: object, write: Write, **_: object) -> None:
        if version == batch.files[0].version:
            large.wait(_LIMIT_SECONDS)
            raise KeyboardInterrupt
        until = time.monotonic() + _LIMIT_SECONDS
        while time.monotonic() < until:
            write("part-00000/questions.csv", [b"x"])
            large.set()
        pytest.fail("it was read to its end")

    monkeypatch.setattr(module, "split", split)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        batch.read()
    assert time.monotonic() - begun < _LIMIT_SECONDS / 2
    assert batch.file_sets.ids == []


def test_objects_that_the_bucket_refuses_do_not_hold_up_the_others_of_their_batch(services: Services, ledger: Ledger) -> None:
    csv = b"question,context\nWhere?,Here.\n"
    for number in range(20):
        services.bucket.blob(f"incoming/refused-{number:03}.csv", encryption_key=b"k" * 32).upload_from_string(csv)
    upload(services.bucket, "good.csv", io.BytesIO(csv))
    (batch,) = look(services).plan.batches
    assert claim(services, batch, token="run")
    files, file_sets = ledger.start("run", batch.versions, run_id="run", batch_id=batch.id), FileSetsInMemory()
    assert len(files) == 21
    Intake(services, ledger, "run", _LOG, "launch", {}).read(files, file_sets)  # type: ignore[arg-type]
    assert len(file_sets.ids) == 1
    ledger.release("run")
    refused = ledger.newest(["refused-000.csv"])["refused-000.csv"]
    assert "upload it again without an encryption key of your own" in refused.error
