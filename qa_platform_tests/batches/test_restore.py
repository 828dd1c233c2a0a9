"""A database restored from before files were loaded: the missing files are found, and one command brings them back, once."""

import io
import json
import logging
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from google.cloud import storage

from qa_platform.batches.archive import archive_file
from qa_platform.batches.missing import Comparison, compare_archive
from qa_platform.batches.pending import look, reconcile
from qa_platform.batches.restore import Restoration, RestoreState
from qa_platform.cli.doctor.archive import PART
from qa_platform.cli.doctor.findings import State
from qa_platform.cli.main import main
from qa_platform.clients.bucket import archived_name, upload
from qa_platform.clients.postgres import connect
from qa_platform.clients.services import Services
from qa_platform.contract import INCOMING, FileStatus, FileVersion, Rejection, RowReason
from qa_platform.embedded.postgres_access import bin_folder
from qa_platform.ledger import FileRecord, Ledger
from qa_platform.ledger.restoring import AnsweredVersion
from qa_platform.loading import migrate
from qa_platform.loading.load import load_file
from qa_platform.orchestration.catalog import QUESTION_ANSWER
from qa_platform.orchestration.partitions import PARTITIONS
from qa_platform.orchestration.reports.archive import archive_evaluation
from qa_platform.settings import IngestSettings, ModelSettings, PachydermSettings, PostgresSettings, WorkSettings
from qa_platform_tests.conftest import Database
from qa_platform_tests.flow import Flow, bridge, csv_of, flow
from qa_platform_tests.json_schemas import fits
from qa_platform_tests.ledger.helpers import NOT_UTF8
from qa_platform_tests.loading_helpers import BUNDLED, AnsweredRow, AnsweredUpload, answered_rows

__all__ = ["flow"]

_LOG = logging.getLogger(__name__)
OPERATING = Path(__file__).parents[2] / "docs" / "operating.md"
CONTENT = b"question,context\nWhere?,Here.\n"
# The last is too long to be a part of its copy's name.
NAMES = ("a.csv", "folder/b, c.csv", "../%0a\u2028$(id)'\".csv", "x" * 1005 + ".csv")


class World:
    """A bucket and a database, without pipelines: what a run does with a file is done by `answer`."""

    def __init__(self, services: Services, folder: Path) -> None:
        self.services = services
        self.ledger = Ledger(services.postgres)
        self._folder = folder

    def put(self, name: str) -> FileVersion:
        return upload(self.services.bucket, name, io.BytesIO(CONTENT))

    def load(self, version: FileVersion) -> None:
        load_id = self.ledger.known([version]).get((version.name, version.generation))
        answered = AnsweredUpload(
            answered_rows(3), name=version.name, generation=version.generation, load_id=load_id.load_id if load_id else 1
        )
        target = self._folder / f"{version.generation}-{answered.load_id}"
        with connect(self.services.postgres) as connection:
            load_file(connection, target if target.exists() else answered.write(target))

    def answer(self, *versions: FileVersion) -> None:
        for version in versions:
            self.load(version)
            archive_file(self.services, self.ledger, self.record(version), log=_LOG)

    def record(self, version: FileVersion) -> FileRecord:
        return self.ledger.records([version])[version.name, version.generation]

    def planned(self) -> list[FileVersion]:
        return [version for batch in look(self.services).plan.batches for version in batch.versions]

    def states(self, *names: str, dry_run: bool = False) -> dict[str, RestoreState]:
        return {each.name: each.state for each in Restoration(self.services, self.ledger, names, dry_run).restore()}

    def rows(self, name: str) -> list[tuple[int, int]]:
        query = "SELECT row_number, generation FROM question_answer WHERE source_file = %s ORDER BY row_number"
        with connect(self.services.postgres) as connection:
            return connection.execute(query, [name]).fetchall()


@pytest.fixture
def world(bucket: storage.Bucket, database: Database, clean_pachyderm: PachydermSettings, tmp_path: Path) -> Iterator[World]:
    settings = PostgresSettings(host=database.host, port=database.port, user=database.user, dbname=database.dbname)
    migrate.upgrade(settings)
    found = World(
        Services(bucket, clean_pachyderm, settings, ModelSettings().pinned, IngestSettings(), WorkSettings(lease_seconds=10)), tmp_path
    )
    with found.ledger:
        yield found


