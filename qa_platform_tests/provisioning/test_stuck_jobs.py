"""Which running jobs are worth waiting for, judged by what pachd says about pipelines and jobs."""

from pachyderm_sdk.api import pps

from qa_platform.clients.pachyderm import job_of
from qa_platform.contract import ANSWER_PIPELINE
from qa_platform.provisioning.stuck_jobs import RESTARTS_OF_A_STUCK_JOB, StuckJobs

RUNNING, CREATED = pps.JobState.JOB_RUNNING, pps.JobState.JOB_CREATED
WELL = pps.PipelineInfo(state=pps.PipelineState.PIPELINE_RUNNING)


def job(id_: str, state: pps.JobState = RUNNING, restart: int = 0, reason: str = "") -> pps.JobInfo:
    return pps.JobInfo(job=job_of(ANSWER_PIPELINE, id_), state=state, restart=restart, reason=reason)


def test_a_job_that_works_is_waited_for() -> None:
    stuck_jobs = StuckJobs()
    for _ in range(3):
        assert stuck_jobs.stuck(WELL, [job("a"), job("b", CREATED)], {}) == {}


def test_no_job_of_a_pipeline_that_is_broken_is_waited_for_and_its_own_reason_is_given() -> None:
    # Of a pipeline whose secret was deleted.
    crashing = pps.PipelineInfo(state=7, reason='CreateContainerConfigError: secret "gsec" key "k"')
    stuck = StuckJobs().stuck(crashing, [job("a", CREATED), job("b")], {})
    assert stuck.keys() == {"a", "b"}
    assert 'crashing: CreateContainerConfigError: secret "gsec"' in stuck["a"]
    failed = pps.PipelineInfo(state=pps.PipelineState.PIPELINE_FAILURE)
    assert StuckJobs().stuck(failed, [job("a")], {}) == {"a": "the pipeline is failure"}


def test_a_job_that_begins_again_and_again_is_not_waited_for() -> None:
    stuck_jobs = StuckJobs()
    for restart in range(RESTARTS_OF_A_STUCK_JOB):
        assert stuck_jobs.stuck(WELL, [job("a", restart=restart)], {}) == {}
    stuck = stuck_jobs.stuck(WELL, [job("a", restart=RESTARTS_OF_A_STUCK_JOB, reason="why")], {})
    assert "restarted 3 times" in stuck["a"]
    assert "why" in stuck["a"]


def test_a_job_that_began_again_some_time_ago_is_waited_for_until_it_does_so_again() -> None:
    stuck_jobs = StuckJobs()
    assert stuck_jobs.stuck(WELL, [job("a", restart=9)], {}) == {}
    assert stuck_jobs.stuck(WELL, [job("a", restart=9)], {}) == {}
    assert stuck_jobs.stuck(WELL, [job("a", restart=10)], {}).keys() == {"a"}


def test_a_job_behind_one_that_cannot_end_is_not_waited_for_but_one_that_works_is() -> None:
    stuck_jobs = StuckJobs()
    jobs = [job("stuck"), job("behind", CREATED), job("works")]
    stuck_jobs.stuck(WELL, jobs, {})
    stuck = stuck_jobs.stuck(WELL, [job("stuck", restart=9), *jobs[1:]], {})
    assert stuck.keys() == {"stuck", "behind"}
    assert "job stuck" in stuck["behind"]


def test_a_job_whose_upstream_job_cannot_end_is_not_waited_for() -> None:
    stuck = StuckJobs().stuck(WELL, [job("a", CREATED), job("b", CREATED)], {"a": "whatever"})
    assert stuck.keys() == {"a"}
