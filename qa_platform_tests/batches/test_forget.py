"""Forgotten files: no trace of them is left, nothing brings them back, and other files stay."""

import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from google.cloud import storage
from pachyderm_sdk.api import pfs

from qa_platform.batches import commits
from qa_platform.batches.archive import archive_file
from qa_platform.batches.file_commits import find_file_commits
from qa_platform.batches.forget import Forgetting, Trace, TraceState
from qa_platform.batches.pending import look, reconcile
from qa_platform.batches.restore import Restoration
from qa_platform.batches.retry import request_retries
from qa_platform.clients.answered_csvs import write_answered
from qa_platform.clients.bucket import upload
from qa_platform.clients.pachyderm import session
from qa_platform.clients.postgres import connect
from qa_platform.clients.services import Services
from qa_platform.contract import INCOMING, MANIFEST, QUESTIONS_REPO, FileStatus, FileVersion, Manifest, file_id, partition_key
from qa_platform.errors import InputError
from qa_platform.ingest import Write
from qa_platform.ledger import FileRecord, Ledger
from qa_platform.loading.load import load_file
from qa_platform.orchestration.catalog import MODEL_QUALITY, QUESTION_ANSWER
from qa_platform.orchestration.forget import DagsterHistory
from qa_platform.orchestration.partitions import PARTITIONS
from qa_platform.results.published import publish
from qa_platform.settings import IngestSettings, ModelSettings, PachydermSettings, PostgresSettings, WorkSettings
from qa_platform_tests.ledger.helpers import NOT_UTF8
from qa_platform_tests.loading_helpers import BUNDLED, AnsweredUpload, answered_rows

_LOG = logging.getLogger(__name__)
CONTENT = b"question,context\nWhere?,Here.\n"
# The second is too long to be a part of its copy's name, and the third's copy has another ending.
NAMES = ("folder, b/../%0a\u2028$(id)'\"*[?].csv", "x" * 1005 + ".csv", "packed.csv.gz")


@dataclass
class World:
    """A bucket, a database, a pachd without pipelines, and a Dagster: what a run does with a file is done by `answer`."""

    services: Services
    ledger: Ledger
    instance: dg.DagsterInstance
    folder: Path

    def put(self, name: str) -> FileVersion:
        return upload(self.services.bucket, name, io.BytesIO(CONTENT))

    def load(self, version: FileVersion) -> FileStatus:
        load_id = self.ledger.known([version])[version.name, version.generation].load_id
        answered = AnsweredUpload(answered_rows(3), name=version.name, generation=version.generation, load_id=load_id)
        target = self.folder / f"{version.generation}-{load_id}"
        with connect(self.services.postgres) as connection:
            return load_file(connection, target if target.exists() else answered.write(target)).status

    def commit(self, *versions: FileVersion) -> str:
        with session(self.services.pachyderm, "committing") as client, commits.FileSets(client) as file_sets:
            for version in versions:
                manifest = Manifest(version.name, version.generation, version.size, version.crc32c, 1, BUNDLED, (), 3, 0)

                def fill(write: Write, manifest: Manifest = manifest) -> None:
                    write(f"part-00000/{MANIFEST}", [manifest.to_json().encode()])

                file_sets.make(file_id(version.name), fill)
            commit = commits.commit_batch(client, f"batch {versions[0].generation}", file_sets.ids)
        assert commit
        return commit

    def answer(self, *versions: FileVersion) -> None:
        self.ledger.claim(versions, owner="run", lease_seconds=60)
        self.commit(*versions)
        for version in versions:
            self.load(version)
            archive_file(self.services, self.ledger, self.record(version), log=_LOG)
            key = partition_key(version.name)
            self.instance.add_dynamic_partitions(PARTITIONS, [key])
            tags = {"dagster/data_version": f"{version.generation}-1"}
            self.instance.report_runless_asset_event(dg.AssetMaterialization(QUESTION_ANSWER, partition=key, tags=tags))
        self.ledger.release("run")

    def record(self, version: FileVersion) -> FileRecord:
        return self.ledger.records([version])[version.name, version.generation]

    def forgetting(self, name: str, generation: int | None = None) -> Forgetting:
        return Forgetting(self.services, self.ledger, DagsterHistory(self.instance, "gold/"), name, generation)

    def forget(self, name: str, generation: int | None = None) -> list[Trace]:
        return list(self.forgetting(name, generation).forget())

    def planned(self) -> list[FileVersion]:
        return [version for batch in look(self.services).plan.batches for version in batch.versions]

    def objects(self) -> list[str]:
        return [blob.name for blob in self.services.bucket.list_blobs(versions=True)]

    def rows(self, name: str) -> int:
        return sum(self.ledger.holdings(name).answers.values())

    def materialized(self, name: str) -> bool:
        wanted = dg.AssetRecordsFilter(asset_key=QUESTION_ANSWER, asset_partitions=[partition_key(name)])
        return bool(self.instance.fetch_materializations(wanted, limit=1).records)


