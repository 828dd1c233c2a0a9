"""What Dagster's catalogue says of the assets: owners, columns and where they come from, version, documentation."""

from typing import Any

import dagster as dg

from qa_platform.answering.model import BUNDLED, bundled_revision
from qa_platform.contract import ANSWER_LIMIT, CONTEXT_LIMIT, MODEL_LIMIT, QUESTION_LIMIT, ModelChoice
from qa_platform.settings import CatalogSettings, ModelSettings

RAW_QUESTIONS = dg.AssetKey("raw_questions")
ANSWERED_QUESTIONS = dg.AssetKey("answered_questions")
QUESTION_ANSWER = dg.AssetKey("question_answer")
MODEL_QUALITY = dg.AssetKey("model_quality")

GROUP = "questions"
OWNERS = list(CatalogSettings().owners)
# Counted up when the same model would give other answers: files answered before count as stale in Dagster from then on.
_ANSWERING_VERSION = 1
# Of the assets that are only reported: counted up when the same upload, listing or gold set would be reported otherwise.
REPORTED_VERSION = "1"
REPORTED_TAGS = {"dagster/code_version": REPORTED_VERSION}


def documentation(page: str) -> dg.MetadataValue:
    """A page of ``docs/``: a link where QA_DOCS_URL says where they are, else its path."""
    base = CatalogSettings().docs_url.rstrip("/")
    return dg.MetadataValue.url(f"{base}/{page}") if base else dg.MetadataValue.text(f"docs/{page}")


def code_version(wanted: ModelChoice, *, revision_of_bundled: str) -> str:
    """What decides what a file's answers are: our code, and the model that is asked for, with its revision."""
    revision = revision_of_bundled if wanted.id == BUNDLED else wanted.revision
    return f"{_ANSWERING_VERSION}-{wanted.id}{f'@{revision}' if revision else ''}-{wanted.precision}"


def current_code_version() -> str:
    """The code version of what is answered from now on."""
    return code_version(ModelSettings().choice, revision_of_bundled=bundled_revision())


def _schema(*columns: tuple[str, str, str]) -> dg.TableSchema:
    return dg.TableSchema([dg.TableColumn(name, kind, description) for name, kind, description in columns])


_QUESTION = "The question; its column may stand anywhere, in any case."
_CONTEXT = "The text that the answer is a piece of."
_OTHERS = ("…", "text", "Any other columns of the upload, untouched.")

RAW_SCHEMA = _schema(("question", "text", _QUESTION), ("context", "text", _CONTEXT), _OTHERS)
ANSWERED_SCHEMA = _schema(
    ("question", "text", _QUESTION),
    ("context", "text", _CONTEXT),
    _OTHERS,
    ("answer", "text", "The piece of the context that answers the question; empty where nothing does."),
    ("score", "float", "Probability of the answer, 0 to 1."),
    ("answer_start", "integer", "Offset of the answer in the context, in characters from 0."),
    ("answer_end", "integer", "End of the answer in the context, exclusive."),
    ("model", "text", "The model that answered."),
    ("error", "text", "Why there is no answer, or low_score where the answer deserves a look; empty for the others."),
)
TABLE_SCHEMA = _schema(
    ("question", f"character varying({QUESTION_LIMIT})", "The question."),
    ("answer", f"character varying({ANSWER_LIMIT})", "The piece of the context that answers the question."),
    ("context", f"character varying({CONTEXT_LIMIT})", _CONTEXT),
    ("model", f"character varying({MODEL_LIMIT})", "The model that answered."),
    ("qa_timestamp", "timestamp without time zone", "Time of answering, UTC."),
    ("score", "double precision", "Probability of the answer, 0 to 1."),
    ("answer_start", "integer", "Offset of the answer in the context, in characters from 0."),
    ("answer_end", "integer", "End of the answer in the context, exclusive."),
    ("model_revision", "text", "Revision of the model: a commit of the hub, or the beginning of the weights' SHA-256."),
    ("model_precision", "text", "Arithmetic that the model was run with."),
    ("source_file", "text", "Name of the file below incoming/; empty for rows that other programs wrote."),
    ("generation", "bigint", "Generation of the file that the row was written from."),
    ("row_number", "bigint", "Data row of the file, from 1."),
    ("load_id", "integer", "How often this generation had been asked to be answered, from 1."),
    ("run_id", "text", "The run that read the file."),
    ("flag", "text", "low_score where the answer deserves a look."),
    ("loaded_at", "timestamp with time zone", "When the row was written."),
)


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
    """Columns and their lineage, as Dagster's pages look for them: in the definition of an asset, and with its events."""
    schema = ANSWERED_SCHEMA if asset == ANSWERED_QUESTIONS else TABLE_SCHEMA
    return {"dagster/column_schema": schema, "dagster/column_lineage": COLUMN_LINEAGE[asset]}
