"""Housekeeping: Dagster's partitions stay bounded. The history of every file stays in the table `question_file`."""

import dagster as dg

from qa_platform import bookkeeping
from qa_platform.contract import FileStatus, partition_key
from qa_platform.database import connect
from qa_platform.partitions import PARTITIONS
from qa_platform.resources import PlatformResource


def surplus(keys: list[str], busy: set[str], keep: int) -> list[str]:
    """The oldest partitions beyond ``keep``, in order of adding, never one of a file that is being worked on or waits."""
    return [key for key in keys[: max(0, len(keys) - keep)] if key not in busy]


@dg.op(description="Deletes the oldest partitions beyond QA_PARTITIONS_KEPT, never one of a file that waits or is worked on.")
def prune_partitions(context: dg.OpExecutionContext, platform: PlatformResource) -> None:
    services = platform.services()
    keys = list(context.instance.get_dynamic_partitions(PARTITIONS))
    with connect(services.postgres) as connection:
        unfinished = bookkeeping.names_with_status(connection, (FileStatus.PENDING, FileStatus.RUNNING, FileStatus.LOADED))
        busy = {partition_key(name) for name in (*unfinished, *bookkeeping.claimed(connection))}
    old = surplus(keys, busy, services.work.partitions_kept)
    for key in old:
        context.instance.delete_dynamic_partition(PARTITIONS, key)
    context.log.info("%d partitions, %d deleted", len(keys), len(old))


@dg.job(name="housekeeping", description="Keeps Dagster's partitions bounded.", executor_def=dg.in_process_executor)
def housekeeping() -> None:
    prune_partitions()


housekeeping_schedule = dg.ScheduleDefinition(
    job=housekeeping, cron_schedule="17 3 * * *", default_status=dg.DefaultScheduleStatus.RUNNING, execution_timezone="UTC"
)