def documented(program: str, settings: PostgresSettings, folder: Path) -> None:
    """Run a program of PostgreSQL as the page says, on the platform's tables."""
    (line,) = {line.strip() for line in OPERATING.read_text().splitlines() if line.strip().startswith(program)}
    variables = {"PGHOST": settings.host, "PGPORT": str(settings.port), "PGUSER": settings.user, "PG_DBNAME": settings.dbname}
    password = {"PGPASSWORD": settings.password.get_secret_value()}
    environment = {**variables, **password, "PATH": f"{bin_folder()}{os.pathsep}{os.defpath}"}
    subprocess.run(["bash", "-euc", line], cwd=folder, env=environment, check=True)


def dump(settings: PostgresSettings, folder: Path) -> Path:
    documented("pg_dump", settings, folder)
    return folder


def restore_database(settings: PostgresSettings, folder: Path) -> None:
    documented("pg_restore", settings, folder)


def bring_back_the_bucket(bucket: storage.Bucket) -> None:
    """Put a copy in the place of every archived object, as when the bucket is copied back: the same names and metadata, new generations."""
    for blob in list(bucket.list_blobs(prefix="processed/")):
        bucket.copy_blob(blob, bucket, blob.name)


def command(*words: str) -> Result:
    return CliRunner().invoke(main, ["restore", *words])


def told(*words: str) -> dict[str, str]:
    lines = command(*words, "--json").stdout.splitlines()
    assert all(fits("restore", line) for line in lines)
    return {line["name"]: line["state"] for line in map(json.loads, lines)}


def load_all(flow: Flow) -> None:
    while results := flow.tick_and_run():
        assert [result.success for result in results] == [True] * len(results)


@pytest.mark.slow
def test_a_dump_from_before_the_uploads_is_made_good_by_one_command(flow: Flow, tmp_path: Path) -> None:
    """The procedure of docs/operating.md, with the bucket copied back."""
    old = dump(PostgresSettings(), tmp_path)
    for number, name in enumerate(NAMES):
        flow.upload(name, csv_of(bridge("Ulm", 1900 + number), ("", "no question")))
    load_all(flow)
    bring_back_the_bucket(flow.services.bucket)
    before = {name: flow.rows(name) for name in NAMES}
    assert [len(rows) for rows in before.values()] == [1] * len(NAMES)
    restore_database(PostgresSettings(), old)
    flow.instance.delete_dynamic_partition(PARTITIONS, "a.csv")
    assert flow.rows("a.csv") == []

    (finding,) = PART.examine()
    assert (finding.state, finding.fix) == (State.WRONG, "qa-platform restore")
    assert not archive_evaluation(flow.services).passed
    assert told(*NAMES, "--dry-run") == dict.fromkeys(NAMES, "missing")
    assert flow.tick() == [], "a dry run does nothing"

    assert told(*NAMES) == dict.fromkeys(NAMES, "requested")
    assert told(*NAMES) == dict.fromkeys(NAMES, "coming"), "nothing is done twice"
    load_all(flow)
    done = command(*NAMES)
    assert (done.exit_code, done.stdout) == (0, "")
    assert {name: flow.rows(name) for name in NAMES} == before
    assert PART.examine().__next__().state is State.OK
    assert archive_evaluation(flow.services).passed
    assert flow.tick() == []
    # Dagster knows of it as of any file.
    assert "a.csv" in flow.instance.get_dynamic_partitions(PARTITIONS)
    assert flow.materializations(QUESTION_ANSWER, "a.csv") == 2


@pytest.mark.slow
def test_what_the_bucket_has_no_copy_of_comes_back_from_pachyderm(flow: Flow, tmp_path: Path) -> None:
    old = dump(PostgresSettings(), tmp_path)
    version = flow.upload("deleted.csv", csv_of(bridge("Ulm", 1800)))
    load_all(flow)
    flow.services.bucket.blob(archived_name(version, rejected=False)).delete()
    restore_database(PostgresSettings(), old)
    (finding,) = PART.examine()
    assert finding.state is State.WRONG
    assert told("deleted.csv", "--dry-run") == {"deleted.csv": "missing"}
    result = command("deleted.csv")
    assert (result.exit_code, result.stdout.split()[0]) == (0, "loaded"), result.output
    assert [answer for _, answer in flow.rows("deleted.csv")] == ["1800"]
    assert told("deleted.csv") == {}
    assert flow.tick() == [], "it is not answered again, but recorded as archived"
    assert flow.record(version).status is FileStatus.FINISHED
    assert flow.materializations(QUESTION_ANSWER, "deleted.csv") == 1, "the same answers, of which Dagster knows"


