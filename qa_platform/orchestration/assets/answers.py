"""`answered_questions` and `question_answer`: one step answers a batch of files in Pachyderm and has the answers loaded into PostgreSQL."""

from collections.abc import Collection, Iterator, Sequence
from functools import partial

import dagster as dg
from dagster._core.storage.tags import BACKFILL_ID_TAG, RETRY_NUMBER_TAG
from pydantic import Field

from qa_platform.answering.version import current_code_version
from qa_platform.batches.plan import Batch, batch_id
from qa_platform.batches.reload import reload_files
from qa_platform.batches.retry import request_retries
from qa_platform.batches.run import Outcome, answer_batch
from qa_platform.clients import bucket
from qa_platform.clients.services import Services
from qa_platform.contract import ANSWER_PIPELINE, FileVersion, ModelChoice, partition_key
from qa_platform.errors import InputError
from qa_platform.ledger import FileRecord, Ledger
from qa_platform.ledger.states import DONE
from qa_platform.orchestration.catalog import (
    ANSWERED_QUESTIONS,
    QUESTION_ANSWER,
    RAW_QUESTIONS,
    AssetFactory,
    table_metadata,
)
from qa_platform.orchestration.failures import SENSOR_NEXT, batch_failure, failures_for_people
from qa_platform.orchestration.partitions import POOL, question_files
from qa_platform.orchestration.pipes import PachydermPipesClient
from qa_platform.orchestration.reports.checks import CHECK_SPECS, as_result, run_results
from qa_platform.orchestration.reports.events import prepare_storage
from qa_platform.orchestration.resources import PlatformResource
from qa_platform.results.published import publish
from qa_platform.settings import ExecutionSettings, WorkSettings


class FileConfig(dg.Config):
    """One file of a batch: its name below ``incoming/``, and the generation to answer."""

    name: str = Field(description="Its name below incoming/.")
    generation: int = Field(description="The generation to answer.")
    size: int = Field(default=0, description="Its bytes.")
    crc32c: str = Field(default="", description="Its checksum, as the bucket gives it.")
    md5: str = Field(default="", description="Its MD5, as the bucket gives it; empty if the bucket has none.")


class BatchConfig(dg.Config):
    """The batch that the sensor planned. It is empty in a run that was started by hand: there the partitions name the files."""

    batch_id: str = Field(default="", description="Set by the sensor. Leave it empty: the partitions name the files.")
    token: str = Field(default="", description="Set by the sensor: the owner of the files' claims. Leave it empty.")
    files: list[FileConfig] = Field(default_factory=list, description="Set by the sensor. Leave it empty: the partitions name the files.")

    @staticmethod
    def of(batch: Batch, *, token: str) -> "BatchConfig":
        files = [FileConfig(name=v.name, generation=v.generation, size=v.size, crc32c=v.crc32c, md5=v.md5) for v in batch.versions]
        return BatchConfig(batch_id=batch.id, token=token, files=files)

    def versions(self) -> tuple[FileVersion, ...]:
        return tuple(FileVersion(f.name, f.generation, f.size, f.crc32c, f.md5) for f in self.files)


def batch_of(services: Services, config: BatchConfig, keys: Sequence[str], *, run_id: str, earlier: Collection[str] = ()) -> Batch:
    """The batch of a run: the one in its configuration, or, for a run started by hand, the newest versions of its partitions.

    In a run started by hand, files that are done are requested again, all or none, and claimed with ``run_id`` in the same transaction.
    Those that an earlier attempt of this run, or one of the runs ``earlier``, has done are not.

    Raises:
        InputError: the configuration and the partitions disagree, a partition has no file, a source is gone, or there are no
            partitions.
    """
    if config.files:
        batch = Batch(config.batch_id, config.versions())
        if [partition_key(v.name) for v in batch.versions] != list(keys):
            raise InputError(
                "the files in this run's configuration are not those of its partition range: the partitions changed after it was requested",
                advice="nothing to do: the sensor requests the files again",
            )
        return batch
    return _batch_by_hand(services, _present(keys), run_id=run_id, earlier=earlier)


def _present(keys: Sequence[str]) -> Sequence[str]:
    """The partitions of a run started by hand.

    Raises:
        InputError: there are none. A range is empty if a new upload has moved its first partition behind its last one. Without an error
            the run would succeed and do nothing.
    """
    if not keys:
        raise InputError("this run has no partitions: they have changed since they were selected", advice="select them again")
    return keys


def _batch_by_hand(services: Services, keys: Sequence[str], *, run_id: str, earlier: Collection[str]) -> Batch:
    uploads = {partition_key(v.name): v for v in bucket.list_incoming(services.bucket, services.work.suffixes)}
    files: dict[str, tuple[FileVersion, int]] = {}
    done: dict[str, str] = {}
    with Ledger(services.postgres) as ledger:
        recorded = ledger.newest_by_partition(keys)
        for key in keys:
            record, upload = recorded.get(key), uploads.get(key)
            if upload and (record is None or upload.generation > record.version.generation):
                files[key] = (upload, 1)
            elif record is None:
                raise InputError("no file under incoming/ has this name, and none was answered before", where=f"partition {key!r}")
            elif record.status in DONE and record.dagster_run not in (run_id, *earlier):
                done[key] = record.version.name
            else:
                files[key] = (record.version, record.load_id)
        if done:
            # All together, and claimed at once: otherwise a sensor that sees some of them waiting would take them from this run.
            seconds = services.work.lease_seconds
            again = request_retries(services.bucket, ledger, list(done.values()), owner=run_id, lease_seconds=seconds)
            files |= {key: (record.version, record.load_id) for key, record in zip(done, again, strict=True)}
    batch = [files[key] for key in keys]
    return Batch(batch_id(batch), tuple(version for version, _ in batch))


