"""The two jobs: `answer_questions`, which the sensor runs per batch, and `answer_pending_files`, which does all that waits."""

import time
from collections.abc import Collection, Sequence
from functools import partial

import dagster as dg

from qa_platform import bookkeeping
from qa_platform.assets.answers import answer_files
from qa_platform.assets.raw import uploaded
from qa_platform.batch import Services, answer_batch
from qa_platform.bookkeeping import FileRecord
from qa_platform.contract import FileStatus, partition_key
from qa_platform.database import connect
from qa_platform.failures import failures_for_people
from qa_platform.partitions import PARTITIONS, POOL
from qa_platform.reporting import report_files
from qa_platform.resources import PlatformResource
from qa_platform.resources.pachyderm import PachydermPipesClient
from qa_platform.settings import ExecutionSettings
from qa_platform.waiting import claim, look, tidy


def _executor() -> dg.ExecutorDefinition:
    settings = ExecutionSettings()
    if settings.executor == "in_process":
        return dg.in_process_executor
    # Here, not above: it takes half a second to import, and brings a library that is only there for clusters.
    from dagster_k8s import k8s_job_executor

    return k8s_job_executor.configured({"resources": settings.step_resources}, "k8s") if settings.step_resources else k8s_job_executor


_EXECUTOR = _executor()

answer_questions = dg.define_asset_job(
    "answer_questions",
    selection=dg.AssetSelection.assets(answer_files),
    description="Answers the files of a range of partitions, and loads their answers.",
    executor_def=_EXECUTOR,
)

# How often the job looks again while other runs still work on files that it found.
_LOOK_AGAIN_SECONDS = 2
# After so many batches in a row that failed without any file being to blame, the job gives up.
_BLAMELESS_FAILURES = 3
_NOT_ANSWERED = (FileStatus.FAILED, FileStatus.PENDING, FileStatus.RUNNING)


@dg.op(
    description="Finds every file that waits, answers it, and reports each like the assets do. Fails if a file could not be answered.",
    pool=POOL,
)
def answer_everything(context: dg.OpExecutionContext, platform: PlatformResource) -> None:
    with failures_for_people(context):
        _answer_everything(context, platform)


def _answer_everything(context: dg.OpExecutionContext, platform: PlatformResource) -> None:
    services = platform.services()
    follow = partial(PachydermPipesClient(services.pachyderm).run, context=context)
    seen: set[str] = set()
    evaluations: list[dg.AssetCheckEvaluation] = []
    blameless = 0

    def report(records: Sequence[FileRecord]) -> None:
        evaluations.extend(report_files(context, services, records))

    while True:
        found = look(services)
        seen |= found.claimed
        is_tidy = tidy(services, found.plan, context.log, report=report)
        for number, planned in enumerate(found.plan.batches):
            seen |= {version.name for version in planned.versions}
            token = f"{context.run.run_id}-{number}"
            if claim(services, planned, token=token) is None:
                continue
            context.instance.add_dynamic_partitions(PARTITIONS, [partition_key(v.name) for v in planned.versions])
            for version in planned.versions:
                context.log_event(uploaded(services.bucket, version, archive=services.work.archive))
            run_id = context.run.run_id
            outcome = answer_batch(services, planned, token=token, run_id=run_id, log=context.log, follow=follow, report=report)
            blameless = blameless + 1 if outcome.failure and not outcome.failure.guilty else 0
            if outcome.failure and blameless == _BLAMELESS_FAILURES:
                raise dg.Failure(
                    f"What to do: {outcome.failure.cause}. Then start this job again. No file is to blame, and it was the same {blameless} "
                    f"times on end; `qa-platform pachyderm status` shows the pipelines.\n{outcome.failure}",
                    allow_retries=False,
                )
        if is_tidy and not found.plan.waiting and not found.claimed:
            break
        if not found.plan.batches:
            context.log.info("%d files wait for another attempt, other runs answer %d", found.plan.waiting, len(found.claimed))
            time.sleep(_LOOK_AGAIN_SECONDS)
    _fail_unless_all_is_well(context, services, seen, evaluations)


def _fail_unless_all_is_well(
    context: dg.OpExecutionContext, services: Services, seen: Collection[str], evaluations: Sequence[dg.AssetCheckEvaluation]
) -> None:
    with connect(services.postgres) as connection:
        newest = bookkeeping.newest_by_partition(connection, [partition_key(name) for name in sorted(seen)])
    unfinished = sorted(record.version.name for record in newest.values() if record.status in _NOT_ANSWERED)
    errors = (e for e in evaluations if not e.passed and e.severity is dg.AssetCheckSeverity.ERROR)
    wrong = sorted({f"{e.partition} ({e.check_name})" for e in errors})
    context.log.info("%d files were answered or rejected, %d were not", len(seen) - len(unfinished), len(unfinished))
    if unfinished:
        raise dg.Failure(
            "What to do: `qa-platform status FILE` says why each of these failed; mend that, then `qa-platform retry FILE`.\n"
            f"{len(unfinished)} files could not be answered: {', '.join(unfinished[:20])}",
            allow_retries=False,
        )
    if wrong:
        raise dg.Failure(
            "What to do: load these again by materialising their partitions of question_answer, and find out who else writes the table.\n"
            f"It does not hold what was answered: {', '.join(wrong[:20])}",
            allow_retries=False,
        )


@dg.job(
    name="answer_pending_files",
    description="Answers everything that waits in the bucket, in one run without partitions. For CI and the command line.",
    executor_def=_EXECUTOR,
)
def answer_pending_files() -> None:
    answer_everything()