@pytest.mark.slow
def test_of_several_answers_of_a_file_in_pachyderm_the_newest_come_back(flow: Flow, tmp_path: Path) -> None:
    old = dump(PostgresSettings(), tmp_path)
    for year in (1805, 1806):
        version = flow.upload("deleted-twice.csv", csv_of(bridge("Ulm", year)))
        load_all(flow)
        flow.services.bucket.blob(archived_name(version, rejected=False)).delete()
    restore_database(PostgresSettings(), old)
    result = command("deleted-twice.csv")
    assert (result.exit_code, result.stdout.split()[0]) == (0, "loaded"), result.output
    assert [answer for _, answer in flow.rows("deleted-twice.csv")] == ["1806"]
    assert told("deleted-twice.csv") == {}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_without_a_record_is_answered_again_under_its_own_name(world: World, tmp_path: Path, name: str) -> None:
    old = dump(world.services.postgres, tmp_path)
    version = world.put(name)
    world.answer(version)
    restore_database(world.services.postgres, old)
    assert world.states(dry_run=True) == {name: RestoreState.MISSING}
    assert world.planned() == []
    assert world.states(name) == {name: RestoreState.REQUESTED}
    assert world.states(name) == {name: RestoreState.COMING}
    assert world.planned() == [version]
    world.answer(version)
    assert world.states() == {}
    assert world.rows(name) == [(row, version.generation) for row in (1, 2, 3)]
    with world.services.bucket.blob(world.record(version).place).open("rb") as kept:
        assert kept.read() == CONTENT


@pytest.mark.parametrize("state", [FileStatus.PENDING, FileStatus.SUPERSEDED, FileStatus.FAILED])
def test_a_dump_from_while_a_file_was_waiting_is_made_good(world: World, tmp_path: Path, state: FileStatus) -> None:
    version = world.put("a.csv")
    world.ledger.claim([version], owner="run", lease_seconds=0)
    with connect(world.services.postgres) as connection:
        connection.execute("UPDATE question_file SET status = %s", [str(state)])
        old = dump(world.services.postgres, tmp_path)
        connection.execute("UPDATE question_file SET status = 'pending'")
    world.answer(version)
    restore_database(world.services.postgres, old)
    assert world.planned() == [], "no listing shows it"
    assert world.states() == {"a.csv": RestoreState.REQUESTED}
    assert world.planned() == [version]
    assert reconcile(world.services, _LOG) == 0
    world.answer(version)
    assert world.states() == {}
    assert [row for row, _ in world.rows("a.csv")] == [1, 2, 3]


def test_reconcile_finds_a_waiting_file_in_the_archive_by_itself(world: World, tmp_path: Path) -> None:
    version = world.put("a.csv")
    world.ledger.claim([version], owner="run", lease_seconds=0)
    old = dump(world.services.postgres, tmp_path)
    world.answer(version)
    restore_database(world.services.postgres, old)
    assert reconcile(world.services, _LOG) == 1
    assert world.planned() == [version]


def test_a_newer_upload_takes_the_place_of_what_is_missing(world: World, tmp_path: Path) -> None:
    old = dump(world.services.postgres, tmp_path)
    world.answer(world.put("a.csv"))
    restore_database(world.services.postgres, old)
    newer = world.put("a.csv")
    assert world.states() == {"a.csv": RestoreState.COMING}
    assert world.planned() == [newer]
    world.answer(newer)
    assert world.states() == {}


def test_of_several_generations_the_newest_comes_back(world: World, tmp_path: Path) -> None:
    old = dump(world.services.postgres, tmp_path)
    world.answer(world.put("a.csv"))
    newest = world.put("a.csv")
    world.answer(newest)
    restore_database(world.services.postgres, old)
    assert world.states() == {"a.csv": RestoreState.REQUESTED}
    assert world.planned() == [newest]


@pytest.mark.parametrize("archived", [True, False])
def test_a_newer_upload_without_answers_does_not_take_its_place(world: World, tmp_path: Path, archived: bool) -> None:
    old = dump(world.services.postgres, tmp_path)
    version = world.put("a.csv")
    world.answer(version)
    restore_database(world.services.postgres, old)
    newer = world.put("a.csv")
    world.ledger.reject_file(newer, NOT_UTF8)
    if archived:
        archive_file(world.services, world.ledger, world.record(newer), log=_LOG)
    assert world.states() == {"a.csv": RestoreState.REQUESTED}
    assert world.planned() == [version]


