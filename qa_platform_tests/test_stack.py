"""The embedded stack as a user has it: the command `qa-platform local run`, its environment, and what is left when it has ended."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest

from qa_platform.embedded.process import ServerSpec, running
from qa_platform.embedded.stack import BUCKET, Stack
from qa_platform_tests.processes import LIMIT_SECONDS, processes_of, until

LOCAL_RUN = [sys.executable, "-m", "qa_platform.cli", "local", "run"]


@pytest.fixture(scope="module")
def old_state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of stacks that each find what the one before has left."""
    return tmp_path_factory.mktemp("stacks") / "state"


@pytest.fixture
def state(old_state: Path) -> Iterator[Path]:
    """A folder for a stack, of which nothing may be left running after the test."""
    yield from without_left_overs(old_state)


@pytest.fixture
def new_state(tmp_path: Path) -> Iterator[Path]:
    """The same, and it is empty."""
    yield from without_left_overs(tmp_path / "state")


def without_left_overs(folder: Path) -> Iterator[Path]:
    (folder.parent / "ready").unlink(missing_ok=True)
    yield folder
    for process in (left := processes_of(folder)):
        process.kill()
    assert left == []


def local_run(state: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    words = [*LOCAL_RUN, "--state", str(state), "--", *command]
    return subprocess.run(words, cwd=state.parent, capture_output=True, text=True, timeout=120, check=False)


@contextlib.contextmanager
def started(state: Path, script: str) -> Iterator["subprocess.Popen[bytes]"]:
    """`local run` of a shell script that makes the file `ready` in the folder above the state when it has come so far."""
    ready = state.parent / "ready"
    process = subprocess.Popen([*LOCAL_RUN, "--state", str(state), "--", "sh", "-c", script], cwd=state.parent)
    try:
        until(lambda: ready.exists() or process.poll() is not None)
        assert ready.exists()
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def test_the_environment_reaches_everything(stack: Stack) -> None:
    variables = stack.variables
    with psycopg.connect(variables["QA_DATABASE_URL"]) as connection:
        assert connection.execute("select current_database()").fetchone() == ("answers",)
        assert connection.execute("select to_regclass('question_file') is not null").fetchone() == (True,)
    with psycopg.connect(variables["DAGSTER_PG_URL"]) as connection:
        assert connection.execute("select current_database()").fetchone() == ("dagster",)
    code = "from google.cloud import storage; print([b.name for b in storage.Client().list_buckets()])"
    listed = subprocess.run([sys.executable, "-c", code], env=stack.environment, capture_output=True, text=True, check=True)
    assert listed.stdout.strip() == str([BUCKET])


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


@pytest.mark.slow
def test_the_exit_status_is_that_of_the_command_and_its_state_is_found_again(state: Path) -> None:
    assert local_run(state, "psql", "-c", "create table kept (x int)").returncode == 0
    assert local_run(state, "psql", "-Atc", "select count(*) from kept").stdout.strip() == "0"
    assert local_run(state, "sh", "-c", "exit 7").returncode == 7
    assert local_run(state, "sh", "-c", "kill -KILL $$").returncode == 128 + signal.SIGKILL
    missing = local_run(state, "no-such-command")
    assert missing.returncode == 1
    assert "no-such-command" in missing.stderr
    assert "Traceback" not in missing.stderr


@pytest.mark.slow
def test_a_second_run_on_the_same_state_uses_the_running_stack(state: Path) -> None:
    with started(state, "touch ready; sleep 1000") as first:
        pid = processes_of(state / "postgres" / "data")[0].pid
        assert local_run(state, "psql", "-Atc", "select 1").stdout.strip() == "1"
        assert processes_of(state / "postgres" / "data")[0].pid == pid
        first.send_signal(signal.SIGTERM)
        assert first.wait(LIMIT_SECONDS) == 128 + signal.SIGTERM


@pytest.mark.slow
def test_two_that_start_at_once_get_the_same_stack(new_state: Path) -> None:
    command = [*LOCAL_RUN, "--state", str(new_state), "--", "sh", "-c", 'echo "$STORAGE_EMULATOR_HOST"; sleep 3']
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outputs[0] == outputs[1] != "\n"


# Detached in every way that a shell knows; none of it ends by itself.
DETACHED = "sleep 1001 & nohup sleep 1002 >/dev/null 2>&1 & setsid sh -c 'trap \"\" TERM; touch ready; sleep 1003; sleep 1004' & "


@pytest.mark.slow
@pytest.mark.faults
def test_what_a_command_leaves_running_is_ended(state: Path) -> None:
    assert local_run(state, "sh", "-c", f"{DETACHED} exit 3").returncode == 3
    assert processes_of(state) == []


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_the_command_and_the_stack(state: Path, number: signal.Signals) -> None:
    with started(state, f"{DETACHED} exec sleep 1000") as process:
        process.send_signal(number)
        assert process.wait(LIMIT_SECONDS) == 128 + number
    assert processes_of(state) == []


@pytest.mark.slow
@pytest.mark.faults
def test_the_command_decides_what_a_signal_means(state: Path) -> None:
    with started(state, "trap 'touch told; exit 5' TERM; touch ready; while :; do sleep 0.1; done") as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_SECONDS) == 5
    assert (state.parent / "told").exists()


