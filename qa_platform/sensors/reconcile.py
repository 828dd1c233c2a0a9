"""The slow sensor: it mends what the fast one cannot see, runs that vanished and objects that came back."""

import time
from collections.abc import Collection

import dagster as dg

from qa_platform import bookkeeping
from qa_platform.database import connect
from qa_platform.partitions import BATCH_TAG
from qa_platform.resources import PlatformResource
from qa_platform.settings import WorkSettings
from qa_platform.waiting import reconcile as reconcile_files

# More runs than this at once are left for the next look.
_RUNS_PER_LOOK = 100

_VANISHED = (
    "What to do: nothing; its files are taken up again by themselves. If it happens often, see whether the machine is short of memory.\n"
    "This run holds no claim any more and has said nothing since: its process is gone."
)


@dg.sensor(
    name="reconcile",
    default_status=dg.DefaultSensorStatus.RUNNING,
    minimum_interval_seconds=WorkSettings().reconcile_seconds,
    description="Marks runs as failed that vanished without a word, and corrects the records of objects that came back to incoming/.",
)
def reconcile(context: dg.SensorEvaluationContext, platform: PlatformResource) -> dg.SkipReason:
    services = platform.services()
    with connect(services.postgres) as connection:
        owners = set(bookkeeping.claimed(connection).values())
    vanished = vanished_runs(context.instance, owners, silent_seconds=2 * services.work.lease_seconds)
    for run in vanished:
        context.instance.report_run_failed(run, _VANISHED)
        context.log.warning("Run %s vanished, and is marked as failed", run.run_id)
    corrected = reconcile_files(services)
    return dg.SkipReason(f"{len(vanished)} runs had vanished, the records of {corrected} files were corrected")


def vanished_runs(instance: dg.DagsterInstance, owners: Collection[str], *, silent_seconds: float) -> list[dg.DagsterRun]:
    """Runs that Dagster believes to be at work, and that are not.

    A run of the sensor's holds claims while it works, and logs events before and after that. One that holds none (``owners`` are
    the holders of all live claims) and has logged nothing for ``silent_seconds`` is gone: it would keep its place in the queue
    for ever.
    """
    started = instance.get_run_records(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED]), limit=_RUNS_PER_LOOK, ascending=True)
    quiet_since = time.time() - silent_seconds
    return [
        record.dagster_run
        for record in started
        if BATCH_TAG in record.dagster_run.tags
        and record.dagster_run.run_id not in owners
        and _last_event(instance, record.dagster_run.run_id) < quiet_since
    ]


def _last_event(instance: dg.DagsterInstance, run_id: str) -> float:
    records = instance.get_records_for_run(run_id, limit=1, ascending=False).records
    return records[0].event_log_entry.timestamp if records else 0.0
