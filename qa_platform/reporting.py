"""What a run tells Dagster about its files: one materialisation per loaded file and asset, its checks, and why others were rejected."""

from collections.abc import Collection, Iterator, Sequence
from itertools import chain
from typing import Any

import dagster as dg

from qa_platform import bucket
from qa_platform.assets.catalog import (
    ANSWERED_QUESTIONS,
    QUESTION_ANSWER,
    RAW_QUESTIONS,
    code_version,
    documentation,
    table_metadata,
)
from qa_platform.assets.quality import quality_events
from qa_platform.assets.raw import object_link
from qa_platform.batch import Services
from qa_platform.bookkeeping import FileRecord
from qa_platform.checks import file_evaluations, reasons_table, rows_table
from qa_platform.contract import ANSWER_PIPELINE, INCOMING, FileStatus, ModelChoice, partition_key
from qa_platform.database import connect
from qa_platform.errors import QaPlatformError
from qa_platform.evidence import IN_THE_TABLE, FileFacts, gather
from qa_platform.markdown import histogram
from qa_platform.planning import ARCHIVABLE
from qa_platform.quality import is_gold
from qa_platform.resources.pachyderm import job_url
from qa_platform.settings import CheckSettings

Event = dg.AssetMaterialization | dg.AssetObservation | dg.AssetCheckEvaluation


def file_events(
    services: Services,
    records: Sequence[FileRecord],
    *,
    assets: Collection[dg.AssetKey] = (ANSWERED_QUESTIONS, QUESTION_ANSWER),
    job_links: bool = False,
) -> Iterator[Event]:
    """The events of every file: materialisations and checks of those in the table, an observation of the upload of the others.

    Args:
        job_links: ask Pachyderm for the address of its console, to link jobs to it; else their ids are shown.
    """
    settings = CheckSettings()
    yield from (_observation(services, record) for record in records if record.status not in IN_THE_TABLE)
    loaded = [record for record in records if record.status in IN_THE_TABLE]
    links = _job_links(services, {record.pachyderm_job for record in loaded}) if job_links else {}
    with connect(services.postgres) as connection:
        for facts in gather(connection, loaded, settings):
            metadata = _metadata(services, facts, settings, links)
            for asset in assets:
                yield _materialization(facts.record, asset, metadata)
            yield from file_evaluations(facts, settings)


def report_files(
    context: dg.OpExecutionContext | dg.AssetExecutionContext,
    services: Services,
    records: Sequence[FileRecord],
    *,
    assets: Collection[dg.AssetKey] = (ANSWERED_QUESTIONS, QUESTION_ANSWER),
) -> list[dg.AssetCheckEvaluation]:
    """Log the events of every file, and of the model where a gold set is among them, and return the checks among them.

    Gold sets are measured here and not with the events of a file: that downloads all of them, which no tick of a sensor has time for.
    """
    evaluations = []
    events = file_events(services, records, assets=assets, job_links=True)
    settings = CheckSettings()
    if any(is_gold(record.version.name, settings.gold_prefix) for record in records if record.status in IN_THE_TABLE):
        events = chain(events, quality_events(services, settings))
    for event in events:
        context.log_event(event)  # type: ignore[arg-type]  # a check's evaluation is taken, though not declared
        if isinstance(event, dg.AssetCheckEvaluation):
            evaluations.append(event)
    return evaluations


def _materialization(record: FileRecord, asset: dg.AssetKey, metadata: dict[str, Any]) -> dg.AssetMaterialization:
    wanted = ModelChoice(record.wanted_model, record.wanted_revision, record.wanted_precision)
    upload, answers = str(record.version.generation), f"{record.version.generation}-{record.load_id}"
    source = ("raw_questions", upload) if asset == ANSWERED_QUESTIONS else ("answered_questions", answers)
    # The table has only the rows with an answer.
    rows = record.rows if asset == ANSWERED_QUESTIONS else record.answered
    return dg.AssetMaterialization(
        asset_key=asset,
        partition=partition_key(record.version.name),
        tags={
            "dagster/data_version": answers,
            f"dagster/input_data_version/{source[0]}": source[1],
            # Without a pointer Dagster takes the input for a new dependency, and calls the partition unsynced. There is no event to
            # point at: the input is the upload itself, or is reported together with this asset.
            f"dagster/input_event_pointer/{source[0]}": "NULL",
            "dagster/code_version": code_version(wanted, revision_of_bundled=record.model_revision),
        },
        metadata={**metadata, "dagster/partition_row_count": rows, **table_metadata(asset)},
    )


def _metadata(services: Services, facts: FileFacts, settings: CheckSettings, links: dict[str, str]) -> dict[str, Any]:
    record, scores = facts.record, facts.scores
    metadata: dict[str, Any] = {
        "rows": record.rows,
        "answered": record.answered,
        "no_answer": record.no_answer,
        "rejected": record.rejected,
        "rows without an answer, by reason": dg.MetadataValue.md(reasons_table(facts)),
    }
    if record.started_at and record.loaded_at:
        seconds = (record.loaded_at - record.started_at).total_seconds()
        metadata |= {"seconds": round(seconds, 2), "rows per second": round(record.rows / max(seconds, 0.001), 1)}
    return metadata | {
        "model": record.model,
        "model revision": record.model_revision,
        "precision": record.model_precision,
        "scores": dg.MetadataValue.md(histogram(scores.counts, low=settings.low_score)),
        "mean score": round(scores.mean, 4),
        f"scores below {settings.low_score:g}": scores.low,
        "first answers": dg.MetadataValue.md(rows_table(facts.first)),
        "lowest scores": dg.MetadataValue.md(rows_table(facts.lowest)),
        "source": _source_link(services, record),
        "generation": str(record.version.generation),
        "Pachyderm commit": record.pachyderm_commit,
        "Pachyderm job": _job_link(record, links),
        "documentation": documentation("how-it-works.md"),
    }


def _job_links(services: Services, jobs: Collection[str]) -> dict[str, str]:
    """Where Pachyderm's console shows these jobs. Files are reported also where it cannot be asked."""
    links = {}
    try:
        for job in filter(None, jobs):
            if (url := job_url(services.pachyderm, job)) is None:
                break
            links[job] = url
    except QaPlatformError:
        return {}
    return links


def _job_link(record: FileRecord, links: dict[str, str]) -> dg.MetadataValue:
    job = record.pachyderm_job
    return dg.MetadataValue.url(links[job]) if job in links else dg.MetadataValue.text(f"{ANSWER_PIPELINE}@{job}" if job else "")


def _source_link(services: Services, record: FileRecord) -> dg.MetadataValue:
    """Where the upload lies. What is done is reported before it is archived: then where it is going to lie."""
    place, is_rejected = record.place, record.status is FileStatus.REJECTED
    if record.status in ARCHIVABLE and record.archived_at is None and place == INCOMING + record.version.name:
        place = bucket.place_when_done(record.version, mode=services.work.archive, rejected=is_rejected)
    return object_link(services.bucket, place)


def _observation(services: Services, record: FileRecord) -> dg.AssetObservation:
    """A file that is not in the table: its upload is observed, with what became of it."""
    return dg.AssetObservation(
        asset_key=RAW_QUESTIONS,
        partition=partition_key(record.version.name),
        metadata={
            "status": str(record.status),
            "why": record.error or "",
            "source": _source_link(services, record),
            "attempts": record.attempts,
        },
    )
