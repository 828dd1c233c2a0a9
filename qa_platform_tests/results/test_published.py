"""Answered CSVs in the bucket: their content, that each gets there eventually, and that older answers never replace newer ones."""

import gzip
import io
import logging
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from google.cloud import storage
from pachyderm_sdk.api import pfs
from pydantic import ValidationError

from qa_platform.batches.archive import archive_file
from qa_platform.batches.missing import compare_archive
from qa_platform.batches.pending import archive_done, look
from qa_platform.cli.main import main
from qa_platform.cli.status.observe import FileState
from qa_platform.clients.answered_csvs import AnswersId, answered_name, write_answered
from qa_platform.clients.bucket import upload
from qa_platform.clients.pachyderm import session
from qa_platform.clients.postgres import connect
from qa_platform.clients.services import Services
from qa_platform.contract import LOAD_PIPELINE, FileStatus, FileVersion, file_id
from qa_platform.errors import TransientError
from qa_platform.ledger import FileRecord, Ledger
from qa_platform.loading.load import load_file
from qa_platform.results import published
from qa_platform.results.published import publish
from qa_platform.settings import IngestSettings, ModelSettings, PachydermSettings, PostgresSettings, WorkSettings
from qa_platform_tests.loading_helpers import AnsweredUpload, answered_rows
from qa_platform_tests.pachd_helpers import remove_platform

LOG = logging.getLogger(__name__)
PREFIX = "answered/"
CSV = b"question,context,answer\r\nWhere?,Here.,Here\r\n"
HOSTILE = "../%0a\u2028$(id)'\".csv"


@dataclass(frozen=True)
class World:
    """A bucket, a database and a pachd. What runs do is done by `load` and `finish`."""

    services: Services
    ledger: Ledger
    folder: Path

    def load(self, version: FileVersion, content: bytes = CSV) -> FileRecord:
        """Load a file, whose answered CSV is ``content``."""
        known = self.ledger.known([version]).get((version.name, version.generation))
        answered = AnsweredUpload(answered_rows(3), name=version.name, generation=version.generation, load_id=known.load_id if known else 1)
        with connect(self.services.postgres) as connection:
            load_file(
                connection,
                answered.write(self.folder / f"{version.generation}-{answered.load_id}"),
                commit_id=self.commit(version, content),
            )
        return self.record(version)

    def commit(self, version: FileVersion, content: bytes) -> str:
        with session(self.services.pachyderm, "committing") as client:
            with client.pfs.commit(branch=pfs.Branch.from_uri(f"{LOAD_PIPELINE}@master")) as commit:
                commit.put_file_from_bytes(path=f"/{file_id(version.name)}.csv", data=content)
            return str(commit.id)

    def put(self, name: str) -> FileVersion:
        return upload(self.services.bucket, name, io.BytesIO(b"question,context\nWhere?,Here.\n"))

    def finish(self, name: str, content: bytes = CSV) -> FileVersion:
        version = self.put(name)
        archive_file(self.services, self.ledger, self.load(version, content), log=LOG)
        return version

    def record(self, version: FileVersion) -> FileRecord:
        return self.ledger.records([version])[version.name, version.generation]

    def answered(self, name: str, prefix: str = PREFIX) -> bytes | None:
        blob = self.services.bucket.get_blob(answered_name(prefix, name))
        return blob.download_as_bytes() if blob else None

    def its_time_has_come(self) -> None:
        with connect(self.services.postgres) as connection:
            connection.execute("UPDATE question_file SET retry_at = now() WHERE retry_at IS NOT NULL")


@pytest.fixture(scope="module")
def pachyderm(pachyderm_cluster: PachydermSettings) -> Iterator[PachydermSettings]:
    """A pachd with a repo of answered CSVs."""
    repo = pfs.Repo.from_uri(LOAD_PIPELINE)
    with session(pachyderm_cluster, "making a repo") as client:
        remove_platform(client)
        client.pfs.create_repo(repo=repo)
        yield pachyderm_cluster
        client.pfs.delete_repo(repo=repo, force=True)


