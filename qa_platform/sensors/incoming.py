"""The bucket sensor: looks under ``incoming/`` and requests one run per batch of files that wait.

It is a thin wrapper: what is to be done is decided by `planning.plan`. It keeps no cursor.
"""

from datetime import UTC, datetime, timedelta

import dagster as dg

from qa_platform.assets.answers import BatchConfig
from qa_platform.assets.raw import uploaded
from qa_platform.contract import partition_key
from qa_platform.jobs import answer_questions
from qa_platform.notifying import tell_of_failed_checks
from qa_platform.partitions import BATCH_TAG, PARTITIONS, RANGE_END_TAG, RANGE_START_TAG, question_files
from qa_platform.planning import Batch
from qa_platform.reporting import file_events
from qa_platform.resources import PlatformResource
from qa_platform.sensors.heartbeat import beat, summary
from qa_platform.settings import WorkSettings
from qa_platform.waiting import claim, keep_claims, look, tidy

# Dagster's own tag for the key of the request that a run comes from.
_RUN_KEY_TAG = "dagster/run_key"
_NOT_BEGUN = (dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED)
# For how many leases more the claims of a run that is starting are renewed. With one lease alone a pod that starts slowly would find
# its files claimed for the next request, and that one's for the one after it. Not for ever: the daemon may be lost while it starts one.
_STARTING_LEASES = 1


@dg.sensor(
    name="incoming_files",
    job=answer_questions,
    default_status=dg.DefaultSensorStatus.RUNNING,
    minimum_interval_seconds=WorkSettings().sensor_seconds,
    description="Finds CSVs under incoming/ that are not answered yet, and requests one run per batch of them.",
)
def incoming_files(context: dg.SensorEvaluationContext, platform: PlatformResource) -> dg.SensorResult:
    services = platform.services()
    keep_claims(services, _queued_run_keys(context.instance, starting_seconds=_STARTING_LEASES * services.work.lease_seconds))
    found = look(services)
    requests: list[dg.RunRequest] = []
    partitions: list[dg.AddDynamicPartitionsRequest] = []
    events: list[dg.AssetMaterialization | dg.AssetObservation | dg.AssetCheckEvaluation] = [*beat(context.instance, found)]
    tidy(services, found.plan, context.log, report=lambda records: events.extend(file_events(services, records)))
    tell_of_failed_checks([event for event in events if isinstance(event, dg.AssetCheckEvaluation)], context.log)
    present = set(context.instance.get_dynamic_partitions(PARTITIONS)) if found.plan.batches else set()
    for planned in found.plan.batches:
        run_key = _run_key(context.instance, planned)
        batch = claim(services, planned, token=run_key)
        if batch is None:
            continue
        keys = [partition_key(version.name) for version in batch.versions]
        # A batch is a contiguous range of partitions, so the keys that are there already move to the end, with the new ones. Dagster
        # takes no result that both deletes and adds a key, hence at once.
        for key in present.intersection(keys):
            context.instance.delete_dynamic_partition(PARTITIONS, key)
        partitions.append(question_files.build_add_request(keys))
        events += [uploaded(services.bucket, version, archive=services.work.archive) for version in batch.versions]
        requests.append(_request(batch, run_key, keys))
    reason = None if requests else dg.SkipReason(summary(found))
    return dg.SensorResult(run_requests=requests, dynamic_partitions_requests=partitions, asset_events=events, skip_reason=reason)


def _queued_run_keys(instance: dg.DagsterInstance, *, starting_seconds: float) -> list[str]:
    """The run keys, which are what files are claimed with, of the runs that wait, or have been starting no longer than so many seconds."""
    starting_since = datetime.now(UTC) - timedelta(seconds=starting_seconds)
    waiting = dg.RunsFilter(job_name=answer_questions.name, statuses=list(_NOT_BEGUN))
    starting = dg.RunsFilter(job_name=answer_questions.name, statuses=[dg.DagsterRunStatus.STARTING], updated_after=starting_since)
    runs = [*instance.get_runs(waiting), *instance.get_runs(starting)]
    return [run.tags[_RUN_KEY_TAG] for run in runs if _RUN_KEY_TAG in run.tags]


def _run_key(instance: dg.DagsterInstance, batch: Batch) -> str:
    """A run key that was never used: a batch that comes again, after a failure, is a new run."""
    number = instance.get_runs_count(dg.RunsFilter(tags={BATCH_TAG: batch.id})) + 1
    # Where somebody has deleted runs, the count alone gives a key that a later one has.
    while instance.get_runs_count(dg.RunsFilter(tags={_RUN_KEY_TAG: f"{batch.id}-{number}"})):
        number += 1
    return f"{batch.id}-{number}"


def _request(batch: Batch, run_key: str, keys: list[str]) -> dg.RunRequest:
    return dg.RunRequest(
        run_key=run_key,
        run_config=dg.RunConfig(ops={"answer_files": BatchConfig.of(batch, token=run_key)}),
        tags={RANGE_START_TAG: keys[0], RANGE_END_TAG: keys[-1], BATCH_TAG: batch.id},
    )
