"""Housekeeping: Dagster's partitions and Pachyderm's commits stay bounded. The history of every file stays in `question_file`."""

from datetime import UTC, datetime, timedelta

import dagster as dg

from qa_platform import bookkeeping, pachd
from qa_platform.batch import Services
from qa_platform.contract import FileStatus, partition_key
from qa_platform.database import connect
from qa_platform.failures import failures_for_people
from qa_platform.partitions import PARTITIONS
from qa_platform.resources import PlatformResource

_BY_ITSELF = "the next night's run does what is left, and no file waits for it"


def surplus(keys: list[str], busy: set[str], keep: int) -> list[str]:
    """The oldest partitions beyond ``keep``, in order of adding, never one of a file that is being worked on or waits."""
    return [key for key in keys[: max(0, len(keys) - keep)] if key not in busy]


@dg.op(description="Deletes the oldest partitions beyond QA_PARTITIONS_KEPT, never one of a file that waits or is worked on.")
def prune_partitions(context: dg.OpExecutionContext, platform: PlatformResource) -> None:
    with failures_for_people(context, by_itself=_BY_ITSELF):
        services = platform.services()
        keys = list(context.instance.get_dynamic_partitions(PARTITIONS))
        with connect(services.postgres) as connection:
            unfinished = bookkeeping.names_with_status(connection, (FileStatus.PENDING, FileStatus.RUNNING, FileStatus.LOADED))
            busy = {partition_key(name) for name in (*unfinished, *bookkeeping.claimed(connection))}
        old = surplus(keys, busy, services.work.partitions_kept)
        for key in old:
            context.instance.delete_dynamic_partition(PARTITIONS, key)
    context.log.info("%d partitions, %d deleted", len(keys), len(old))


# Enough for a cluster with a batch a minute; what is left is for the next night.
_SQUASHED_AT_ONCE = 2_000


def squash_batches(services: Services, before: datetime) -> tuple[int, int]:
    """Remove the Pachyderm commits of batches from before a time whose files are all done: how many were removed, how many were kept."""
    with pachd.session(services.pachyderm, "removing old commits") as client:
        old = pachd.old_batches(client, before, limit=_SQUASHED_AT_ONCE)
        with connect(services.postgres) as connection:
            in_use = bookkeeping.commits_in_use(connection, old)
        squashed = sum(pachd.squash(client, commit) for commit in old if commit not in in_use)
    return squashed, len(old) - squashed


@dg.op(description="Removes the Pachyderm commits of batches that are done and older than QA_COMMITS_KEPT_DAYS.")
def squash_commits(context: dg.OpExecutionContext, platform: PlatformResource) -> None:
    with failures_for_people(context, by_itself=_BY_ITSELF):
        services = platform.services()
        squashed, kept = squash_batches(services, datetime.now(UTC) - timedelta(days=services.work.commits_kept_days))
    context.log.info("%d old commits were removed, %d could not be now", squashed, kept)


@dg.job(name="housekeeping", description="Keeps Dagster's partitions and Pachyderm's commits bounded.", executor_def=dg.in_process_executor)
def housekeeping() -> None:
    prune_partitions()
    squash_commits()


housekeeping_schedule = dg.ScheduleDefinition(
    job=housekeeping,
    cron_schedule="17 3 * * *",
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Every night: deletes partitions beyond QA_PARTITIONS_KEPT, and Pachyderm's commits older than QA_COMMITS_KEPT_DAYS.",
)
