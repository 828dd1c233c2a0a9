"""One shard that kills its worker, or never ends: its file is charged, and the other files are answered without it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import pytest

from qa_platform.contract import ANSWER_PIPELINE, FileStatus
from qa_platform.ledger import Ledger
from qa_platform.settings import PostgresSettings
from qa_platform_tests.flow import Flow, bridge, csv_of, flow, put_pipeline, wait_until

__all__ = ["flow"]

pytestmark = [pytest.mark.slow, pytest.mark.faults]

POISON = "poison"
# The real worker, which is killed, as by the kernel when memory is short, when it comes to a shard with the word.
DYING_WORKER = f"""
import os, signal
from pathlib import Path
from qa_platform.answering import worker
from qa_platform.contract import QUESTIONS_REPO
from qa_platform.datum_batching import path_of
do = worker.Worker.do
def dying(self, datum):
    shard = path_of(datum, self._root, within=self._root / QUESTIONS_REPO) / "questions.csv"
    if shard.exists() and "{POISON}" in shard.read_text():
        print("this shard is", "{POISON}", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    do(self, datum)
worker.Worker.do = dying
worker.main()
"""


@contextmanager
def dying_workers(program: str = DYING_WORKER, fields: Mapping[str, Any] = MappingProxyType({})) -> Iterator[None]:
    put_pipeline(fields, cmd=["python", "-c", program])
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
        assert first.get_asset_check_evaluations() == [], "no file was loaded: nothing is said of the table"
        event = first.get_step_failure_events()[0]
        shown = str(event.step_failure_data.error)
        assert "died without reporting a reason: error running user code" in shown
        assert ANSWER_PIPELINE in shown
        lines = "\n".join(entry.user_message for entry in flow.instance.all_logs(first.run_id))
        assert f"this shard is {POISON}" in lines, "what the worker printed is in the run's log"
        assert [(flow.record(v).status, flow.record(v).attempts) for v in good] == [(FileStatus.PENDING, 0)] * 2
        assert (flow.record(bad).status, flow.record(bad).attempts) == (FileStatus.PENDING, 0), "it is tried alone before it is charged"
        assert "retried alone" in flow.record(bad).error
        batches = []
        while flow.record(bad).status is not FileStatus.FAILED:
            for request in wait_until(flow.tick, "something is due"):
                batches.append([file["name"] for file in request.run_config["ops"]["answer_files"]["config"]["files"]])
                flow.run(request)
        assert sorted(batches) == [*[["bad.csv"]] * 2, [v.name for v in good]]
        assert "died without reporting a reason" in flow.record(bad).error
        assert [flow.record(v).status for v in good] == [FileStatus.FINISHED] * 2
        assert flow.rows("bad.csv") == []
        assert flow.objects("incoming/bad.csv") == ["incoming/bad.csv"], "its owner sees it where it was"
        assert flow.tick() == [], "a parked file is not tried again by itself"
    with Ledger(PostgresSettings()) as ledger:
        ledger.request_retries(["bad.csv"])
    assert [r.success for r in flow.tick_and_run()] == [True]
    assert flow.record(bad).status is FileStatus.FINISHED
    assert len(flow.rows("bad.csv")) == 5


def test_workers_that_die_of_everything_charge_no_file(flow: Flow) -> None:
    assert flow.tick() == [], "nothing of another test may wait"
    versions = [flow.upload(f"all-{town}.csv", csv_of(bridge(town))) for town in ("Ulm", "Graz")]
    # Every shard has this word.
    with dying_workers(DYING_WORKER.replace(POISON, "bridge")):
        (result,) = flow.tick_and_run()
        assert not result.success
        for version in versions:
            record = flow.record(version)
            assert (record.status, record.attempts, record.was_deferred) == (FileStatus.PENDING, 0, True)
            assert "all 2 files failed for the same reason" in record.error

    def finished() -> bool:
        # A run, or before it the job that Pachyderm starts when its pipeline is updated.
        assert all(flow.run(request).success for request in flow.tick())
        return [flow.record(version).status for version in versions] == [FileStatus.FINISHED] * 2

    wait_until(finished, "both are answered")


def test_a_file_with_a_shard_that_never_ends_is_told_so_and_the_others_are_answered(flow: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QA_MAX_ATTEMPTS", "1")
    assert flow.tick() == [], "nothing of another test may wait"
    good = flow.upload("quick.csv", csv_of(bridge("Ulm")))
    endless = flow.upload("endless.csv", csv_of(bridge(POISON)))
    program = DYING_WORKER.replace("os.kill(os.getpid(), signal.SIGKILL)", "import time; time.sleep(600)")
    with dying_workers(program, {"datum_timeout": "10s", "datum_tries": 1}):
        (first,) = flow.tick_and_run()
        assert not first.success
        assert flow.record(endless).status is FileStatus.FAILED
        assert "took longer than the pipeline's datum_timeout allows" in flow.record(endless).error
        assert [flow.run(request).success for request in wait_until(flow.tick, "the other file is due")] == [True]
    assert flow.record(good).status is FileStatus.FINISHED
    assert flow.record(endless).status is FileStatus.FAILED
