"""The platform end to end on a Pachyderm: the embedded one, as slow as a cluster, or the one that QA_TEST_PACHD names.

A cluster's trouble at the worst moment charges no file, and passes: all rows are loaded once, and the reason is reported.
"""

import io
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from pachyderm_sdk.api import pfs, pps
from psycopg.conninfo import conninfo_to_dict

from qa_platform.batches import commits
from qa_platform.batches.plan import Batch, batch_id
from qa_platform.batches.run import Outcome, answer_batch
from qa_platform.batches.squash import squash_old
from qa_platform.cli.doctor.findings import State
from qa_platform.cli.doctor.workers import reach
from qa_platform.cli.status.observe import Observer, ObserverSettings
from qa_platform.clients import bucket, pachyderm
from qa_platform.clients.pachyderm import job_of
from qa_platform.clients.postgres import connect
from qa_platform.clients.services import Services
from qa_platform.contract import ANSWER_PIPELINE, LOAD_PIPELINE, QUESTIONS_REPO, FileStatus, FileVersion, Manifest
from qa_platform.embedded.stack import Stack
from qa_platform.errors import QaPlatformError, TransientError
from qa_platform.ingest import split
from qa_platform.ledger import FileRecord, Ledger
from qa_platform.loading import migrate
from qa_platform.provisioning.pipelines import Options, apply, specifications
from qa_platform.provisioning.secrets import DATABASE_SECRET
from qa_platform.settings import (
    BucketSettings,
    PachydermSettings,
    PostgresSettings,
)
from qa_platform_tests.flow import bridge, csv_of
from qa_platform_tests.pachd_helpers import CLUSTER, DATABASE, LIMIT_SECONDS, REGISTRY, TAG, Server, eventually, remove_platform

pytestmark = [pytest.mark.slow, pytest.mark.faults]

_LOG = logging.getLogger("cluster")
# A job has to start its pods first.
_JOB_SECONDS = 4 * LIMIT_SECONDS
OPTIONS = Options(registry=REGISTRY, tag=TAG)
# No logs of what is idle, late lines, pods that take their time, commits that finish slowly.
UNKIND = {"QA_PACHD_LOKI": "0", "QA_PACHD_LOG_SECONDS": "3", "QA_PACHD_POD_SECONDS": "1", "QA_PACHD_FINISH_SECONDS": "0.5"}


@dataclass
class Cluster:
    """The platform on a Pachyderm; ``server`` is None where it is not the embedded one."""

    services: Services
    server: Server | None
    folder: Path

    def upload(self, name: str, content: bytes) -> FileVersion:
        return bucket.upload(self.services.bucket, name, io.BytesIO(content))

    def run(self, *versions: FileVersion, run: str) -> Outcome:
        """Answer files in a batch of their own, as a run does."""
        batch = Batch(batch_id([(version, 1) for version in versions]), versions)
        return answer_batch(self.services, batch, token=run, run_id=run, log=_LOG)

    def record(self, version: FileVersion) -> FileRecord:
        with Ledger(self.services.postgres) as ledger:
            return ledger.records([version])[version.name, version.generation]

    def rows(self, version: FileVersion) -> int:
        with connect(self.services.postgres) as connection:
            (count,) = connection.execute("SELECT count(*) FROM question_answer WHERE source_file = %s", [version.name]).fetchone()  # type: ignore[misc]
        return int(count)

    def apply(self, postgres: PostgresSettings | None = None) -> dict[str, str]:
        """Apply, by default with the right database; what was done, by name."""
        changes = apply(self.services.pachyderm, postgres or self.services.postgres, BucketSettings(), OPTIONS)
        return {change.name: change.action for change in changes}

    def put_pipeline(self, name: str, **transform: Any) -> None:
        spec = dict(specifications(OPTIONS, self.services.postgres, bucket=BucketSettings()))[name]
        spec["transform"] |= transform
        with pachyderm.session(self.services.pachyderm, "putting a pipeline") as client:
            client.pps.create_pipeline_v2(create_pipeline_request_json=json.dumps(spec), update=True)

    @contextmanager
    def without_database_secret(self) -> Iterator[None]:
        with pachyderm.session(self.services.pachyderm, "testing") as client:
            client.pps.delete_secret(secret=pps.Secret(name=DATABASE_SECRET))
        try:
            yield
        finally:
            self.apply()

    def job(self, version: FileVersion, pipeline: str) -> pps.JobInfo:
        with pachyderm.session(self.services.pachyderm, "testing") as client:
            return client.pps.inspect_job(job=job_of(pipeline, self.record(version).pachyderm_job), details=True)


