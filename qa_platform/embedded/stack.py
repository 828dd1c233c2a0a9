"""The embedded stack: PostgreSQL, the GCS emulator and pachd, with one folder for all state.

A folder has one stack at a time. The first process that opens the folder starts the stack. Processes that open it later share the stack
until the first process closes it. That one waits for the others, unless a signal tells it to end.
"""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import click

from qa_platform.embedded import postgres_access
from qa_platform.embedded.command import Signals, run_command
from qa_platform.embedded.private import google_credentials, own_folder, token_file
from qa_platform.embedded.serving import write_atomically
from qa_platform.embedded.supervise import START_SECONDS, Check, ServerSpec, no_check, running, try_lock
from qa_platform.errors import TransientError
from qa_platform.provisioning.project_files import project_file

SERVERS = (
    ServerSpec("postgres", "qa_platform.embedded.postgres", guarded=True),
    ServerSpec("gcs", "qa_platform.embedded.gcs", guarded=True),
    ServerSpec("pachd", "qa_platform.embedded.pachd", guarded=True),
)
BUCKET = "questions"
PROJECT = "qa-platform"

# Removed from the environment, so that addresses and credentials of other services do not mix with the stack's. The variables of libpq and
# of the platform's own settings begin with PG.
_FOREIGN_PREFIXES = ("PG", "PACH_", "PACHD_")
_FOREIGN = ("GOOGLE_APPLICATION_CREDENTIALS", "GCS_ACCESS", "STORAGE_EMULATOR_HOST", "API_ENDPOINT_OVERRIDE")
_GOOGLE_CREDENTIALS = "google-credentials.json"
_LOOPBACK = "127.0.0.1,localhost"
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Stack:
    """A running stack.

    Attributes:
        state: the folder of its state.
        addresses: ``host:port`` by server name; for PostgreSQL the folder of its socket.
        tokens: the tokens that clients must send, by server name; for PostgreSQL the password.
    """

    state: Path
    addresses: Mapping[str, str]
    tokens: Mapping[str, str] = field(repr=False)

    @classmethod
    def at(cls, state: Path, addresses: Mapping[str, str]) -> Self:
        """The stack whose servers run at these addresses. It reads the tokens, and writes a credentials file for Google's clients.

        Raises:
            FileNotFoundError: a server of this state was never started with a token.
        """
        tokens = {name: token_file(state, name).read_text() for name in addresses}
        write_atomically(state / _GOOGLE_CREDENTIALS, google_credentials(tokens["gcs"]))
        return cls(state, addresses, tokens)

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables with the servers' addresses and tokens: the same as those of a deployment."""
        socket_folder, password = self.addresses["postgres"], self.tokens["postgres"]
        return {
            "STORAGE_BUCKET": BUCKET,
            # Google's client sends no credentials to a STORAGE_EMULATOR_HOST.
            "API_ENDPOINT_OVERRIDE": f"http://{self.addresses['gcs']}",
            "GOOGLE_APPLICATION_CREDENTIALS": str(self.state / _GOOGLE_CREDENTIALS),
            "GOOGLE_CLOUD_PROJECT": PROJECT,
            "PACHD_ADDRESS": f"grpc://{self.addresses['pachd']}",
            "PACH_TOKEN": self.tokens["pachd"],
            "PG_HOST": socket_folder,
            "PG_PORT": str(postgres_access.PORT),
            "PG_USER": postgres_access.USER,
            "PG_PASSWORD": password,
            "PG_DBNAME": postgres_access.ANSWERS_DATABASE,
            # libpq's own variables: `psql -c …` needs nothing else.
            "PGHOST": socket_folder,
            "PGPORT": str(postgres_access.PORT),
            "PGUSER": postgres_access.USER,
            "PGPASSWORD": password,
            "PGDATABASE": postgres_access.ANSWERS_DATABASE,
            # Without the password, which is in PGPASSWORD: other users can read the arguments of `psql "$QA_DATABASE_URL"`.
            "QA_DATABASE_URL": postgres_access.database_url(socket_folder, postgres_access.ANSWERS_DATABASE),
            "DAGSTER_HOME": str(self.state / "dagster"),
            "DAGSTER_PG_URL": postgres_access.database_url(socket_folder, postgres_access.DAGSTER_DATABASE, password),
        }

    @property
    def environment(self) -> dict[str, str]:
        """The whole environment of a program in the stack: this process's own, without other services, plus the stack's variables."""
        # The settings ignore the case of their variables' names.
        own = {name: value for name, value in _own_environment().items() if name.upper() not in self.variables}
        return {**own, **self.variables}


