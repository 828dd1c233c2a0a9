"""Repeated uploads of the same content: what proves that the content is the same, and what does not."""

import io
import logging
from dataclasses import replace

import pytest
from google.cloud import storage

from qa_platform.answering import version as answering_version
from qa_platform.answering.version import known_revision
from qa_platform.batches.intake import split_file
from qa_platform.batches.pending import look, tidy
from qa_platform.clients.archived import find_archived
from qa_platform.clients.bucket import archive, archived_name, find_incoming, upload
from qa_platform.clients.postgres import connect
from qa_platform.clients.services import Services
from qa_platform.contract import INCOMING, FileStatus, FileVersion, ModelChoice, ShardInfo
from qa_platform.errors import InputError
from qa_platform.ledger import Ledger
from qa_platform.loading import migrate
from qa_platform.settings import IngestSettings, ModelSettings, PachydermSettings, PostgresSettings, WorkSettings
from qa_platform_tests.conftest import Database
from qa_platform_tests.forged import forged

CONTENT = b"question,context\nWhere is the lighthouse?,It is at Cape Verde.\n0000\n"
OTHER = forged(b"question,context\nWhere is the lighthouse?,It is at Cape Wrath.\n", b"\n", like=CONTENT)


@pytest.fixture
def services(bucket: storage.Bucket, database: Database) -> Services:
    settings = PostgresSettings(host=database.host, port=database.port, user=database.user, dbname=database.dbname)
    migrate.upgrade(settings)
    return Services(bucket, PachydermSettings(), settings, ModelSettings().pinned, IngestSettings(), WorkSettings())


def answered(services: Services, content: bytes) -> FileVersion:
    """Upload a file, and record that it is answered."""
    version = upload(services.bucket, "a.csv", io.BytesIO(content))
    with Ledger(services.postgres) as ledger, connect(services.postgres) as connection:
        ledger.claim([version], owner="test", lease_seconds=10)
        model = services.model
        connection.execute(
            "UPDATE question_file SET status = 'finished', loaded_at = now(), archived_at = now(), "
            "wanted_model = %s, wanted_revision = %s, wanted_precision = %s, model_revision = %s",
            [model.id, model.revision, model.precision, known_revision(model)],
        )
        ledger.release("test")
    return version


def planned(services: Services) -> list[FileVersion]:
    return [version for batch in look(services).plan.batches for version in batch.versions]


def test_the_two_files_of_these_tests_differ_and_have_one_size_and_checksum(services: Services) -> None:
    first, second = (upload(services.bucket, name, io.BytesIO(text)) for name, text in (("a.csv", CONTENT), ("b.csv", OTHER)))
    assert CONTENT != OTHER
    assert (first.size, first.crc32c) == (second.size, second.crc32c)
    assert first.md5 != second.md5


def test_another_file_of_the_same_size_and_checksum_is_no_copy_in_the_archive(services: Services) -> None:
    version = upload(services.bucket, "a.csv", io.BytesIO(CONTENT))
    place = services.bucket.blob(archived_name(version, rejected=False))
    place.upload_from_string(OTHER)
    assert find_archived(services.bucket, version) == ""
    place.upload_from_string(CONTENT)
    assert find_archived(services.bucket, version) == place.name


def test_the_same_content_is_answered_again_by_another_revision_of_the_bundled_model(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered(services, CONTENT)
    again = upload(services.bucket, "a.csv", io.BytesIO(CONTENT))
    assert look(services).plan.unchanged == (again,)
    monkeypatch.setattr(answering_version, "bundled_revision", lambda: "another")
    assert look(services).plan.unchanged == ()
    assert planned(services) == [again]


def test_shards_are_new_datums_if_another_revision_answered_them_or_nobody_knows_which(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(model: ModelChoice, answered_by: str, *, load_id: int = 2) -> str:
        shards: dict[str, bytes] = {}
        record = replace(answered_record, load_id=load_id, model_revision=answered_by)
        asked = replace(services, model=model)
        split_file(asked, record, lambda path, chunks: shards.update({path: b"".join(chunks)}), logging.getLogger(__name__))
        return ShardInfo.from_json(shards["part-00000/shard.json"]).launch

    version = answered(services, CONTENT)
    with Ledger(services.postgres) as ledger:
        answered_record = ledger.records([version])["a.csv", version.generation]
    monkeypatch.setattr(answering_version, "bundled_revision", lambda: "new")
    bundled, pinned, unpinned = ModelChoice("bundled"), ModelChoice("a/b", "c0ffee"), ModelChoice("a/b")
    assert launch(bundled, "") == launch(bundled, "new") == "new"
    assert launch(pinned, "") == launch(pinned, "c0ffee") == launch(unpinned, "") == "", "the model says it"
    again = f"{version.generation}-2"
    assert launch(bundled, "new, old") == launch(bundled, "old") == f"new {again}"
    assert launch(pinned, "other") == launch(unpinned, "c0ffee") == again
    assert launch(unpinned, "c0ffee", load_id=3) == f"{version.generation}-3", "a request more"


def test_the_same_content_is_unchanged(services: Services) -> None:
    before = answered(services, CONTENT)
    with Ledger(services.postgres) as ledger:
        ledger.record_layout(before, blank=3, delimiter=";")
    again = upload(services.bucket, "a.csv", io.BytesIO(CONTENT))
    found = look(services).plan
    assert (found.unchanged, found.batches) == ((again,), ())
    assert tidy(services, found, logging.getLogger(__name__))
    with Ledger(services.postgres) as ledger:
        record = ledger.records([again])["a.csv", again.generation]
        assert (record.status, record.blank, record.delimiter) == (FileStatus.UNCHANGED, 3, ";")


def test_another_content_of_the_same_size_and_checksum_is_answered(services: Services) -> None:
    answered(services, CONTENT)
    other = upload(services.bucket, "a.csv", io.BytesIO(OTHER))
    assert planned(services) == [other]
    with Ledger(services.postgres) as ledger:
        assert not ledger.mark_unchanged(other), "whoever asks"


def test_a_composed_object_has_no_md5_and_is_answered_which_is_said(services: Services, caplog: pytest.LogCaptureFixture) -> None:
    answered(services, CONTENT)
    parts = [services.bucket.blob(f"part-{number}") for number in range(2)]
    for part, content in zip(parts, (CONTENT[:20], CONTENT[20:]), strict=True):
        part.upload_from_string(content)
    services.bucket.blob(INCOMING + "a.csv").compose(parts)
    composed = find_incoming(services.bucket, "a.csv")
    assert composed is not None
    assert composed.md5 == ""
    assert planned(services) == [composed]
    with caplog.at_level("INFO"):
        tidy(services, look(services).plan, logging.getLogger(__name__))
    assert "an MD5 is missing" in caplog.text


def test_a_file_that_was_answered_before_there_were_md5s_is_answered_again(services: Services) -> None:
    answered(services, CONTENT)
    with connect(services.postgres) as connection:
        connection.execute("UPDATE question_file SET md5 = ''")
    again = upload(services.bucket, "a.csv", io.BytesIO(CONTENT))
    assert planned(services) == [again]


def test_another_object_of_the_same_size_and_checksum_is_not_taken_for_the_archived_copy(services: Services) -> None:
    version = answered(services, CONTENT)
    services.bucket.blob(archived_name(version, rejected=False)).upload_from_string(OTHER)
    with pytest.raises(InputError, match="another object lies"):
        archive(services.bucket, version, mode="move")
    assert find_incoming(services.bucket, "a.csv") == version
