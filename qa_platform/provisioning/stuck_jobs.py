"""Finds running jobs that can never end because their workers or their program do not start. `apply` does not wait for them."""

from collections.abc import Iterable, Mapping

from pachyderm_sdk.api import pps

from qa_platform.clients.pachyderm import NOT_STARTING, pipeline_state

# A job that restarts once or twice may have a transient reason.
RESTARTS_OF_A_STUCK_JOB = 3


class StuckJobs:
    """Tells, over repeated looks, which running jobs of the pipelines cannot end.

    It remembers each job's number of restarts at the first look. A job with `RESTARTS_OF_A_STUCK_JOB` or more, and more than at the first
    look, does not start. A job with an unchanged number may have started since.
    """

    def __init__(self) -> None:
        self._first: dict[tuple[str, str], int] = {}

    def stuck(
        self, info: pps.PipelineInfo, running: Iterable[pps.JobInfo], upstream: Mapping[str, str], *, has_workers: bool = False
    ) -> dict[str, str]:
        """The ids of the jobs that cannot end, each with its reason.

        Args:
            running: the jobs of the pipeline that have not ended.
            upstream: the stuck jobs of the pipeline before it, as this method returned them.
            has_workers: workers are working on one of its jobs, whatever the state of the pipeline.
        """
        jobs = {job.job.id: job for job in running}
        if info.state in NOT_STARTING and not has_workers:
            return dict.fromkeys(jobs, f"the pipeline is {pipeline_state(info)}{f': {info.reason}' if info.reason else ''}")
        restarting = {id_: restarted(job) for id_, job in jobs.items() if self._restarts_again(job)}
        waiting = {}
        for id_ in (id_ for id_, job in jobs.items() if job.state == pps.JobState.JOB_CREATED and id_ not in restarting):
            if before := next(iter(restarting), id_ if id_ in upstream else ""):
                waiting[id_] = f"it has not begun, and waits for job {before}, which cannot end"
        return restarting | waiting

    def _restarts_again(self, job: pps.JobInfo) -> bool:
        first = self._first.setdefault((job.job.pipeline.name, job.job.id), job.restart)
        return bool(job.restart >= RESTARTS_OF_A_STUCK_JOB and job.restart > first and not job.data_processed)


def restarted(job: pps.JobInfo) -> str:
    """The reason why a job that keeps restarting is stuck."""
    return f"it restarted {job.restart} times: its program does not start{f' ({job.reason})' if job.reason else ''}"
