"""Failures that are no file's fault, changes during a run, and what is left when old commits are removed."""

import csv
import io
import logging
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime, timedelta

import dagster as dg
import pytest
from click.testing import CliRunner
from pachyderm_sdk.api import pfs, pps

from qa_platform.batches.jobs import Watcher, follow_jobs
from qa_platform.batches.missing import Comparison
from qa_platform.batches.pending import look
from qa_platform.batches.plan import Batch, batch_id
from qa_platform.batches.reload import reload_files
from qa_platform.batches.restore import Restoration, RestoreState
from qa_platform.batches.run import answer_batch
from qa_platform.batches.squash import Squashed, squash_old
from qa_platform.cli.main import main
from qa_platform.clients import pachyderm as pachd
from qa_platform.clients.postgres import connect
from qa_platform.contract import ANSWER_COLUMNS, INCOMING, FileStatus, FileVersion, file_id, partition_key
from qa_platform.embedded.stack import Stack
from qa_platform.errors import InputError
from qa_platform.ledger import FileRecord, Ledger
from qa_platform.ledger.restoring import AnsweredVersion
from qa_platform.orchestration.sensors.heartbeat import summary
from qa_platform.provisioning.secrets import DATABASE_SECRET, database_secret
from qa_platform.results.rebuilt_csv import rebuilt_csv
from qa_platform.settings import PachydermSettings, PostgresSettings
from qa_platform_tests.conftest import new_database
from qa_platform_tests.flow import Flow, bridge, csv_of, flow, wait_until

__all__ = ["flow"]

pytestmark = pytest.mark.slow

_LOG = logging.getLogger("surviving")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QA_RETRY_FIRST_SECONDS", "1")


def answer(flow: Flow, *versions: FileVersion, run: str, **options: object) -> tuple[FileRecord, ...]:
    batch = Batch(batch_id([(version, 1) for version in versions]), versions)
    return answer_batch(flow.services, batch, token=run, run_id=run, log=_LOG, **options).records  # type: ignore[arg-type]


def message_of(result: dg.ExecuteInProcessResult) -> str:
    """What Dagster shows of a failed step."""
    return str(result.get_step_failure_events()[0].step_failure_data.error_display_string)


def statuses(flow: Flow, versions: Sequence[FileVersion]) -> list[tuple[FileStatus, int]]:
    return [(record.status, record.attempts) for record in map(flow.record, versions)]


