"""Users' commands between the steps of the platform: each test requests a retry at a point where it used to be lost."""

import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.cloud import storage

from qa_platform.answering import version as answering_version
from qa_platform.batches.archive import archive_file
from qa_platform.batches.intake import Intake, set_aside
from qa_platform.batches.pending import look, reconcile, tidy
from qa_platform.batches.retry import request_retries
from qa_platform.clients import bucket as bucket_module
from qa_platform.clients.bucket import upload
from qa_platform.clients.postgres import connect
from qa_platform.clients.services import Services
from qa_platform.clients.source import SourceChanged
from qa_platform.contract import INCOMING, FileReason, FileStatus, FileVersion
from qa_platform.errors import InputError, TransientError
from qa_platform.ingest import FileRejected
from qa_platform.ledger import FileRecord, Ledger
from qa_platform.loading import migrate
from qa_platform.loading.load import load_file
from qa_platform.settings import IngestSettings, PachydermSettings, PostgresSettings, WorkSettings
from qa_platform_tests.conftest import Database
from qa_platform_tests.loading_helpers import ANSWERED_BY, BUNDLED, AnsweredUpload, answered_rows

_LOG = logging.getLogger(__name__)
CONTENT = b"question,context\nWhere?,Here.\n"


class World:
    """A bucket and a database. ``retry`` is what the command does, with connections of its own."""

    def __init__(self, opened: storage.Bucket, settings: PostgresSettings, folder: Path) -> None:
        self.opened = opened
        self.settings = settings
        self.ledger = Ledger(settings)
        self._folder = folder

    def services(self, archive: str) -> Services:
        work = WorkSettings.model_validate({"lease_seconds": 10, "archive": archive, "max_attempts": 1})
        return Services(self.opened, PachydermSettings(), self.settings, BUNDLED, IngestSettings(), work)

    def put(self, name: str = "a.csv") -> FileVersion:
        return upload(self.opened, name, io.BytesIO(CONTENT))

    def load(self, version: FileVersion, *, load_id: int = 1) -> FileRecord:
        # Recorded as it was seen, with its checksum.
        self.ledger.claim([version], owner="load", lease_seconds=0)
        answered = AnsweredUpload(answered_rows(3), name=version.name, generation=version.generation, load_id=load_id)
        with connect(self.settings) as connection:
            load_file(connection, answered.write(self._folder / f"{version.generation}-{load_id}"))
        return self.record(version)

    def record(self, version: FileVersion) -> FileRecord:
        return self.ledger.records([version])[version.name, version.generation]

    def retry(self, name: str = "a.csv") -> FileRecord:
        with Ledger(self.settings) as ledger:
            return request_retries(self.opened, ledger, [name])[0]

    def retry_or_refusal(self, refusals: list[str]) -> None:
        """`retry`, whose refusal is added to the list."""
        try:
            self.retry()
        except InputError as error:
            refusals.append(str(error))

    def will_be_answered(self, version: FileVersion, services: Services) -> bool:
        """Whether a retry comes true: it waits, is planned under its new load id, and its source is there."""
        reconcile(services, _LOG)
        record = self.record(version)
        planned = [each for batch in look(services).plan.batches for each in batch.versions]
        there = bool(record.place) and bucket_module.is_there(self.opened, version, record.place)
        return record.status is FileStatus.PENDING and record.archived_at is None and planned == [version] and there


@pytest.fixture
def world(bucket: storage.Bucket, database: Database, tmp_path: Path) -> Iterator[World]:
    settings = PostgresSettings(host=database.host, port=database.port, user=database.user, dbname=database.dbname)
    migrate.upgrade(settings)
    found = World(bucket, settings, tmp_path)
    with found.ledger:
        yield found


def run_before(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, action: Callable[[], object]) -> None:
    """Run ``action`` once, just before the next call of ``owner.name``."""
    call = getattr(owner, name)

    def interrupted(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(owner, name, call)
        action()
        return call(*arguments, **options)

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize("archive", ["move", "delete"])
def test_a_retry_between_load_and_archive_keeps_its_source(world: World, archive: str) -> None:
    version, services = world.put(), world.services(archive)
    stale = world.load(version)
    world.retry()
    archive_file(services, world.ledger, stale, log=_LOG)
    assert world.will_be_answered(version, services)


@pytest.mark.parametrize("archive", ["move", "delete"])
@pytest.mark.parametrize("seam", ["begin_archiving", "record_archived"])
def test_a_retry_at_any_step_of_archiving_comes_true_or_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch, archive: str, seam: str
) -> None:
    version, services = world.put(), world.services(archive)
    stale, refusals = world.load(version), list[str]()
    run_before(monkeypatch, Ledger, seam, lambda: world.retry_or_refusal(refusals))
    archive_file(services, world.ledger, stale, log=_LOG)
    if archive == "delete" and seam == "record_archived":
        assert "QA_ARCHIVE has it deleted" in refusals[0]
        assert world.record(version).status is FileStatus.FINISHED
    else:
        assert refusals == []
        assert world.will_be_answered(version, services)


