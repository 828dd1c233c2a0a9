"""The model's exact match and F1 on the gold sets, as the metadata of an event and the result of a check."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import dagster as dg

from qa_platform.clients.services import Services
from qa_platform.errors import InputError
from qa_platform.ledger import FileRecord, Ledger
from qa_platform.orchestration.catalog import MODEL_QUALITY, REPORTED_TAGS
from qa_platform.orchestration.reports.markdown import table
from qa_platform.results.gold import Quality, combined, gold_sets, measure
from qa_platform.settings import CheckSettings

GOOD_ENOUGH = "gold_sets_are_answered_well"


def quality_events(services: Services, settings: CheckSettings) -> Iterator[dg.AssetMaterialization | dg.AssetCheckEvaluation]:
    """The events of `model_quality` after a run that answered a gold set."""
    measurement = measure_gold_sets(services, settings)
    yield dg.AssetMaterialization(asset_key=MODEL_QUALITY, metadata=measurement.metadata, tags=REPORTED_TAGS)
    yield dg.AssetCheckEvaluation(
        asset_key=MODEL_QUALITY,
        check_name=GOOD_ENOUGH,
        passed=measurement.passed,
        severity=dg.AssetCheckSeverity.WARN,
        metadata=measurement.metadata,
    )


@dataclass(frozen=True)
class Measurement:
    """Whether every gold set could be measured and passes, and the figures."""

    passed: bool
    metadata: dict[str, Any]


def measure_gold_sets(services: Services, settings: CheckSettings) -> Measurement:
    """Measure the newest answers of every gold set. This downloads all of them."""
    with Ledger(services.postgres) as ledger:
        records = gold_sets(ledger, settings.gold_prefix)
    measured: dict[str, Quality] = {}
    unusable: dict[str, str] = {}
    for record in records:
        try:
            measured[record.version.name] = measure(services, record)
        except InputError as error:
            # The table already names the file.
            line = error.where.removeprefix(record.version.name).removeprefix(", ")
            unusable[record.version.shown] = "; ".join(filter(None, (f"{line}: {error.what}" if line else error.what, error.advice)))
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
    return Measurement(good and not unusable, metadata)


def _figures(measured: dict[str, Quality], records: list[FileRecord], settings: CheckSettings) -> dict[str, Any]:
    total = combined(list(measured.values()))
    sets = [(r.version.shown, q.questions, q.exact_match, q.f1, _model(r)) for r in records if (q := measured[r.version.name])]
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
