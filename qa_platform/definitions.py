"""The code location: everything that Dagster loads."""

import dagster as dg

from qa_platform.orchestration.assets.answers import answer_files_asset
from qa_platform.orchestration.assets.archive import archive_check
from qa_platform.orchestration.assets.model_quality import gold_check, model_quality
from qa_platform.orchestration.assets.raw import raw_questions
from qa_platform.orchestration.catalog import AssetFactory
from qa_platform.orchestration.housekeeping import housekeeping_schedule
from qa_platform.orchestration.jobs import answer_pending_files_job, answer_questions_job
from qa_platform.orchestration.notifications import notification_sensors
from qa_platform.orchestration.reports.status import platform_status
from qa_platform.orchestration.resources import platform_resource
from qa_platform.orchestration.sensors.done import done_files_sensor
from qa_platform.orchestration.sensors.heartbeat import incoming_listing
from qa_platform.orchestration.sensors.incoming import incoming_files_sensor
from qa_platform.orchestration.sensors.reconcile import reconcile_sensor
from qa_platform.orchestration.sensors.status import platform_status_sensor
from qa_platform.settings import (
    BucketSettings,
    CatalogSettings,
    ExecutionSettings,
    ModelSettings,
    NotificationSettings,
    WorkSettings,
    settings_errors,
)


def build_definitions() -> dg.Definitions:
    """Build the definitions from the settings in the environment."""
    catalog, work = CatalogSettings(), WorkSettings()
    execution, notifications = ExecutionSettings(), NotificationSettings()
    factory = AssetFactory(catalog)
    answer_questions = answer_questions_job(execution)
    return dg.Definitions(
        assets=[
            raw_questions(factory, expected_hours=catalog.expected_hours),
            answer_files_asset(factory, ModelSettings().choice, execution, work),
            model_quality(factory),
            incoming_listing(factory, work),
            platform_status(factory),
        ],
        asset_checks=[gold_check(execution), archive_check(execution)],
        jobs=[answer_questions, answer_pending_files_job(execution)],
        schedules=[housekeeping_schedule(execution)],
        sensors=[
            incoming_files_sensor(answer_questions, work, execution),
            done_files_sensor(work, notifications),
            reconcile_sensor(work),
            platform_status_sensor(work),
            *notification_sensors(notifications),
        ],
        resources={"platform": platform_resource(BucketSettings())},
    )


with settings_errors():
    defs = build_definitions()
