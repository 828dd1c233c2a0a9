"""The assets as Dagster's catalogue shows them: keys, owners, columns and their lineage, versions, links to the documentation."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import dagster as dg

from qa_platform.clients.schema import ANSWERS
from qa_platform.settings import CatalogSettings

RAW_QUESTIONS = dg.AssetKey("raw_questions")
ANSWERED_QUESTIONS = dg.AssetKey("answered_questions")
QUESTION_ANSWER = dg.AssetKey("question_answer")
MODEL_QUALITY = dg.AssetKey("model_quality")
PLATFORM_STATUS = dg.AssetKey("platform_status")

_GROUP = "questions"
# The version of assets that are only reported. Incremented when the same upload, listing or gold set would be reported differently.
REPORTED_VERSION = "1"
REPORTED_TAGS = {"dagster/code_version": REPORTED_VERSION}


def documentation(settings: CatalogSettings, page: str) -> dg.MetadataValue:
    """A page of ``docs/``: a link if QA_DOCS_URL is set, else its path."""
    base = settings.docs_url.rstrip("/")
    return dg.MetadataValue.url(f"{base}/{page}") if base else dg.MetadataValue.text(f"docs/{page}")


@dataclass(frozen=True)
class AssetFactory:
    """Makes the specs of the platform's assets, which share the group, the owners and the documentation."""

    settings: CatalogSettings

    def spec(
        self,
        key: dg.AssetKey,
        *,
        description: str,
        kinds: set[str],
        page: str,
        version: str = REPORTED_VERSION,
        deps: Iterable[dg.AssetKey] = (),
        metadata: Mapping[str, Any] | None = None,
        skippable: bool = False,
        partitions: dg.PartitionsDefinition | None = None,
        freshness: dg.FreshnessPolicy | None = None,
    ) -> dg.AssetSpec:
        """A spec. ``page``: the page of ``docs/`` that describes the asset. ``version``: its code version."""
        return dg.AssetSpec(
            key,
            description=description,
            deps=list(deps),
            skippable=skippable,
            group_name=_GROUP,
            owners=list(self.settings.owners),
            kinds=kinds,
            code_version=version,
            metadata={**(metadata or {}), "documentation": documentation(self.settings, page)},
            partitions_def=partitions,
            freshness_policy=freshness,
        )


def _schema(*columns: tuple[str, str, str]) -> dg.TableSchema:
    return dg.TableSchema([dg.TableColumn(name, kind, description) for name, kind, description in columns])


_QUESTION = "The question. The column may be anywhere, in upper or lower case."
_CONTEXT = "The text that contains the answer."
_OTHERS = ("…", "text", "The other columns of the upload, unchanged.")

RAW_SCHEMA = _schema(("question", "text", _QUESTION), ("context", "text", _CONTEXT), _OTHERS)
ANSWERED_SCHEMA = _schema(
    ("question", "text", _QUESTION),
    ("context", "text", _CONTEXT),
    _OTHERS,
    ("answer", "text", "The part of the context that answers the question; empty if there is none."),
    ("score", "float", "Probability of the answer, 0 to 1."),
    ("answer_start", "integer", "Offset of the answer in the context, in characters from 0."),
    ("answer_end", "integer", "End of the answer in the context, exclusive."),
    ("model", "text", "The model that answered."),
    ("error", "text", "Why there is no answer; low_score if the answer should be checked; otherwise empty."),
)
TABLE_SCHEMA = _schema(*((column.name, column.type, column.description) for column in ANSWERS.columns))


def _lineage(upstream: dict[str, list[tuple[dg.AssetKey, str]]]) -> dg.TableColumnLineage:
    return dg.TableColumnLineage({name: [dg.TableColumnDep(asset, column) for asset, column in deps] for name, deps in upstream.items()})


_BOTH = [(RAW_QUESTIONS, "question"), (RAW_QUESTIONS, "context")]
_FOUND = ("answer", "score", "answer_start", "answer_end", "error")
_KEPT = ("question", "context", "answer", "score", "answer_start", "answer_end", "model")

COLUMN_LINEAGE = {
    ANSWERED_QUESTIONS: _lineage(
        {name: [(RAW_QUESTIONS, name)] for name in ("question", "context", "…")} | {name: list(_BOTH) for name in _FOUND}
    ),
    QUESTION_ANSWER: _lineage({name: [(ANSWERED_QUESTIONS, name)] for name in _KEPT} | {"flag": [(ANSWERED_QUESTIONS, "error")]}),
}


def table_metadata(asset: dg.AssetKey) -> dict[str, Any]:
    """An asset's columns and their lineage, under Dagster's own metadata keys. For its definition and its events."""
    schema = ANSWERED_SCHEMA if asset == ANSWERED_QUESTIONS else TABLE_SCHEMA
    return {"dagster/column_schema": schema, "dagster/column_lineage": COLUMN_LINEAGE[asset]}
