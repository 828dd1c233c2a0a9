"""A disk that was full for a while: what could not be recorded then is recorded later."""

import sqlite3
import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest

from qa_platform.embedded.pachd.execution import job_run
from qa_platform.embedded.pachd.pps import JobState


def test_a_job_that_cannot_be_ended_is_ended_once_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_run, "_END_PAUSE", 0.01)
    ended, tries = threading.Event(), list[tuple[JobState, str]]()

    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    def end(_: int, state: JobState, reason: str, **__: object) -> None:
        tries.append((state, reason))
        if len(tries) < 3:
            full()
        ended.set()

    jobs = SimpleNamespace(by_pk=lambda pk: SimpleNamespace(pk=pk), set_state=full, end=end)
    pods = SimpleNamespace(pipeline=SimpleNamespace(spec=None))
    job_run.JobRun(1, cast("Any", SimpleNamespace(jobs=jobs)), cast("Any", pods), lambda: True).start()
    assert ended.wait(30)
    assert tries == [(JobState.FAILURE, "OperationalError: database or disk is full")] * 3
