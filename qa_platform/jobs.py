"""The two jobs: `answer_questions`, which the sensor runs per batch, and `answer_pending_files`, which does all that waits."""

import time
from functools import partial

import dagster as dg

from qa_platform.assets.answers import answer_files
from qa_platform.assets.raw import uploaded
from qa_platform.batch import answer_batch
from qa_platform.contract import FileStatus, partition_key
from qa_platform.partitions import PARTITIONS
from qa_platform.reporting import report_files
from qa_platform.resources import PlatformResource
from qa_platform.resources.pachyderm import PachydermPipesClient
from qa_platform.waiting import claim, look, tidy

answer_questions = dg.define_asset_job(
    "answer_questions",
    selection=dg.AssetSelection.assets(answer_files),
    description="Answers the files of a range of partitions, and loads their answers.",
    executor_def=dg.in_process_executor,
)

# How often the job looks again while other runs still work on files that it found.
_LOOK_AGAIN_SECONDS = 2


@dg.op(description="Finds every file that waits, answers it, and reports each like the assets do. Fails if a file could not be answered.")
def answer_everything(context: dg.OpExecutionContext, platform: PlatformResource) -> None:
    services = platform.services()
    follow = partial(PachydermPipesClient(services.pachyderm).run, context=context)
    reported: dict[str, FileStatus] = {}
    while True:
        found = look(services)
        tidy(services, found.plan, context.log)
        for number, planned in enumerate(found.plan.batches):
            token = f"{context.run.run_id}-{number}"
            if claim(services, planned, token=token) is None:
                continue
            context.instance.add_dynamic_partitions(PARTITIONS, [partition_key(v.name) for v in planned.versions])
            for version in planned.versions:
                context.log_event(uploaded(version))
            outcome = answer_batch(services, planned, token=token, run_id=context.run.run_id, log=context.log, follow=follow)
            report_files(context, services, outcome.records)
            reported |= {record.version.name: record.status for record in outcome.records}
        if not found.plan.waiting and not found.claimed:
            break
        if not found.plan.batches:
            context.log.info("%d files wait for another attempt, other runs answer %d", found.plan.waiting, len(found.claimed))
            time.sleep(_LOOK_AGAIN_SECONDS)
    unfinished = sorted(name for name, status in reported.items() if status in (FileStatus.FAILED, FileStatus.PENDING, FileStatus.RUNNING))
    context.log.info("%d files were answered or rejected, %d were not", len(reported) - len(unfinished), len(unfinished))
    if unfinished:
        raise dg.Failure(
            f"{len(unfinished)} files could not be answered: {', '.join(unfinished[:20])}. "
            "`qa-platform status FILE` says why; `qa-platform retry FILE` tries again.",
            allow_retries=False,
        )


@dg.job(
    name="answer_pending_files",
    description="Answers everything that waits in the bucket, in one run without partitions. For CI and the command line.",
    executor_def=dg.in_process_executor,
)
def answer_pending_files() -> None:
    answer_everything()
