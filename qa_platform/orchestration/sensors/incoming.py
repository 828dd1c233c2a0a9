"""The bucket sensor: lists ``incoming/`` and requests one run per batch of waiting files.

It is a thin wrapper around `batches.plan.plan`, which decides what to do. It keeps no cursor. It stores its events itself. A batch that
cannot be requested does not stop the others.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import chain

import dagster as dg
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

from qa_platform.batches.pending import Look, claim, keep_claims, look, record_unchanged
from qa_platform.batches.plan import Batch
from qa_platform.clients.services import Services
from qa_platform.contract import partition_key
from qa_platform.errors import TransientError
from qa_platform.ledger import Ledger
from qa_platform.orchestration.assets.answers import BatchConfig
from qa_platform.orchestration.partitions import BATCH_TAG, PARTITIONS, RANGE_END_TAG, RANGE_START_TAG, RUN_KEY_TAG
from qa_platform.orchestration.reports.runless import store
from qa_platform.orchestration.reports.uploads import uploaded
from qa_platform.orchestration.resources import PlatformResource
from qa_platform.orchestration.sensors.heartbeat import beat, summary
from qa_platform.orchestration.sensors.tick_log import TickLog
from qa_platform.orchestration.stored_runs import stored_runs
from qa_platform.settings import ExecutionSettings, WorkSettings

# While this many runs have not started, no more are requested: their files would not be answered sooner, and every tick renews the claims
# of all of these runs. That is far more than run at once, so no slot stays empty until the next tick.
_QUEUED_RUNS = 50
# The format of `new_run_key`. Other claims are owned by runs, or by the job that needs no sensor.
_RUN_KEY = re.compile(r"[0-9a-f]{32}-\d+")
# A run that is still in such a state after the tick that requested it could not be launched, and never will be.
_NOT_LAUNCHED = frozenset({dg.DagsterRunStatus.NOT_STARTED})


def incoming_files_sensor(job: UnresolvedAssetJobDefinition, work: WorkSettings, execution: ExecutionSettings) -> dg.SensorDefinition:
    @dg.sensor(
        name="incoming_files",
        job=job,
        default_status=dg.DefaultSensorStatus.RUNNING,
        minimum_interval_seconds=work.sensor_seconds,
        description="Finds CSVs under incoming/ that are not answered yet, and requests one run per batch of them.",
    )
    def incoming_files(context: dg.SensorEvaluationContext, platform: PlatformResource) -> dg.SensorResult:
        services = platform.services()
        beginning_seconds = seconds_to_begin(context.instance, services.work, execution)
        queued = queued_run_keys(context.instance, job.name, beginning_seconds=beginning_seconds)
        keep_claims(services, queued)
        # Before this tick claims anything: those claims have no run yet.
        lost = lost_requests(context.instance, services, queued)
        return _tick(context, services, lost, queued=len(queued))

    return incoming_files


@dataclass(frozen=True)
class _Request:
    """The request of a run for one batch, with the events of its uploads."""

    run: dg.RunRequest
    uploads: tuple[dg.AssetMaterialization, ...]


def _tick(context: dg.SensorEvaluationContext, services: Services, lost: Collection[str], *, queued: int) -> dg.SensorResult:
    seen = look(services)
    record_unchanged(services, seen.plan, TickLog(context))
    is_full = queued >= _QUEUED_RUNS
    requests, failed = _requests(context, services, () if is_full else seen.plan.batches)
    events = [event for request in requests for event in request.uploads]
    problem = _problem(lost, failed)
    if problem:
        context.log.error(problem)
    else:
        # Last in the tick, and only if all runs can be requested: the heartbeat says that uploads get their runs.
        events += _beat(context, services, seen)
    store(context.instance, events, TickLog(context))
    full = f"{queued} requested runs have not started; more are requested once there are fewer than {_QUEUED_RUNS}" if is_full else ""
    reason = None if requests else dg.SkipReason("\n".join(filter(None, (problem, full, summary(seen)))))
    return dg.SensorResult(run_requests=[r.run for r in requests], skip_reason=reason)


def _beat(context: dg.SensorEvaluationContext, services: Services, seen: Look) -> list[dg.AssetMaterialization]:
    """Call `beat`. If it fails, the batches that this tick has claimed must still get their runs."""
    try:
        return beat(context.instance, seen, every_seconds=services.work.heartbeat_seconds)
    except Exception as error:
        context.log.warning("The heartbeat is left out: %s", error)
        return []


def _problem(lost: Collection[str], failed: int) -> str:
    """Why uploads do not get their runs; "" if they do."""
    problems = [f"{failed} batches could not be requested; the log of this tick says why"] if failed else []
    if lost:
        problems.append(f"{len(lost)} runs were requested but do not exist; the errors of this sensor's last ticks say why")
    return ". ".join(problems)


def _requests(context: dg.SensorEvaluationContext, services: Services, batches: Sequence[Batch]) -> tuple[list[_Request], int]:
    """The requests for the batches that could be claimed, and the number of batches that raised an error."""
    instance, requests, failed = context.instance, list[_Request](), 0
    present = instance.get_dynamic_partitions(PARTITIONS) if batches else []
    for planned in batches:
        try:
            if request := _request(instance, services, planned, present):
                requests.append(request)
        except Exception as error:
            failed += 1
            context.log.warning("No run could be requested for batch %s: %s", planned.id, error)
            if isinstance(error, TransientError):
                # A service is unavailable: the other batches would fail too. Batches that are already claimed are requested.
                break
    return requests, failed


def _request(instance: dg.DagsterInstance, services: Services, batch: Batch, present: Sequence[str]) -> _Request | None:
    """Claim a batch and request its run. None if another process was faster."""
    run_key = new_run_key(instance, batch)
    if not claim(services, batch, token=run_key):
        return None
    keys = [partition_key(version.name) for version in batch.versions]
    uploads = tuple(uploaded(services.bucket, version, services.work) for version in batch.versions)
    for key in keys_to_move(present, keys, kept=services.work.partitions_kept):
        instance.delete_dynamic_partition(PARTITIONS, key)
    # Now, and not with the tick's result: a backfill in progress fails for good if it looks while one of its keys is missing.
    instance.add_dynamic_partitions(PARTITIONS, keys)
    return _Request(_run_request(batch, run_key, keys), uploads)


def keys_to_move(present: Sequence[str], keys: Sequence[str], *, kept: int) -> set[str]:
    """The existing keys that must move to the end, next to the new ones: a batch is a contiguous range of partitions.

    Empty if the keys already are that range: an earlier run of the batch, which Dagster may be starting right now, needs them too.
    They move all the same if they are so far from the end that housekeeping, which keeps the last ``kept``, might soon delete them.
    """
    existing = set(keys).intersection(present)
    if len(existing) == len(keys):
        first = present.index(keys[0])
        if list(present[first : first + len(keys)]) == list(keys) and first >= len(present) - max(len(keys), kept // 2):
            return set()
    return existing


def seconds_to_begin(instance: dg.DagsterInstance, work: WorkSettings, execution: ExecutionSettings) -> float:
    """How long a run that Dagster reports as started may take until its step takes over the claims."""
    if execution.executor == "in_process":
        return work.lease_seconds
    # The step has its own pod, which may start as slowly as the run's pod.
    return max(work.lease_seconds, instance.run_monitoring_start_timeout_seconds)


def queued_run_keys(instance: dg.DagsterInstance, job_name: str, *, beginning_seconds: float) -> list[str]:
    """The run keys of runs that have not yet taken over their claims. Until then, the run key owns the claims.

    The runs:

    - in the queue;
    - starting, for as long as Dagster waits for them. Otherwise another request would claim the files of a pod that starts slowly;
    - started less than ``beginning_seconds`` ago.
    """
    now = datetime.now(UTC)
    starting_since = now - timedelta(seconds=instance.run_monitoring_start_timeout_seconds)
    begun_since = now - timedelta(seconds=beginning_seconds)
    filters = (
        dg.RunsFilter(job_name=job_name, statuses=[dg.DagsterRunStatus.QUEUED]),
        dg.RunsFilter(job_name=job_name, statuses=[dg.DagsterRunStatus.STARTING], updated_after=starting_since),
        dg.RunsFilter(job_name=job_name, statuses=[dg.DagsterRunStatus.STARTED], updated_after=begun_since),
    )
    runs = chain.from_iterable(stored_runs(instance, wanted) for wanted in filters)
    return [run.tags[RUN_KEY_TAG] for run in runs if RUN_KEY_TAG in run.tags]


def lost_requests(instance: dg.DagsterInstance, services: Services, queued: Collection[str]) -> set[str]:
    """The keys of earlier ticks' requests that did not become a run, or whose run was never launched. Their files are still claimed.

    A tick's requests are submitted before the next tick begins. If that fails, for example because Dagster's storage refuses them, the
    files stay claimed until the claims expire, and are then requested again.

    Args:
        queued: run keys of runs that exist.
    """
    with Ledger(services.postgres) as ledger:
        owners = ledger.waiting_claims(expired_for=services.work.heartbeat_fails_after)
    unknown = {owner for owner in owners.keys() - set(queued) if _RUN_KEY.fullmatch(owner)}
    launched = [status for status in dg.DagsterRunStatus if status not in _NOT_LAUNCHED]
    return {key for key in unknown if not instance.get_runs_count(dg.RunsFilter(tags={RUN_KEY_TAG: key}, statuses=launched))}


def new_run_key(instance: dg.DagsterInstance, batch: Batch) -> str:
    """A run key that was never used: a batch that is retried after a failure gets a new run."""
    number = instance.get_runs_count(dg.RunsFilter(tags={BATCH_TAG: batch.id})) + 1
    # If runs were deleted, the count alone may give the key of an existing run.
    while instance.get_runs_count(dg.RunsFilter(tags={RUN_KEY_TAG: f"{batch.id}-{number}"})):
        number += 1
    return f"{batch.id}-{number}"


def _run_request(batch: Batch, run_key: str, keys: list[str]) -> dg.RunRequest:
    return dg.RunRequest(
        run_key=run_key,
        run_config=dg.RunConfig(ops={"answer_files": BatchConfig.of(batch, token=run_key)}),
        tags={RANGE_START_TAG: keys[0], RANGE_END_TAG: keys[-1], BATCH_TAG: batch.id},
    )
