"""`model_quality`: exact match and F1 on the gold sets. Measured whenever a gold set is answered, or by running the check."""

import dagster as dg

from qa_platform.orchestration.catalog import MODEL_QUALITY, QUESTION_ANSWER, AssetFactory
from qa_platform.orchestration.failures import failures_for_people
from qa_platform.orchestration.reports.gold import GOOD_ENOUGH, measure_gold_sets
from qa_platform.orchestration.resources import PlatformResource
from qa_platform.settings import ExecutionSettings

_NEXT = "it is measured again when the next gold set is answered"


def model_quality(factory: AssetFactory) -> dg.AssetSpec:
    return factory.spec(
        MODEL_QUALITY,
        deps=[QUESTION_ANSWER],
        description="The quality of the answers: exact match and F1, in percent, on the gold sets. A gold set is a file of questions "
        "below `gold/` (QA_GOLD_PREFIX) with a column `answers`. It is answered like any other file, and then measured.",
        kinds={"postgres"},
        page="model.md",
    )


def gold_check(execution: ExecutionSettings) -> dg.AssetChecksDefinition:
    """The check of the model's quality."""

    @dg.asset_check(
        asset=MODEL_QUALITY,
        name=GOOD_ENOUGH,
        description="Warning. Exact match and F1 of every gold set are at least QA_GOLD_EXACT_MATCH and QA_GOLD_F1.",
    )
    def gold_sets_are_answered_well(context: dg.AssetCheckExecutionContext, platform: PlatformResource) -> dg.AssetCheckResult:
        with failures_for_people(context.op_execution_context, execution, next_step=_NEXT):
            reporter = platform.reporter(platform.services())
            measurement = measure_gold_sets(reporter.services, reporter.checks)
        return dg.AssetCheckResult(passed=measurement.passed, severity=dg.AssetCheckSeverity.WARN, metadata=measurement.metadata)

    return gold_sets_are_answered_well