@pytest.mark.faults
def test_a_model_that_cannot_be_loaded_charges_no_file_and_is_named_where_people_look(flow: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QA_RETRY_FIRST_SECONDS", "4")
    versions = [flow.upload(f"no-model/{number}.csv", csv_of(bridge("Genf"))) for number in range(2)]
    monkeypatch.setenv("QA_MODEL", "/no/such/model")
    (result,) = flow.tick_and_run()
    assert not result.success
    first_line = message_of(result).splitlines()[0]
    assert "/no/such/model" in first_line
    assert "QA_MODEL" in first_line
    assert statuses(flow, versions) == [(FileStatus.PENDING, 0)] * 2
    assert "/no/such/model" in flow.record(versions[0]).error
    found = look(flow.services)
    assert (found.plan.batches, found.plan.waiting) == ((), 2)
    assert found.deferred is not None
    assert "/no/such/model" in found.deferred.why
    monkeypatch.delenv("QA_MODEL")
    (request,) = wait_until(flow.tick, "what was put off is due, all of it together")
    assert flow.run(request).success
    assert statuses(flow, versions) == [(FileStatus.FINISHED, 0)] * 2


@contextmanager
def loader_with_database(name: str) -> Iterator[None]:
    """The loader's secret names another database."""
    with pachd.session(PachydermSettings(), "testing") as client:
        right = database_secret(PostgresSettings())
        client.pps.delete_secret(secret=pps.Secret(name=DATABASE_SECRET))
        client.pps.create_secret(name=DATABASE_SECRET, data={**right, "dbname": name})
        try:
            yield
        finally:
            client.pps.delete_secret(secret=pps.Secret(name=DATABASE_SECRET))
            client.pps.create_secret(name=DATABASE_SECRET, data=dict(right))


@pytest.mark.faults
@pytest.mark.parametrize("encoding", [None, "LATIN1"])
def test_a_loader_whose_database_is_missing_or_not_utf8_charges_no_file_and_says_so_everywhere(
    flow: Flow, monkeypatch: pytest.MonkeyPatch, encoding: str | None
) -> None:
    monkeypatch.setenv("QA_RETRY_FIRST_SECONDS", "4")
    version = flow.upload(f"no-database-{encoding}.csv", csv_of(bridge("Genf")))
    other = nullcontext() if encoding is None else new_database(PostgresSettings().host, encoding=encoding)
    with other as database, loader_with_database(database.dbname if database else "no_such_database"):
        (result,) = flow.tick_and_run()
    said = f"encoded in {encoding}" if encoding else "no_such_database"
    assert not result.success
    assert said in message_of(result)
    record = flow.record(version)
    assert (record.status, record.attempts, record.due) == (FileStatus.PENDING, 0, False)
    assert said in record.error
    assert said in summary(look(flow.services))
    assert said in CliRunner().invoke(main, ["status", version.name]).output
    (request,) = wait_until(flow.tick, "it is due")
    assert flow.run(request).success
    assert len(flow.rows(version.name)) == 1


@pytest.mark.faults
def test_a_file_whose_jobs_are_done_and_that_is_not_in_the_table_is_launched_again(flow: Flow) -> None:
    version = flow.upload("lost.csv", csv_of(bridge("Hof")))
    answer(flow, version, run="first")
    commit = flow.record(version).pachyderm_commit
    with connect(PostgresSettings()) as connection:
        # As after a restore of the database from before the load; the source lies where it lay.
        connection.execute("DELETE FROM question_answer WHERE source_file = %s", [version.name])
        connection.execute("UPDATE question_file SET status = 'pending', loaded_at = NULL WHERE source_file = %s", [version.name])
    launched: list[tuple[str, bool]] = []

    def follow(*, commit_id: str, adopted: bool, **_: object) -> None:
        launched.append((commit_id, adopted))
        follow_jobs(flow.services.pachyderm, commit_id, watcher=Watcher(_LOG))

    (record,) = answer(flow, version, run="second", follow=follow)
    assert [adopted for _, adopted in launched] == [True, False]
    assert launched[0][0] == commit != launched[1][0] == record.pachyderm_commit
    assert (record.status, record.attempts) == (FileStatus.FINISHED, 0)
    assert len(flow.rows(version.name)) == 1


@pytest.mark.faults
def test_jobs_that_load_nothing_here_fail_the_run_and_charge_no_file(flow: Flow) -> None:
    version = flow.upload("elsewhere.csv", csv_of(bridge("Hof")))

    def follow(*, commit_id: str, **_: object) -> None:
        follow_jobs(flow.services.pachyderm, commit_id, watcher=Watcher(_LOG))
        with connect(PostgresSettings()) as connection:
            connection.execute("DELETE FROM question_answer WHERE source_file = %s", [version.name])
            connection.execute("UPDATE question_file SET status = 'running' WHERE source_file = %s", [version.name])

    batch = Batch(batch_id([(version, 1)]), (version,))
    outcome = answer_batch(flow.services, batch, token="r", run_id="r", log=_LOG, follow=follow)
    assert outcome.failure is not None
    assert "dbaccess" in outcome.failure.cause
    assert [(record.status, record.attempts, record.due) for record in outcome.records] == [(FileStatus.PENDING, 0, False)]
    assert [r.status for r in answer(flow, version, run="later")] == [FileStatus.FINISHED]


def test_a_file_that_turns_out_to_be_damaged_after_its_first_shards_leaves_none_of_them(flow: Flow) -> None:
    rows = [("q", "c")] * (2 * flow.services.ingest.shard_rows + 1)
    damaged = flow.upload("damaged-late.csv", csv_of(*rows) + b'q,"c\n')
    good = flow.upload("beside-it.csv", csv_of(bridge("Ulm")))
    found = {record.version: record for record in answer(flow, damaged, good, run="r")}
    assert (found[damaged].status, found[good].status) == (FileStatus.REJECTED, FileStatus.FINISHED)
    assert found[damaged].error.startswith(f"unbalanced_quote at line {len(rows) + 2}: ")
    with pachd.session(PachydermSettings(), "testing") as client:
        files = client.pfs.list_file(file=pfs.File.from_uri(f"questions@{found[good].pachyderm_commit}:/"))
        assert [info.file.path.strip("/") for info in files] == [file_id(good.name)]


def test_a_file_that_is_overwritten_before_it_is_read_is_superseded_and_its_successor_answered(flow: Flow) -> None:
    old = flow.upload("early.csv", csv_of(bridge("Ulm")))
    (request,) = flow.tick()
    new = flow.upload("early.csv", csv_of(bridge("Ulm", 1900)))
    assert flow.run(request).success
    assert flow.record(old).status is FileStatus.SUPERSEDED
    assert [r.success for r in flow.tick_and_run()] == [True]
    assert flow.record(new).status is FileStatus.FINISHED
    assert [row for _, row in flow.rows("early.csv")] == ["1900"]


def test_a_file_that_is_overwritten_while_it_is_answered_is_neither_deleted_nor_lost(flow: Flow) -> None:
    old = flow.upload("late.csv", csv_of(bridge("Ulm")))
    later: list[FileVersion] = []

    def overwrite(records: Sequence[FileRecord]) -> None:
        # Called when it is in the table, and not archived yet.
        later.append(flow.upload("late.csv", csv_of(bridge("Ulm", 1900), bridge("Ulm", 1901))))

    (record,) = answer(flow, old, run="r", report=overwrite)
    assert (record.status, record.place) == (FileStatus.FINISHED, "")
    assert flow.objects("incoming/late.csv") == [f"{INCOMING}late.csv"]
    assert [r.success for r in flow.tick_and_run()] == [True]
    assert flow.record(later[0]).status is FileStatus.FINISHED
    assert [row for _, row in flow.rows("late.csv")] == ["1900", "1901"]
    assert flow.objects("incoming/late.csv") == []


def test_a_file_that_is_deleted_while_it_is_answered_stays_in_the_table(flow: Flow) -> None:
    version = flow.upload("deleted.csv", csv_of(bridge("Ulm")))
    place = f"{INCOMING}deleted.csv"
    (record,) = answer(flow, version, run="r", report=lambda records: flow.services.bucket.blob(place).delete())
    assert (record.status, record.place) == (FileStatus.FINISHED, "")
    assert len(flow.rows("deleted.csv")) == 1
    assert flow.tick() == []
    with Ledger(PostgresSettings()) as ledger, pytest.raises(InputError, match="is gone"):
        ledger.request_retries(["deleted.csv"])


def test_what_another_run_works_on_is_not_loaded_by_hand(flow: Flow) -> None:
    versions = [flow.upload(f"by-hand/{town}.csv", csv_of(bridge(town))) for town in ("Ulm", "Hof")]
    flow.tick_and_run()
    keys = [partition_key(version.name) for version in versions]
    with Ledger(PostgresSettings()) as ledger:
        ledger.take_over(versions[:1], token="", owner="another", lease_seconds=60)
        records: list[FileRecord] = []
        reload_files(flow.services, keys, run_id="mine", log=_LOG, report=records.extend)
        assert [record.version for record in records] == versions[1:]
        assert ledger.claimed() == {versions[0].name: "another"}
        ledger.release("another")


def test_files_without_answers_do_not_keep_others_from_being_loaded_again(flow: Flow) -> None:
    contents = {"good": csv_of(bridge("Ulm")), "photo": b"\x89PNG\r\n\x1a\n", "gone": csv_of(bridge("Hof"))}
    versions = {name: flow.upload(f"reload/{name}.csv", content) for name, content in contents.items()}
    flow.tick_and_run()
    with connect(PostgresSettings()) as connection:
        connection.execute(
            "UPDATE question_file SET pachyderm_commit = %s WHERE source_file = 'reload/gone.csv'", [f"{'0' * 12}4{'0' * 19}"]
        )
        connection.execute("DELETE FROM question_answer WHERE source_file = 'reload/good.csv'")
    keys = [partition_key(f"reload/{name}.csv") for name in ("photo", "gone", "good", "never")]
    records: list[FileRecord] = []
    with pytest.raises(InputError, match="no longer has commit") as caught:
        reload_files(flow.services, keys, run_id="r", log=_LOG, report=records.extend)
    assert caught.value.where == "reload/gone.csv"
    assert len(flow.rows("reload/good.csv")) == 1
    assert {record.version.name: record.status for record in records} == {
        "reload/good.csv": FileStatus.FINISHED,
        "reload/photo.csv": FileStatus.REJECTED,
    }
    with pytest.raises(InputError, match="it was rejected: not_utf8") as caught:
        reload_files(flow.services, [keys[0], keys[3]], run_id="r", log=_LOG)
    assert caught.value.where == f"partition {keys[0]!r}"
    assert flow.record(versions["gone"]).claim_owner == ""


@pytest.mark.parametrize("newest", ["unchanged", "rejected"])
def test_the_answers_in_the_table_are_loaded_again_also_if_the_newest_upload_has_none(flow: Flow, newest: str) -> None:
    name, content = f"reload/{newest}.csv", csv_of(bridge("Ulm"), bridge("Graz"))
    first = flow.upload(name, content)
    flow.tick_and_run()
    second = flow.upload(name, content if newest == "unchanged" else b"\x89PNG\r\n\x1a\n")
    flow.tick_and_run()
    assert flow.record(second).status == newest
    with connect(PostgresSettings()) as connection:
        connection.execute("DELETE FROM question_answer WHERE source_file = %s AND row_number = 1", [name])
    records: list[FileRecord] = []
    reload_files(flow.services, [partition_key(name)], run_id="r", log=_LOG, report=records.extend)
    assert [record.version for record in records] == [first]
    assert len(flow.rows(name)) == 2


@pytest.mark.parametrize("again", [False, True])
def test_deleted_rows_of_a_file_that_stays_under_incoming_are_restored(flow: Flow, monkeypatch: pytest.MonkeyPatch, again: bool) -> None:
    monkeypatch.setenv("QA_ARCHIVE", "keep")
    name, content = f"restore/{again}.csv", csv_of(bridge("Ulm"), bridge("Graz"))
    version = flow.upload(name, content)
    (request,) = flow.tick()
    flow.run(request)
    assert (flow.record(version).status, flow.objects(INCOMING + name)) == (FileStatus.FINISHED, [INCOMING + name])
    if again:
        newest = flow.upload(name, content)
        assert flow.tick() == []
        assert flow.record(newest).status is FileStatus.UNCHANGED
    with connect(PostgresSettings()) as connection:
        connection.execute("DELETE FROM question_answer WHERE source_file = %s", [name])
    with Ledger(PostgresSettings()) as ledger:
        (restored,) = Restoration(flow.services, ledger, [name]).restore()
        assert (restored.generation, restored.state) == (version.generation, RestoreState.LOADED)
        assert list(Restoration(flow.services, ledger, [name]).restore()) == []
    assert len(flow.rows(name)) == 2


def test_a_file_that_is_answered_while_it_is_compared_is_not_missing(flow: Flow) -> None:
    version = flow.upload("restore/meanwhile.csv", csv_of(bridge("Ulm")))
    comparison = Comparison()
    with Ledger(PostgresSettings()) as ledger:
        comparison.add([AnsweredVersion(version, "")], ledger)
        assert list(comparison.missing) == ["restore/meanwhile.csv"]
        listing = [version]
        flow.tick_and_run()
        comparison.leave_to_the_sensor(ledger, listing)
    assert (comparison.missing, comparison.coming) == ({}, {})


def test_old_commits_of_files_that_are_done_are_removed_and_the_answers_come_from_the_tables(flow: Flow, stack: Stack) -> None:
    assert flow.tick() == [], "nothing of another test may wait"
    rows = [bridge("Ulm"), ("", "nothing, is asked"), bridge("Graz", 1901)]
    done = flow.upload("old.csv", csv_of(*rows))
    (request,) = flow.tick()
    flow.run(request)
    original = list(csv.DictReader(io.StringIO(command("answers", "old.csv", stack=stack).stdout)))
    waiting = flow.upload("waiting.csv", csv_of(bridge("Bonn")))
    answer(flow, waiting, run="r")
    newest = flow.upload("newest.csv", csv_of(bridge("Jena")))
    answer(flow, newest, run="r")
    with Ledger(PostgresSettings()) as ledger:
        ledger.request_retries(["waiting.csv"])
    commits = [flow.record(version).pachyderm_commit for version in (done, waiting, newest)]
    assert squash_old(flow.services.pachyderm, flow.services.postgres, datetime.now(UTC) - timedelta(days=30)) == Squashed(0, 0), (
        "none is that old"
    )
    squashed = squash_old(flow.services.pachyderm, flow.services.postgres, datetime.now(UTC))
    assert squashed.removed >= 1
    assert squashed.kept >= 1
    assert remaining(commits) == commits[1:]

    rebuilt = command("answers", "old.csv", stack=stack)
    assert "QA_COMMITS_KEPT_DAYS" in rebuilt.stderr
    found = list(csv.DictReader(io.StringIO(rebuilt.stdout)))
    assert list(found[0]) == ["question", "context", *ANSWER_COLUMNS, "raw"]
    for mine, before in zip(found, original, strict=True):
        assert (mine["error"], mine["answer"], mine["score"], mine["model"]) == tuple(
            before[name] for name in ("error", "answer", "score", "model")
        )
        assert mine["raw"] if before["error"] else (mine["question"], mine["context"]) == (before["question"], before["context"])
    assert "nothing, is asked" in found[1]["raw"]
    with connect(PostgresSettings()) as connection:
        connection.execute("DELETE FROM question_answer WHERE source_file = 'old.csv' AND row_number = 1")
        with pytest.raises(InputError, match="2 of the 3 rows"):
            list(rebuilt_csv(connection, flow.record(done)))
    with pytest.raises(InputError, match="QA_COMMITS_KEPT_DAYS"):
        reload_files(flow.services, [partition_key("old.csv")], run_id="r", log=_LOG)
    assert [r.success for r in flow.tick_and_run()] == [True], "what waits is answered, and new batches are as before"
    assert [answer for _, answer in flow.rows("waiting.csv")] == ["1872"]


def remaining(commits: Sequence[str]) -> list[str]:
    with pachd.session(PachydermSettings(), "testing") as client:
        known = {info.commit.id for info in client.pfs.list_commit(repo=pfs.Repo.from_uri("questions"))}
    return [commit for commit in commits if commit in known]


def command(*words: str, stack: Stack) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(["qa-platform", *words], env=stack.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done
