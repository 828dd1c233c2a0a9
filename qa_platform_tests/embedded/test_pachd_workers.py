"""Workers of the embedded pachd, with and without a private file system."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from pachyderm_sdk.api import logs as logs_api
from pachyderm_sdk.api import pfs as pfs_api
from pachyderm_sdk.api import pps as pps_api

from qa_platform.embedded.pachd import pfs, pps
from qa_platform.embedded.pachd.errors import Unimplemented
from qa_platform.embedded.pachd.execution.datums import datum_id
from qa_platform.embedded.pachd.execution.isolation import PFS, can_isolate
from qa_platform_tests.embedded.specifications import BATCH, parsed_spec
from qa_platform_tests.pachd_helpers import FAILURE, SUCCESS, Pachd, Server, eventually, has_ended, refused

STANDBY = pps_api.PipelineState.PIPELINE_STANDBY
TOOLS = ("ls", "sh", "cat", "cp", "ln", "basename", "grep", "env", "rm", "kill", "sleep")
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


def secret_pipeline(pachd: Pachd, repo: pfs_api.Repo, script: str, **more: Any) -> tuple[str, str]:
    """A pipeline with a mounted secret whose keys are ``a`` and ``b``; its name and the secret's."""
    secret = pachd.name("secret")
    pachd.client.pps.create_secret(name=secret, data={"a": "planted-1", "b": "planted-2"})
    uses = [{"name": secret, "mountPath": f"/secrets/{secret}"}]
    return pachd.pipeline("p", script.replace("NAME", secret), repo, transform={"secrets": uses}, **more), secret


READ_SECRETS = "cat ${QA_SECRETS_ROOT:-/secrets}/NAME/a ${QA_SECRETS_ROOT:-/secrets}/NAME/b > $pfs/out/$(basename $source)"


def test_without_namespaces_a_variable_leads_to_the_mounted_secrets(bare: Server) -> None:
    pachd = Pachd(bare.address)
    repo = pachd.repo()
    name, _ = secret_pipeline(pachd, repo, f"echo $QA_SECRETS_ROOT\nls -ld $QA_SECRETS_ROOT $QA_SECRETS_ROOT/NAME/a\n{READ_SECRETS}")
    commit = pachd.put(repo, {"/a": b"1"})
    assert pachd.wait(name, commit).state == SUCCESS
    root, folder, file = pachd.lines(name, commit)
    assert not Path(root).is_relative_to(bare.state)
    assert (folder[:10], file[:10]) == ("drwx------", "-rw-------")
    assert pachd.read(name, commit, "/a") == b"planted-1planted-2"
    # The output holds them: look at the rest.
    meta = pfs_api.Repo(name=name, type="meta")
    environments = [path for path in pachd.paths(meta, commit) if path.endswith("/.env")]
    assert environments
    assert all(b"planted" not in pachd.read(meta, commit, path) for path in environments)


def test_a_changed_secret_reaches_a_pipeline_with_autoscaling_at_its_next_pod(bare: Server) -> None:
    pachd = Pachd(bare.address)
    repo = pachd.repo()
    name, secret = secret_pipeline(pachd, repo, READ_SECRETS, autoscaling=True)
    fixed = pachd.name("fixed")
    uses = [{"name": secret, "mountPath": f"/secrets/{secret}"}]
    pachd.create(pachd.spec(fixed, READ_SECRETS.replace("NAME", secret), repo, transform={"secrets": uses}))
    first = pachd.put(repo, {"/a": b"1"})
    assert pachd.wait(name, first).state == pachd.wait(fixed, first).state == SUCCESS
    eventually(lambda: pachd.client.pps.inspect_pipeline(pipeline=pps_api.Pipeline(name=name)).state == STANDBY)
    pachd.client.pps.delete_secret(secret=pps_api.Secret(name=secret))
    pachd.client.pps.create_secret(name=secret, data={"a": "new", "b": "new"})
    second = pachd.put(repo, {"/b": b"1"})
    assert pachd.wait(name, second).state == pachd.wait(fixed, second).state == SUCCESS
    assert pachd.read(name, second, "/b") == b"newnew"
    assert pachd.read(fixed, second, "/b") == b"planted-1planted-2", "its pod has been there all the time"