@pytest.mark.parametrize("archive", ["move", "delete"])
def test_a_retry_just_before_the_source_is_deleted_comes_true_or_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch, archive: str
) -> None:
    version, services = world.put(), world.services(archive)
    stale, refusals = world.load(version), list[str]()
    run_before(monkeypatch, storage.Blob, "delete", lambda: world.retry_or_refusal(refusals))
    archive_file(services, world.ledger, stale, log=_LOG)
    assert bool(refusals) != world.will_be_answered(version, services)
    assert bool(refusals) == (archive == "delete")


def test_a_source_that_is_about_to_be_deleted_is_looked_for_again_before_a_retry_is_accepted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, services = world.put(), world.services("delete")
    stale = world.load(version)
    # The command has seen the source; it is deleted before the command asks.
    run_before(monkeypatch, Ledger, "request_retries", lambda: archive_file(services, world.ledger, stale, log=_LOG))
    with pytest.raises(InputError, match="QA_ARCHIVE has it deleted"):
        world.retry()
    assert world.record(version).status is FileStatus.FINISHED


def test_a_newer_generation_that_comes_while_the_source_is_looked_for_is_looked_for_too(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = world.put()
    world.load(version)

    def overwritten_and_deleted() -> None:
        world.ledger.mark_superseded(world.put())
        world.opened.blob(INCOMING + "a.csv").delete()

    run_before(monkeypatch, Ledger, "request_retries", overwritten_and_deleted)
    with pytest.raises(InputError, match="deleted from incoming/"):
        world.retry()
    assert world.record(version).load_id == 1


@pytest.mark.parametrize("archive", ["move", "delete"])
def test_a_source_that_cannot_be_deleted_is_archived_later(world: World, monkeypatch: pytest.MonkeyPatch, archive: str) -> None:
    version, services = world.put(), world.services(archive)
    stale = world.load(version)

    def refuse(*arguments: Any, **options: Any) -> None:
        raise TransientError("not now")

    with monkeypatch.context() as patch:
        patch.setattr(storage.Blob, "delete", refuse)
        with pytest.raises(TransientError):
            archive_file(services, world.ledger, stale, log=_LOG)
    assert world.record(version).place == INCOMING + "a.csv"
    tidy(services, look(services).plan, _LOG)
    assert world.record(version).status is FileStatus.FINISHED
    assert not world.opened.blob(INCOMING + "a.csv").exists()


def test_a_retry_while_the_bucket_is_reconciled_is_not_swallowed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    version, services = world.put(), world.services("move")
    world.ledger.claim([version], owner="run", lease_seconds=0)

    def answered_and_retried() -> None:
        archive_file(services, world.ledger, world.load(version), log=_LOG)
        world.retry()

    # Reconcile has read that it waits under incoming/, and lists that folder when it has left it.
    run_before(monkeypatch, bucket_module, "list_incoming", answered_and_retried)
    assert reconcile(services, _LOG) == 0
    assert world.record(version).load_id == 2
    assert world.will_be_answered(version, services)


def test_a_retry_just_before_reconcile_gives_a_file_up_is_not_swallowed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    version, services = world.put(), world.services("move")
    world.ledger.claim([version], owner="run", lease_seconds=0)
    world.opened.blob(INCOMING + "a.csv").delete()

    def uploaded_elsewhere_and_retried() -> None:
        # Somebody puts the copy back, and asks for it.
        world.opened.blob(f"processed/a.csv/{version.generation}.csv").upload_from_string(CONTENT)
        world.retry()

    run_before(monkeypatch, Ledger, "mark_superseded", uploaded_elsewhere_and_retried)
    assert reconcile(services, _LOG) == 0
    assert world.will_be_answered(version, services)


def test_a_file_that_leaves_while_it_is_listed_does_not_come_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    version, services = world.put(), world.services("delete")
    loaded = world.load(version)
    run_before(monkeypatch, Ledger, "reopen", lambda: archive_file(services, world.ledger, loaded, log=_LOG))
    assert reconcile(services, _LOG) == 0
    assert (world.record(version).status, world.record(version).place) == (FileStatus.FINISHED, "")


@pytest.mark.parametrize("overwritten", [True, False])
def test_a_retry_of_a_superseded_file_whose_source_is_gone_is_refused_with_the_reason(world: World, overwritten: bool) -> None:
    version = world.put()
    world.ledger.mark_superseded(version)
    if overwritten:
        newer = world.put()
    else:
        world.opened.blob(INCOMING + "a.csv").delete()
    with pytest.raises(InputError, match=f"generation {newer.generation} is answered" if overwritten else "deleted from incoming/"):
        world.retry()
    assert world.record(version).status is FileStatus.SUPERSEDED


def test_a_retry_of_a_superseded_file_finds_its_copy_in_the_archive(world: World) -> None:
    version, services = world.put(), world.services("move")
    archive_file(services, world.ledger, world.load(version), log=_LOG)
    with connect(world.settings) as connection:
        # As in a table that was restored from before the file was loaded.
        connection.execute("UPDATE question_file SET status = 'superseded', archived_at = NULL, place = 'incoming/a.csv'")
    world.retry()
    assert world.will_be_answered(version, services)


@pytest.mark.parametrize("end", ["rejected", "gone"])
def test_a_retry_during_a_run_is_not_ended_by_what_the_run_read_before(world: World, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    version, services = world.put(), world.services("move")
    world.ledger.claim([version], owner="run", lease_seconds=60)
    (record,) = world.ledger.start("run", [version], run_id="run", batch_id="batch")
    if end == "rejected":
        world.retry()
        set_aside(services, world.ledger, record, FileRejected(FileReason.BINARY, "a photo"), _LOG)
    else:
        blob = world.opened.blob(INCOMING + "a.csv")
        place = f"processed/a.csv/{version.generation}.csv"

        def moved_and_retried() -> None:
            world.opened.rename_blob(blob, place)
            world.retry()

        run_before(monkeypatch, bucket_module, "is_there", moved_and_retried)
        with pytest.raises(TransientError):
            set_aside(services, world.ledger, record, SourceChanged("gone"), _LOG)
    world.ledger.release("run")
    assert world.record(version).load_id == 2
    assert world.will_be_answered(version, services)


def test_a_retry_is_not_charged_for_the_load_that_failed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    version, services = world.put(), world.services("move")
    world.ledger.claim([version], owner="run", lease_seconds=60)
    (record,) = world.ledger.start("run", [version], run_id="run", batch_id="batch")
    world.retry()

    class Broken:
        ids: tuple[str, ...] = ("set",)

        def make(self, folder: str, fill: Callable[..., object]) -> None:
            raise ValueError("broken")

    Intake(services, world.ledger, "run", _LOG, "launch", {}).read([record], Broken())  # type: ignore[arg-type]
    world.ledger.release("run")
    assert world.record(version).attempts == 0
    assert world.will_be_answered(version, services)


def test_a_run_works_under_the_load_id_of_a_retry_that_came_after_its_claim(world: World) -> None:
    version = world.put()
    world.ledger.claim([version], owner="run", lease_seconds=60)
    world.retry()
    (record,) = world.ledger.start("run", [version], run_id="run", batch_id="batch")
    assert (record.load_id, record.status) == (2, FileStatus.RUNNING)


def test_an_upload_that_is_retried_is_not_found_unchanged(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    services = world.services("move")
    monkeypatch.setattr(answering_version, "bundled_revision", lambda: ANSWERED_BY.revision)
    first = world.put()
    world.ledger.claim([first], owner="run", lease_seconds=0)
    archive_file(services, world.ledger, world.load(first), log=_LOG)
    same = world.put()
    found = look(services).plan
    assert found.unchanged == (same,)

    def claimed_and_retried() -> None:
        world.ledger.claim([same], owner="run", lease_seconds=0)
        world.retry()

    run_before(monkeypatch, Ledger, "mark_unchanged", claimed_and_retried)
    tidy(services, found, _LOG)
    assert world.will_be_answered(same, services)


def test_retries_are_asked_for_together_or_not_at_all_also_where_a_source_is_gone(world: World) -> None:
    versions = [world.put("a.csv"), world.put("b.csv")]
    for version in versions:
        world.load(version)
    world.opened.blob(INCOMING + "b.csv").delete()
    with pytest.raises(InputError, match=r"no file 'c\.csv'.*'b\.csv' is gone"):
        request_retries(world.opened, world.ledger, ["a.csv", "b.csv", "c.csv"])
    assert world.record(versions[0]).load_id == 1
