"""What is seen of a batch's jobs while they work, and what a worker's log says of whose fault a failure is."""

import logging
import threading
from pathlib import Path

from pachyderm_sdk.api import pfs

from qa_platform.contract import ANSWER_PIPELINE, BLAMELESS, LOAD_PIPELINE, MANIFEST, QUESTIONS_REPO, Manifest, ModelChoice, ShardEntry
from qa_platform.following import Progress, follow_jobs, said_blameless
from qa_platform.settings import PachydermSettings
from qa_platform_tests.pachd_helpers import Pachd, Server, eventually

# Says which shard it works on, and goes on when it is told to.
SLOW = """
shard=$(basename $source)
if [ -d $source ]; then
    echo "at $shard"
    while [ ! -e {folder}/go-$shard ]; do sleep 0.02; done
fi
mkdir $pfs/out/f
cp -r $source $pfs/out/f/
"""


def test_lines_progress_and_the_time_left_are_told_while_the_job_works(tmp_path: Path) -> None:
    server = Server(tmp_path)
    pachd = Pachd(server.address)
    repo = pfs.Repo(name=QUESTIONS_REPO)
    pachd.client.pfs.create_repo(repo=repo)
    pachd.create(pachd.spec(ANSWER_PIPELINE, SLOW.format(folder=tmp_path), repo, glob="/*/*"))
    pachd.create(pachd.spec(LOAD_PIPELINE, "true", ANSWER_PIPELINE))
    shards = (ShardEntry("s0", 1, 10, 0, ""), ShardEntry("s1", 11, 30, 0, ""))
    manifest = Manifest("f.csv", 1, 1, "", 1, ModelChoice("bundled", "", ""), (), rows=40, rejected=0, shards=shards)
    commit = pachd.put(repo, {f"/f/{MANIFEST}": manifest.to_json().encode(), "/f/s0/q": b"0", "/f/s1/q": b"1"})
    log, lines, seen = logging.getLogger(f"{__name__}.live"), list[str](), list[Progress]()
    log.setLevel(logging.INFO)
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    settings = PachydermSettings(pachd_address=server.address)
    follower = threading.Thread(target=follow_jobs, args=(settings, commit), kwargs={"log": log, "observe": seen.append})
    follower.start()
    eventually(lambda: f"{ANSWER_PIPELINE} | at s0" in lines)
    # The estimate is made of what is done while it looks.
    eventually(lambda: seen and (seen[-1].state, seen[-1].datums) == ("running", 1))
    (tmp_path / "go-s0").touch()
    eventually(lambda: f"{ANSWER_PIPELINE} | at s1" in lines)
    found = eventually(lambda: [one for one in seen if one.rows == 10])[0]
    assert (found.pipeline, found.state, found.datums, found.datums_total, found.rows_total) == (ANSWER_PIPELINE, "running", 2, 3, 40)
    assert found.seconds_left is not None
    assert found.seconds_left > 0
    assert str(found) in lines
    assert follower.is_alive()
    (tmp_path / "go-s1").touch()
    follower.join(30)
    assert (seen[-1].pipeline, seen[-1].state, seen[-1].rows) == (LOAD_PIPELINE, "success", 40)
    log.removeHandler(handler)
    assert server.stop() == 0


def test_the_programs_of_both_pipelines_say_that_no_file_is_to_blame() -> None:
    assert said_blameless(f"reading\nERROR push-answers-to-sql: {BLAMELESS}the database is away\n") == "the database is away"
    assert said_blameless(f"2026-01-02 03:04:05,678 ERROR {BLAMELESS}no such model") == "no such model"


def test_a_files_name_does_not_say_so() -> None:
    name = f"{BLAMELESS}x.csv"
    assert said_blameless(f"ERROR push-answers-to-sql: {name!r} (generation 1) is not loaded") == ""
    assert said_blameless(f"2026-01-02 03:04:05,678 INFO {name}") == ""