@contextlib.contextmanager
def open_stack(state: Path, *, check: Check = no_check) -> Iterator[Stack]:
    """The stack of a folder. If none is running, one is started and prepared, and stopped at the end, after those who share it.

    Args:
        state: the folder. It is created if it does not exist. From then on, only its owner can read it.
        check: called repeatedly during each wait.

    Raises:
        InputError: the folder belongs to another user, or others can write to it.
        TransientError: the stack does not start, or another process is still starting it after START_SECONDS.
    """
    state = own_folder(state.resolve())
    description = state / "stack.json"
    deadline = time.monotonic() + START_SECONDS
    with (state / "stack.lock").open("ab") as lock:
        while not try_lock(lock):
            check()
            with (state / "stack.users").open("ab") as users:
                fcntl.flock(users, fcntl.LOCK_SH)
                # Looked at while the lock is held: the stack does not stop before it is released.
                if shared := _described(state, description):
                    yield shared
                    return
            if time.monotonic() > deadline:
                what = f"another process has been starting the stack for {START_SECONDS:.0f} s"
                raise TransientError(what, where=str(state), advice="end that process")
            time.sleep(_POLL_SECONDS)
        description.unlink(missing_ok=True)
        with _preparer() as preparer, running(SERVERS, state, environment=_own_environment(), check=check) as addresses:
            stack = Stack.at(state, addresses)
            _prepare(stack, preparer, check)
            write_atomically(description, json.dumps({"pid": os.getpid(), "addresses": stack.addresses}))
            try:
                yield stack
            finally:
                _close(state, description, check)


def _close(state: Path, description: Path, check: Check) -> None:
    """Let no other process share the stack from now on, once those that do have ended. A signal ends the waiting."""
    # The command may have removed the folder.
    with contextlib.suppress(FileNotFoundError), (state / "stack.users").open("ab") as users:
        with contextlib.suppress(SystemExit):
            check()
            if not try_lock(users):
                click.echo("the command has ended; its stack stays until the others that use it have ended (Ctrl-C stops it)", err=True)
            while not try_lock(users):
                check()
                time.sleep(_POLL_SECONDS)
        description.unlink(missing_ok=True)


def local_run(state: Path, command: Sequence[str]) -> int:
    """Run a command inside the stack of a folder.

    Returns:
        The command's exit status; 128 + n if signal n ended it or this process.

    Raises:
        TransientError: the stack does not start.
        InputError: the command does not exist or cannot be executed.
    """
    with Signals() as signals, open_stack(state, check=signals.check) as stack:
        return run_command(command, stack.environment, signals)


@contextlib.contextmanager
def _preparer() -> Iterator["subprocess.Popen[str]"]:
    """A process of `qa_platform.embedded.prepare`. It waits for the stack's variables."""
    process = subprocess.Popen(
        [sys.executable, "-m", "qa_platform.embedded.prepare"],
        env=_own_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def _prepare(stack: Stack, preparer: "subprocess.Popen[str]", check: Check) -> None:
    """Prepare everything that a deployment has before its first file: Dagster's home, the bucket, the tables, the repos, the pipelines.

    Raises:
        TransientError: the preparation failed. The error contains the output of the preparing process.
    """
    home = own_folder(stack.state / "dagster")
    shutil.copyfile(project_file("dagster.yaml"), home / "dagster.yaml")
    messages, variables = "", json.dumps(stack.variables)
    while preparer.returncode is None:
        check()
        try:
            _, messages = preparer.communicate(variables, timeout=_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            # The first call has started to send the input; later calls only wait.
            variables = ""
    if preparer.returncode:
        raise TransientError(f"the embedded stack cannot be prepared:\n{messages.strip()}", where=str(stack.state))


def _described(state: Path, description: Path) -> Stack | None:
    """The stack in a description file; None if the process that started it is dead, so that the file is out of date."""
    try:
        values = json.loads(description.read_text())
        os.kill(values["pid"], 0)
    except (FileNotFoundError, ProcessLookupError):
        return None
    except PermissionError:
        pass
    return Stack.at(state, values["addresses"])


def _is_foreign(name: str) -> bool:
    return name in _FOREIGN or name.startswith(_FOREIGN_PREFIXES)


def _own_environment() -> dict[str, str]:
    """This process's environment without other services. PATH includes the tools of this installation and of PostgreSQL."""
    kept = {name: value for name, value in os.environ.items() if not _is_foreign(name.upper())}
    tools = [str(Path(sys.executable).parent), str(postgres_access.bin_folder()), kept.get("PATH", os.defpath)]
    # Requests to loopback must not go through a proxy.
    proxies = {name: ",".join(filter(None, [kept.get(name), _LOOPBACK])) for name in ("NO_PROXY", "no_proxy")}
    return {**kept, **proxies, "PATH": os.pathsep.join(tools)}
