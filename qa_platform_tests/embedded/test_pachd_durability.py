"""What the embedded pachd keeps when it is killed, and what it leaves behind when it ends."""

import contextlib
import json
import os
import random
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from pachyderm_sdk.api import pfs, pps

from qa_platform_tests.pachd_helpers import LIMIT_SECONDS, SUCCESS, Pachd, Server, eventually, refused

pytestmark = pytest.mark.faults


def slow(folder: Path) -> str:
    """A program that copies its input slowly, and writes into the file ``journal`` that it did."""
    return f'echo $(basename $source) >> "{folder}/journal"\nsleep 0.3\ncp $source $pfs/out/'


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[list[Server]]:
    """Servers that the test starts; those that still run are ended."""
    started: list[Server] = []
    yield started
    for server in started:
        if server.process.poll() is None:
            assert server.stop() == 0


def start(servers: list[Server], folder: Path) -> Pachd:
    servers.append(Server(folder))
    return Pachd(servers[-1].address)


def running(mark: str) -> list[int]:
    """The processes with that text in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue
    return found


def worker_mark(servers: list[Server]) -> str:
    return f"QA_PACHD_WORKER={servers[-1].state}/"


def test_a_job_goes_on_after_the_server_was_killed(tmp_path: Path, servers: list[Server]) -> None:
    pachd = start(servers, tmp_path)
    repo = pachd.repo()
    name = pachd.pipeline("p", slow(tmp_path), repo)
    down = pachd.pipeline("down", "cat $source/* > $pfs/out/all", name, glob="/")
    journal = tmp_path / "journal"
    commit = pachd.put(repo, {f"/{number}": str(number).encode() for number in range(6)})
    eventually(lambda: journal.exists() and len(journal.read_text().split()) >= 3)
    mark = worker_mark(servers)
    servers[-1].kill()
    eventually(lambda: not running(mark), lambda: "the worker's process has outlived the server")
    again = start(servers, tmp_path)
    assert again.wait(down, commit).state == SUCCESS
    info = again.wait(name, commit)
    assert info.state == SUCCESS
    assert info.data_processed == 6
    assert again.read(down, commit, "/all") == b"012345"
    begun = journal.read_text().split()
    assert set(begun) == set("012345")
    assert len(begun) <= 7, "a datum that was done before the kill was done again"
    assert next(job.job.id for job in again.jobs(name)) == commit


@pytest.mark.slow
def test_nothing_that_was_finished_is_lost_however_often_the_server_is_killed(tmp_path: Path, servers: list[Server]) -> None:
    pachd = start(servers, tmp_path)
    repo = pachd.repo()
    name = pachd.pipeline("p", "cp $source $pfs/out/", repo)
    expected: dict[str, dict[str, bytes]] = {}
    files: dict[str, bytes] = {}
    chance = random.Random(7)
    for number in range(5):
        killer = threading.Timer(chance.uniform(0.05, 0.6), servers[-1].kill)
        killer.start()
        with contextlib.suppress(grpc.RpcError, ConnectionError):
            while True:
                change = {f"/{chance.randrange(8)}": chance.randbytes(chance.choice([10, 200_000])) for _ in range(3)}
                commit = pachd.put(repo, change)
                files = files | change
                expected[commit] = files
        killer.join()
        pachd = start(servers, tmp_path)
        # What the kill has cut off is open, or complete, or not there at all.
        head = next(iter(pachd.client.pfs.list_commit(repo=repo, number=1)))
        if head.finishing.year == 1970:
            pachd.client.pfs.drop_commit_set(commit_set=pfs.CommitSet(id=head.commit.id))
        elif head.commit.id not in expected:
            pachd.client.pfs.wait_commit(head.commit)
            files = {path: pachd.read(repo, head.commit.id, path) for path in pachd.paths(repo, head.commit.id)}
            expected[head.commit.id] = files
        assert expected or number == 0
    for commit, content in expected.items():
        assert {path: pachd.read(repo, commit, path) for path in pachd.paths(repo, commit)} == content
        assert pachd.wait(name, commit).state == SUCCESS
        assert {path: pachd.read(name, commit, path) for path in pachd.paths(name, commit)} == content


def test_everything_is_found_again(tmp_path: Path, servers: list[Server]) -> None:
    pachd = start(servers, tmp_path)
    repo = pachd.repo()
    pachd.client.pps.create_secret(name=pachd.name("s"), data={"key": "value"})
    uses = [{"name": pachd.name("s"), "envVar": "KEPT", "key": "key"}]
    name = pachd.pipeline("p", 'echo "$KEPT" > $pfs/out/$(basename $source)', repo, transform={"secrets": uses})
    first = pachd.put(repo, {"/a": b"1", "/big": os.urandom(9_000_000)})
    assert pachd.wait(name, first).state == SUCCESS
    opened = pachd.client.pfs.start_commit(branch=pachd.branch(repo))
    pachd.client.pfs.put_file_from_bytes(commit=opened, path="/b", data=b"2")
    cluster = pachd.client.admin.inspect_cluster().id
    servers[-1].kill()
    again = start(servers, tmp_path)
    assert again.client.admin.inspect_cluster().id == cluster
    assert again.paths(repo, first) == ["/a", "/big"]
    assert again.paths(repo, opened.id) == ["/a", "/b", "/big"]
    again.client.pfs.finish_commit(commit=opened)
    info = again.wait(name, opened.id)
    assert info.state == SUCCESS
    assert (info.data_processed, info.data_skipped) == (1, 2)
    assert again.read(name, opened.id, "/b") == b"value\n"


def test_a_write_that_was_cut_off_leaves_nothing(tmp_path: Path, servers: list[Server]) -> None:
    pachd = start(servers, tmp_path)
    repo = pachd.repo()
    commit = pachd.client.pfs.start_commit(branch=pachd.branch(repo))

    def requests() -> Iterator[pfs.ModifyFileRequest]:
        yield pfs.ModifyFileRequest(set_commit=commit)
        for number in range(40):
            if number == 20:
                servers[-1].kill()
            yield pfs.ModifyFileRequest(add_file=pfs.AddFile(path=f"/{number}", raw=os.urandom(200_000)))

    with pytest.raises(grpc.RpcError):
        pachd.client.pfs.modify_file(requests())
    again = start(servers, tmp_path)
    assert again.paths(repo, commit.id) == []


def test_a_damaged_piece_is_not_served(tmp_path: Path, servers: list[Server]) -> None:
    pachd = start(servers, tmp_path)
    repo = pachd.repo()
    commit = pachd.put(repo, {"/a": b"x" * 1_000_000})
    [piece] = [path for path in (servers[-1].state / "chunks").glob("*/*") if path.stat().st_size == 1_000_000]
    piece.write_bytes(b"x" * 999_999)
    with refused(grpc.StatusCode.UNKNOWN, "damaged"):
        pachd.read(repo, commit, "/a")


@pytest.mark.parametrize("how", ["end of input", "SIGTERM", "SIGINT", "SIGKILL"])
def test_no_process_is_left_behind(tmp_path: Path, servers: list[Server], how: str) -> None:
    pachd = start(servers, tmp_path)
    repo = pachd.repo()
    name = pachd.pipeline("p", "setsid sleep 600 &\necho begun\nsleep 600", repo)
    commit = pachd.put(repo, {"/a": b"1"})
    eventually(lambda: pachd.lines(name, commit))
    mark = worker_mark(servers)
    assert running(mark)
    if how == "end of input":
        assert servers[-1].stop() == 0
    else:
        servers[-1].process.send_signal(getattr(signal, how))
        assert servers[-1].process.wait(LIMIT_SECONDS) == (-signal.SIGKILL if how == "SIGKILL" else 0)
    eventually(lambda: not running(mark), lambda: "a process was left behind")


def test_a_second_server_on_the_same_folder_refuses_to_start(tmp_path: Path, servers: list[Server]) -> None:
    start(servers, tmp_path)
    second = subprocess.run(servers[-1].process.args, stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT_SECONDS, check=False)
    assert second.returncode != 0
    assert b"another server works on" in second.stderr


def test_values_of_mounted_secrets_are_nowhere_in_the_state(tmp_path: Path, servers: list[Server]) -> None:
    pachd = start(servers, tmp_path)
    repo = pachd.repo()
    pachd.client.pps.create_secret(name=pachd.name("s"), data={"key": "planted-value"})
    uses = [{"name": pachd.name("s"), "mountPath": "/secrets/kept"}]
    script = "test $(wc -c < ${QA_SECRETS_ROOT:-/secrets}/kept/key) = 13"
    name = pachd.pipeline("p", script, repo, transform={"secrets": uses})
    assert pachd.wait(name, pachd.put(repo, {"/a": b"1"})).state == SUCCESS
    assert servers[-1].stop() == 0
    for file in servers[-1].state.rglob("*"):
        if file.is_file():
            data = file.read_bytes()
            assert b"planted-value" not in data, file
            assert b"cGxhbnRlZC12YWx1" not in data, file
    assert servers[-1].state.stat().st_mode & 0o077 == 0


def test_a_spec_of_before_is_read_after_a_restart(tmp_path: Path, servers: list[Server]) -> None:
    pachd = start(servers, tmp_path)
    repo = pachd.repo()
    name = pachd.pipeline("p", slow(tmp_path), repo, jobTimeout="60s")
    servers[-1].kill()
    again = start(servers, tmp_path)
    info = again.client.pps.inspect_pipeline(pipeline=pps.Pipeline(name=name), details=True)
    assert info.details.job_timeout.total_seconds() == 60
    assert json.loads(info.user_spec_json)["pipeline"]["name"] == name
