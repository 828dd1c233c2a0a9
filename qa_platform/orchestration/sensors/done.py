"""The sensor `done_files`: archives the sources of done files, and reports files whose run was lost.

It is a separate sensor, so that trouble with a done file never delays a waiting one.
"""

from collections.abc import Sequence

import dagster as dg

from qa_platform.batches.pending import archive_done
from qa_platform.clients.services import Services
from qa_platform.ledger import FileRecord
from qa_platform.orchestration.notifications import notify_of_failed_checks
from qa_platform.orchestration.reports.events import Reporter
from qa_platform.orchestration.reports.runless import report_lost
from qa_platform.orchestration.resources import PlatformResource
from qa_platform.orchestration.sensors.tick_log import TickLog
from qa_platform.results.published import publish
from qa_platform.settings import NotificationSettings, WorkSettings


def done_files_sensor(work: WorkSettings, notifications: NotificationSettings) -> dg.SensorDefinition:
    @dg.sensor(
        name="done_files",
        default_status=dg.DefaultSensorStatus.RUNNING,
        minimum_interval_seconds=work.sensor_seconds,
        description="Archives the sources of done files if their runs could not, reports the files of lost runs, and writes answered CSVs.",
    )
    def done_files(context: dg.SensorEvaluationContext, platform: PlatformResource) -> dg.SkipReason:
        services = platform.services()
        return _tick(context, services, platform.reporter(services), notifications)

    return done_files


def _tick(
    context: dg.SensorEvaluationContext, services: Services, reporter: Reporter, notifications: NotificationSettings
) -> dg.SkipReason:
    evaluations: list[dg.AssetCheckEvaluation] = []

    def report(records: Sequence[FileRecord]) -> None:
        for record in records:
            evaluations.extend(report_lost(context.instance, reporter, record))

    log = TickLog(context)
    left = archive_done(services, log, report=report)
    notify_of_failed_checks(notifications, evaluations, log)
    # Last: it may take the longest, and nothing waits for it.
    unwritten = publish(services, log)
    why = "every file that is done is archived"
    if left:
        why = f"{left} files that are done are not archived yet; where an attempt failed, `qa-platform status FILE` says why"
    return dg.SkipReason(f"{why}; {unwritten} answered CSVs are still to be written" if unwritten else why)
