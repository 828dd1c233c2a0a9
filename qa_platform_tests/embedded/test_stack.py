"""The embedded stack as a user runs it: the command `qa-platform local run`, its environment, and what it leaves when it ends."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest
from pachyderm_sdk import Client

from qa_platform.contract import ANSWER_PIPELINE, LOAD_PIPELINE, QUESTIONS_REPO
from qa_platform.embedded.stack import BUCKET, Stack
from qa_platform.embedded.supervise import ServerSpec, running
from qa_platform_tests.processes import LIMIT_SECONDS, processes_of, until

LOCAL_RUN = [sys.executable, "-m", "qa_platform.cli.main", "local", "run"]


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """A folder for a stack of the test's own, of which nothing may be left running after it."""
    yield tmp_path / "state"
    for process in (left := processes_of(tmp_path)):
        process.kill()
    assert left == []


def words_of(state: Path, *command: str) -> list[str]:
    return [*LOCAL_RUN, "--state", str(state), "--", *command]


def local_run(state: Path, *command: str, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(words_of(state, *command), cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


@contextlib.contextmanager
def started(state: Path, script: str, cwd: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """`local run` of a shell script that makes the file `ready` when it has come so far."""
    process = subprocess.Popen(words_of(state, "sh", "-c", script), cwd=cwd)
    try:
        until(lambda: (cwd / "ready").exists() or process.poll() is not None)
        assert (cwd / "ready").exists()
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def test_the_environment_reaches_everything(stack: Stack) -> None:
    variables = stack.variables
    with psycopg.connect(variables["QA_DATABASE_URL"], password=variables["PGPASSWORD"]) as connection:
        assert connection.execute("select current_database()").fetchone() == ("answers",)
        assert connection.execute("select to_regclass('question_file') is not null").fetchone() == (True,)
    with psycopg.connect(variables["DAGSTER_PG_URL"]) as connection:
        assert connection.execute("select current_database()").fetchone() == ("dagster",)
    code = "from google.cloud import storage; print([b.name for b in storage.Client().list_buckets()])"
    listed = subprocess.run([sys.executable, "-c", code], env=stack.environment, capture_output=True, text=True, check=True)
    assert listed.stdout.strip() == str([BUCKET])


def test_repos_and_pipelines_are_there(stack: Stack) -> None:
    client = Client.from_pachd_address(stack.variables["PACHD_ADDRESS"], auth_token=stack.variables["PACH_TOKEN"])
    assert {info.pipeline.name for info in client.pps.list_pipeline()} == {ANSWER_PIPELINE, LOAD_PIPELINE}
    assert {QUESTIONS_REPO, ANSWER_PIPELINE, LOAD_PIPELINE} <= {info.repo.name for info in client.pfs.list_repo()}


def test_plain_psql_finds_the_answers(stack: Stack) -> None:
    done = subprocess.run(["psql", "-Atc", "select current_database()"], env=stack.environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "answers"


def test_dagster_keeps_its_records_in_postgres(stack: Stack) -> None:
    code = "import dagster as d; i = d.DagsterInstance.get(); print(type(i.run_storage).__name__, i.telemetry_enabled)"
    done = subprocess.run([sys.executable, "-c", code], env=stack.environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["PostgresRunStorage", "False"], done.stderr


def test_what_points_to_other_services_does_not_get_in(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PG_PASSWORD", "PGSERVICE", "PG_SSLROOTCERT", "PACH_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS", "GCS_ACCESS"):
        monkeypatch.setenv(name, "elsewhere")
    monkeypatch.setenv("PG_HOST", "elsewhere")
    # The settings ignore the case of names.
    for name in ("pg_dbname", "pachd_address", "Storage_Bucket"):
        monkeypatch.setenv(name, "elsewhere")
    monkeypatch.setenv("QA_SHARD_ROWS", "7")
    monkeypatch.setenv("no_proxy", "example.org")
    environment = stack.environment
    assert "elsewhere" not in environment.values()
    assert environment["QA_SHARD_ROWS"] == "7"
    assert environment["no_proxy"] == "example.org,127.0.0.1,localhost"


def test_everything_listens_on_loopback_only(stack: Stack) -> None:
    listening = [
        connection.laddr
        for process in processes_of(stack.state)
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening
    assert {address.ip.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


def test_no_secret_is_in_the_description(stack: Stack) -> None:
    assert set(json.loads((stack.state / "stack.json").read_text())) == {"pid", "addresses"}


@pytest.mark.parametrize(
    ("script", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -KILL $$", 128 + signal.SIGKILL), ("kill -TERM $$", 128 + signal.SIGTERM)]
)
def test_the_exit_status_is_that_of_the_command(stack: Stack, script: str, status: int) -> None:
    assert local_run(stack.state, "sh", "-c", script).returncode == status


def test_a_command_that_does_not_exist_is_named(stack: Stack) -> None:
    missing = local_run(stack.state, "no-such-command")
    assert missing.returncode == 1
    assert "no-such-command" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_a_second_run_on_the_same_state_uses_the_running_stack(stack: Stack) -> None:
    address = stack.variables["API_ENDPOINT_OVERRIDE"]
    assert local_run(stack.state, "sh", "-c", 'echo "$API_ENDPOINT_OVERRIDE"').stdout.strip() == address
    # And did not take it down.
    assert local_run(stack.state, "psql", "-Atc", "select 1").stdout.strip() == "1"


@pytest.mark.slow
def test_two_that_start_at_once_get_the_same_stack(state: Path) -> None:
    command = words_of(state, "sh", "-c", 'echo "$API_ENDPOINT_OVERRIDE"; touch $$; until [ $(ls | wc -l) = 3 ]; do sleep 0.1; done')
    # Neither ends before the other has begun: this folder has then a file of each, and the state.
    both = [subprocess.Popen(command, cwd=state.parent, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outputs[0] == outputs[1] != "\n"


# Detached in every way that a shell knows; none of it ends by itself.
DETACHED = "sleep 1001 & nohup sleep 1002 >/dev/null 2>&1 & setsid sh -c 'trap \"\" TERM; touch ready; sleep 1003; sleep 1004' & "


@pytest.mark.faults
def test_what_a_command_leaves_running_is_ended(stack: Stack, tmp_path: Path) -> None:
    done = local_run(stack.state, "sh", "-c", f"{DETACHED} until [ -e ready ]; do sleep 0.1; done; exit 3", cwd=tmp_path)
    assert done.returncode == 3
    assert processes_of(tmp_path) == []


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_the_command_and_all_that_it_started(stack: Stack, tmp_path: Path, number: signal.Signals) -> None:
    with started(stack.state, f"{DETACHED} exec sleep 1000", tmp_path) as process:
        process.send_signal(number)
        assert process.wait(LIMIT_SECONDS) == 128 + number
    assert processes_of(tmp_path) == []


@pytest.mark.faults
def test_a_killed_run_takes_all_that_its_command_started_with_it(stack: Stack, tmp_path: Path) -> None:
    with started(stack.state, f"{DETACHED} exec sleep 1000", tmp_path) as process:
        process.kill()
        process.wait()
        until(lambda: processes_of(tmp_path) == [])


@pytest.mark.faults
def test_the_command_decides_what_a_signal_means(stack: Stack, tmp_path: Path) -> None:
    with started(stack.state, "trap 'touch told; exit 5' TERM; touch ready; while :; do sleep 0.1; done", tmp_path) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_SECONDS) == 5
    assert (tmp_path / "told").exists()


@pytest.mark.faults
def test_ctrl_c_in_a_terminal_reaches_the_command_once(stack: Stack, tmp_path: Path) -> None:
    # The second it stays is for a second signal, which must not come.
    script = "n=0; trap 'echo told >> told; n=1' INT; touch ready; while [ $n = 0 ]; do sleep 0.1; done; sleep 1; exit 6"
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execv(sys.executable, words_of(stack.state, "sh", "-c", script))
    until((tmp_path / "ready").exists)
    os.write(terminal, b"\x03")
    assert until(lambda: _status(pid, terminal)) == 6
    assert (tmp_path / "told").read_text() == "told\n"
    assert processes_of(tmp_path) == []


def _status(pid: int, terminal: int) -> int | None:
    """The exit status of a process on a terminal, whose output is read and dropped; None while it runs."""
    os.set_blocking(terminal, False)
    with contextlib.suppress(OSError):
        os.read(terminal, 4096)
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


@pytest.mark.slow
@pytest.mark.faults
def test_a_signal_ends_the_stack(state: Path) -> None:
    with started(state, "touch ready; exec sleep 1000", state.parent) as process:
        assert len(processes_of(state)) > 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_SECONDS) == 128 + signal.SIGTERM
    assert processes_of(state) == []


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("far", ["stack.lock", "postgres", "gcs.address", "dagster"])
def test_a_signal_during_the_start_ends_what_was_started(state: Path, far: str) -> None:
    process = subprocess.Popen(words_of(state, "sleep", "1000"))
    until(lambda: (state / far).exists())
    process.send_signal(signal.SIGTERM)
    assert process.wait(LIMIT_SECONDS) == 128 + signal.SIGTERM
    assert processes_of(state) == []


@pytest.mark.slow
@pytest.mark.faults
def test_a_killed_stack_leaves_nothing_and_can_be_started_at_once(state: Path) -> None:
    script = f"psql -c 'create table kept (x int)' -c checkpoint; {DETACHED} sleep 1000"
    with started(state, script, state.parent) as process:
        process.kill()
        process.wait()
    # The servers of before are still on their way out.
    assert local_run(state, "psql", "-Atc", "select count(*) from kept").stdout.strip() == "0"
    until(lambda: processes_of(state.parent) == [])


@pytest.mark.slow
def test_a_stack_starts_in_a_path_with_blanks_and_special_characters(tmp_path: Path) -> None:
    state = tmp_path / "a folder, with 'quotes' & ünïcode%20"
    done = local_run(state, "psql", "-Atc", "select 1")
    assert done.stdout.strip() == "1", done.stderr


def test_a_server_that_does_not_start_is_reported_with_its_log(tmp_path: Path) -> None:
    with (
        pytest.raises(Exception, match=r"(?s)embedded broken ended with status 1.*No module named"),
        running([ServerSpec("gcs", "qa_platform.embedded.gcs"), ServerSpec("broken", "qa_platform.embedded.no_such_module")], tmp_path),
    ):
        pass
    assert processes_of(tmp_path) == []


def test_help_imports_nothing_that_is_slow() -> None:
    done = subprocess.run([sys.executable, "-m", "qa_platform.cli.main", "--help"], capture_output=True, text=True, check=True)
    assert "local" in done.stdout
    code = (
        "import sys, qa_platform.cli.main; print([m for m in ('dagster', 'torch', 'google.cloud.storage', 'psycopg') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_stack_outlives_its_first_command_while_another_uses_it(tmp_path: Path) -> None:
    run = [sys.executable, "-m", "qa_platform.cli.main", "local", "run", "--state", str(tmp_path / "qa"), "--"]
    wait = f"while ! test -e {tmp_path}/go; do sleep 0.1; done"
    first = subprocess.Popen([*run, "sh", "-c", wait], stderr=subprocess.PIPE, text=True)
    until((tmp_path / "qa/stack.json").exists)
    # The second command ends the first one.
    script = f"touch {tmp_path}/go; sleep 3; psql -qAtc 'SELECT 1'"
    second = subprocess.run([*run, "sh", "-c", script], capture_output=True, text=True, check=False)
    assert (second.returncode, second.stdout) == (0, "1\n"), second.stderr
    _, said = first.communicate(timeout=30)
    assert first.returncode == 0
    assert "a new stack in" in said
    assert "its stack stays until the others" in said
    assert second.stderr == ""


def test_a_signal_ends_the_wait_for_others_that_use_the_stack(tmp_path: Path) -> None:
    run = [sys.executable, "-m", "qa_platform.cli.main", "local", "run", "--state", str(tmp_path / "qa"), "--"]
    first = subprocess.Popen([*run, "sh", "-c", f"while ! test -e {tmp_path}/go; do sleep 0.1; done"], stderr=subprocess.PIPE, text=True)
    until((tmp_path / "qa/stack.json").exists)
    second = subprocess.Popen([*run, "sh", "-c", f"touch {tmp_path}/go; exec sleep 100"])
    try:
        assert first.stderr
        while "its stack stays" not in (line := first.stderr.readline()):
            assert line, "the first command did not wait"
        first.terminate()
        first.communicate(timeout=30)
        assert second.poll() is None
        assert not (tmp_path / "qa/stack.json").exists()
    finally:
        second.terminate()
        second.wait(30)


def test_a_command_that_removes_the_folder_of_its_stack_ends_with_its_own_status(tmp_path: Path) -> None:
    run = [sys.executable, "-m", "qa_platform.cli.main", "local", "run", "--state", str(tmp_path / "qa"), "--"]
    ended = subprocess.run([*run, "sh", "-c", f"rm -rf {tmp_path}/qa; exit 7"], capture_output=True, text=True, check=False)
    assert ended.returncode == 7, ended.stderr
