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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, LiteralString

import dagster as dg
import grpc
import psutil
import psycopg
import pytest
from google.cloud import storage
from google.oauth2.credentials import Credentials
from pachyderm_sdk import Client
from pachyderm_sdk.api import pps
from psycopg.sql import SQL, Identifier, Literal
from pydantic import SecretStr

from qa_platform.embedded import postgres_access
from qa_platform.embedded.stack import BUCKET, Stack
from qa_platform.embedded.supervise import START_SECONDS, RunningServer, ServerSpec
from qa_platform.ledger import Ledger
from qa_platform.provisioning.project_files import project_file
from qa_platform.provisioning.secrets import DATABASE_SECRET, database_secret
from qa_platform.settings import PostgresSettings
from qa_platform_tests.answering_models import make_bert
from qa_platform_tests.faults.commands import COMMAND_SECONDS, Command
from qa_platform_tests.faults.proxies import FaultyBucket, Forwarder

PROJECT = Path(__file__).resolve().parents[2]

# All waits of the platform are short here.
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
_MONITORING = {
    "poll_interval_seconds: 30": "poll_interval_seconds: 10",
    # The wait for a run whose daemon died while starting it.
    "start_timeout_seconds: 300": "start_timeout_seconds: 90",
}

_SPECS = {name: ServerSpec(name, f"qa_platform.embedded.{name}", guarded=True) for name in ("postgres", "gcs", "pachd")}


# The platform's role in the database.
ROLE = "platform"


