"""One shard that its worker dies of: its file is charged and retried alone, the others are answered without it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from qa_platform import bookkeeping
from qa_platform.checks import CHECK_SPECS
from qa_platform.contract import ANSWER_PIPELINE, FileStatus
from qa_platform.database import connect
from qa_platform.pachd import session
from qa_platform.project_files import project_file
from qa_platform.settings import PachydermSettings, PostgresSettings
from qa_platform_tests.test_flow import Flow, bridge, csv_of, flow, wait_until

__all__ = ["flow"]

pytestmark = [pytest.mark.slow, pytest.mark.faults]

POISON = "poison"
# The real worker, which is killed, as by the kernel when memory is short, when it comes to a shard with the word.
DYING_WORKER = f"""
import os, signal
from pathlib import Path
from qa_platform.answering import worker
do = worker.Worker.do
def dying(self, datum):
    shard = self._source(datum) / "questions.csv"
    if shard.exists() and "{POISON}" in shard.read_text():
        print("this shard is", "{POISON}", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    do(self, datum)
worker.Worker.do = dying
worker.main()
"""


def put_pipeline(**transform: Any) -> None:
    spec = json.loads((project_file("pachyderm") / "question_answer" / "pipeline.json").read_text())
    spec["transform"] |= transform
    with session(PachydermSettings(), "putting a pipeline") as client:
        client.pps.create_pipeline_v2(create_pipeline_request_json=json.dumps(spec), update=True)


@contextmanager
def dying_workers(program: str = DYING_WORKER) -> Iterator[None]:
    put_pipeline(cmd=["python", "-c", program])
    try:
        yield
    finally:
        put_pipeline()


def test_the_file_of_a_bad_shard_is_retried_alone_and_parked_and_the_others_are_answered(
    flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QA_SHARD_ROWS", "2")
    monkeypatch.setenv("QA_MAX_ATTEMPTS", "2")
    assert flow.tick() == [], "nothing of another test may wait"
    good = [flow.upload(f"good-{town}.csv", csv_of(bridge(town), bridge(town))) for town in ("Ulm", "Graz")]
    bad = flow.upload("bad.csv", csv_of(bridge("Bern"), bridge("Chur"), bridge(POISON), bridge("Thun"), bridge("Genf")))
    with dying_workers():
        (first,) = flow.tick_and_run()
        assert not first.success
        assert [check.passed for check in first.get_asset_check_evaluations()] == [True] * len(CHECK_SPECS), "no file is wrong in the table"
        event = first.get_step_failure_events()[0]
        shown = str(event.step_failure_data.error)
        assert f"this shard is {POISON}" in shown, "the error shows the failed datum's own log lines"
        assert ANSWER_PIPELINE in shown
        assert [(flow.record(v).status, flow.record(v).attempts) for v in good] == [(FileStatus.PENDING, 0)] * 2
        assert (flow.record(bad).status, flow.record(bad).attempts) == (FileStatus.PENDING, 1)
        assert POISON in flow.record(bad).error
        batches = []
        while flow.record(bad).status is not FileStatus.FAILED:
            for request in wait_until(flow.tick, "something is due"):
                batches.append([file["name"] for file in request.run_config["ops"]["answer_files"]["config"]["files"]])
                flow.run(request)
        assert sorted(batches) == [["bad.csv"], [v.name for v in good]]
        assert [flow.record(v).status for v in good] == [FileStatus.FINISHED] * 2
        assert flow.rows("bad.csv") == []
        assert flow.objects("incoming/bad.csv") == ["incoming/bad.csv"], "its owner sees it where it was"
        assert flow.tick() == [], "a parked file is not tried again by itself"
    with connect(PostgresSettings()) as connection:
        bookkeeping.request_retry(connection, "bad.csv")
    assert [r.success for r in flow.tick_and_run()] == [True]
    assert flow.record(bad).status is FileStatus.FINISHED
    assert len(flow.rows("bad.csv")) == 5


def test_workers_that_die_of_everything_charge_no_file(flow: Flow) -> None:
    assert flow.tick() == [], "nothing of another test may wait"
    versions = [flow.upload(f"all-{town}.csv", csv_of(bridge(town))) for town in ("Ulm", "Graz")]
    with dying_workers("raise SystemExit('no module of that name')"):
        (result,) = flow.tick_and_run()
        assert not result.success
        for version in versions:
            record = flow.record(version)
            assert (record.status, record.attempts, record.due) == (FileStatus.PENDING, 0, False)
            assert "failed alike: no module of that name" in record.error
    assert [flow.run(request).success for request in wait_until(flow.tick, "both are due")] == [True]
    assert [flow.record(version).status for version in versions] == [FileStatus.FINISHED] * 2
