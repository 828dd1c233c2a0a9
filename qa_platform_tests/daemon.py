"""Dagster's own sensor daemon, for tests: whole ticks, with their events, partitions and runs stored in Dagster's PostgreSQL.

The daemon's own code decides what else fails if one step of a tick does, so no test re-implements it.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import dagster._daemon.sensor as sensor_daemon
import psycopg
import pytest
from dagster._core.remote_origin import InProcessCodeLocationOrigin
from dagster._core.scheduler.instigation import InstigatorTick
from dagster._core.test_utils import create_test_daemon_workspace_context, instance_for_test
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import InProcessWorkspaceLoadTarget

from qa_platform.contract import partition_key
from qa_platform.orchestration.partitions import RANGE_START_TAG
from qa_platform.orchestration.sensors.heartbeat import HEARTBEAT

_LOCATION = "qa_platform"


@dataclass
class Daemon:
    """The sensor daemon of one instance. The runs that its ticks request are queued, but never started."""

    instance: dg.DagsterInstance
    workspace: WorkspaceProcessContext
    storage_url: str

    def tick(self) -> InstigatorTick:
        """Tick every sensor once, regardless of its minimum interval. Returns the tick of `incoming_files`."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sensor_daemon, "is_under_min_interval", lambda *_: False)
            for error in sensor_daemon.execute_sensor_iteration(self.workspace, logging.getLogger(__name__), None, None):
                if error:
                    logging.getLogger(__name__).warning("%s", error)
        return self.last_tick("incoming_files")

    def last_tick(self, sensor: str) -> InstigatorTick:
        repository = next(iter(self.workspace.create_request_context().get_code_location(_LOCATION).get_repositories().values()))
        remote = repository.get_sensor(sensor)
        return self.instance.get_ticks(remote.get_remote_origin_id(), remote.selector_id, limit=1)[0]

    def queued(self) -> dict[str, dg.DagsterRun]:
        """The queued runs, by the first of their partitions."""
        runs = self.instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.QUEUED]))
        return {run.tags[RANGE_START_TAG]: run for run in runs}

    def materializations(self, asset: dg.AssetKey, name: str) -> int:
        wanted = dg.AssetRecordsFilter(asset_key=asset, asset_partitions=[partition_key(name)])
        return len(self.instance.fetch_materializations(wanted, limit=1000).records)

    def beats(self) -> int:
        return len(self.instance.fetch_materializations(HEARTBEAT, limit=1000).records)

    @contextmanager
    def storage_refuses(self, table: str, condition: str) -> Iterator[None]:
        """During the block, Dagster's PostgreSQL refuses new rows of a table that meet a condition on ``NEW``."""
        with psycopg.connect(self.storage_url, autocommit=True) as connection:
            connection.execute("CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE ''refused''; END'")
            connection.execute(f"CREATE TRIGGER refuse BEFORE INSERT ON {table} FOR EACH ROW WHEN ({condition}) EXECUTE FUNCTION refuse()")
            try:
                yield
            finally:
                connection.execute("DROP FUNCTION refuse CASCADE")


@contextmanager
def daemon(postgres_url: str, folder: Path) -> Iterator[Daemon]:
    """A daemon whose instance stores everything in this PostgreSQL. It uses this process's environment."""
    folder.mkdir(exist_ok=True)
    storage = {"postgres": {"postgres_url": postgres_url}}
    target = LoadableTargetOrigin(module_name="qa_platform.definitions")
    origin = InProcessCodeLocationOrigin(target, location_name=_LOCATION)
    with (
        instance_for_test({"storage": storage}, temp_dir=str(folder)) as instance,
        create_test_daemon_workspace_context(InProcessWorkspaceLoadTarget(origin), instance) as workspace,
    ):
        # Otherwise Dagster's storages connect anew for every statement.
        instance.optimize_for_webserver(statement_timeout=60_000, pool_recycle=3600, max_overflow=20)
        yield Daemon(instance, workspace, postgres_url)