def _database() -> dict[str, str]:
    """The variables of the database that QA_TEST_PACHD_DATABASE names; none where the embedded one is used."""
    values = conninfo_to_dict(DATABASE)
    return {f"PG_{name.upper()}": str(values[name]) for name in ("host", "port", "user", "password", "dbname") if name in values}


@contextmanager
def cluster_of(stack: Stack, folder: Path, options: dict[str, str], *, token: str = "") -> Iterator[Cluster]:
    """A clean Pachyderm with the platform applied, beside the database and the bucket of the embedded stack."""
    server = None if CLUSTER else Server(folder, options)
    address = server.address if server else CLUSTER
    with pytest.MonkeyPatch.context() as patch:
        own = {"PACHD_ADDRESS": address, "PACH_TOKEN": token, "QA_RETRY_FIRST_SECONDS": "0.1"}
        for name, value in {**stack.variables, **_database(), **own}.items():
            patch.setenv(name, value)
        migrate.upgrade(PostgresSettings())
        with pachyderm.session(PachydermSettings(), "cleaning") as client:
            remove_platform(client)
        cluster = Cluster(Services.from_environment(), server, folder)
        cluster.apply()
        try:
            yield cluster
        finally:
            if cluster.server:
                assert cluster.server.stop() == 0
            else:
                with pachyderm.session(PachydermSettings(), "cleaning") as client:
                    remove_platform(client)


