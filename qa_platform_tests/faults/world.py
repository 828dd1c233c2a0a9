"""The whole platform as processes that can be killed one by one: servers, daemon, code server, run workers, pipeline workers."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage

from qa_platform.embedded import postgres
from qa_platform.embedded.process import START_SECONDS, RunningServer, ServerSpec
from qa_platform.embedded.stack import BUCKET, Stack
from qa_platform.project_files import project_file
from qa_platform_tests.answering_models import make_bert
from qa_platform_tests.faults.proxies import FaultyBucket, Forwarder

PROJECT = Path(__file__).resolve().parents[2]

# Everything that waits in the platform waits shortly here; the lease is longer than a run takes to start.
LEASE_SECONDS = 15
_SETTINGS = {
    "QA_LEASE_SECONDS": str(LEASE_SECONDS),
    "QA_SENSOR_SECONDS": "2",
    "QA_RECONCILE_SECONDS": "5",
    "QA_RETRY_FIRST_SECONDS": "2",
    "QA_RETRY_MOST_SECONDS": "20",
    "QA_BATCH_FILES": "4",
    "QA_SHARD_ROWS": "15",
    "QA_THREADS": "1",
}
_MONITORING = ("poll_interval_seconds: 30", "poll_interval_seconds: 10")

_SPECS = {name: ServerSpec(name, f"qa_platform.embedded.{name}") for name in ("postgres", "gcs", "pachd")}


class World:
    """A stack in ``state`` with the daemon on it. The platform reaches the bucket and pachd through proxies, the tests do not."""

    def __init__(self, state: Path, rng: random.Random) -> None:
        self.state = state
        self._closing = contextlib.ExitStack()
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
        self._environment = {name: value for name, value in environment.items() if not name.startswith(("PG", "PACH", "QA_"))}
        self._servers = {name: RunningServer(spec, state, environment=self._environment) for name, spec in _SPECS.items()}
        self._closing.callback(self._end_servers)
        addresses = {name: server.address() for name, server in self._servers.items()}
        self.proxy = FaultyBucket(addresses["gcs"], rng)
        self.pachd = Forwarder()
        self.pachd.target = addresses["pachd"]
        self._closing.callback(self.proxy.close)
        self._closing.callback(self.pachd.close)
        self.socket_folder = Path(addresses["postgres"])
        self.stack = Stack(state, {"postgres": addresses["postgres"], "gcs": self.proxy.address, "pachd": self.pachd.address})
        model = make_bert(state / "model")
        self.variables = {**self.stack.variables, **_SETTINGS, "QA_MODEL": str(model)}
        self._prepare()
        client = storage.Client("test", AnonymousCredentials(), client_options={"api_endpoint": f"http://{addresses['gcs']}"})
        self.bucket: storage.Bucket = client.bucket(BUCKET)
        self.daemon: subprocess.Popen[bytes] | None = None
        self.agent: subprocess.Popen[str] | None = None
        self.restarts = 0

    @property
    def environment(self) -> dict[str, str]:
        return {**self._environment, **self.variables}

    def close(self) -> None:
        self._closing.close()

    def _prepare(self) -> None:
        home = self.state / "dagster"
        home.mkdir(exist_ok=True)
        text = project_file("dagster.yaml").read_text()
        assert _MONITORING[0] in text
        (home / "dagster.yaml").write_text(text.replace(*_MONITORING))
        command = [sys.executable, "-m", "qa_platform.embedded.prepare"]
        subprocess.run(command, input=json.dumps(self.variables), text=True, env=self._environment, check=True)

    def _end_servers(self) -> None:
        for started in (self.daemon, self.agent):
            if started:
                started.kill()
                started.wait()
        for process in self.processes("dagster"):
            with contextlib.suppress(psutil.Error):
                process.kill()
        for server in self._servers.values():
            server.end()
        for server in self._servers.values():
            server.wait()

    # What a supervisor does: systemd, Kubernetes, or a person.

    def supervise(self) -> None:
        """Start whatever should run and does not."""
        if self.daemon is None or self.daemon.poll() is not None:
            self.restarts += self.daemon is not None
            with (self.state / "logs" / "daemon.log").open("ab") as log:
                command = [sys.executable, "-m", "dagster._daemon", "run", "-w", str(PROJECT / "workspace.yaml")]
                self.daemon = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, cwd=PROJECT)
        if self.agent is None or self.agent.poll() is not None:
            with (self.state / "logs" / "agent.log").open("ab") as log:
                self.agent = subprocess.Popen(
                    [sys.executable, "-m", "qa_platform_tests.faults.agent"],
                    env=self.environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    cwd=PROJECT,
                )

    def tell_agent(self, order: dict[str, Any]) -> None:
        """Have the agent do something; returns at once."""
        assert self.agent
        assert self.agent.stdin
        self.agent.stdin.write(json.dumps(order) + "\n")
        self.agent.stdin.flush()

    # The processes.

    def processes(self, kind: str) -> list[psutil.Process]:
        """The live processes of a kind: ``run`` (Dagster's run workers), ``worker`` (the pipelines'), or ``dagster`` (all of its)."""
        return [process for process in psutil.process_iter() if self._is(process, kind)]

    def _is(self, process: psutil.Process, kind: str) -> bool:
        with contextlib.suppress(psutil.Error):
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            command = " ".join(process.cmdline())
            if kind == "worker":
                if not any(f"python -m qa_platform.{part}.worker" in command for part in ("answering", "loading")):
                    return False
                return self._servers["pachd"].pid in [parent.pid for parent in process.parents()]
            if process.environ().get("DAGSTER_HOME") != self.variables["DAGSTER_HOME"]:
                return False
            if kind == "run":
                parent = process.parent()
                return "spawn_main" in command and parent is not None and "grpc" in " ".join(parent.cmdline())
            return "dagster" in command or "spawn_main" in command
        return False

    def kill_daemon(self) -> None:
        daemon = self.daemon
        assert daemon
        daemon.kill()
        daemon.wait()

    def restart_pachd(self) -> None:
        self._servers["pachd"].kill()
        self._servers["pachd"] = RunningServer(_SPECS["pachd"], self.state, environment=self._environment)
        self.pachd.target = self._servers["pachd"].address()

    def kill_postgres(self, *, seconds: float) -> None:
        """Kill PostgreSQL's first process, keep it away for a while, and start it again."""
        pid = int((self.state / "postgres" / "data" / "postmaster.pid").read_text().splitlines()[0])
        os.kill(pid, signal.SIGKILL)
        self._servers["postgres"].wait()
        time.sleep(seconds)
        self._servers["postgres"] = RunningServer(_SPECS["postgres"], self.state, environment=self._environment)
        assert self._servers["postgres"].address() == str(self.socket_folder)

    def kill_backend(self, rng: random.Random) -> bool:
        """Kill one process that serves a connection: PostgreSQL then cuts all of them and recovers."""
        with self.database() as connection:
            query = "SELECT pid FROM pg_stat_activity WHERE datname IS NOT NULL AND pid <> pg_backend_pid()"
            pids = [pid for (pid,) in connection.execute(query)]
        if pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(pids), signal.SIGKILL)
        return bool(pids)

    @contextlib.contextmanager
    def postgres_refuses(self) -> Iterator[None]:
        """Cut all connections, and let nobody connect for as long as the block lasts."""
        socket = self.socket_folder / f".s.PGSQL.{postgres.PORT}"
        hidden = socket.with_suffix(".hidden")
        with self.database() as connection:
            socket.rename(hidden)
            try:
                connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname <> ''")
                yield
            finally:
                hidden.rename(socket)

    def database(self) -> psycopg.Connection:
        """A connection of the test's own; waits while PostgreSQL recovers."""
        until = time.monotonic() + START_SECONDS
        while True:
            try:
                return psycopg.connect(postgres.database_url(str(self.socket_folder), postgres.ANSWERS_DATABASE), autocommit=True)
            except psycopg.OperationalError:
                if time.monotonic() > until:
                    raise
            time.sleep(0.1)


def resume_later(process: psutil.Process, seconds: float) -> None:
    """Let a stopped process go on after a while, in the background."""

    def resume() -> None:
        with contextlib.suppress(psutil.Error):
            process.resume()

    timer = threading.Timer(seconds, resume)
    timer.daemon = True
    timer.start()
