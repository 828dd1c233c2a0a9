"""The slow sensor: it repairs what the fast one cannot see, namely runs that vanished and objects that came back."""

import time
from collections.abc import Collection

import dagster as dg

from qa_platform.batches.pending import reconcile as reconcile_files
from qa_platform.clients.services import Services
from qa_platform.ledger import Ledger
from qa_platform.orchestration.catalog import ANSWERED_QUESTIONS, QUESTION_ANSWER
from qa_platform.orchestration.failures import advised
from qa_platform.orchestration.partitions import BATCH_TAG, RUN_KEY_TAG
from qa_platform.orchestration.resources import PlatformResource
from qa_platform.orchestration.sensors.tick_log import TickLog
from qa_platform.orchestration.stored_runs import stored_runs
from qa_platform.settings import WorkSettings

_VANISHED = advised(
    "nothing; the sensor answers its files again. If it happens often, check whether the machine is short of memory.",
    "This run holds no claim and has logged nothing for some time: its process is gone.",
)
# The jobs that answer files.
_JOBS = ("answer_questions", "answer_pending_files")


def reconcile_sensor(work: WorkSettings) -> dg.SensorDefinition:
    @dg.sensor(
        name="reconcile",
        default_status=dg.DefaultSensorStatus.RUNNING,
        minimum_interval_seconds=work.reconcile_seconds,
        description="Marks runs whose process is gone as failed, and corrects the records of objects that came back to incoming/.",
    )
    def reconcile(context: dg.SensorEvaluationContext, platform: PlatformResource) -> dg.SkipReason:
        return _tick(context, platform.services())

    return reconcile


def _tick(context: dg.SensorEvaluationContext, services: Services) -> dg.SkipReason:
    with Ledger(services.postgres) as ledger:
        owners = set(ledger.claimed().values())
    vanished = vanished_runs(context.instance, owners, silent_seconds=2 * services.work.lease_seconds)
    for run in vanished:
        context.instance.report_run_failed(run, _VANISHED)
        context.log.warning("Run %s vanished, and is marked as failed", run.run_id)
    corrected = reconcile_files(services, TickLog(context))
    return dg.SkipReason(f"{len(vanished)} runs had vanished, the records of {corrected} files were corrected")


def vanished_runs(instance: dg.DagsterInstance, owners: Collection[str], *, silent_seconds: float) -> list[dg.DagsterRun]:
    """Runs that Dagster reports as started but whose process is gone.

    Of the runs that the sensor requested, and of those that a command executes in its own process (`dagster job execute`), which Dagster
    does not watch. Such a run holds claims while it works, and logs events before and after. Until its step begins, which may have to wait
    for a pod, its run key holds them. A run that holds none and has logged nothing for ``silent_seconds`` is gone, and would otherwise keep
    its slot in the queue for ever.

    Args:
        owners: the owners of all live claims.
    """
    started = stored_runs(instance, dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED]))
    quiet_since = time.time() - silent_seconds
    mine = (run for run in started if BATCH_TAG in run.tags or _is_executed_by_a_command(run))
    unclaimed = (run for run in mine if {run.run_id, run.tags.get(RUN_KEY_TAG)}.isdisjoint(owners))
    return [run for run in unclaimed if _last_event(instance, run.run_id) < quiet_since]


def _is_executed_by_a_command(run: dg.DagsterRun) -> bool:
    """Whether no daemon launched the run, and it answers files of this platform. Other code may share Dagster's storage."""
    of_assets = run.asset_selection is not None and not run.asset_selection.isdisjoint({ANSWERED_QUESTIONS, QUESTION_ANSWER})
    return run.remote_job_origin is None and (of_assets or run.job_name in _JOBS)


def _last_event(instance: dg.DagsterInstance, run_id: str) -> float:
    records = instance.get_records_for_run(run_id, limit=1, ascending=False).records
    return records[0].event_log_entry.timestamp if records else 0.0