def answer_files_asset(factory: AssetFactory, wanted: ModelChoice, execution: ExecutionSettings, work: WorkSettings) -> dg.AssetsDefinition:
    """The step that answers files. ``wanted``: the model, which determines the assets' code version."""

    @dg.multi_asset(
        name="answer_files",
        can_subset=True,
        partitions_def=question_files,
        # Each run of a backfill is a batch: one commit of everything that was ever answered would neither fit nor end.
        backfill_policy=dg.BackfillPolicy.multi_run(max_partitions_per_run=work.batch_files),
        specs=_specs(factory, version=current_code_version(wanted)),
        check_specs=CHECK_SPECS,
        pool=POOL,
    )
    def answer_files(context: dg.AssetExecutionContext, config: BatchConfig, platform: PlatformResource) -> Iterator[dg.AssetCheckResult]:
        outcome, evaluations, failed = Outcome(()), list[dg.AssetCheckEvaluation](), None
        try:
            with failures_for_people(context, execution, next_step=SENSOR_NEXT if config.files else "start this run again"):
                outcome = _answer(context, config, platform, evaluations)
        except dg.Failure as error:
            failed = error
        wanted_checks = {key.name for key in context.selected_asset_check_keys}
        yield from (as_result(each) for each in run_results(evaluations) if each.check_name in wanted_checks)
        # After the checks: without results, Dagster shows all of them as failed, even those of correctly loaded files.
        if failed:
            raise failed
        if outcome.failure:
            raise batch_failure(outcome, outcome.failure)

    return answer_files


def _specs(factory: AssetFactory, *, version: str) -> list[dg.AssetSpec]:
    return [
        factory.spec(
            ANSWERED_QUESTIONS,
            deps=[RAW_QUESTIONS],
            description="The answered CSVs, in Pachyderm's repo `question_answer`: the upload's columns, then answer, score, model, …",
            kinds={"pachyderm", "huggingface"},
            page="model.md",
            version=version,
            metadata={**table_metadata(ANSWERED_QUESTIONS), "Pachyderm repo": ANSWER_PIPELINE},
            skippable=True,
        ),
        factory.spec(
            QUESTION_ANSWER,
            deps=[ANSWERED_QUESTIONS],
            description="The table `question_answer` in PostgreSQL. Rows without an answer are in `question_answer_reject`.",
            kinds={"postgres", "table"},
            page="how-it-works.md",
            version=version,
            metadata={"dagster/table_name": "question_answer", **table_metadata(QUESTION_ANSWER)},
            skippable=True,
        ),
    ]


def _answer(
    context: dg.AssetExecutionContext, config: BatchConfig, platform: PlatformResource, evaluations: list[dg.AssetCheckEvaluation]
) -> Outcome:
    """Answer the batch, or only reload its files if `answered_questions` is not selected. Adds the checks to ``evaluations``."""
    services, selected = platform.services(), context.selected_asset_keys
    reporter = platform.reporter(services)
    prepare_storage(context.instance)
    if not selected:
        raise InputError(
            "a run of checks alone has no files", advice="materialise question_answer for the partitions to check: that runs no model"
        )
    keys = _selected_keys(context)

    def report(records: Sequence[FileRecord]) -> None:
        evaluations.extend(reporter.report(context, records, assets=selected))

    if ANSWERED_QUESTIONS not in selected:
        reload_files(services, _present(keys), run_id=context.run.run_id, log=context.log, report=report)
        return Outcome(())
    predecessors = [run for run in (context.run.parent_run_id, context.run.root_run_id) if run]
    outcome = answer_batch(
        services,
        batch_of(services, config, keys, run_id=context.run.run_id, earlier=predecessors if RETRY_NUMBER_TAG in context.run.tags else ()),
        token=config.token or context.run.run_id,
        run_id=context.run.run_id,
        log=context.log,
        predecessors=predecessors,
        follow=partial(PachydermPipesClient(services.pachyderm).run, context=context),
        report=report,
    )
    publish(services, context.log)
    return outcome


def _selected_keys(context: dg.AssetExecutionContext) -> Sequence[str]:
    """The partitions of a run. Of a backfill's run, those that were selected: a range grows if a new upload moves its last partition."""
    keys, tags = context.partition_keys, context.run.tags
    backfill = context.instance.get_backfill(tags[BACKFILL_ID_TAG]) if BACKFILL_ID_TAG in tags else None
    if backfill is None or backfill.asset_backfill_data is None:
        return keys
    selected = {each.partition_key for each in backfill.asset_backfill_data.target_subset.iterate_asset_partitions()}
    return [key for key in keys if key in selected]