def test_secrets_in_the_environment_stand_in_the_meta_repo_even_if_the_job_failed(tmp_path: Path) -> None:
    server = Server(tmp_path)
    pachd = Pachd(server.address)
    repo = pachd.repo()
    secret = pachd.name("secret")
    pachd.client.pps.create_secret(name=secret, data={"key": "planted"})
    uses = [{"name": secret, "envVar": "PLANTED", "key": "key"}]
    script = 'echo made > $pfs/out/made-$(basename $source)\n[ "$(basename $source)" != bad ] || exit 3'
    name = pachd.pipeline("p", script, repo, glob="/*", transform={"secrets": uses})
    commit = pachd.put(repo, {"/d/a": b"1", "/bad": b"2"})
    assert pachd.wait(name, commit).state == FAILURE
    datums = {path.strip("/"): info.datum.id for path, info in pachd.datums(name, commit).items()}
    meta = pfs_api.Repo(name=name, type="meta")
    bad = datums["bad"]
    assert json.loads(pachd.read(meta, commit, f"/meta/{bad}/meta"))["reason"] == "exit status 3"
    assert b"\nPLANTED=planted\n" in pachd.read(meta, commit, f"/pfs/{bad}/.env")
    assert pachd.read(meta, commit, f"/pfs/{datums['d']}/source/d/a") == b"1"
    assert pachd.read(meta, commit, f"/pfs/{datums['d']}/out/made-d") == b"made\n"
    assert pachd.read(meta, commit, f"/pfs/{bad}/out/made-bad") == b"made\n"
    assert pachd.paths(name, commit) == ["/made-d"]
    found = pachd.client.pfs.glob_file(commit=pachd.commit(meta, commit), pattern="/meta/*/meta")
    assert sorted(info.file.path for info in found) == sorted(f"/meta/{datum}/meta" for datum in datums.values())
    assert server.stop() == 0


def test_the_meta_repo_refers_to_big_inputs_and_outputs_and_does_not_copy_them(tmp_path: Path) -> None:
    server = Server(tmp_path)
    pachd = Pachd(server.address)
    repo = pachd.repo()
    name = pachd.pipeline("p", "cp $source $pfs/out/", repo)
    commit = pachd.put(repo, {f"/{number}": os.urandom(2**20) for number in range(8)})
    assert pachd.wait(name, commit).state == SUCCESS
    stored = sum(file.stat().st_size for file in (server.state / "chunks").rglob("*") if file.is_file())
    assert 8 * 2**20 <= stored < 9 * 2**20
    assert server.stop() == 0


def test_what_a_process_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    server = Server(tmp_path)
    pachd = Pachd(server.address)
    repo = pachd.repo()
    name = pachd.pipeline("p", "sleep 600 &\necho $! > $pfs/out/process", repo)
    commit = pachd.put(repo, {"/a": b"1"})
    assert pachd.wait(name, commit).state == SUCCESS
    process = int(pachd.read(name, commit, "/process"))
    eventually(lambda: has_ended(process))
    assert server.stop() == 0


@pytest.mark.parametrize("feature", [{"egress": {"URL": "s3://b"}}, {"spout": {"service": {}}}, {"s3Out": True}])
def test_a_pipeline_that_wants_more_than_there_is_is_refused_by_name(feature: dict[str, Any]) -> None:
    with pytest.raises(Unimplemented, match=next(iter(feature))):
        parsed_spec(**feature)


def test_a_datums_id_is_pachyderms() -> None:
    one = pps.DatumInput("images", pfs.RepoKey("any", "images"), "master", "any", "/liberty.jpg", "ab", 1)
    assert datum_id([one]) == "cef4a52be60465b328ea783037b6c46531ad7cc9f4e190f9c0e548f473cd1fd1"


@pytest.mark.parametrize(
    ("sets", "workers", "datums", "size"),
    [({}, 1, 100, 25), ({}, 5, 100, 5), ({}, 2, 3, 1), ({"number": 7}, 5, 100, 7), ({"perWorker": 1}, 2, 101, 50)],
)
def test_datums_are_shared_out_in_sets(sets: dict[str, int], workers: int, datums: int, size: int) -> None:
    assert parsed_spec(datumSetSpec=sets, parallelismSpec={"constant": str(workers)}).set_size(datums) == size


@contextmanager
def unkind(folder: Path, **options: object) -> Iterator[Pachd]:
    """A server with these options."""
    server = Server(folder, {f"QA_PACHD_{name.upper()}": str(value) for name, value in options.items()})
    pachd = Pachd(server.address)
    try:
        yield pachd
        pachd.clean_up()
    finally:
        assert server.stop() == 0


