"""The asset check of the archive, as a step that people can run. The job `housekeeping` reports it every night."""

import dagster as dg

from qa_platform.orchestration.catalog import RAW_QUESTIONS
from qa_platform.orchestration.failures import failures_for_people
from qa_platform.orchestration.reports.archive import ARCHIVED, DESCRIPTION, archive_evaluation
from qa_platform.orchestration.reports.checks import as_result
from qa_platform.orchestration.resources import PlatformResource
from qa_platform.settings import ExecutionSettings

_NEXT = "it is checked again every night"


def archive_check(execution: ExecutionSettings) -> dg.AssetChecksDefinition:
    # A check of `raw_questions`: a check of `question_answer` would be part of every run that answers files.
    @dg.asset_check(asset=RAW_QUESTIONS, name=ARCHIVED, description=DESCRIPTION)
    def the_archive_is_in_the_table(context: dg.AssetCheckExecutionContext, platform: PlatformResource) -> dg.AssetCheckResult:
        with failures_for_people(context.op_execution_context, execution, next_step=_NEXT):
            return as_result(archive_evaluation(platform.services()))

    return the_archive_is_in_the_table
