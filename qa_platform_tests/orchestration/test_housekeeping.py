"""What housekeeping keeps. Beside backfills it is tested with the daemon."""

import dagster as dg
import pytest

from qa_platform.ledger import Ledger
from qa_platform.orchestration.housekeeping import housekeeping_job
from qa_platform.orchestration.partitions import PARTITIONS
from qa_platform.orchestration.resources import platform_resource
from qa_platform.settings import BucketSettings, ExecutionSettings, PostgresSettings
from qa_platform_tests.ledger.helpers import A1, EXPIRED


def test_housekeeping_keeps_the_partitions_of_files_that_wait(postgres: PostgresSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"PG_HOST": postgres.host, "PG_PORT": str(postgres.port), "PG_USER": postgres.user, "PG_DBNAME": postgres.dbname}
    # The bucket is not asked.
    for name, value in {**variables, "STORAGE_EMULATOR_HOST": "http://127.0.0.1:9", "QA_PARTITIONS_KEPT": "1"}.items():
        monkeypatch.setenv(name, value)
    with Ledger(postgres) as ledger:
        ledger.claim([A1], owner="gone", lease_seconds=EXPIRED)
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions(PARTITIONS, ["done.csv", A1.name, "new.csv"])
        resources = {"platform": platform_resource(BucketSettings())}
        job = housekeeping_job(ExecutionSettings())
        assert job.execute_in_process(instance=instance, resources=resources, op_selection=["prune_partitions"]).success
        assert list(instance.get_dynamic_partitions(PARTITIONS)) == [A1.name, "new.csv"]
