"""Events that sensors store themselves, outside of a run: uploads, the heartbeat, and the reports of files whose run was lost.

Dagster's daemon would store the events that a tick returns before it submits the tick's run requests. One refused event would then cost
all of the requests.
"""

import logging
import time
import uuid
from collections.abc import Sequence
from itertools import groupby

import dagster as dg
from dagster._core.definitions.data_version import DATA_VERSION_TAG
from dagster._core.events import DagsterEvent, DagsterEventType, StepMaterializationData
from dagster._core.instance.utils import RUNLESS_JOB_NAME, RUNLESS_RUN_ID

from qa_platform.clients.services import Log
from qa_platform.contract import partition_key
from qa_platform.ledger import FileRecord
from qa_platform.orchestration.catalog import QUESTION_ANSWER
from qa_platform.orchestration.reports.events import Event, Reporter, answers_version

# Events that are not stored within this time are left out: Dagster ends a tick after 60 s.
_SECONDS = 20.0
_IDENTITIES = uuid.UUID("6b1f5f0e-6c0c-4d43-9d0c-0a9f6f6c6d1e")


def store(instance: dg.DagsterInstance, events: Sequence[dg.AssetMaterialization], log: Log) -> None:
    """Store materialisations that belong to no run. One that cannot be stored is logged, and the others are stored."""
    # Dagster updates only the asset of a batch's last event.
    for _, alike in groupby(sorted(events, key=_asset), key=_asset):
        batch = list(alike)
        try:
            # Several hundred events in two transactions. One by one, each takes several connections.
            instance.event_log_storage.store_event_batch([_entry(event) for event in batch])
        except Exception as error:
            log.warning("%d events of %s could not be stored at once: %s", len(batch), _asset(batch[0]), error)
            _store_each(instance, batch, log)


def _store_each(instance: dg.DagsterInstance, events: Sequence[dg.AssetMaterialization], log: Log) -> None:
    until = time.monotonic() + _SECONDS
    for number, event in enumerate(events):
        if time.monotonic() > until:
            log.warning("%d events are left out: storing the %d before took %.0f s", len(events) - number, number, _SECONDS)
            break
        try:
            instance.report_runless_asset_event(event)
        except Exception as error:
            log.warning("An event of %s (%s) could not be stored: %s", _asset(event), event.partition, error)


def _asset(event: dg.AssetMaterialization) -> str:
    return event.asset_key.to_user_string()


def _entry(event: dg.AssetMaterialization) -> dg.EventLogEntry:
    return dg.EventLogEntry(
        error_info=None,
        level=logging.INFO,
        user_message="",
        run_id=RUNLESS_RUN_ID,
        timestamp=time.time(),
        job_name=RUNLESS_JOB_NAME,
        dagster_event=_dagster_event(event, job_name=RUNLESS_JOB_NAME),
    )


def is_reported(instance: dg.DagsterInstance, record: FileRecord) -> bool:
    """Whether all events of a loaded file are in Dagster, judged by the last of them, the materialisation of `question_answer`."""
    key = partition_key(record.version.name)
    newest = instance.event_log_storage.get_latest_tags_by_partition(
        QUESTION_ANSWER, DagsterEventType.ASSET_MATERIALIZATION, [DATA_VERSION_TAG], [key]
    )
    return newest.get(key, {}).get(DATA_VERSION_TAG) == answers_version(record)


def report_lost(instance: dg.DagsterInstance, reporter: Reporter, record: FileRecord) -> list[dg.AssetCheckEvaluation]:
    """Report a loaded file whose run died before it could report it. Does nothing if the file is reported already.

    The events belong to the lost run, even if Dagster has deleted it. Dagster accepts one evaluation per check, partition and run: events
    without a run would be refused when a file of the same name needs this again.

    Returns:
        The checks that were stored.
    """
    if is_reported(instance, record):
        return []
    events = list(reporter.file_events([record]))
    run_id = record.dagster_run or _identity(record)
    run = instance.get_run_by_id(run_id)
    for event in events:
        instance.report_dagster_event(_dagster_event(event, job_name=run.job_name if run else ""), run_id=run_id)
    return [event for event in events if isinstance(event, dg.AssetCheckEvaluation)]


def _identity(record: FileRecord) -> str:
    """The run id for a file that was answered without Dagster: each answer of each version has its own."""
    return str(uuid.uuid5(_IDENTITIES, f"{record.version.name}\0{answers_version(record)}"))


def _dagster_event(event: Event, *, job_name: str) -> DagsterEvent:
    if isinstance(event, dg.AssetMaterialization):
        kind, data = DagsterEventType.ASSET_MATERIALIZATION, StepMaterializationData(event)
        return DagsterEvent(event_type_value=kind.value, job_name=job_name, event_specific_data=data)
    return DagsterEvent(event_type_value=DagsterEventType.ASSET_CHECK_EVALUATION.value, job_name=job_name, event_specific_data=event)  # type: ignore[arg-type]
