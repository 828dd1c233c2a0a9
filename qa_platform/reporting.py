"""What a run tells Dagster about its files: one materialisation per loaded file and asset, its checks, and why others were rejected."""

from collections.abc import Collection, Iterable, Iterator
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


def file_events(
    services: Services, records: Iterable[FileRecord], *, assets: Collection[dg.AssetKey] = (ANSWERED_QUESTIONS, QUESTION_ANSWER)
) -> Iterator[dg.AssetMaterialization | dg.AssetObservation | dg.AssetCheckEvaluation]:
    """The events of every file: materialisations and checks of those in the table, an observation of the upload of the others."""
    for record in records:
        if record.status not in IN_THE_TABLE:
            yield _observation(record)
            continue
        for asset in assets:
            yield _materialization(record, asset)
        with connect(services.postgres) as connection:
            counted = bookkeeping.check_file(connection, record.version)
        yield from file_evaluations(record, counted)


def report_files(
    context: dg.OpExecutionContext | dg.AssetExecutionContext,
    services: Services,
    records: Iterable[FileRecord],
    *,
    assets: Collection[dg.AssetKey] = (ANSWERED_QUESTIONS, QUESTION_ANSWER),
) -> list[dg.AssetCheckEvaluation]:
    """Log the events of every file, and return the checks among them."""
    events = list(file_events(services, records, assets=assets))
    for event in events:
        context.log_event(event)  # type: ignore[arg-type]  # a check's evaluation is taken, though not declared
    return [event for event in events if isinstance(event, dg.AssetCheckEvaluation)]


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