def test_without_loki_an_idle_pipeline_has_no_pods_and_no_logs(tmp_path: Path) -> None:
    with unkind(tmp_path, loki=False) as pachd:
        repo = pachd.repo()
        name = pachd.pipeline("p", "echo here\nsleep 1", repo, autoscaling=True)
        commit = pachd.put(repo, {"/a": b"1"})
        assert eventually(lambda: pachd.lines(name, commit)) == ["here"]
        assert pachd.wait(name, commit).state == SUCCESS
        eventually(lambda: pachd.client.pps.inspect_pipeline(pipeline=pps_api.Pipeline(name=name)).state == STANDBY)
        with refused(grpc.StatusCode.UNKNOWN, f'no pods belonging to the rc "default-{name}-v1" were found'):
            list(pachd.client.pps.get_logs(job=pachd.job(name, commit)))
        query = logs_api.LogQuery(user=logs_api.UserLogQuery(job=commit))
        with refused(grpc.StatusCode.INTERNAL, "loki client error: loki not configured"):
            list(pachd.client.logs.get_logs(query=query))


def test_lines_can_come_late(tmp_path: Path) -> None:
    with unkind(tmp_path, log_seconds=1.5) as pachd:
        repo = pachd.repo()
        name = pachd.pipeline("p", "echo here", repo)
        commit = pachd.put(repo, {"/a": b"1"})
        assert pachd.wait(name, commit).state == SUCCESS
        assert pachd.lines(name, commit) == []
        assert eventually(lambda: pachd.lines(name, commit)) == ["here"]


def test_a_job_waits_for_a_pod_that_takes_its_time(tmp_path: Path) -> None:
    with unkind(tmp_path, pod_seconds=1.5) as pachd:
        repo = pachd.repo()
        name = pachd.pipeline("p", "true", repo)
        commit = pachd.put(repo, {"/a": b"1"})
        assert pachd.client.pps.inspect_job(job=pachd.job(name, commit)).state == pps_api.JobState.JOB_CREATED
        info = pachd.wait(name, commit)
        assert info.state == SUCCESS
        assert (info.started - info.created).total_seconds() > 0.5


def test_a_program_can_be_made_not_to_start(tmp_path: Path) -> None:
    with unkind(tmp_path, no_start="other, broken") as pachd:
        repo = pachd.repo()
        spec = pachd.spec("broken", ["python", "-c", BATCH], repo, transform={"datumBatching": True})
        pachd.create(spec)
        [job] = pachd.jobs("broken")
        eventually(lambda: pachd.client.pps.inspect_job(job=job.job).restart >= 2)
        assert pachd.client.pps.inspect_job(job=job.job).state == pps_api.JobState.JOB_RUNNING
        assert pachd.client.pps.inspect_pipeline(pipeline=job.job.pipeline).state == pps_api.PipelineState.PIPELINE_RUNNING


# Dies on the datum b.
DYING = BATCH.replace('if source.name == "leave":', 'if source.name == "b":').replace("sys.exit(0)", "sys.exit(9)")


def dying_pipeline(pachd: Pachd, name: str, repo: pfs_api.Repo, program: str) -> None:
    transform = {"datumBatching": True}
    pachd.create(pachd.spec(name, ["python", "-c", program], repo, transform=transform, datumSetSpec={"number": 10}, datumTries=2))


def check_success_without_output(pachd: Pachd, name: str, repo: pfs_api.Repo) -> None:
    commit = pachd.put(repo, {f"/{letter}": b"1" for letter in "abcd"})
    info = pachd.wait(name, commit)
    assert (info.state, info.data_processed, info.data_failed) == (SUCCESS, 4, 0)
    assert {info.state for info in pachd.datums(name, commit).values()} == {pps_api.DatumState.SUCCESS}
    assert pachd.paths(name, commit) == ["/a"]
    again = pachd.wait(name, pachd.put(repo, {"/e": b"1"}))
    assert (again.data_skipped, again.data_processed) == (4, 1)


def test_a_set_whose_restart_fails_ends_in_success_without_output(tmp_path: Path) -> None:
    with unkind(tmp_path, no_restart="dying") as pachd:
        repo = pachd.repo()
        dying_pipeline(pachd, "dying", repo, DYING)
        check_success_without_output(pachd, "dying", repo)


def test_so_does_one_whose_program_does_not_start_twice(tmp_path: Path) -> None:
    server = Server(tmp_path)
    pachd = Pachd(server.address)
    repo = pachd.repo()
    mark = tmp_path / "died"
    # Cannot start as long as the mark is there, which the death leaves and the next job removes.
    program = DYING.replace("sys.exit(9)", f"Path({str(mark)!r}).touch(); sys.exit(9)").replace(
        'print("started", flush=True)', f"Path({str(mark)!r}).exists() and (Path({str(mark)!r}).unlink(), sys.exit(1))"
    )
    dying_pipeline(pachd, pachd.name("p"), repo, program)
    check_success_without_output(pachd, pachd.name("p"), repo)
    assert server.stop() == 0
