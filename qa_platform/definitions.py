"""Everything that Dagster knows of this code location."""

import dagster as dg

from qa_platform.assets.answers import answer_files
from qa_platform.assets.quality import gold_sets_are_answered_well, model_quality
from qa_platform.assets.raw import raw_questions
from qa_platform.housekeeping import housekeeping_schedule
from qa_platform.jobs import answer_pending_files, answer_questions
from qa_platform.notifying import notification_sensors
from qa_platform.resources import platform_resource
from qa_platform.sensors.heartbeat import incoming_listing
from qa_platform.sensors.incoming import incoming_files
from qa_platform.sensors.reconcile import reconcile
from qa_platform.settings import NotificationSettings

defs = dg.Definitions(
    assets=[raw_questions, answer_files, model_quality, incoming_listing],
    asset_checks=[gold_sets_are_answered_well],
    jobs=[answer_questions, answer_pending_files],
    schedules=[housekeeping_schedule],
    sensors=[incoming_files, reconcile, *notification_sensors(NotificationSettings())],
    resources={"platform": platform_resource},
)
