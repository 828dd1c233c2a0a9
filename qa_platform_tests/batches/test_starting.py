"""A job of a pipeline that has some of its workers is not a job that cannot start."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from pachyderm_sdk.api import pps

from qa_platform.batches.starting import CannotStart, Start, WorkerKilled
from qa_platform.clients.pachyderm import job_of
from qa_platform.contract import ANSWER_PIPELINE
from qa_platform.provisioning import pipelines
from qa_platform.provisioning.stuck_jobs import StuckJobs

JOB, OTHER = job_of(ANSWER_PIPELINE, "a"), job_of(ANSWER_PIPELINE, "b")
# Pachyderm says this of a pipeline as long as one of its pods has no room, even if the others work.
CRASHING = pps.PipelineInfo(state=pps.PipelineState.PIPELINE_CRASHING, reason="0/3 nodes are available: 3 Insufficient cpu.")


def client_of(*jobs: pps.JobInfo, worked_on: str) -> Any:
    """A Pachyderm with these jobs, one of which a worker is working on."""

    def inspect_job(*, job: pps.Job, details: bool) -> pps.JobInfo:
        assert details
        status = [pps.WorkerStatus(worker_id="w", job_id=job.id)] if job.id == worked_on else []
        return pps.JobInfo(job=job, details=pps.JobInfoDetails(worker_status=status))

    return SimpleNamespace(
        pps=SimpleNamespace(inspect_pipeline=lambda **_: CRASHING, inspect_job=inspect_job, list_job=lambda **_: iter(jobs))
    )


@pytest.fixture
def minutes(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Sixty minutes, which pass as they are iterated."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def passing() -> Iterator[int]:
        for minute in range(60):
            now[0] = minute * 60.0
            yield minute

    return passing()


@pytest.mark.parametrize("worked_on", ["a", "b"])
def test_a_job_is_not_stopped_because_one_of_its_workers_has_no_room(minutes: Iterator[int], worked_on: str) -> None:
    states = {"a": pps.JobState.JOB_CREATED, "b": pps.JobState.JOB_CREATED} | {worked_on: pps.JobState.JOB_RUNNING}
    info, other = pps.JobInfo(job=JOB, state=states["a"]), pps.JobInfo(job=OTHER, state=states["b"])
    told: list[str] = []
    start = Start(client_of(info, other, worked_on=worked_on), JOB, patience=900, waiting=told.append)
    for _ in minutes:
        start.look(info, SimpleNamespace(last="", answered=set()))  # type: ignore[arg-type]
    assert told == []


@pytest.mark.parametrize("state", [pps.JobState.JOB_CREATED, pps.JobState.JOB_RUNNING])
def test_a_job_without_a_worker_is_stopped_with_the_reason_of_its_pipeline(minutes: Iterator[int], state: pps.JobState) -> None:
    info = pps.JobInfo(job=JOB, state=state)
    start = Start(client_of(info, worked_on=""), JOB, patience=900, waiting=lambda reason: None)

    def look_every_minute() -> None:
        for _ in minutes:
            start.look(info, SimpleNamespace(last="", answered=set()))  # type: ignore[arg-type]

    with pytest.raises(CannotStart, match=r"do not start \(crashing\): 0/3 nodes are available"):
        look_every_minute()
    # It was stopped in the minute after these fifteen.
    assert next(minutes) == 17


@pytest.mark.parametrize(("worked_on", "count"), [("a", 0), ("b", 0), ("", 2)])
def test_apply_waits_for_jobs_of_a_pipeline_that_has_some_of_its_workers(
    monkeypatch: pytest.MonkeyPatch, worked_on: str, count: int
) -> None:
    jobs = [pps.JobInfo(job=job, state=pps.JobState.JOB_RUNNING) for job in (JOB, OTHER)]
    monkeypatch.setattr(pipelines, "find_pipeline", lambda client, name: CRASHING)
    running, stuck = pipelines._look_at_jobs(client_of(*jobs, worked_on=worked_on), ANSWER_PIPELINE, StuckJobs())
    assert running == {"a", "b"}
    assert len(stuck) == count


WORKS = pps.PipelineInfo(state=pps.PipelineState.PIPELINE_RUNNING)


@pytest.mark.parametrize("has_worked", [True, False])
def test_a_job_whose_worker_is_killed_again_and_again_does_not_run_for_ever(monkeypatch: pytest.MonkeyPatch, has_worked: bool) -> None:
    # Kubernetes kills the whole container that has no memory left: the job stays as it is, and nobody counts an attempt.
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    info = pps.JobInfo(job=JOB, state=pps.JobState.JOB_RUNNING, data_processed=int(has_worked), data_total=4)

    def inspect_job(**_: Any) -> pps.JobInfo:
        # A new container every five minutes, which lives for twenty seconds.
        number, second = divmod(now[0], 300)
        began = datetime.fromtimestamp(1e9 + number * 300, UTC)
        status = pps.DatumStatus(started=began, data=[pps.InputFile(path="/f/part-0000")])
        alive = [pps.WorkerStatus(worker_id="w", job_id="a", datum_status=status)] if second < 20 else []
        return pps.JobInfo(job=JOB, state=info.state, details=pps.JobInfoDetails(worker_status=alive))

    client: Any = SimpleNamespace(
        pps=SimpleNamespace(inspect_pipeline=lambda **_: WORKS, inspect_job=inspect_job, list_job=lambda **_: iter([info]))
    )
    start = Start(client, JOB, patience=900, waiting=lambda reason: None)

    def look_all_day() -> None:
        while now[0] < 86_400:
            start.look(info, SimpleNamespace(last="", answered=set()))  # type: ignore[arg-type]
            now[0] += 2

    with pytest.raises(WorkerKilled, match="part-0000") as caught:
        look_all_day()
    assert now[0] < 1800
    assert (caught.value.path, caught.value.has_worked) == ("/f/part-0000", has_worked)


def test_a_job_that_has_worked_is_not_stopped_for_an_outage_of_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    # A worker asks Kubernetes for its image before every set. Without an answer, the job begins again, after 0.5 s, 0.75 s, ...
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    start = Start(client_of(worked_on="a"), JOB, patience=900, waiting=lambda reason: None)
    lines: Any = SimpleNamespace(last="", answered=set())
    start.look(pps.JobInfo(job=JOB, state=pps.JobState.JOB_RUNNING, data_processed=40, data_total=50), lines)
    for restart in range(1, 8):
        now[0] += 3
        start.look(pps.JobInfo(job=JOB, state=pps.JobState.JOB_RUNNING, data_total=50, restart=restart), lines)
    now[0] += 3600
    with pytest.raises(CannotStart, match="restarted 9 times"):
        start.look(pps.JobInfo(job=JOB, state=pps.JobState.JOB_RUNNING, data_total=50, restart=9), lines)