@pytest.fixture
def world(bucket: storage.Bucket, postgres: PostgresSettings, pachyderm: PachydermSettings, tmp_path: Path) -> Iterator[World]:
    work = WorkSettings(answered_prefix=PREFIX)
    services = Services(bucket, pachyderm, postgres, ModelSettings().pinned, IngestSettings(), work)
    with Ledger(postgres) as ledger:
        yield World(services, ledger, tmp_path)


@pytest.fixture
def answers(world: World, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], bytes]:
    """What `qa-platform answers` gives."""
    settings = world.services.postgres
    for name, value in (("HOST", settings.host), ("PORT", settings.port), ("USER", settings.user), ("DBNAME", settings.dbname)):
        monkeypatch.setenv(f"PG_{name}", str(value))
    monkeypatch.setenv("PACHD_ADDRESS", world.services.pachyderm.pachd_address)

    def given(name: str) -> bytes:
        result = CliRunner().invoke(main, ["answers", name])
        assert result.exit_code == 0, result.output
        return result.stdout_bytes

    return given


@pytest.mark.parametrize(
    ("prefix", "name"), [(PREFIX, "a.csv"), (PREFIX, HOSTILE), (PREFIX, "x" * 1005 + ".csv"), ("answered by us/", "x" * 1005 + ".csv")]
)
def test_a_finished_file_has_the_csv_that_answers_gives_under_the_prefix(
    world: World, answers: Callable[[str], bytes], prefix: str, name: str
) -> None:
    services = replace(world.services, work=WorkSettings(answered_prefix=prefix))
    world = replace(world, services=services)
    version = world.finish(name)
    assert publish(services, LOG) == 0
    blob = services.bucket.get_blob(answered_name(prefix, name))
    assert blob.download_as_bytes() == answers(name) == CSV
    assert AnswersId.of(blob) == AnswersId(name, version.generation, 1, world.record(version).pachyderm_commit)
    assert look(services).objects == 0, "it is no upload"
    archive = compare_archive(services.bucket, world.ledger, services.work.suffixes)
    assert (archive.compared, archive.missing) == (1, {}), "it is no archived source"


def test_the_answered_csv_has_the_delimiter_of_the_upload(world: World, answers: Callable[[str], bytes]) -> None:
    version = world.finish("a.csv", b'question,context,answer\nWhere?,"Here, or; there.",Here\n')
    world.ledger.record_layout(version, blank=0, delimiter=";")
    assert publish(world.services, LOG) == 0
    assert world.answered("a.csv") == answers("a.csv") == b'question;context;answer\nWhere?;"Here, or; there.";Here\n'


def test_the_answered_csv_of_a_compressed_upload_is_compressed(world: World, answers: Callable[[str], bytes]) -> None:
    world.finish("a.csv.gz")
    assert publish(world.services, LOG) == 0
    blob = world.services.bucket.get_blob(f"{PREFIX}a.csv.gz")
    assert (blob.content_type, blob.content_encoding) == ("application/gzip", None)
    assert gzip.decompress(blob.download_as_bytes()) == answers("a.csv.gz") == CSV


