"""Workers of the embedded pachd, with and without a file system of their own."""

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qa_platform.embedded.pachd import pfs, pps, secrets, spec
from qa_platform.embedded.pachd.errors import Unimplemented
from qa_platform.embedded.pachd.execution import worker
from qa_platform.embedded.pachd.execution.datums import datum_id
from qa_platform.embedded.pachd.execution.isolation import PFS, can_isolate
from qa_platform.embedded.pachd.execution.process import Command
from qa_platform.embedded.pachd.storage.store import Store
from qa_platform_tests.pachd_helpers import SUCCESS, Pachd, Server, eventually

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


def test_what_a_process_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    server = Server(tmp_path)
    pachd = Pachd(server.address)
    repo = pachd.repo()
    name = pachd.pipeline("p", "sleep 600 &\necho $! > $pfs/out/process", repo)
    commit = pachd.put(repo, {"/a": b"1"})
    assert pachd.wait(name, commit).state == SUCCESS
    process = int(pachd.read(name, commit, "/process"))
    eventually(lambda: not Path(f"/proc/{process}").exists() or "Z" in Path(f"/proc/{process}/stat").read_text().split()[2])
    assert server.stop() == 0


def parsed_spec(**more: Any) -> spec.PipelineSpec:
    document = {"pipeline": {"name": "p"}, "transform": {"cmd": ["true"]}, "input": {"pfs": {"repo": "r", "glob": "/*"}}, **more}
    return spec.parse(spec.with_defaults(document, now=0))


def test_a_batching_process_is_started_even_for_no_datums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Command] = []

    class Recorded:
        exit_status = None
        killed = False

        def __init__(self, command: Command, *, on_line: Callable[[str], None], on_change: Callable[[], None]) -> None:
            started.append(command)

        def kill(self) -> None:
            Recorded.killed = True

    monkeypatch.setattr(worker, "UserProcess", Recorded)
    store = Store(tmp_path / "state", pfs.SCHEMA + pps.SCHEMA + secrets.SCHEMA)
    rules = pps.Pps(pfs.Pfs(store), secrets.Secrets(store.metadata, tmp_path))
    batching = parsed_spec(transform={"cmd": ["batch"], "datumBatching": True})
    job: Any = SimpleNamespace(id="0" * 32)
    context = worker.JobContext(job, batching, "salt", roots={}, secret_env={}, secret_mounts={}, spec_commit="c")
    endpoint: Any = SimpleNamespace(port=7, stop=lambda: None)
    made = worker.Worker("w", tmp_path / "worker", store, rules, lambda next_datum: endpoint)
    made.work(context, [])
    assert [command.argv[-1] for command in started] == ["batch"]
    assert started[0].env["PPS_WORKER_GRPC_PORT"] == "7"
    assert Recorded.killed
    store.close()


@pytest.mark.parametrize("feature", [{"egress": {"URL": "s3://b"}}, {"spout": {"service": {}}}, {"s3Out": True}])
def test_a_pipeline_that_wants_more_than_there_is_is_refused_by_name(feature: dict[str, Any]) -> None:
    with pytest.raises(Unimplemented, match=next(iter(feature))):
        parsed_spec(**feature)


def test_a_datums_id_is_pachyderms() -> None:
    one = pps.DatumInput("images", pfs.RepoKey("any", "images"), "master", "any", "/liberty.jpg", "ab", 1)
    assert datum_id([one]) == "cef4a52be60465b328ea783037b6c46531ad7cc9f4e190f9c0e548f473cd1fd1"


@pytest.mark.parametrize(
    ("sets", "workers", "datums", "size"),
    [({}, 1, 100, 25), ({}, 5, 100, 5), ({}, 2, 3, 1), ({"number": 7}, 5, 100, 7), ({"perWorker": 1}, 2, 101, 51)],
)
def test_datums_are_shared_out_in_sets(sets: dict[str, int], workers: int, datums: int, size: int) -> None:
    assert parsed_spec(datumSetSpec=sets, parallelismSpec={"constant": str(workers)}).set_size(datums) == size
