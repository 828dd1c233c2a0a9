"""Housekeeping: bounds the numbers of Dagster's partitions and Pachyderm's commits. The history of every file stays in `question_file`."""

from datetime import UTC, datetime, timedelta

import dagster as dg
from dagster._core.execution.backfill import BulkActionsFilter, BulkActionStatus

from qa_platform.batches.squash import squash_old
from qa_platform.clients.services import Services
from qa_platform.contract import partition_key
from qa_platform.ledger import Ledger
from qa_platform.orchestration.failures import failures_for_people
from qa_platform.orchestration.partitions import PARTITIONS
from qa_platform.orchestration.reports.archive import archive_evaluation
from qa_platform.orchestration.reports.events import log_events
from qa_platform.orchestration.resources import PlatformResource
from qa_platform.settings import ExecutionSettings

_NEXT = "the next night's run does the rest, and no file waits for it"
# Partitions that are deleted with one look at what is in progress.
_DELETED_TOGETHER = 200


def housekeeping_schedule(execution: ExecutionSettings) -> dg.ScheduleDefinition:
    """The schedule of the job `housekeeping`."""
    return dg.ScheduleDefinition(
        job=housekeeping_job(execution),
        cron_schedule="17 3 * * *",
        execution_timezone="UTC",
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description="Every night: deletes partitions beyond QA_PARTITIONS_KEPT, and Pachyderm's commits older than QA_COMMITS_KEPT_DAYS.",
    )


def housekeeping_job(execution: ExecutionSettings) -> dg.JobDefinition:
    @dg.op(description="Deletes the oldest partitions beyond QA_PARTITIONS_KEPT, but none of a file that is waiting or in progress.")
    def prune_partitions(context: dg.OpExecutionContext, platform: PlatformResource) -> None:
        _prune_partitions(context, platform, execution)

    @dg.op(description="Removes the Pachyderm commits of batches that are done and older than QA_COMMITS_KEPT_DAYS.")
    def squash_commits(context: dg.OpExecutionContext, platform: PlatformResource) -> None:
        _squash_commits(context, platform, execution)

    @dg.op(description="Compares the archive with the tables, and reports the result as a check.")
    def compare_archive(context: dg.OpExecutionContext, platform: PlatformResource) -> None:
        with failures_for_people(context, execution, next_step=_NEXT):
            log_events(context, [archive_evaluation(platform.services())])

    @dg.job(
        name="housekeeping",
        description="Keeps the numbers of Dagster's partitions and Pachyderm's commits bounded, and compares the archive with the tables.",
        executor_def=dg.in_process_executor,
    )
    def housekeeping() -> None:
        prune_partitions()
        squash_commits()
        compare_archive()

    return housekeeping


def surplus(keys: list[str], busy: set[str], keep: int) -> list[str]:
    """The oldest partitions beyond ``keep``, in the order in which they were added, without those in ``busy``."""
    return [key for key in keys[: max(0, len(keys) - keep)] if key not in busy]


def _prune_partitions(context: dg.OpExecutionContext, platform: PlatformResource, execution: ExecutionSettings) -> None:
    with failures_for_people(context, execution, next_step=_NEXT):
        services, deleted = platform.services(), 0
        with Ledger(services.postgres) as ledger:
            # Looked at again and again: deleting takes long, and meanwhile files are uploaded and backfills begin.
            while old := _deletable(context, services, ledger)[:_DELETED_TOGETHER]:
                for key in old:
                    context.instance.delete_dynamic_partition(PARTITIONS, key)
                deleted += len(old)
    context.log.info("%d partitions deleted", deleted)


def _deletable(context: dg.OpExecutionContext, services: Services, ledger: Ledger) -> list[str]:
    # A backfill whose partition is deleted before it has requested all of its runs fails for good.
    if backfills := context.instance.get_backfills_count(BulkActionsFilter(statuses=[BulkActionStatus.REQUESTED])):
        context.log.info("No partition is deleted while backfills are in progress: %d. %s", backfills, _NEXT)
        return []
    # Read before the claims: a file's partition moves to the end after it is claimed.
    keys = list(context.instance.get_dynamic_partitions(PARTITIONS))
    unfinished = ledger.names_of_unfinished()
    return surplus(keys, {partition_key(name) for name in (*unfinished, *ledger.claimed())}, services.work.partitions_kept)


def _squash_commits(context: dg.OpExecutionContext, platform: PlatformResource, execution: ExecutionSettings) -> None:
    with failures_for_people(context, execution, next_step=_NEXT):
        services = platform.services()
        squashed = squash_old(services.pachyderm, services.postgres, datetime.now(UTC) - timedelta(days=services.work.commits_kept_days))
    if squashed.denied:
        context.log.warning(
            "Old commits are kept, because Pachyderm denies permission to remove them: %s. Answering files does not need this permission",
            squashed.denied,
        )
    context.log.info("%d old commits were removed; %d are kept: in use, or Pachyderm needs them", squashed.removed, squashed.kept)