def test_what_a_run_works_on_is_left_to_it(world: World, tmp_path: Path) -> None:
    version = world.put("a.csv")
    world.ledger.claim([version], owner="run", lease_seconds=60)
    old = dump(world.services.postgres, tmp_path)
    world.answer(version)
    restore_database(world.services.postgres, old)
    assert world.states() == {"a.csv": RestoreState.COMING}
    assert world.record(version).place == INCOMING + "a.csv"


def test_a_file_whose_rows_alone_were_lost_is_answered_again(world: World) -> None:
    version = world.put("a.csv")
    world.answer(version)
    with connect(world.services.postgres) as connection:
        connection.execute("DELETE FROM question_answer")
    assert world.states() == {"a.csv": RestoreState.REQUESTED}
    assert world.record(version).load_id == 2, "Pachyderm would skip the load that it has done"
    world.answer(version)
    assert world.states() == {}


def test_a_file_of_which_every_row_was_rejected_is_not_missing(world: World, tmp_path: Path) -> None:
    version = world.put("a.csv")
    rejections = {1: Rejection(1, 2, RowReason.EMPTY_QUESTION)}
    rows = [AnsweredRow("", "nothing is asked", error=RowReason.EMPTY_QUESTION)]
    answered = AnsweredUpload(rows, name=version.name, generation=version.generation, rejections=rejections)
    with connect(world.services.postgres) as connection:
        load_file(connection, answered.write(tmp_path / "rejected"))
    archive_file(world.services, world.ledger, world.record(version), log=_LOG)
    assert world.states() == {}


