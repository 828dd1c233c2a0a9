"""Everything that Dagster knows of this code location."""

import dagster as dg

from qa_platform.assets.answers import answer_files
from qa_platform.assets.raw import raw_questions
from qa_platform.housekeeping import housekeeping_schedule
from qa_platform.jobs import answer_pending_files, answer_questions
from qa_platform.resources import platform_resource
from qa_platform.sensors.heartbeat import incoming_listing
from qa_platform.sensors.incoming import incoming_files
from qa_platform.sensors.reconcile import reconcile

defs = dg.Definitions(
    assets=[raw_questions, answer_files, incoming_listing],
    jobs=[answer_questions, answer_pending_files],
    schedules=[housekeeping_schedule],
    sensors=[incoming_files, reconcile],
    resources={"platform": platform_resource},
)
