"""Reports files to Dagster: a materialisation per loaded file and asset, its checks, and an observation of every other file."""

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import dagster as dg
from dagster._core.events import DagsterEvent, DagsterEventBatchMetadata, generate_event_batch_id

from qa_platform.answering.version import code_version
from qa_platform.clients import bucket
from qa_platform.clients.postgres import connect
from qa_platform.clients.services import Services
from qa_platform.contract import ANSWER_PIPELINE, INCOMING, FileStatus, ModelChoice, partition_key
from qa_platform.errors import QaPlatformError
from qa_platform.ledger import FileRecord, Ledger
from qa_platform.ledger.overview import stage_seconds
from qa_platform.ledger.states import ARCHIVABLE
from qa_platform.orchestration.catalog import (
    ANSWERED_QUESTIONS,
    QUESTION_ANSWER,
    RAW_QUESTIONS,
    documentation,
    table_metadata,
)
from qa_platform.orchestration.pipes import job_url
from qa_platform.orchestration.reports.checks import file_evaluations, reasons_table, rows_table
from qa_platform.orchestration.reports.commands import answers_query, rejects_command
from qa_platform.orchestration.reports.gold import quality_events
from qa_platform.orchestration.reports.markdown import histogram
from qa_platform.orchestration.reports.uploads import answered_link, object_link
from qa_platform.results.facts import LOADED_STATUSES, FileFacts, gather
from qa_platform.results.gold import is_gold
from qa_platform.settings import CatalogSettings, CheckSettings
from qa_platform.text import escaped_lines

Event = dg.AssetMaterialization | dg.AssetObservation | dg.AssetCheckEvaluation

_TABLES = (ANSWERED_QUESTIONS, QUESTION_ANSWER)
# The time-out of a statement of Dagster's own storage.
_STATEMENT_MILLISECONDS = 60_000
_CONNECTION_SECONDS = 600
# The maximum number of events that are collected before they are written.
_EVENTS_AT_ONCE = 500


def prepare_storage(instance: dg.DagsterInstance) -> None:
    """Make Dagster's storage keep its connections in this process, and write events in the batches that `log_events` makes.

    Otherwise each event opens several connections, which takes longer than the event itself. A file has about ten events.
    """
    os.environ.setdefault("DAGSTER_EVENT_BATCH_SIZE", str(_EVENTS_AT_ONCE))
    instance.optimize_for_webserver(statement_timeout=_STATEMENT_MILLISECONDS, pool_recycle=_CONNECTION_SECONDS, max_overflow=4)


def log_events(context: dg.OpExecutionContext | dg.AssetExecutionContext, events: Sequence[Event]) -> None:
    """Log events. The materialisations of an asset form one batch: each alone would take several transactions.

    The materialisations come last, since `runless.is_reported` takes one as the end of a file's report.
    """
    step = context.get_step_execution_context()
    batches: dict[dg.AssetKey, list[dg.AssetMaterialization]] = {}
    for event in events:
        if isinstance(event, dg.AssetMaterialization):
            batches.setdefault(event.asset_key, []).append(event)
        else:
            context.log_event(event)  # type: ignore[arg-type]  # a check's evaluation is accepted, though not declared
    for batch in batches.values():
        batch_id = generate_event_batch_id()
        for event in batch:
            DagsterEvent.asset_materialization(step, event, DagsterEventBatchMetadata(batch_id, is_end=event is batch[-1]))