@pytest.fixture
def world(bucket: storage.Bucket, postgres: PostgresSettings, clean_pachyderm: PachydermSettings, tmp_path: Path) -> Iterator[World]:
    with session(clean_pachyderm, "preparing") as client:
        client.pfs.create_repo(repo=pfs.Repo.from_uri(QUESTIONS_REPO))
        client.pfs.create_branch(branch=pfs.Branch.from_uri(f"{QUESTIONS_REPO}@master"))
    services = Services(bucket, clean_pachyderm, postgres, ModelSettings().pinned, IngestSettings(), WorkSettings())
    with Ledger(postgres) as ledger, dg.DagsterInstance.ephemeral() as instance:
        yield World(services, ledger, instance, tmp_path)


def test_the_answered_csv_of_a_forgotten_file_is_removed_also_if_it_is_written_just_then(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.services = replace(world.services, work=WorkSettings(answered_prefix="answered/"))
    version, other = world.put("a.csv"), world.put("a.csv.csv")
    world.answer(version, other)
    assert publish(world.services, _LOG) == 0
    assert {"answered/a.csv", "answered/a.csv.csv"} <= set(world.objects())
    assert {trace.state for trace in world.forget("a.csv")} == {TraceState.REMOVED}
    assert "answered/a.csv" not in world.objects()

    def forget_first(*arguments: object, **options: Any) -> bool:
        world.forget("a.csv.csv")
        return write_answered(*arguments, **{**options, "may_write": lambda: True})  # type: ignore[arg-type]

    request_retries(world.services.bucket, world.ledger, ["a.csv.csv"])
    world.answer(other)
    monkeypatch.setattr("qa_platform.results.published.write_answered", forget_first)
    assert publish(world.services, _LOG) == 0
    assert [place for place in world.objects() if place.startswith("answered/")] == []


def test_a_name_that_nothing_is_known_of_is_refused(world: World) -> None:
    world.answer(world.put("a.csv"))
    for find in (world.forgetting("b.csv").find, lambda: world.forget("b.csv")):
        with pytest.raises(InputError, match="nothing is known of such a file"):
            find()
    world.forget("a.csv")
    assert world.forgetting("a.csv").find() == [], "what was forgotten is known"


def states(traces: list[Trace]) -> set[tuple[str, TraceState]]:
    return {(trace.service, trace.state) for trace in traces}


def all_are(state: TraceState) -> set[tuple[str, TraceState]]:
    return {(service, state) for service in ("PostgreSQL", "bucket", "Pachyderm", "Dagster")}


def is_refused(world: World, version: FileVersion) -> bool:
    """Whether nothing answers, loads, retries or restores a version."""
    with pytest.raises(InputError, match="was forgotten; upload it again"):
        request_retries(world.services.bucket, world.ledger, [version.name])
    restored = list(Restoration(world.services, world.ledger, [version.name]).restore())
    reconcile(world.services, _LOG)
    return (world.load(version), restored, world.planned(), world.rows(version.name)) == (FileStatus.SUPERSEDED, [], [], 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_forgotten_file_is_nowhere_and_nothing_brings_it_back(world: World, name: str) -> None:
    version, other = world.put(name), world.put("other.csv")
    world.answer(version, other)
    assert states(world.forgetting(name).find()) == all_are(TraceState.FOUND)
    assert world.rows(name) == 3, "a dry run changes nothing"

    assert states(world.forget(name)) == all_are(TraceState.REMOVED)
    assert [place for place in world.objects() if not place.startswith("processed/other.csv/")] == []
    assert (world.record(version).status, world.record(version).version) == (FileStatus.FORGOTTEN, FileVersion(name, version.generation))
    assert is_refused(world, version)
    assert world.forget(name) == [], "nothing is done twice"

    assert (world.rows("other.csv"), world.record(other).status) == (3, FileStatus.FINISHED)
    assert (world.materialized(name), world.materialized("other.csv")) == (False, True)
    assert world.instance.get_dynamic_partitions(PARTITIONS) == ["other.csv"]

    again = world.put(name)
    assert world.planned() == [again]
    world.answer(again)
    assert (world.rows(name), world.record(again).status) == (3, FileStatus.FINISHED)


STEPS = (
    "qa_platform.ledger.Ledger.forget",
    "qa_platform.batches.forget.delete_file_object",
    "qa_platform.batches.forget.remove_commits",
    "qa_platform.batches.file_commits._remove",
    "qa_platform.orchestration.forget.DagsterHistory.remove",
)


@pytest.mark.parametrize("step", STEPS)
def test_a_command_that_is_killed_at_a_step_is_finished_by_the_next_one(world: World, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    version, other = world.put("a.csv"), world.put("other.csv")
    world.answer(version, other)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(step, killed)
        with pytest.raises(KeyboardInterrupt):
            world.forget("a.csv")
    assert world.planned() == []
    assert step == STEPS[0] or is_refused(world, version)
    assert {state for _, state in states(world.forget("a.csv"))} == {TraceState.REMOVED}
    assert world.forget("a.csv") == []
    assert is_refused(world, version)
    assert world.rows("other.csv") == 3


def test_one_generation_is_forgotten_and_the_others_stay(world: World) -> None:
    kept = world.put("a.csv")
    world.answer(kept)
    wrong = world.put("a.csv")
    world.answer(wrong)
    with pytest.raises(InputError, match="nothing is known of generation 5"):
        world.forget("a.csv", 5)
    assert states(world.forget("a.csv", wrong.generation)) == all_are(TraceState.REMOVED)
    assert world.objects() == [f"processed/a.csv/{kept.generation}.csv"]
    assert (world.record(kept).status, world.record(wrong).status) == (FileStatus.FINISHED, FileStatus.FORGOTTEN)
    with session(world.services.pachyderm, "looking") as client:
        assert [commit.generations for commit in find_file_commits(client, "a.csv")] == [{kept.generation}]
    assert world.materialized("a.csv")
    # What the table had before may come back, and is answered instead of the forgotten one.
    assert [record.version for record in request_retries(world.services.bucket, world.ledger, ["a.csv"])] == [kept]


def test_a_file_that_a_run_works_on_is_refused_and_untouched(world: World) -> None:
    version = world.put("a.csv")
    world.ledger.claim([version], owner="run", lease_seconds=60)
    with pytest.raises(InputError, match="run run is working on it"):
        world.forget("a.csv")
    assert world.objects() == [INCOMING + "a.csv"]
    world.ledger.release("run")
    world.forget("a.csv")
    assert (world.objects(), world.planned()) == ([], [])


def test_a_commit_in_which_another_file_is_being_answered_is_left_and_said_to_be(world: World) -> None:
    version, other = world.put("a.csv"), world.put("other.csv")
    world.ledger.claim([other], owner="run", lease_seconds=60)
    commit = world.commit(version, other)
    world.ledger.record_commit("run", [other], commit=commit, job=commit)
    (left,) = [trace for trace in world.forget("a.csv") if trace.state is TraceState.LEFT]
    assert (left.what, left.detail) == (f"commit {commit}", "its other files are being answered; repeat the command later")
    world.load(other)
    world.ledger.release("run")
    assert states(world.forget("a.csv")) == {("Pachyderm", TraceState.REMOVED)}


def test_what_the_bucket_refuses_or_keeps_is_said(world: World) -> None:
    version = world.put("a.csv")
    world.ledger.reject_file(version, NOT_UTF8)
    archive_file(world.services, world.ledger, world.record(version), log=_LOG)
    held = world.services.bucket.blob(f"rejected/a.csv/{version.generation}.report.csv")
    held.temporary_hold = True
    held.patch()
    world.services.bucket.soft_delete_policy.retention_duration_seconds = 7 * 86_400
    world.services.bucket.patch()
    found = [trace for trace in world.forget("a.csv") if trace.service == "bucket"]
    assert [trace.state for trace in found] == [TraceState.KEPT, TraceState.LEFT]
    assert "soft-deleted; the bucket keeps it until 2" in found[0].detail
    assert "Temporary hold" in found[1].detail


def test_versions_that_are_not_live_are_deleted_too(world: World) -> None:
    world.services.bucket.versioning_enabled = True
    world.services.bucket.patch()
    world.put("a.csv")
    world.answer(world.put("a.csv"))
    assert len(world.objects()) == 3
    world.forget("a.csv")
    assert world.objects() == []


def test_names_that_contain_the_name_are_other_files(world: World) -> None:
    others = ("a.csv/5.csv", "b/a.csv", "a.csv.csv", "A.csv")
    world.answer(*(world.put(name) for name in others))
    before = world.objects()
    with pytest.raises(InputError, match="nothing is known"):
        world.forget("a.csv")
    world.answer(world.put("a.csv"))
    world.forget("a.csv")
    assert world.objects() == before
    assert [world.rows(name) for name in others] == [3] * 4


@pytest.mark.parametrize("rejected", [False, True])
def test_a_file_that_is_forgotten_while_it_is_archived_leaves_no_copy(
    world: World, monkeypatch: pytest.MonkeyPatch, rejected: bool
) -> None:
    version = world.put("a.csv")
    world.ledger.claim([version], owner="run", lease_seconds=0)
    if rejected:
        world.ledger.reject_file(version, NOT_UTF8)
    else:
        world.load(version)
    record = world.record(version)
    begin = Ledger.begin_archiving

    def forgotten_before(ledger: Ledger, version: FileVersion, *, source: str, place: str) -> bool:
        world.ledger.forget(version.name, [version.generation])
        return begin(ledger, version, source=source, place=place)

    monkeypatch.setattr(Ledger, "begin_archiving", forgotten_before)
    archive_file(world.services, world.ledger, record, log=_LOG)
    assert world.objects() == []


def test_a_gold_set_takes_the_measurements_that_quote_it_with_it(world: World) -> None:
    world.answer(world.put("a.csv"), world.put("gold/a.csv"))
    world.instance.report_runless_asset_event(dg.AssetMaterialization(MODEL_QUALITY, metadata={"worst mistakes": "Where?"}))
    world.forget("a.csv")
    assert world.instance.get_latest_materialization_event(MODEL_QUALITY)
    world.forget("gold/a.csv")
    assert world.instance.get_latest_materialization_event(MODEL_QUALITY) is None
    assert world.instance.fetch_materializations(MODEL_QUALITY, limit=1).records == []