def test_where_sources_are_deleted_the_check_compares_commits(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Comparison(missing={"a.csv": AnsweredVersion(FileVersion("a.csv", 1), "")})
    monkeypatch.setattr("qa_platform.orchestration.reports.archive.compare_commits", lambda *_, **__: found)
    assert archive_evaluation(world.services).passed
    deleting = replace(world.services, work=world.services.work.model_copy(update={"archive": "delete"}))
    assert not archive_evaluation(deleting).passed


def test_an_unchanged_upload_whose_rows_were_lost_is_answered_itself(world: World) -> None:
    first = world.put("a.csv")
    world.ledger.claim([first], owner="run", lease_seconds=0)
    world.answer(first)
    same = world.put("a.csv")
    assert world.ledger.mark_unchanged(same)
    archive_file(world.services, world.ledger, world.record(same), log=_LOG)
    with connect(world.services.postgres) as connection:
        connection.execute("DELETE FROM question_answer")
        connection.execute("UPDATE question_file SET archive_error = 'a hold'")
    assert world.states() == {"a.csv": RestoreState.REQUESTED}
    found = look(replace(world.services, model=BUNDLED)).plan
    assert (found.unchanged, [batch.versions for batch in found.batches]) == ((), [(same,)])
    assert world.record(same).archive_error == ""
    world.answer(same)
    assert world.states() == {}


def test_a_restored_upload_keeps_its_md5(world: World, tmp_path: Path) -> None:
    old = dump(world.services.postgres, tmp_path)
    version = world.put("a.csv")
    world.answer(version)
    restore_database(world.services.postgres, old)
    world.states()
    assert world.record(version).version.md5 == version.md5 != ""


def test_a_rejected_file_that_waits_in_an_older_dump_is_found_under_rejected(world: World, tmp_path: Path) -> None:
    version = world.put("a.csv")
    world.ledger.claim([version], owner="run", lease_seconds=0)
    old = dump(world.services.postgres, tmp_path)
    world.ledger.reject_file(version, NOT_UTF8)
    archive_file(world.services, world.ledger, world.record(version), log=_LOG)
    restore_database(world.services.postgres, old)
    assert reconcile(world.services, _LOG) == 1
    assert world.record(version).place == archived_name(version, rejected=True)
    assert world.planned() == [version]


def test_two_commands_at_once_request_a_file_once(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = dump(world.services.postgres, tmp_path)
    version = world.put("a.csv")
    world.answer(version)
    restore_database(world.services.postgres, old)
    compare = compare_archive

    def and_another(*arguments: object, **options: object) -> object:
        found = compare(*arguments, **options)  # type: ignore[arg-type]
        monkeypatch.undo()
        assert world.states() == {"a.csv": RestoreState.REQUESTED}
        world.answer(version)
        return found

    monkeypatch.setattr("qa_platform.batches.restore.compare_archive", and_another)
    assert world.states() == {"a.csv": RestoreState.COMING}
    assert world.record(version).status is FileStatus.FINISHED


def test_what_nobody_has_is_lost(world: World) -> None:
    assert {each.detail for each in Restoration(world.services, world.ledger, ("nowhere.csv",)).restore()} == {
        "no file of that name is known"
    }
    assert world.states("nowhere.csv", "\x1b[2J.csv") == {"nowhere.csv": RestoreState.LOST, "\x1b[2J.csv": RestoreState.LOST}


def test_objects_that_are_not_archived_files_are_left_alone(world: World) -> None:
    names = ("", "a.csv", "a.csv/0.csv", "a.csv/01.csv", f"a.csv/{2**63}.csv", "a.txt/5.csv", "a.csv/5.txt", "/5.csv")
    for name in names:
        world.services.bucket.blob(f"processed/{name}").upload_from_string(CONTENT)
    found = compare_archive(world.services.bucket, world.ledger, world.services.work.suffixes)
    assert (found.compared, found.unnamed, found.missing) == (0, len(names), {})


def test_metadata_of_an_upload_does_not_rename_it(world: World, tmp_path: Path) -> None:
    old = dump(world.services.postgres, tmp_path)
    blob = world.services.bucket.blob(INCOMING + "a.csv")
    blob.metadata = {"qa-platform-name": "another.csv"}
    blob.upload_from_string(CONTENT)
    version = FileVersion("a.csv", int(blob.generation), int(blob.size), blob.crc32c)
    world.answer(version)
    restore_database(world.services.postgres, old)
    assert world.states() == {"a.csv": RestoreState.REQUESTED}


def test_a_comparison_that_is_bounded_says_so(world: World) -> None:
    for number in range(3):
        world.services.bucket.blob(f"processed/{number}.csv/5.csv").upload_from_string(CONTENT)
    suffixes = world.services.work.suffixes
    assert compare_archive(world.services.bucket, world.ledger, suffixes, limit=3).is_whole
    found = compare_archive(world.services.bucket, world.ledger, suffixes, limit=2)
    assert (len(found.missing), found.is_whole) == (2, False)


def test_what_is_compared_by_pages_is_compared_to_its_end(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qa_platform.batches.missing._PAGE", 2)
    for number in range(5):
        world.services.bucket.blob(f"processed/{number}.csv/5.csv").upload_from_string(CONTENT)
    assert len(compare_archive(world.services.bucket, world.ledger, world.services.work.suffixes).missing) == 5
    monkeypatch.setattr("qa_platform.batches.missing.MOST_MISSING", 4)
    # In the order of their names, before and after the other generation.
    for name in ("0.csv/10.csv", "3.csv/6.csv"):
        world.services.bucket.blob(f"processed/{name}").upload_from_string(CONTENT)
    found = compare_archive(world.services.bucket, world.ledger, world.services.work.suffixes)
    assert (len(found.missing), found.is_whole) == (4, False)
    assert [found.missing[name].version.generation for name in ("0.csv", "3.csv")] == [10, 6]


def test_a_pachd_that_is_away_does_not_keep_the_bucket_from_being_restored(world: World, tmp_path: Path) -> None:
    old = dump(world.services.postgres, tmp_path)
    version = world.put("a.csv")
    world.answer(version)
    restore_database(world.services.postgres, old)
    away = replace(world.services, pachyderm=PachydermSettings(pachd_address="grpc://127.0.0.1:1"))
    restoring = Restoration(away, world.ledger).restore()
    assert next(restoring).state is RestoreState.REQUESTED
    assert world.planned() == [version]


@pytest.mark.slow
def test_a_file_that_was_loaded_beside_one_that_failed_comes_back_from_pachyderm(flow: Flow, tmp_path: Path) -> None:
    old = dump(PostgresSettings(), tmp_path)
    with connect(PostgresSettings()) as connection:
        connection.execute("CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE ''refused''; END'")
        connection.execute(
            "CREATE TRIGGER refuse BEFORE INSERT ON question_answer FOR EACH ROW "
            "WHEN (NEW.source_file = 'refused.csv') EXECUTE FUNCTION refuse()"
        )
    good = flow.upload("beside-refused.csv", csv_of(bridge("Ulm", 1801)))
    flow.upload("refused.csv", csv_of(bridge("Bonn", 1802)))
    assert len(flow.tick_and_run()) == 1
    assert [answer for _, answer in flow.rows("beside-refused.csv")] == ["1801"]
    flow.services.bucket.blob(archived_name(good, rejected=False)).delete()
    restore_database(PostgresSettings(), old)
    try:
        result = command("beside-refused.csv")
        assert (result.exit_code, result.stdout.split()[0]) == (0, "loaded"), result.output
    finally:
        flow.services.bucket.blob("incoming/refused.csv").delete()