class World:
    """A stack in ``state``, with Dagster's daemon. The platform reaches the bucket and pachd through proxies; the tests do not."""

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
        self.stack = Stack.at(state, {"postgres": addresses["postgres"], "gcs": self.proxy.address, "pachd": self.pachd.address})
        model = make_bert(state / "model")
        self.variables = {**self.stack.variables, **_SETTINGS, "QA_MODEL": str(model)}
        self.bucket = self._bucket_at(addresses["gcs"])
        self._prepare()
        self.daemon: subprocess.Popen[bytes] | None = None
        self.agent: subprocess.Popen[str] | None = None
        self.commands: list[Command] = []
        # Holding it prevents uploads.
        self.uploading = threading.RLock()
        self.overwriting = True
        # Ranges of generations (first, last) of uploads that a restore of the bucket removed.
        self.vanished: list[tuple[int, int]] = []
        self.pachyderm_restored = False
        # True until `qa-platform restore` has succeeded.
        self.database_restored = False
        self.postgres_crashed = False
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
        for shipped, here in _MONITORING.items():
            assert shipped in text
            text = text.replace(shipped, here)
        (home / "dagster.yaml").write_text(text)
        command = [sys.executable, "-m", "qa_platform.embedded.prepare"]
        subprocess.run(command, input=json.dumps(self.variables), text=True, env=self._environment, check=True)
        # From here on, the platform uses a role that can lack a privilege. The database's secret names it.
        with self.database() as connection:
            connection.execute(SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(Identifier(ROLE), Literal(self.stack.tokens["postgres"])))
            connection.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {ROLE}")
        self.variables["PG_USER"] = ROLE
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

    # The work of a supervisor: systemd, Kubernetes, or a person.

    def supervise(self) -> None:
        """Start every process that should be running and is not."""
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
        """Give the agent an order, without waiting."""
        assert self.agent
        assert self.agent.stdin
        self.agent.stdin.write(json.dumps(order) + "\n")
        self.agent.stdin.flush()

    def command(self, *arguments: str) -> Command:
        """Start a command of `qa-platform`, as a user would."""
        command = Command.start(arguments, self.environment, self.state / "logs" / f"command-{len(self.commands)}.log")
        self.commands.append(command)
        return command

    def must_succeed(self, *arguments: str) -> None:
        """Repeat a command until it succeeds: its services may be unavailable or refuse it for a while."""
        until = time.monotonic() + COMMAND_SECONDS
        while (command := self.command(*arguments)).wait() and time.monotonic() < until:
            time.sleep(0.5)
        command.must_succeed = True

    def cancel_run(self, rng: random.Random) -> bool:
        """Cancel a queued or started run, like a user of Dagster's pages. Returns whether there was one."""
        at_work = dg.RunsFilter(statuses=[dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.STARTED])
        with self.dagster() as instance:
            runs = instance.get_runs(at_work)
            return bool(runs) and bool(instance.run_coordinator.cancel_run(rng.choice(runs).run_id))

    @contextlib.contextmanager
    def dagster(self) -> Iterator[dg.DagsterInstance]:
        """Dagster's instance, in this process."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DAGSTER_PG_URL", self.variables["DAGSTER_PG_URL"])
            with dg.DagsterInstance.from_config(self.variables["DAGSTER_HOME"]) as instance:
                yield instance

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

    def restart_pachd(self, options: Mapping[str, str] | None = None) -> None:
        """Kill pachd, and restart it with these options."""
        self._servers["pachd"].kill()
        environment = {**self._environment, **(options or {})}
        self._servers["pachd"] = RunningServer(_SPECS["pachd"], self.state, environment=environment)
        self.pachd.target = self._servers["pachd"].address()

    def server_process(self, server: str) -> psutil.Process:
        return psutil.Process(self._servers[server].pid)

    def restart(self, server: str, change: Callable[[Path], None]) -> None:
        """Kill pachd or the bucket, change its state folder, and restart it. There are no uploads meanwhile."""
        with self.uploading:
            self._servers[server].kill()
            change(self.state / server)
            self._servers[server] = RunningServer(_SPECS[server], self.state, environment=self._environment)
            address = self._servers[server].address()
            if server == "pachd":
                self.pachd.target = address
            else:
                self.proxy.target, self.bucket = address, self._bucket_at(address)

    @contextlib.contextmanager
    def only_new_names(self) -> Iterator[None]:
        """Prevent overwriting of uploads during the block."""
        with self.uploading:
            self.overwriting = False
        try:
            yield
        finally:
            self.overwriting = True

    def _bucket_at(self, address: str) -> storage.Bucket:
        owner = Credentials(self.stack.tokens["gcs"])
        return storage.Client("test", owner, client_options={"api_endpoint": f"http://{address}"}).bucket(BUCKET)

    def is_vanished(self, generation: int) -> bool:
        """Whether a restore of the bucket removed this upload."""
        return any(first <= generation <= last for first, last in self.vanished)

    @contextlib.contextmanager
    def without_secret(self) -> Iterator[None]:
        """Remove the database's secret during the block."""
        settings = self._postgres().model_copy(update={"user": ROLE})
        client = Client.from_pachd_address(f"grpc://{self.pachd.target}", auth_token=self.stack.tokens["pachd"])
        client.pps.delete_secret(secret=pps.Secret(name=DATABASE_SECRET))
        try:
            yield
        finally:
            # A concurrent `pachyderm apply` may have created it.
            with contextlib.suppress(grpc.RpcError):
                client.pps.delete_secret(secret=pps.Secret(name=DATABASE_SECRET))
            client.pps.create_secret(name=DATABASE_SECRET, data=database_secret(settings))

    def kill_postgres(self, *, seconds: float) -> None:
        """Kill PostgreSQL's first process, and restart it after a while."""
        self.postgres_crashed = True
        pid = int((self.state / "postgres" / "data" / "postmaster.pid").read_text().splitlines()[0])
        os.kill(pid, signal.SIGKILL)
        self._servers["postgres"].wait()
        time.sleep(seconds)
        self._servers["postgres"] = RunningServer(_SPECS["postgres"], self.state, environment=self._environment)
        assert self._servers["postgres"].address() == str(self.socket_folder)

    def kill_backend(self, rng: random.Random) -> bool:
        """Kill one process that serves a connection: PostgreSQL then cuts all connections and recovers. Returns whether there was one."""
        self.postgres_crashed = True
        with self.database() as connection:
            query = "SELECT pid FROM pg_stat_activity WHERE datname IS NOT NULL AND pid <> pg_backend_pid()"
            pids = [pid for (pid,) in connection.execute(query)]
        if pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(pids), signal.SIGKILL)
        return bool(pids)

    @contextlib.contextmanager
    def postgres_refuses(self) -> Iterator[None]:
        """Cut all connections to PostgreSQL, and refuse new ones during the block."""
        socket = self.socket_folder / f".s.PGSQL.{postgres_access.PORT}"
        hidden = socket.with_suffix(".hidden")
        with self.database() as connection:
            socket.rename(hidden)
            try:
                connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname <> ''")
                yield
            finally:
                hidden.rename(socket)

    def rows(self, query: LiteralString) -> list[tuple[Any, ...]]:
        """The rows of a query; none while another fault cuts the connection or removes the tables."""
        with contextlib.suppress(psycopg.Error), self.database() as connection:
            return connection.execute(query).fetchall()
        return []

    def ledger(self) -> Ledger:
        """The platform's ledger; waits while PostgreSQL recovers."""
        self.database().close()
        return Ledger(self._postgres())

    def database_url(self, database: str) -> str:
        """The URL of a database, with its owner as user."""
        return postgres_access.database_url(str(self.socket_folder), database, self.stack.tokens["postgres"])

    def _postgres(self) -> PostgresSettings:
        return PostgresSettings(
            host=str(self.socket_folder),
            port=postgres_access.PORT,
            user=postgres_access.USER,
            password=SecretStr(self.stack.tokens["postgres"]),
            dbname=postgres_access.ANSWERS_DATABASE,
        )

    def database(self) -> psycopg.Connection:
        """A connection for the test itself; waits while PostgreSQL recovers."""
        until = time.monotonic() + START_SECONDS
        while True:
            try:
                url = self.database_url(postgres_access.ANSWERS_DATABASE)
                return psycopg.connect(url, autocommit=True)
            except psycopg.OperationalError:
                if time.monotonic() > until:
                    raise
            time.sleep(0.1)


def resume_later(process: psutil.Process, seconds: float) -> None:
    """Resume a suspended process after a while, in the background."""

    def resume() -> None:
        with contextlib.suppress(psutil.Error):
            process.resume()

    timer = threading.Timer(seconds, resume)
    timer.daemon = True
    timer.start()