@dataclass(frozen=True)
class Reporter:
    """Reports files to Dagster."""

    services: Services
    checks: CheckSettings
    catalog: CatalogSettings

    def file_events(
        self, records: Sequence[FileRecord], *, assets: Collection[dg.AssetKey] = _TABLES, job_links: bool = False
    ) -> Iterator[Event]:
        """The events of every file: checks and materialisations for files in the table, an observation of the upload for the others.

        The last event of a file in the table is the materialisation of `question_answer`, if that is among the assets.

        Args:
            job_links: ask Pachyderm for the address of its console, to link to the jobs; else their ids are shown.
        """
        yield from (self._observation(record) for record in records if record.status not in LOADED_STATUSES)
        loaded = [record for record in records if record.status in LOADED_STATUSES]
        links = self._job_links({record.pachyderm_job for record in loaded}) if job_links else {}
        with Ledger(self.services.postgres) as ledger, connect(self.services.postgres) as connection:
            for facts in gather(ledger, connection, loaded, self.checks):
                metadata = self._metadata(facts, links)
                yield from file_evaluations(facts, self.checks)
                for asset in _TABLES:
                    if asset in assets:
                        yield _materialization(facts.record, asset, metadata)

    def report(
        self,
        context: dg.OpExecutionContext | dg.AssetExecutionContext,
        records: Sequence[FileRecord],
        *,
        assets: Collection[dg.AssetKey] = _TABLES,
    ) -> list[dg.AssetCheckEvaluation]:
        """Log the events of every file, and those of the model if a gold set is among them. Returns the checks.

        Gold sets are measured here and not in `file_events`: measuring downloads all of them, and a sensor's tick has no time for that.
        """
        events: list[Event] = [*self.file_events(records, assets=assets, job_links=True)]
        if any(is_gold(record.version.name, self.checks.gold_prefix) for record in records if record.status in LOADED_STATUSES):
            events += quality_events(self.services, self.checks)
        # Dagster shows the newest evaluation of a check: a failed one must not be hidden by that of the next file.
        events.sort(key=_order)
        for first in range(0, len(events), _EVENTS_AT_ONCE):
            log_events(context, events[first : first + _EVENTS_AT_ONCE])
        return [event for event in events if isinstance(event, dg.AssetCheckEvaluation)]

    def _metadata(self, facts: FileFacts, links: dict[str, str]) -> dict[str, Any]:
        """The metadata on a file's pages, in this order: its figures, where to go next, its answers, how they came about."""
        record, scores, low = facts.record, facts.scores, self.checks.low_score
        metadata: dict[str, Any] = {
            "rows": record.rows,
            "answered": record.answered,
            "no_answer": record.no_answer,
            "rejected": record.rejected,
        }
        if record.blank:
            metadata["blank rows, skipped"] = record.blank
        metadata |= {"its answers": answers_query(record.version.name)}
        if record.rejected:
            metadata["rejected rows, and why"] = rejects_command(record.version.name)
        metadata |= {
            "source": self._source_link(record),
            **answered_link(self.services.bucket, record.version, self.services.work),
            "Pachyderm job": _job_link(record, links),
            "rows without an answer, by reason": dg.MetadataValue.md(reasons_table(facts)),
            "scores": dg.MetadataValue.md(histogram(scores.counts, low=low)),
            "mean score": round(scores.mean, 4),
            f"scores below {low:g}": scores.low,
            "first answers": dg.MetadataValue.md(rows_table(facts.first)),
            "lowest scores": dg.MetadataValue.md(rows_table(facts.lowest)),
        }
        if record.started_at and record.loaded_at:
            seconds = (record.loaded_at - record.started_at).total_seconds()
            metadata |= {"seconds": round(seconds, 2), "rows per second": round(record.rows / max(seconds, 0.001), 1)}
        return metadata | {
            **{f"seconds {stage}": round(seconds, 2) for stage, seconds in stage_seconds(record).items()},
            "model": record.model,
            "model revision": record.model_revision,
            "precision": record.model_precision,
            "generation": str(record.version.generation),
            "Pachyderm commit": record.pachyderm_commit,
            "documentation": documentation(self.catalog, "how-it-works.md"),
        }

    def _observation(self, record: FileRecord) -> dg.AssetObservation:
        """The observation of the upload of a file that is not in the table, with its state and the reason."""
        report = {}
        if record.status is FileStatus.REJECTED:
            report["report"] = object_link(self.services.bucket, bucket.report_name(record.version))
        return dg.AssetObservation(
            asset_key=RAW_QUESTIONS,
            partition=partition_key(record.version.name),
            metadata={
                "status": str(record.status),
                "why": escaped_lines(record.error),
                **report,
                "source": self._source_link(record),
                "attempts": record.attempts,
            },
        )

    def _source_link(self, record: FileRecord) -> dg.MetadataValue:
        """A link to the upload. A file is reported before it is archived, so the link leads to where it will be."""
        place, is_rejected = record.place, record.status is FileStatus.REJECTED
        if record.status in ARCHIVABLE and record.archived_at is None and place == INCOMING + record.version.name:
            place = bucket.place_when_done(record.version, mode=self.services.work.archive, rejected=is_rejected)
        return object_link(self.services.bucket, place)

    def _job_links(self, jobs: Collection[str]) -> dict[str, str]:
        """Links to the jobs in Pachyderm's console; empty if its address is unknown or cannot be fetched."""
        links = {}
        try:
            for job in filter(None, jobs):
                if (url := job_url(self.services.pachyderm, job)) is None:
                    break
                links[job] = url
        except QaPlatformError:
            return {}
        return links


def _order(event: Event) -> tuple[bool, bool]:
    """The order in which events are stored: materialisations last, and failed checks behind those that passed."""
    return isinstance(event, dg.AssetMaterialization), isinstance(event, dg.AssetCheckEvaluation) and not event.passed


def answers_version(record: FileRecord) -> str:
    """Dagster's data version of a loaded file's answers. It differs for every upload, and for every new answer of the same upload."""
    return f"{record.version.generation}-{record.load_id}"


def _materialization(record: FileRecord, asset: dg.AssetKey, metadata: dict[str, Any]) -> dg.AssetMaterialization:
    wanted = ModelChoice(record.wanted_model, record.wanted_revision, record.wanted_precision, record.wanted_no_answer_threshold)
    upload, answers = str(record.version.generation), answers_version(record)
    source = ("raw_questions", upload) if asset == ANSWERED_QUESTIONS else ("answered_questions", answers)
    # The table holds only the rows with an answer.
    rows = record.rows if asset == ANSWERED_QUESTIONS else record.answered
    return dg.AssetMaterialization(
        asset_key=asset,
        partition=partition_key(record.version.name),
        tags={
            "dagster/data_version": answers,
            f"dagster/input_data_version/{source[0]}": source[1],
            # Without a pointer Dagster treats the input as a new dependency, and the partition as unsynced. There is no event to point
            # at: the input is the upload itself, or is reported together with this asset.
            f"dagster/input_event_pointer/{source[0]}": "NULL",
            "dagster/code_version": code_version(wanted, revision_of_bundled=record.model_revision),
        },
        metadata={**metadata, "dagster/partition_row_count": rows, **table_metadata(asset)},
    )


def _job_link(record: FileRecord, links: dict[str, str]) -> dg.MetadataValue:
    job = record.pachyderm_job
    return dg.MetadataValue.url(links[job]) if job in links else dg.MetadataValue.text(f"{ANSWER_PIPELINE}@{job}" if job else "")
