"""The sensor `platform_status`: reports the state of the platform, when something has changed and every hour."""

import math
import time

import dagster as dg
from dagster._core.definitions.data_version import DATA_VERSION_TAG

from qa_platform.orchestration.catalog import PLATFORM_STATUS
from qa_platform.orchestration.reports.runless import store
from qa_platform.orchestration.reports.status import read_figures, status_event
from qa_platform.orchestration.resources import PlatformResource
from qa_platform.orchestration.sensors.tick_log import TickLog
from qa_platform.settings import CheckSettings, WorkSettings

# How often it is reported even if nothing happens: the numbers cover the last 24 hours, so they change anyway.
_EVERY_SECONDS = 3_600


def platform_status_sensor(work: WorkSettings) -> dg.SensorDefinition:
    @dg.sensor(
        name="platform_status",
        default_status=dg.DefaultSensorStatus.RUNNING,
        # As often as the heartbeat, and for the same reason: each report is an event in Dagster's log.
        minimum_interval_seconds=work.heartbeat_seconds,
        description="Reports the asset platform_status: when a file has changed its state, and at least every hour.",
    )
    def report_status(context: dg.SensorEvaluationContext, platform: PlatformResource) -> dg.SkipReason:
        return _tick(context, platform)

    return report_status


def _tick(context: dg.SensorEvaluationContext, platform: PlatformResource) -> dg.SkipReason:
    settings = CheckSettings()
    figures = read_figures(platform.services(), settings)
    last = context.instance.get_latest_materialization_event(PLATFORM_STATUS)
    tags = (last.asset_materialization.tags or {}) if last and last.asset_materialization else {}
    age = time.time() - last.timestamp if last else math.inf
    if 0 <= age < _EVERY_SECONDS and tags.get(DATA_VERSION_TAG) == figures.version:
        return dg.SkipReason(f"nothing has changed since the last report, {age:.0f} s ago")
    event = status_event(figures, settings)
    store(context.instance, [event], TickLog(context))
    return dg.SkipReason(f"reported: {event.description}")
