"""What is visible of a batch's jobs while they run, and what failed jobs leave."""

import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from pachyderm_sdk.api import pfs, pps

from qa_platform.batches import log_lines
from qa_platform.batches.contents import Contents
from qa_platform.batches.failure import JobFailed
from qa_platform.batches.jobs import Watcher, follow_jobs
from qa_platform.batches.log_lines import LogLines
from qa_platform.batches.progress import Progress
from qa_platform.clients.pachyderm import job_of
from qa_platform.contract import (
    ANSWER_PIPELINE,
    LOAD_PIPELINE,
    MANIFEST,
    QUESTIONS_REPO,
    SHARD_INFO,
    Manifest,
    ModelChoice,
    ShardEntry,
    file_id,
)
from qa_platform.settings import PachydermSettings
from qa_platform_tests.pachd_helpers import CLUSTER, LIMIT_SECONDS, Pachd, eventually

FILE = "f.csv"
FOLDER = file_id(FILE)
# Answers a shard as far as the run can see: its shard.json, and the manifest where it carries one.
ANSWER = """
mkdir -p $pfs/out/{folder}/$(basename $source)
cp $source/shard.json $pfs/out/{folder}/$(basename $source)/
if [ -e $source/manifest.json ]; then cp $source/manifest.json $pfs/out/{folder}/; fi
"""


def manifest_of(*rows: int) -> Manifest:
    """Of a file whose shards have so many rows each."""
    entries, first = [], 1
    for index, count in enumerate(rows):
        entries.append(ShardEntry(f"part-{index:05d}", first, count, 0, ""))
        first += count
    return Manifest(FILE, 1, 1, "", 1, ModelChoice("bundled", "", ""), (), rows=sum(rows), rejected=0, shards=tuple(entries))


def files_of(manifest: Manifest, folder: str = FOLDER) -> dict[str, bytes]:
    files = {f"/{folder}/{entry.name}/{SHARD_INFO}": entry.name.encode() for entry in manifest.shards}
    return {**files, f"/{folder}/{manifest.shards[0].name}/{MANIFEST}": manifest.to_json().encode()}


@dataclass
class Told:
    """What a watcher is told."""

    lines: list[str] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)

    def watcher(self, name: str) -> Watcher:
        log = logging.getLogger(f"{__name__}.{name}")
        log.setLevel(logging.INFO)
        handler = logging.Handler()
        handler.emit = lambda record: self.lines.append(record.getMessage())  # type: ignore[method-assign]
        log.addHandler(handler)
        return Watcher(log, self.progress.append, self.waiting.append)


@pytest.fixture
def pachd(clean_pachyderm: PachydermSettings) -> Iterator[Pachd]:
    """A clean Pachyderm with the repo of questions; the tests put their own pipelines behind it."""
    pachd = Pachd(clean_pachyderm.pachd_address)
    pachd.client.pfs.create_repo(repo=pfs.Repo.from_uri(QUESTIONS_REPO))
    yield pachd
    pachd.clean_up()


def put_pipelines(pachd: Pachd, answer: str, load: str = "true", **more: object) -> None:
    pachd.create(pachd.spec(ANSWER_PIPELINE, answer.replace("{folder}", FOLDER), QUESTIONS_REPO, glob="/*/*", **more))
    pachd.create(pachd.spec(LOAD_PIPELINE, load, ANSWER_PIPELINE))


def put(pachd: Pachd, manifest: Manifest, **others: Manifest) -> str:
    files = files_of(manifest)
    for folder, other in others.items():
        files |= files_of(other, folder)
    return pachd.put(pfs.Repo.from_uri(QUESTIONS_REPO), files)


