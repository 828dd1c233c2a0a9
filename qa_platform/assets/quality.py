"""`model_quality`: exact match and F1 on the gold sets. Measured whenever one of them is answered, or by running its check."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import dagster as dg

from qa_platform.assets.catalog import GROUP, MODEL_QUALITY, OWNERS, QUESTION_ANSWER, REPORTED_TAGS, REPORTED_VERSION, documentation
from qa_platform.batch import Services
from qa_platform.bookkeeping import FileRecord
from qa_platform.database import connect
from qa_platform.errors import InputError
from qa_platform.failures import failures_for_people
from qa_platform.markdown import table
from qa_platform.quality import Quality, gold_sets, measure, together
from qa_platform.resources import PlatformResource
from qa_platform.settings import CheckSettings

GOOD_ENOUGH = "gold_sets_are_answered_well"

model_quality = dg.AssetSpec(
    MODEL_QUALITY,
    deps=[QUESTION_ANSWER],
    description="How good the answers are: exact match and F1, in percent, on the gold sets. A gold set is a file of questions below "
    "`gold/` (QA_GOLD_PREFIX) with a column `answers`; it is answered like any other, and measured whenever it was.",
    group_name=GROUP,
    owners=OWNERS,
    kinds={"postgres"},
    code_version=REPORTED_VERSION,
    metadata={"documentation": documentation("model.md")},
)


@dg.asset_check(
    asset=MODEL_QUALITY,
    name=GOOD_ENOUGH,
    description="Warning. Exact match and F1 of every gold set are at least QA_GOLD_EXACT_MATCH and QA_GOLD_F1.",
)
def gold_sets_are_answered_well(context: dg.AssetCheckExecutionContext, platform: PlatformResource) -> dg.AssetCheckResult:
    with failures_for_people(context.op_execution_context, by_itself="this is measured anew with the next gold set that is answered"):
        found = _measure_all(platform.services(), CheckSettings())
    return dg.AssetCheckResult(passed=found.good_enough, severity=dg.AssetCheckSeverity.WARN, metadata=found.metadata)


def quality_events(services: Services, settings: CheckSettings) -> Iterator[dg.AssetMaterialization | dg.AssetCheckEvaluation]:
    """What a run that answered a gold set tells of the model."""
    found = _measure_all(services, settings)
    yield dg.AssetMaterialization(asset_key=MODEL_QUALITY, metadata=found.metadata, tags=REPORTED_TAGS)
    yield dg.AssetCheckEvaluation(
        asset_key=MODEL_QUALITY,
        check_name=GOOD_ENOUGH,
        passed=found.good_enough,
        severity=dg.AssetCheckSeverity.WARN,
        metadata=found.metadata,
    )


@dataclass(frozen=True)
class _Found:
    good_enough: bool
    metadata: dict[str, Any]


def _measure_all(services: Services, settings: CheckSettings) -> _Found:
    with connect(services.postgres) as connection:
        records = gold_sets(connection, settings.gold_prefix)
    measured: dict[str, Quality] = {}
    unusable: dict[str, str] = {}
    for record in records:
        try:
            measured[record.version.name] = measure(services, record)
        except InputError as error:
            unusable[record.version.name] = str(error)
    metadata: dict[str, Any] = {"gold sets": len(records)}
    if not records:
        metadata["note"] = (
            f"nothing to measure: upload a CSV with the columns question, context and answers as {settings.gold_prefix}NAME.csv"
        )
    if measured:
        metadata |= _figures(measured, [record for record in records if record.version.name in measured], settings)
    if unusable:
        metadata["not measured"] = dg.MetadataValue.md(table(("gold set", "why"), list(unusable.items())))
    good = all(q.exact_match >= settings.gold_exact_match and q.f1 >= settings.gold_f1 for q in measured.values())
    return _Found(good and not unusable, metadata)


def _figures(measured: dict[str, Quality], records: list[FileRecord], settings: CheckSettings) -> dict[str, Any]:
    total = together(list(measured.values()))
    sets = [(r.version.name, q.questions, q.exact_match, q.f1, _model(r)) for r in records if (q := measured[r.version.name])]
    mistakes = [(m.question, m.answer, " / ".join(m.right), m.f1) for m in total.mistakes]
    return {
        "exact match": total.exact_match,
        "F1": total.f1,
        "questions": total.questions,
        "warns below": f"exact match {settings.gold_exact_match:g}, F1 {settings.gold_f1:g}",
        "by gold set": dg.MetadataValue.md(table(("gold set", "questions", "exact match", "F1", "model"), sets)),
        "worst mistakes": dg.MetadataValue.md(table(("question", "answer", "right", "F1"), mistakes)),
    }


def _model(record: FileRecord) -> str:
    return f"{record.model} {record.model_revision} {record.model_precision}"
