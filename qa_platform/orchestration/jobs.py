"""The jobs that answer files: `answer_questions`, requested by the sensor per batch, and `answer_pending_files`, for all waiting files."""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial

import dagster as dg
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

from qa_platform.batches.failure import JobFailure
from qa_platform.batches.pending import claim, look, reconcile, tidy
from qa_platform.batches.plan import Batch
from qa_platform.batches.run import answer_batch
from qa_platform.clients.services import Services
from qa_platform.contract import FileStatus, partition_key
from qa_platform.ledger import FileRecord, Ledger
from qa_platform.orchestration.catalog import ANSWERED_QUESTIONS, QUESTION_ANSWER
from qa_platform.orchestration.failures import failure, failures_for_people
from qa_platform.orchestration.partitions import PARTITIONS, POOL
from qa_platform.orchestration.pipes import PachydermPipesClient
from qa_platform.orchestration.reports.checks import run_evaluations, run_results, without_evidence
from qa_platform.orchestration.reports.events import Reporter, log_events, prepare_storage
from qa_platform.orchestration.reports.runless import is_reported
from qa_platform.orchestration.reports.uploads import uploaded
from qa_platform.orchestration.resources import PlatformResource
from qa_platform.results.published import publish
from qa_platform.settings import ExecutionSettings

# How long the job waits before it looks again, while other runs work on files that it has seen.
_PAUSE_SECONDS = 2
# The time limit for writing answered CSVs at the end. The next job, or the sensor `done_files`, writes the rest.
_PUBLISHING_SECONDS = 600
# The job gives up after this many failed batches in a row that charge no file.
_UNCHARGED_FAILURES = 3
# The maximum number of files that a message names.
_NAMED = 20
_NOT_ANSWERED = (FileStatus.FAILED, FileStatus.PENDING, FileStatus.RUNNING)


def answer_questions_job(execution: ExecutionSettings) -> UnresolvedAssetJobDefinition:
    return dg.define_asset_job(
        "answer_questions",
        selection=dg.AssetSelection.assets(ANSWERED_QUESTIONS, QUESTION_ANSWER),
        description="Answers the files of a range of partitions, and loads their answers. The sensor starts it. By hand, it needs a "
        "partition or a range; without one, use answer_pending_files.",
        executor_def=executor(execution),
    )


def answer_pending_files_job(execution: ExecutionSettings) -> dg.JobDefinition:
    @dg.op(
        description="Answers every waiting file, and reports each as the assets do. Fails if a file could not be answered.",
        pool=POOL,
    )
    def answer_everything(context: dg.OpExecutionContext, platform: PlatformResource) -> None:
        with failures_for_people(context, execution, next_step="start the job again"):
            services = platform.services()
            prepare_storage(context.instance)
            _PendingFiles(context, services, platform.reporter(services)).answer()

    @dg.job(
        name="answer_pending_files",
        description="Answers everything that waits in the bucket, in one run without partitions. For CI and the command line.",
        executor_def=executor(execution),
    )
    def answer_pending_files() -> None:
        answer_everything()

    return answer_pending_files


def executor(settings: ExecutionSettings) -> dg.ExecutorDefinition:
    """The executor for the steps of the jobs that answer files."""
    if settings.executor == "in_process":
        return dg.in_process_executor
    # Imported here: it takes half a second, and its library is installed on clusters only.
    from dagster_k8s import k8s_job_executor

    return k8s_job_executor.configured({"resources": settings.step_resources}, "k8s") if settings.step_resources else k8s_job_executor


