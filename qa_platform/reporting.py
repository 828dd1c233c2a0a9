"""What a run tells Dagster about its files: one materialisation per loaded file and asset, its checks, and why others were rejected."""

from collections.abc import Collection, Iterable
from typing import Any

import dagster as dg

from qa_platform import bookkeeping
from qa_platform.assets.raw import RAW_QUESTIONS
from qa_platform.batch import Services
from qa_platform.bookkeeping import FileRecord
from qa_platform.checks import QUESTION_ANSWER, file_evaluations
from qa_platform.contract import FileStatus, partition_key
from qa_platform.database import connect

ANSWERED_QUESTIONS = dg.AssetKey("answered_questions")

IN_THE_TABLE = frozenset({FileStatus.LOADED, FileStatus.FINISHED})


def report_files(
    context: dg.OpExecutionContext | dg.AssetExecutionContext,
    services: Services,
    records: Iterable[FileRecord],
    *,
    assets: Collection[dg.AssetKey] = (ANSWERED_QUESTIONS, QUESTION_ANSWER),
) -> list[dg.AssetCheckEvaluation]:
    """Log the events of every file, and return the checks of the loaded ones, which are logged too."""
    evaluations = []
    for record in records:
        if record.status in IN_THE_TABLE:
            for asset in assets:
                context.log_event(_materialization(record, asset))
            with connect(services.postgres) as connection:
                counted = bookkeeping.check_file(connection, record.version)
            for evaluation in file_evaluations(record, counted):
                evaluations.append(evaluation)
                context.log_event(evaluation)  # type: ignore[arg-type]  # taken, though not declared
        else:
            context.log_event(_observation(record))
    return evaluations


def _materialization(record: FileRecord, asset: dg.AssetKey) -> dg.AssetMaterialization:
    return dg.AssetMaterialization(
        asset_key=asset,
        partition=partition_key(record.version.name),
        tags={
            "dagster/data_version": f"{record.version.generation}-{record.load_id}",
            "dagster/input_data_version/raw_questions": str(record.version.generation),
        },
        metadata=_metadata(record),
    )


def _metadata(record: FileRecord) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "dagster/partition_row_count": record.rows,
        "answered": record.answered,
        "no_answer": record.no_answer,
        "rejected": record.rejected,
        "model": record.model,
        "model revision": record.model_revision,
        "precision": record.model_precision,
        "source": record.place,
        "generation": str(record.version.generation),
        "Pachyderm job": record.pachyderm_job,
    }
    if record.started_at and record.loaded_at:
        seconds = (record.loaded_at - record.started_at).total_seconds()
        metadata |= {"seconds": round(seconds, 2), "rows per second": round(record.rows / max(seconds, 0.001), 1)}
    return metadata


def _observation(record: FileRecord) -> dg.AssetObservation:
    """A file that is not in the table: its upload is observed, with what became of it."""
    return dg.AssetObservation(
        asset_key=RAW_QUESTIONS,
        partition=partition_key(record.version.name),
        metadata={"status": str(record.status), "why": record.error or "", "source": record.place, "attempts": record.attempts},
    )