def test_lines_that_take_long_to_get_are_asked_for_seldom_and_none_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = [1000.0], list[tuple[float, timedelta]]()
    monkeypatch.setattr(log_lines, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def get_logs(*, since: timedelta, **_: object) -> Iterator[pps.LogMessage]:
        """Takes 30 s, and fails every second time."""
        asked.append((now[0], since))
        now[0] += 30
        yield pps.LogMessage(message=f"line {len(asked)}", user=True)
        if len(asked) % 2 == 0:
            raise grpc.RpcError

    slow: Any = SimpleNamespace(pps=SimpleNamespace(get_logs=get_logs))
    lines = LogLines(slow, job_of(ANSWER_PIPELINE, "j"), logging.getLogger())
    while len(asked) < 4:
        lines.pass_on()
        now[0] += 1
    begun = [moment for moment, _ in asked]
    assert [later - earlier for earlier, later in pairwise(begun)] == [180, 180, 180]
    # Since well before the last time that all were there.
    assert [since.total_seconds() for _, since in asked[1:]] == [240, 420, 240]


@pytest.mark.skipif(bool(CLUSTER), reason="its workers see none of this test's files")
def test_lines_progress_and_the_time_left_are_told_while_the_job_works(pachd: Pachd, tmp_path: Path) -> None:
    held = "shard=$(basename $source)\necho at $shard\nwhile [ ! -e {go}/go-$shard ]; do sleep 0.02; done\n".replace("{go}", str(tmp_path))
    put_pipelines(pachd, held + ANSWER, datumSetSpec={"number": 1})
    commit = put(pachd, manifest_of(10, 20, 30))
    told = Told()
    follower = threading.Thread(
        target=follow_jobs, args=(PachydermSettings(pachd_address=pachd.address), commit), kwargs={"watcher": told.watcher("live")}
    )
    follower.start()
    eventually(lambda: f"{ANSWER_PIPELINE} | at part-00000" in told.lines)
    for name, rows in (("part-00000", 10), ("part-00001", 30)):
        (tmp_path / f"go-{name}").touch()
        found = eventually(lambda rows=rows: [one for one in told.progress if one.rows == rows])[0]  # type: ignore[misc]
        assert (found.pipeline, found.state, found.datums_total, found.rows_total) == (ANSWER_PIPELINE, "running", 3, 60)
        assert str(found) in told.lines
    assert found.seconds_left is not None
    assert found.seconds_left > 0
    assert follower.is_alive()
    (tmp_path / "go-part-00002").touch()
    follower.join(LIMIT_SECONDS)
    last = told.progress[-1]
    assert (last.pipeline, last.state, last.rows) == (LOAD_PIPELINE, "success", 60)
    assert told.waiting == []


def test_the_reasons_of_failed_datums_say_who_is_guilty(pachd: Pachd) -> None:
    put_pipelines(pachd, f"case $source in *{FOLDER}/part-00001) exit 3;; esac\n{ANSWER}")
    commit = put(pachd, manifest_of(1, 2), other=manifest_of(3))
    with pytest.raises(JobFailed) as caught:
        follow_jobs(PachydermSettings(pachd_address=pachd.address), commit, watcher=Told().watcher("guilty"))
    verdict = caught.value.failure.verdict
    # A plain pipeline keeps no more than how the process ended: the file is suspected, the other one is not.
    assert set(verdict.suspects) == {FOLDER}
    assert "exit status 3" in verdict.suspects[FOLDER]
    assert (verdict.guilty, verdict.blameless) == ({}, False)


def test_datums_of_an_earlier_job_count_neither_as_progress_nor_as_work(pachd: Pachd) -> None:
    put_pipelines(pachd, 'if [ "$(cat $source/shard.json)" = bad ]; then exit 3; fi\n' + ANSWER)
    settings = PachydermSettings(pachd_address=pachd.address)
    follow_jobs(settings, put(pachd, manifest_of(1, 2)), watcher=Told().watcher("first"))
    told = Told()
    commit = pachd.put(
        pfs.Repo.from_uri(QUESTIONS_REPO),
        {f"/x/part-00000/{SHARD_INFO}": b"bad", f"/x/part-00000/{MANIFEST}": manifest_of(5).to_json().replace(FILE, "x").encode()},
        delete=["/"],
    )
    with pytest.raises(JobFailed) as caught:
        follow_jobs(settings, commit, watcher=told.watcher("second"))
    assert [one.rows for one in told.progress if one.pipeline == ANSWER_PIPELINE][-1] == 0
    assert caught.value.failure.verdict.guilty == {}


def test_output_that_a_successful_job_left_out_is_named_by_file_and_shard(pachd: Pachd) -> None:
    put_pipelines(pachd, "case $source in *part-00001) exit 0;; esac\n" + ANSWER)
    with pytest.raises(JobFailed) as caught:
        follow_jobs(PachydermSettings(pachd_address=pachd.address), put(pachd, manifest_of(1, 2, 3)), watcher=Told().watcher("lost"))
    assert caught.value.failure.missing == {FOLDER: frozenset({"part-00001"})}
    assert caught.value.failure.verdict.guilty == {}


def test_a_file_without_its_manifest_lacks_the_shard_that_carries_it() -> None:
    batch = Contents({FOLDER: manifest_of(1, 2)})
    whole = {f"/{FOLDER}/part-00000/{SHARD_INFO}", f"/{FOLDER}/part-00001/{SHARD_INFO}", f"/{FOLDER}/{MANIFEST}"}
    assert batch.missing_in(whole) == {}
    assert batch.missing_in(whole - {f"/{FOLDER}/{MANIFEST}"}) == {FOLDER: {"part-00000"}}
    assert batch.missing_in([]) == {FOLDER: {"part-00000", "part-00001"}}


def test_rows_are_those_of_the_shards_and_files_that_the_manifests_name() -> None:
    batch = Contents({FOLDER: manifest_of(1, 2)})
    assert [batch.rows(path) for path in (f"/{FOLDER}/", f"/{FOLDER}/part-00001/", "/other/", f"/{FOLDER}/part-00009/")] == [3, 2, 0, 0]
    assert batch.total_rows == 3
