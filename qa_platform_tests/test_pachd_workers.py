"""Workers of the embedded pachd, with and without a file system of their own."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qa_platform.embedded.pachd.execution.isolation import PFS, can_isolate
from qa_platform_tests.pachd_helpers import SUCCESS, Pachd, Server

TOOLS = ("sh", "cat", "cp", "ln", "basename", "grep", "env", "rm", "kill", "sleep")
SCRIPT = 'echo "$QA_PFS_ROOT $source"\ncp $source $QA_PFS_ROOT/out/\nln -s $source $QA_PFS_ROOT/out/link-$(basename $source)'


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[Server]:
    """A server on a machine that has no way to make mount namespaces."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in TOOLS:
        found = shutil.which(name)
        assert found
        (tools / name).symlink_to(found)
    server = Server(tmp_path, {"PATH": str(tools)})
    yield server
    assert server.stop() == 0


def test_without_namespaces_a_variable_leads_to_the_files(bare: Server) -> None:
    pachd = Pachd(bare.address)
    repo = pachd.repo()
    name = pachd.pipeline("p", SCRIPT, repo)
    commit = pachd.put(repo, {"/a": b"1"})
    assert pachd.wait(name, commit).state == SUCCESS
    root, source = pachd.lines(name, commit)[0].split()
    assert Path(root).is_relative_to(bare.state)
    assert source == f"{root}/source/a"
    assert pachd.read(name, commit, "/a") == pachd.read(name, commit, "/link-a") == b"1"


def test_without_namespaces_a_missing_command_fails_the_datum(bare: Server) -> None:
    pachd = Pachd(bare.address)
    repo = pachd.repo()
    name = pachd.pipeline("p", ["there-is-no-such-command"], repo)
    commit = pachd.put(repo, {"/a": b"1"})
    assert "failed" in pachd.wait(name, commit).reason
    assert any("there-is-no-such-command" in line.message for line in pachd.client.pps.get_logs(job=pachd.job(name, commit)))


@pytest.mark.skipif(not can_isolate(), reason="this machine permits no mount namespaces")
def test_with_namespaces_every_worker_has_its_own_pfs(tmp_path: Path) -> None:
    server = Server(tmp_path)
    pachd = Pachd(server.address)
    repo = pachd.repo()
    script = "echo $QA_PFS_ROOT $source; ls /pfs/source; sleep 0.3; ls /pfs/source; cp $source /pfs/out/"
    name = pachd.pipeline("p", ["sh", "-c", script], repo, parallelismSpec={"constant": 2})
    commit = pachd.put(repo, {"/a": b"1", "/b": b"2"})
    assert pachd.wait(name, commit).state == SUCCESS
    assert sorted(pachd.lines(name, commit)) == sorted([f"{PFS} {PFS}/source/a", f"{PFS} {PFS}/source/b", "a", "a", "b", "b"])
    workers = {line.worker_id for line in pachd.client.pps.get_logs(job=pachd.job(name, commit)) if line.user}
    assert len(workers) == 2
    assert not list(PFS.iterdir())
    assert server.stop() == 0


def test_a_pipeline_finds_the_interpreter_and_the_code_of_the_server(tmp_path: Path) -> None:
    server = Server(tmp_path)
    pachd = Pachd(server.address)
    repo = pachd.repo()
    code = "import sys, qa_platform; print(sys.executable, qa_platform.__file__)"
    name = pachd.pipeline("p", ["python", "-c", code], repo, transform={"workingDir": "/"})
    commit = pachd.put(repo, {"/a": b"1"})
    assert pachd.wait(name, commit).state == SUCCESS
    executable, package = pachd.lines(name, commit)[0].split()
    assert Path(executable).parent == Path(sys.executable).parent
    assert Path(package).parent.name == "qa_platform"
    assert server.stop() == 0
