"""`answered_questions` and `question_answer`: one step answers a batch of files in Pachyderm and has them loaded into Postgres."""

from collections.abc import Iterator, Sequence
from functools import partial

import dagster as dg
from pydantic import Field

from qa_platform import bookkeeping, bucket
from qa_platform.assets.catalog import (
    ANSWERED_QUESTIONS,
    GROUP,
    OWNERS,
    QUESTION_ANSWER,
    RAW_QUESTIONS,
    current_code_version,
    documentation,
    table_metadata,
)
from qa_platform.batch import Outcome, Services, answer_batch, reload_files
from qa_platform.checks import CHECK_SPECS, batch_results
from qa_platform.contract import ANSWER_PIPELINE, FileVersion, partition_key
from qa_platform.database import connect
from qa_platform.errors import InputError
from qa_platform.failures import batch_failure, failures_for_people
from qa_platform.partitions import POOL, question_files
from qa_platform.planning import DONE, Batch, batch_id
from qa_platform.reporting import report_files
from qa_platform.resources import PlatformResource
from qa_platform.resources.pachyderm import PachydermPipesClient


class FileConfig(dg.Config):
    """One file of a batch: its name below ``incoming/`` and the generation that is to be answered."""

    name: str
    generation: int
    size: int = 0
    crc32c: str = ""


class BatchConfig(dg.Config):
    """The batch that the sensor planned. A run started by hand leaves all of it empty: then the partitions say which files."""

    batch_id: str = ""
    token: str = ""
    files: list[FileConfig] = Field(default_factory=list)

    @staticmethod
    def of(batch: Batch, *, token: str) -> "BatchConfig":
        files = [FileConfig(name=v.name, generation=v.generation, size=v.size, crc32c=v.crc32c) for v in batch.versions]
        return BatchConfig(batch_id=batch.id, token=token, files=files)

    def versions(self) -> tuple[FileVersion, ...]:
        return tuple(FileVersion(f.name, f.generation, f.size, f.crc32c) for f in self.files)


def batch_of(services: Services, config: BatchConfig, keys: Sequence[str]) -> Batch:
    """The batch of a run: the one in its configuration, or, for a run started by hand, the newest versions of its partitions.

    Raises:
        InputError: the configuration and the partitions disagree, or a partition has no file.
    """
    if config.files:
        batch = Batch(config.batch_id, config.versions())
        if [partition_key(v.name) for v in batch.versions] != list(keys):
            raise InputError(
                "the files in this run's configuration are not those of its partition range; the partitions changed after it was "
                "requested. Nothing was done; the sensor will request the files again"
            )
        return batch
    return _batch_by_hand(services, keys)


def _batch_by_hand(services: Services, keys: Sequence[str]) -> Batch:
    uploads = {partition_key(v.name): v for v in bucket.list_incoming(services.bucket, services.work.suffixes)}
    files = []
    with connect(services.postgres) as connection:
        recorded = bookkeeping.newest_by_partition(connection, keys)
        for key in keys:
            record, upload = recorded.get(key), uploads.get(key)
            if upload and (record is None or upload.generation > record.version.generation):
                files.append((upload, 1))
                continue
            if record is None:
                raise InputError(f"partition {key!r} has no file: nothing under incoming/ has this name, and none was answered before")
            if record.status in DONE:
                record = bookkeeping.request_retry(connection, record.version.name)
            files.append((record.version, record.load_id))
    return Batch(batch_id(files), tuple(version for version, _ in files))


@dg.multi_asset(
    name="answer_files",
    can_subset=True,
    partitions_def=question_files,
    backfill_policy=dg.BackfillPolicy.single_run(),
    specs=[
        dg.AssetSpec(
            ANSWERED_QUESTIONS,
            deps=[RAW_QUESTIONS],
            skippable=True,
            description="The answered CSVs, in Pachyderm's repo `question_answer`: the upload's columns, then answer, score, model, …",
            group_name=GROUP,
            owners=OWNERS,
            kinds={"pachyderm", "huggingface"},
            code_version=current_code_version(),
            metadata={**table_metadata(ANSWERED_QUESTIONS), "Pachyderm repo": ANSWER_PIPELINE, "documentation": documentation("model.md")},
        ),
        dg.AssetSpec(
            QUESTION_ANSWER,
            deps=[ANSWERED_QUESTIONS],
            skippable=True,
            description="The table `question_answer` in Postgres. Rows without an answer are in `question_answer_reject`.",
            group_name=GROUP,
            owners=OWNERS,
            kinds={"postgres", "table"},
            code_version=current_code_version(),
            metadata={
                "dagster/table_name": "question_answer",
                **table_metadata(QUESTION_ANSWER),
                "documentation": documentation("how-it-works.md"),
            },
        ),
    ],
    check_specs=CHECK_SPECS,
    pool=POOL,
)
def answer_files(context: dg.AssetExecutionContext, config: BatchConfig, platform: PlatformResource) -> Iterator[dg.AssetCheckResult]:
    selected = context.selected_asset_keys
    outcome = Outcome(())
    with failures_for_people(context):
        services = platform.services()
        if ANSWERED_QUESTIONS not in selected:
            records = reload_files(services, context.partition_keys, run_id=context.run.run_id, log=context.log)
            evaluations = report_files(context, services, records, assets=selected)
        else:
            batch = batch_of(services, config, context.partition_keys)
            evaluations = []
            outcome = answer_batch(
                services,
                batch,
                token=config.token or context.run.run_id,
                run_id=context.run.run_id,
                log=context.log,
                predecessors=[run for run in (context.run.parent_run_id, context.run.root_run_id) if run],
                follow=partial(PachydermPipesClient(services.pachyderm).run, context=context),
                report=lambda records: evaluations.extend(report_files(context, services, records, assets=selected)),
            )
    wanted = {key.name for key in context.selected_asset_check_keys}
    yield from (result for result in batch_results(evaluations) if result.check_name in wanted)
    # After the checks: without results Dagster shows all of them as failed, of files that are in the table as they should be.
    if outcome.failure:
        raise batch_failure(outcome, outcome.failure) from outcome.failure
