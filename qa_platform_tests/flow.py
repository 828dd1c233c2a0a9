"""A Dagster instance on the embedded stack, with the actions of tests: upload, tick, run, look.

A test file that uses it imports the fixture `flow` by name.
"""

import csv
import io
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import dagster as dg
import pytest
from dagster._core.definitions.sensor_definition import SensorExecutionData
from google.api_core.exceptions import NotFound

from qa_platform.clients import bucket
from qa_platform.clients.pachyderm import session
from qa_platform.clients.postgres import connect
from qa_platform.clients.services import Services
from qa_platform.contract import FileVersion, partition_key
from qa_platform.definitions import defs
from qa_platform.embedded.stack import Stack
from qa_platform.ledger import FileRecord, Ledger
from qa_platform.orchestration.resources import platform_resource
from qa_platform.provisioning.project_files import project_file
from qa_platform.settings import BucketSettings, PachydermSettings, PostgresSettings

T = TypeVar("T")

CONTEXT = "The old bridge of {} was finished in {} by a mason called {}, after eleven years of work."


def csv_of(*rows: tuple[str, str]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows([("question", "context"), *rows])
    return text.getvalue().encode()


def bridge(town: str, year: int = 1872, mason: str = "Ada Blum") -> tuple[str, str]:
    return (f"When was the bridge of {town} finished?", CONTEXT.format(town, year, mason))


def wait_until(condition: Callable[[], T], what: str, *, seconds: float = 120) -> T:
    """Wait for the first true value of a condition, and return it."""
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, f"waited {seconds} s in vain until {what}"
        time.sleep(0.1)
    return value


@dataclass
class Flow:
    """A Dagster instance and the stack's services. `tick` does the daemon's work, `run` the launcher's."""

    instance: dg.DagsterInstance
    services: Services

    def upload(self, name: str, content: bytes) -> FileVersion:
        return bucket.upload(self.services.bucket, name, io.BytesIO(content))

    def tick(self) -> list[dg.RunRequest]:
        """Tick the sensors that find and finish files. Returns the run requests, which an earlier error loses, as in the daemon."""
        tick = self._evaluate("incoming_files")
        self._evaluate("done_files")
        return list(tick.run_requests or ())

    def _evaluate(self, sensor: str) -> SensorExecutionData:
        with dg.build_sensor_context(instance=self.instance, resources={"platform": platform_resource(BucketSettings())}) as context:
            # Not a plain call: only `evaluate_tick` checks the result like the daemon's code server.
            tick = defs.resolve_sensor_def(sensor).evaluate_tick(context)
        for event in tick.asset_events or ():
            self.instance.report_runless_asset_event(event)
        return tick

    def run(self, request: dg.RunRequest) -> dg.ExecuteInProcessResult:
        job = defs.resolve_job_def("answer_questions")
        return job.execute_in_process(run_config=request.run_config, tags=dict(request.tags), instance=self.instance, raise_on_error=False)

    def tick_and_run(self) -> list[dg.ExecuteInProcessResult]:
        return [self.run(request) for request in self.tick()]

    def record(self, version: FileVersion) -> FileRecord:
        with Ledger(PostgresSettings()) as ledger:
            return ledger.records([version])[version.name, version.generation]

    def rows(self, name: str) -> list[tuple[str, str]]:
        query = "SELECT question, answer FROM question_answer WHERE source_file = %s ORDER BY row_number"
        with connect(PostgresSettings()) as connection:
            return connection.execute(query, [name]).fetchall()

    def objects(self, prefix: str) -> list[str]:
        return [blob.name for blob in self.services.bucket.list_blobs(prefix=prefix)]

    def materializations(self, asset: dg.AssetKey, name: str) -> int:
        records = self.instance.fetch_materializations(
            dg.AssetRecordsFilter(asset_key=asset, asset_partitions=[partition_key(name)]), limit=100
        ).records
        return len(records)


@pytest.fixture(scope="module")
def flow(stack: Stack) -> Iterator[Flow]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in stack.variables.items():
            patch.setenv(name, value)
        patch.setenv("QA_LEASE_SECONDS", "10")
        patch.setenv("QA_RETRY_FIRST_SECONDS", "1")
        with dg.DagsterInstance.ephemeral() as instance:
            services = dg.build_resources({"p": platform_resource(BucketSettings())}).__enter__().p.services()
            _give_up_what_is_parked(services)
            yield Flow(instance, services)


def _give_up_what_is_parked(services: Services) -> None:
    """Delete the sources of failed files of earlier modules on the same stack: the job for CI fails as long as there are any."""
    with Ledger(services.postgres) as ledger:
        for record in ledger.parked():
            with suppress(NotFound):
                services.bucket.delete_blob(record.place)


def put_pipeline(fields: Mapping[str, Any] = MappingProxyType({}), **transform: Any) -> None:
    """Update the answering pipeline with changed fields of its specification and of its transform."""
    spec = json.loads((project_file("pachyderm") / "question_answer" / "pipeline.json").read_text())
    spec |= fields
    spec["transform"] |= transform
    with session(PachydermSettings(), "putting a pipeline") as client:
        client.pps.create_pipeline_v2(create_pipeline_request_json=json.dumps(spec), update=True)


def let_the_claim_run_out(version: FileVersion) -> None:
    """As time does, only sooner."""
    with connect(PostgresSettings()) as connection:
        connection.execute("UPDATE question_file SET claim_until = now() WHERE source_file = %s", [version.name])