@pytest.fixture(scope="module")
def cluster(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster_of(stack, tmp_path_factory.mktemp("pachd"), {} if CLUSTER else UNKIND) as found:
        if CLUSTER:
            _skip_without_database(found)
        yield found


def _skip_without_database(cluster: Cluster) -> None:
    failure = cluster.run(a_file(cluster, "first"), run="first").failure
    if failure and failure.verdict.blameless:
        pytest.skip(f"no worker reaches the database; QA_TEST_PACHD_DATABASE names another one: {failure.cause}")


def a_file(cluster: Cluster, name: str, rows: int = 2) -> FileVersion:
    return cluster.upload(f"{cluster.folder.name}/{name}.csv", csv_of(*(bridge(f"{name} {n}") for n in range(rows))))


def statuses(cluster: Cluster, versions: Sequence[FileVersion]) -> list[tuple[FileStatus, int, int]]:
    return [(cluster.record(v).status, cluster.record(v).attempts, cluster.rows(v)) for v in versions]


def test_apply_changes_nothing_the_second_time(cluster: Cluster) -> None:
    actions = cluster.apply()
    assert {actions[name] for name in ("questions", ANSWER_PIPELINE, LOAD_PIPELINE)} == {"unchanged"}


def test_batches_back_to_back_load_every_row_once(cluster: Cluster) -> None:
    versions = [a_file(cluster, f"back-{n}") for n in range(3)]
    for number, version in enumerate(versions):
        assert cluster.run(version, run=f"back-{number}").failure is None
    assert statuses(cluster, versions) == [(FileStatus.FINISHED, 0, 2)] * 3


def test_a_small_file_is_one_datum_of_each_pipeline(cluster: Cluster) -> None:
    versions = [a_file(cluster, f"small-{n}", rows=5) for n in range(60)]
    assert cluster.run(*versions, run="small").failure is None
    assert statuses(cluster, versions) == [(FileStatus.FINISHED, 0, 5)] * 60
    for pipeline in (ANSWER_PIPELINE, LOAD_PIPELINE):
        info = cluster.job(versions[0], pipeline)
        assert (info.data_total, info.data_processed + info.data_skipped) == (60, 60)


def workers(pipeline: str) -> list[psutil.Process]:
    """The processes of a pipeline's program under this one. Others on this machine are somebody else's."""
    module = {ANSWER_PIPELINE: "qa_platform.answering.worker", LOAD_PIPELINE: "qa_platform.loading.worker"}[pipeline]
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            found += [process] if module in process.cmdline() else []
    return found


def in_background(work: Callable[[], Outcome]) -> Any:
    return ThreadPoolExecutor(1).submit(work)


def test_a_killed_worker_loses_and_doubles_nothing(cluster: Cluster) -> None:
    version = a_file(cluster, "killed-worker", rows=400)
    outcome = in_background(lambda: cluster.run(version, run="killed-worker"))
    eventually(lambda: workers(ANSWER_PIPELINE) or outcome.done(), seconds=_JOB_SECONDS)
    for process in workers(ANSWER_PIPELINE):
        process.kill()
    assert outcome.result(_JOB_SECONDS).failure is None
    assert statuses(cluster, [version]) == [(FileStatus.FINISHED, 0, 400)]


@pytest.mark.skipif(bool(CLUSTER), reason="only the embedded server is this test's to kill")
# Seconds after the beginning, from the first calls to the first answers; None: when a worker is at work.
@pytest.mark.parametrize("moment", [0.06, 0.08, 0.1, 0.12, None])
def test_a_pachd_that_is_killed_and_started_again_goes_on(stack: Stack, tmp_path: Path, moment: float | None) -> None:
    with cluster_of(stack, tmp_path, {}) as cluster:
        rows = 400 if moment is None else 2
        version = a_file(cluster, "killed-pachd", rows=rows)
        batch = Batch(batch_id([(version, 1)]), (version,))
        outcome = in_background(lambda: cluster.run(version, run="killed-pachd"))
        if moment is None:
            eventually(lambda: workers(ANSWER_PIPELINE), seconds=_JOB_SECONDS)
        else:
            time.sleep(moment)
        assert cluster.server
        cluster.server.kill()
        with pytest.raises(TransientError):
            outcome.result(_JOB_SECONDS)
        cluster.server = Server(tmp_path)
        cluster.services = replace(cluster.services, pachyderm=PachydermSettings(pachd_address=cluster.server.address))
        again = answer_batch(cluster.services, batch, token="", run_id="again", predecessors=["killed-pachd"], log=_LOG)
        assert again.failure is None
        assert statuses(cluster, [version]) == [(FileStatus.FINISHED, 0, rows)]


def test_a_failing_file_is_charged_with_its_cause_and_the_good_one_beside_it_is_loaded(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = a_file(cluster, "good"), a_file(cluster, "bad")

    def damaged(source: Any, *, version: FileVersion, write: Any, **more: Any) -> Manifest:
        def damaging(path: str, chunks: Any) -> None:
            data = b"".join(chunks)
            # As if a row had been lost on the way to the worker.
            write(path, [data.replace(b'"rows": 2', b'"rows": 3', 1) if version == bad and path.endswith("shard.json") else data])

        return split(source, version=version, write=damaging, **more)

    monkeypatch.setattr("qa_platform.batches.intake.split", damaged)
    outcome = cluster.run(good, bad, run="mixed")
    assert outcome.failure is not None
    assert "2 rows, but its shard.json says 3" in outcome.failure.message
    assert cluster.record(bad).attempts == 1
    assert "2 rows, but its shard.json says 3" in cluster.record(bad).error
    assert cluster.run(good, run="mixed-2").failure is None
    assert statuses(cluster, [good]) == [(FileStatus.FINISHED, 0, 2)]
    for attempt in range(2, cluster.services.work.max_attempts + 1):
        cluster.run(bad, run=f"bad-{attempt}")
    record = cluster.record(bad)
    assert (record.status, record.attempts) == (FileStatus.FAILED, cluster.services.work.max_attempts)
    assert "2 rows, but its shard.json says 3" in record.error


def test_a_loader_without_its_database_charges_nobody_and_the_database_is_named(cluster: Cluster) -> None:
    versions = [a_file(cluster, f"no-database-{n}") for n in range(2)]
    cluster.apply(cluster.services.postgres.model_copy(update={"dbname": "no_such_database"}))
    try:
        outcome = cluster.run(*versions, run="no-database")
    finally:
        cluster.apply()
    assert outcome.failure is not None
    assert "no_such_database" in outcome.failure.cause
    assert outcome.failure.verdict.blameless
    assert [(r.status, r.attempts) for r in outcome.records] == [(FileStatus.PENDING, 0)] * 2
    assert all("no_such_database" in r.error for r in outcome.records)
    with pachyderm.session(cluster.services.pachyderm, "asking the doctor") as client:
        told = reach(client)
        assert told.state is State.WRONG
        assert "no_such_database" in told.detail
        assert told.fix.endswith("qa-platform pachyderm apply")
        assert cluster.run(*versions, run="with-database").failure is None
        assert reach(client).state is State.OK
    assert statuses(cluster, versions) == [(FileStatus.FINISHED, 0, 2)] * 2


def test_a_secret_that_is_gone_is_waited_for_and_its_reason_shown_until_it_is_back(cluster: Cluster) -> None:
    version = a_file(cluster, "no-secret")
    with cluster.without_database_secret():
        outcome = in_background(lambda: cluster.run(version, run="no-secret"))

        def waiting() -> str:
            files = Observer(ObserverSettings.from_environment(), version.name).snapshot().files
            return next((file.note for file in files if file.is_waiting), "")

        note = eventually(waiting, seconds=_JOB_SECONDS)
        assert note.startswith("waiting for Pachyderm: ")
        assert LOAD_PIPELINE in note
        assert DATABASE_SECRET in note
    assert outcome.result(_JOB_SECONDS).failure is None
    assert statuses(cluster, [version]) == [(FileStatus.FINISHED, 0, 2)]


def test_a_job_that_cannot_start_for_too_long_is_stopped_and_charges_nobody(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    version = a_file(cluster, "never-starts")
    monkeypatch.setenv("QA_START_SECONDS", "6")
    monkeypatch.setattr(cluster, "services", replace(cluster.services, pachyderm=PachydermSettings()))
    with cluster.without_database_secret():
        outcome = cluster.run(version, run="never-starts")
    assert outcome.failure is not None
    assert outcome.failure.not_started
    assert DATABASE_SECRET in outcome.failure.cause
    assert [(r.status, r.attempts) for r in outcome.records] == [(FileStatus.PENDING, 0)]
    assert DATABASE_SECRET in cluster.record(version).error
    assert cluster.run(version, run="starts").failure is None
    assert statuses(cluster, [version]) == [(FileStatus.FINISHED, 0, 2)]


def test_a_program_that_does_not_start_is_stopped_and_charges_nobody(cluster: Cluster) -> None:
    version = a_file(cluster, "no-program")
    cluster.put_pipeline(ANSWER_PIPELINE, cmd=["python", "-c", "import nothing_here"])
    try:
        outcome = cluster.run(version, run="no-program")
    finally:
        cluster.put_pipeline(ANSWER_PIPELINE)
    assert outcome.failure is not None
    assert outcome.failure.not_started
    assert f"the program of pipeline {ANSWER_PIPELINE} does not start" in outcome.failure.cause
    assert [(r.status, r.attempts) for r in outcome.records] == [(FileStatus.PENDING, 0)]
    assert cluster.run(version, run="program").failure is None
    assert statuses(cluster, [version]) == [(FileStatus.FINISHED, 0, 2)]


@pytest.mark.skipif(bool(CLUSTER), reason="a cluster loses output when it likes")
def test_output_that_a_successful_job_lost_is_made_again(stack: Stack, tmp_path: Path) -> None:
    with cluster_of(stack, tmp_path, {"QA_PACHD_NO_RESTART": ANSWER_PIPELINE}) as cluster:
        # The first process is killed in the middle of its set, and no other one starts: the job succeeds all the same.
        versions = [a_file(cluster, f"lost-{n}", rows=200) for n in range(4)]
        outcome = in_background(lambda: cluster.run(*versions, run="lost"))
        killed = threading.Event()

        def kill_once() -> bool:
            for process in workers(ANSWER_PIPELINE) if not killed.is_set() else ():
                process.kill()
                killed.set()
            return killed.is_set()

        eventually(kill_once, seconds=_JOB_SECONDS)
        assert outcome.result(_JOB_SECONDS).failure is None
        assert statuses(cluster, versions) == [(FileStatus.FINISHED, 0, 200)] * 4


def robots(folder: Path, *roles: str) -> dict[str, str]:
    """The option of a server that asks for a token, and knows one robot with these roles."""
    tokens = folder / "tokens.json"
    tokens.write_text(json.dumps({"the-token": {"robot": "qa-platform", "roles": roles}}))
    return {"QA_PACHD_TOKENS": str(tokens)}


@pytest.mark.skipif(bool(CLUSTER), reason="a cluster's robots are not this test's to change")
@pytest.mark.parametrize("may_remove", [True, False])
def test_with_the_roles_of_the_documentation_all_goes_through_and_without_removing_all_but_housekeeping(
    stack: Stack, tmp_path: Path, may_remove: bool
) -> None:
    options = robots(tmp_path, "projectWriter", "secretAdmin", *(["repoWriter"] if may_remove else []))
    with cluster_of(stack, tmp_path, options, token="the-token") as cluster:
        versions = [a_file(cluster, f"robot-{may_remove}-{n}") for n in range(2)]
        # An open commit that a dead run left behind has to be got out of the way.
        with pachyderm.session(cluster.services.pachyderm, "testing") as client:
            branch = pfs.Branch.from_uri(f"{QUESTIONS_REPO}@master")
            client.pfs.start_commit(branch=branch, description="of a run that is gone")
        for number, version in enumerate(versions):
            assert cluster.run(version, run=f"robot-{number}").failure is None
        assert statuses(cluster, versions) == [(FileStatus.FINISHED, 0, 2)] * 2
        squashed = squash_old(cluster.services.pachyderm, cluster.services.postgres, datetime.now(UTC))
        if may_remove:
            assert (squashed.removed > 0, squashed.denied) == (True, "")
        else:
            assert squashed.removed == 0
            assert "REPO_DELETE_COMMIT" in squashed.denied


def test_pods_that_hang_without_a_reason_end_the_wait_too(stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QA_START_SECONDS", "4")
    with cluster_of(stack, tmp_path, {"QA_PACHD_POD_SECONDS": "40"}) as cluster:
        assert cluster.server is not None
        impatient = PachydermSettings(pachd_address=cluster.server.address)
        monkeypatch.setattr(cluster, "services", replace(cluster.services, pachyderm=impatient))
        version = a_file(cluster, "hangs")
        outcome = cluster.run(version, run="hangs")
        assert outcome.failure is not None
        assert outcome.failure.not_started
        assert [(r.status, r.attempts) for r in outcome.records] == [(FileStatus.PENDING, 0)]
    with cluster_of(stack, tmp_path, {}) as cluster:
        assert cluster.run(version, run="again").failure is None


@pytest.mark.parametrize("pipeline", [ANSWER_PIPELINE, LOAD_PIPELINE])
def test_a_stopped_pipeline_is_named_and_nothing_is_committed_in_vain(stack: Stack, tmp_path: Path, pipeline: str) -> None:
    with cluster_of(stack, tmp_path, {}) as cluster:
        version = a_file(cluster, f"stopped-{pipeline}")
        with pachyderm.session(cluster.services.pachyderm, "testing") as client:
            client.pps.stop_pipeline(pipeline=pps.Pipeline(name=pipeline))
            head = commits.head(client).commit.id
            with pytest.raises(QaPlatformError, match=f"{pipeline} is stopped.*pachctl start pipeline {pipeline}"):
                cluster.run(version, run="stopped")
            assert "is stopped" in cluster.record(version).error
            assert commits.head(client).commit.id == head
            client.pps.start_pipeline(pipeline=pps.Pipeline(name=pipeline))
        assert cluster.run(version, run="again").failure is None
        assert statuses(cluster, [version]) == [(FileStatus.FINISHED, 0, 2)]