def test_once_pachyderm_has_removed_the_commit_the_csv_is_rebuilt_as_answers_does(
    world: World, answers: Callable[[str], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    world.finish("a.csv")
    with connect(world.services.postgres) as connection:
        connection.execute("UPDATE question_file SET pachyderm_commit = %s", ["0" * 32])
    assert publish(world.services, LOG) == 0
    assert world.answered("a.csv") == answers("a.csv") != CSV
    assert "come from PostgreSQL" in caplog.text


def test_nothing_is_written_or_remembered_unless_a_prefix_is_set(world: World) -> None:
    off = replace(world.services, work=WorkSettings())
    version = world.put("a.csv")
    archive_file(off, world.ledger, world.load(version), log=LOG)
    assert world.record(version).status is FileStatus.FINISHED
    assert (publish(off, LOG), publish(world.services, LOG)) == (0, 0)
    assert world.answered("a.csv") is None


@pytest.mark.parametrize("prefix", ["incoming/", "incoming/answered/", "processed/", "rejected/x/", "answered"])
def test_a_prefix_where_answered_csvs_would_be_taken_for_something_else_is_refused(prefix: str) -> None:
    with pytest.raises(ValidationError, match=r"must end with a slash, .* must not be below"):
        WorkSettings(answered_prefix=prefix)


def test_a_run_that_dies_between_load_and_archiving_leads_to_the_csv(world: World) -> None:
    version = world.put("a.csv")
    world.load(version)
    assert publish(world.services, LOG) == 0, "before the file is finished nothing is written"
    archive_done(world.services, LOG)
    assert publish(world.services, LOG) == 0
    assert world.answered("a.csv") == CSV


def test_a_process_that_dies_while_it_writes_leaves_nothing_and_another_writes_later(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    version = world.finish("a.csv")

    def dies(*_: Any, **__: Any) -> Iterator[bytes]:
        yield b"half of "
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(published, "answered_csv", dies)
        with pytest.raises(KeyboardInterrupt):
            publish(world.services, LOG)
    assert world.answered("a.csv") is None
    assert publish(world.services, LOG) == 1, "others leave it to the one that began, until it has had its time"
    world.its_time_has_come()
    assert publish(world.services, LOG) == 0
    assert world.answered("a.csv") == CSV
    assert world.record(version).csv_error == ""


def test_a_process_that_dies_after_the_write_does_not_have_it_written_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.finish("a.csv")
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "clear_owed_csv", partial(pytest.fail, "killed"))
        with pytest.raises(pytest.fail.Exception):
            publish(world.services, LOG)
    before = world.services.bucket.get_blob(PREFIX + "a.csv").generation
    world.its_time_has_come()
    assert publish(world.services, LOG) == 0
    assert world.services.bucket.get_blob(PREFIX + "a.csv").generation == before


def hold(world: World) -> Callable[[], None]:
    world.finish("a.csv", b"older")
    publish(world.services, LOG)
    blob = world.services.bucket.get_blob(PREFIX + "a.csv")
    blob.temporary_hold = True
    blob.patch()

    def release() -> None:
        blob.temporary_hold = False
        blob.patch()

    return release


def stand_in_the_way(world: World) -> Callable[[], None]:
    other = world.services.bucket.blob(PREFIX + "a.csv")
    other.upload_from_string(b"somebody's own")
    return other.delete


@pytest.mark.parametrize(("refuse", "why"), [(hold, "Temporary hold"), (stand_in_the_way, "another object lies")])
def test_a_refusal_holds_up_neither_the_file_nor_another_and_is_tried_again(
    world: World, refuse: Callable[[World], Callable[[], None]], why: str
) -> None:
    allow = refuse(world)
    before = world.answered("a.csv")
    stuck, free = world.finish("a.csv"), world.finish("b.csv")
    assert publish(world.services, LOG) == 1
    assert (world.answered("a.csv"), world.answered("b.csv")) == (before, CSV)
    found = world.record(stuck)
    assert (found.status, world.record(free).csv_error) == (FileStatus.FINISHED, "")
    assert "its answered CSV is not in the bucket yet" in FileState(stuck, found).note
    assert why in FileState(stuck, found).note
    assert [record.version.generation for record in world.ledger.unwritten_csvs(limit=5)] == [stuck.generation]
    assert world.ledger.owed_csvs(limit=5) == [], "it waits for its next try"
    allow()
    world.its_time_has_come()
    assert publish(world.services, LOG) == 0
    assert world.answered("a.csv") == CSV
    assert world.record(stuck).csv_error == ""


def test_a_role_that_may_not_write_is_named(world: World) -> None:
    version = world.finish("a.csv")
    policy = world.services.bucket.get_iam_policy()
    policy.bindings = [{"role": "roles/storage.objectViewer", "members": {"allUsers"}}]
    world.services.bucket.set_iam_policy(policy)
    assert publish(world.services, LOG) == 1
    found = world.record(version)
    assert found.status is FileStatus.FINISHED
    assert "storage.objects.create" in found.csv_error


def test_while_pachyderm_is_unavailable_the_first_file_waits_and_the_others_are_left_alone(world: World) -> None:
    versions = [world.finish("a.csv"), world.finish("b.csv")]
    away = replace(world.services, pachyderm=PachydermSettings(pachd_address="grpc://127.0.0.1:1"))
    assert publish(away, LOG) == 2
    assert sorted(bool(world.record(version).csv_error) for version in versions) == [False, True]
    world.its_time_has_come()
    assert publish(world.services, LOG) == 0


def test_without_postgres_the_caller_goes_on(world: World) -> None:
    assert publish(replace(world.services, postgres=PostgresSettings(host="127.0.0.1", port=1)), LOG) == 0


def test_a_newer_generation_replaces_an_older_one_and_never_the_other_way_round(world: World) -> None:
    older = world.finish("a.csv", b"older")
    newer = world.finish("a.csv", b"newer")
    assert publish(world.services, LOG) == 0
    assert world.answered("a.csv") == b"newer"
    owed = AnswersId("a.csv", older.generation, 9, "commit")
    assert write_answered(world.services.bucket, PREFIX, owed, partial(iter, [b"older"]), may_write=lambda: True)
    assert world.answered("a.csv") == b"newer"
    assert world.services.bucket.get_blob(PREFIX + "a.csv").metadata["qa-platform-generation"] == str(newer.generation)


def test_nothing_is_written_for_rows_that_left_with_a_generation_that_is_forgotten(world: World) -> None:
    world.finish("a.csv", b"older")
    newer = world.finish("a.csv", b"newer")
    world.ledger.forget("a.csv", [newer.generation])
    assert publish(world.services, LOG) == 0
    assert world.answered("a.csv") is None


def test_what_was_written_meanwhile_is_not_replaced(world: World) -> None:
    version = world.finish("a.csv", b"newer")

    def newer_is_written() -> bool:
        assert publish(world.services, LOG) == 0
        return True

    late = AnswersId("a.csv", version.generation, 0, "")
    with pytest.raises(TransientError, match="was replaced while it was written"):
        write_answered(world.services.bucket, PREFIX, late, partial(iter, [b"older"]), may_write=newer_is_written)
    assert world.answered("a.csv") == b"newer"


def test_answers_that_a_retry_asked_for_replace_the_earlier_ones(world: World) -> None:
    version = world.finish("a.csv", b"first")
    world.ledger.request_retries(["a.csv"])
    assert publish(world.services, LOG) == 0, "what is to be answered again is not owed"
    assert world.answered("a.csv") is None
    for content in (b"second", b"third"):
        archive_file(world.services, world.ledger, world.load(version, content), log=LOG)
        assert publish(world.services, LOG) == 0
        assert world.answered("a.csv") == content
        world.ledger.request_retries(["a.csv"])


def test_memory_does_not_grow_with_the_csv_and_one_that_breaks_off_replaces_nothing(world: World) -> None:
    piece, bucket = b"x" * 2**20, world.services.bucket

    def pieces(*, breaks: bool) -> Iterator[bytes]:
        for _ in range(100):
            yield piece
        if breaks:
            raise TransientError("gone")

    tracemalloc.start()
    try:
        assert write_answered(bucket, PREFIX, AnswersId("a.csv", 1, 1, ""), partial(pieces, breaks=False), may_write=lambda: True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 50 * 2**20
    with pytest.raises(TransientError, match="gone"):
        write_answered(bucket, PREFIX, AnswersId("a.csv", 2, 1, ""), partial(pieces, breaks=True), may_write=lambda: True)
    blob = bucket.get_blob(PREFIX + "a.csv")
    assert (blob.size, blob.metadata["qa-platform-generation"]) == (100 * 2**20, "1")