@pytest.mark.slow
@pytest.mark.faults
def test_ctrl_c_in_a_terminal_reaches_the_command_once_and_ends_all(state: Path) -> None:
    script = "trap 'echo told >> told' INT; touch ready; sleep 1000; sleep 1; exit 6"
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(state.parent)
        os.execv(sys.executable, [*LOCAL_RUN, "--state", str(state), "--", "sh", "-c", script])
    until((state.parent / "ready").exists)
    os.write(terminal, b"\x03")
    status = until(lambda: _status(pid, terminal))
    assert status == 6
    assert (state.parent / "told").read_text() == "told\n"
    assert processes_of(state) == []


def _status(pid: int, terminal: int) -> int | None:
    """The exit status of a process on a terminal, whose output is read and dropped; None while it runs."""
    os.set_blocking(terminal, False)
    with contextlib.suppress(OSError):
        os.read(terminal, 4096)
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


@pytest.mark.slow
@pytest.mark.faults
def test_a_signal_during_the_start_ends_what_was_started(new_state: Path) -> None:
    process = subprocess.Popen([*LOCAL_RUN, "--state", str(new_state), "--", "sleep", "1000"])
    until(lambda: (new_state / "postgres").exists())
    process.send_signal(signal.SIGTERM)
    assert process.wait(LIMIT_SECONDS) == 128 + signal.SIGTERM
    assert processes_of(new_state) == []


@pytest.mark.slow
@pytest.mark.faults
def test_a_killed_stack_leaves_nothing_and_starts_again(state: Path) -> None:
    with started(state, f"{DETACHED} psql -c 'create table survivor (x int)'; sleep 1000") as process:
        process.kill()
        process.wait()
        until(lambda: processes_of(state) == [])
    assert local_run(state, "psql", "-Atc", "select count(*) from survivor").stdout.strip() == "0"


@pytest.mark.slow
@pytest.mark.faults
def test_a_stack_starts_at_once_after_a_kill(state: Path) -> None:
    """While the servers of before are still on their way out."""
    with started(state, "touch ready; sleep 1000") as process:
        process.kill()
        process.wait()
    assert local_run(state, "psql", "-Atc", "select 1").stdout.strip() == "1"


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


def test_help_comes_at_once() -> None:
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "qa_platform.cli", "--help"], capture_output=True, text=True, check=True)
    assert "local" in done.stdout
    code = "import sys, qa_platform.cli; print([m for m in ('dagster', 'torch', 'google.cloud.storage', 'psycopg') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    # A hundredth of that on an idle machine.
    assert time.monotonic() - began < 5