@dataclass
class _PendingFiles:
    """Answers all waiting files, batch by batch.

    Args:
        seen: names of all files that this attempt of the step has found so far.
        uncharged: the number of failed batches in a row that charged no file.
    """

    context: dg.OpExecutionContext
    services: Services
    reporter: Reporter
    seen: set[str] = field(default_factory=set)
    uncharged: int = 0

    def answer(self) -> None:
        """Answer until nothing waits.

        Raises:
            dg.Failure: a file could not be answered, now or in an earlier run, or its source cannot leave ``incoming/``; the table is
                wrong; or batches fail without a file's fault.
        """
        # Where this job runs alone, no sensor does this, nor what comes last.
        reconcile(self.services, self.context.log)
        try:
            while not self._answer_found():
                pass
        finally:
            # A failed check of one batch must not be hidden by a later batch.
            for evaluation in run_results(self._evaluations()):
                self.context.log_event(evaluation)  # type: ignore[arg-type]  # accepted, though not declared
        publish(self.services, self.context.log, seconds=_PUBLISHING_SECONDS)
        _fail_unless_all_is_well(self.context, self.services, self.seen)

    def _answer_found(self) -> bool:
        """Look once, and answer the batches that were found. Returns whether nothing is left."""
        seen = look(self.services)
        self.seen |= seen.claimed
        is_tidy = tidy(self.services, seen.plan, self.context.log, report=self._report_lost)
        for number, batch in enumerate(seen.plan.batches):
            self._answer_batch(batch, token=f"{self.context.run.run_id}-{number}")
        if is_tidy and not seen.plan.waiting and not seen.claimed:
            return True
        if not seen.plan.batches:
            message = "%d files wait for a retry or for their content; other runs are answering %d"
            self.context.log.info(message, seen.plan.waiting, len(seen.claimed))
            time.sleep(_PAUSE_SECONDS)
        return False

    def _answer_batch(self, batch: Batch, *, token: str) -> None:
        context, services = self.context, self.services
        self.seen |= {version.name for version in batch.versions}
        if not claim(services, batch, token=token):
            return
        context.instance.add_dynamic_partitions(PARTITIONS, [partition_key(v.name) for v in batch.versions])
        log_events(context, [uploaded(services.bucket, version, services.work) for version in batch.versions])
        run_id = context.run.run_id
        follow = partial(PachydermPipesClient(services.pachyderm).run, context=context)
        outcome = answer_batch(services, batch, token=token, run_id=run_id, log=context.log, follow=follow, report=self._report)
        self._give_up_on(outcome.failure)

    def _give_up_on(self, job_failure: JobFailure | None) -> None:
        """Fail if the jobs cannot start, or if several batches in a row failed without a file's fault."""
        is_uncharged = job_failure is not None and not (job_failure.verdict.guilty or job_failure.verdict.suspects)
        self.uncharged = self.uncharged + 1 if is_uncharged else 0
        if job_failure and (self.uncharged == _UNCHARGED_FAILURES or job_failure.not_started):
            raise failure(
                f"fix this cause, then start the job again: {job_failure.cause}. No file is charged. "
                f"Batches in a row that failed this way: {self.uncharged}. `qa-platform pachyderm status` shows the pipelines.",
                job_failure.message,
            )

    def _report_lost(self, records: Sequence[FileRecord]) -> None:
        # A file that cannot be archived comes up at every look.
        self._report([record for record in records if not is_reported(self.context.instance, record)])

    def _report(self, records: Sequence[FileRecord]) -> None:
        self.reporter.report(self.context, records)

    def _evaluations(self) -> list[dg.AssetCheckEvaluation]:
        """The newest evaluation of every check of a file, in all attempts of this step. Without the evidence, of which there is much."""
        run = run_evaluations(self.context.instance, self.context.run.run_id)
        return list({(each.partition, each.check_name): without_evidence(each) for each in run if each.partition}.values())


def _fail_unless_all_is_well(context: dg.OpExecutionContext, services: Services, seen: Collection[str]) -> None:
    run_id = context.run.run_id
    with Ledger(services.postgres) as ledger:
        # A look does not find failed files, whether an earlier attempt of the step or an earlier run has seen them.
        parked = {record.version.name for record in ledger.parked()}
        names = ledger.names_of_run(run_id).union(seen, parked)
        newest = ledger.newest_by_partition([partition_key(name) for name in sorted(names)])
        stuck = [record.version.shown for record in ledger.unarchived_files(limit=_NAMED)]
    unfinished = sorted(record.version.shown for record in newest.values() if record.status in _NOT_ANSWERED)
    errors = (e for e in run_evaluations(context.instance, run_id) if not e.passed and e.severity is dg.AssetCheckSeverity.ERROR)
    wrong = sorted({f"{e.partition} ({e.check_name})" for e in errors if e.partition})
    context.log.info("%d files were answered or rejected, %d were not", len(names) - len(unfinished), len(unfinished))
    if unfinished:
        raise failure(
            "`qa-platform status FILE` says why each of these failed. Fix that, then `qa-platform retry FILE`. A failed file that nobody "
            "needs: delete its source.",
            f"{len(unfinished)} files could not be answered: {', '.join(unfinished[:_NAMED])}",
        )
    if wrong:
        raise failure(
            "reload these files by materialising their partitions of question_answer, and find out what else writes to the table.",
            f"the table does not hold what was answered: {', '.join(wrong[:_NAMED])}",
        )
    if stuck:
        raise failure(
            "`qa-platform status FILE` says why. Fix that, for example by releasing a hold, then start the job again.",
            f"these files are answered or rejected, and their sources cannot leave incoming/: {', '.join(stuck)}",
        )
