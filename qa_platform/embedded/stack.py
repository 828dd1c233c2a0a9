"""The embedded stack: PostgreSQL, the GCS emulator and pachd side by side, with one folder for the state of all.

A folder has one stack at a time. Whoever asks for it first starts it; whoever asks while it runs uses the same one, for as long
as its starter keeps it.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qa_platform.embedded import postgres
from qa_platform.embedded.command import Signals, run_command
from qa_platform.embedded.process import START_SECONDS, Check, ServerSpec, no_check, running, try_lock, write_atomically
from qa_platform.errors import TransientError
from qa_platform.project_files import project_file

SERVERS = (
    ServerSpec("postgres", "qa_platform.embedded.postgres"),
    ServerSpec("gcs", "qa_platform.embedded.gcs"),
    ServerSpec("pachd", "qa_platform.embedded.pachd"),
)
BUCKET = "questions"

# Addresses and credentials of other services, which must not be mixed with the stack's. libpq's variables begin with PG, and so
# do those of the platform's own settings.
_FOREIGN_PREFIXES = ("PG", "PACH_", "PACHD_")
_FOREIGN = ("GOOGLE_APPLICATION_CREDENTIALS", "GCS_ACCESS")
_LOOPBACK = "127.0.0.1,localhost"
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Stack:
    """A stack that serves. ``addresses``: by server, ``host:port``; for PostgreSQL the folder of its socket."""

    state: Path
    addresses: Mapping[str, str]

    @property
    def variables(self) -> dict[str, str]:
        """What tells a program where everything is: the variables that a deployment sets."""
        socket_folder = self.addresses["postgres"]
        return {
            "STORAGE_BUCKET": BUCKET,
            "STORAGE_EMULATOR_HOST": f"http://{self.addresses['gcs']}",
            "PACHD_ADDRESS": f"grpc://{self.addresses['pachd']}",
            "PG_HOST": socket_folder,
            "PG_PORT": str(postgres.PORT),
            "PG_USER": postgres.USER,
            "PG_DBNAME": postgres.ANSWERS_DATABASE,
            # libpq's own: `psql -c …` needs nothing else.
            "PGHOST": socket_folder,
            "PGPORT": str(postgres.PORT),
            "PGUSER": postgres.USER,
            "PGDATABASE": postgres.ANSWERS_DATABASE,
            "QA_DATABASE_URL": postgres.database_url(socket_folder, postgres.ANSWERS_DATABASE),
            "DAGSTER_HOME": str(self.state / "dagster"),
            "DAGSTER_PG_URL": postgres.database_url(socket_folder, postgres.DAGSTER_DATABASE),
        }

    @property
    def environment(self) -> dict[str, str]:
        """The whole environment of a program in the stack: ours, without what points elsewhere, and the variables."""
        return {**_own_environment(), **self.variables}


@contextlib.contextmanager
def open_stack(state: Path, *, check: Check = no_check) -> Iterator[Stack]:
    """The stack of a folder: the one that runs, or else one that is started, prepared, and stopped at the end.

    Raises:
        TransientError: it does not start, or another process has been starting it for too long.
    """
    state = state.resolve()
    state.mkdir(parents=True, exist_ok=True)
    description = state / "stack.json"
    deadline = time.monotonic() + START_SECONDS
    with (state / "stack.lock").open("ab") as lock:
        while not try_lock(lock):
            check()
            if running_one := _described(state, description):
                yield running_one
                return
            if time.monotonic() > deadline:
                raise TransientError(f"another process has been starting the stack in {state} for {START_SECONDS:.0f} s; end it")
            time.sleep(_POLL_SECONDS)
        description.unlink(missing_ok=True)
        with _preparer() as preparer, running(SERVERS, state, environment=_own_environment(), check=check) as addresses:
            stack = Stack(state, addresses)
            _prepare(stack, preparer, check)
            write_atomically(description, json.dumps({"pid": os.getpid(), "addresses": stack.addresses}))
            try:
                yield stack
            finally:
                description.unlink(missing_ok=True)


def local_run(state: Path, command: Sequence[str]) -> int:
    """Run a command inside the stack of a folder; its exit status, or 128 + n where signal n ended it or this process.

    Raises:
        TransientError: the stack does not start.
        InputError: the command cannot be run.
    """
    with Signals() as signals, open_stack(state, check=signals.check) as stack:
        return run_command(command, stack.environment, signals)


@contextlib.contextmanager
def _preparer() -> Iterator["subprocess.Popen[str]"]:
    """A process of `qa_platform.embedded.prepare`, which waits for the stack's variables."""
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
    """Give a stack all that a deployment has before its first file: Dagster's home, bucket, tables, repos and pipelines.

    Raises:
        TransientError: something of that failed; the message has the details.
    """
    home = stack.state / "dagster"
    home.mkdir(exist_ok=True)
    shutil.copyfile(project_file("dagster.yaml"), home / "dagster.yaml")
    messages, variables = "", json.dumps(stack.variables)
    while preparer.returncode is None:
        check()
        try:
            _, messages = preparer.communicate(variables, timeout=_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            # Its input is on its way; only the waiting is taken up again.
            variables = ""
    if preparer.returncode:
        raise TransientError(f"the embedded stack cannot be prepared:\n{messages.strip()}")


def _described(state: Path, description: Path) -> Stack | None:
    """The stack that a description tells of, if its starter is alive: the file of one that was killed stays for a moment."""
    try:
        values = json.loads(description.read_text())
        os.kill(values["pid"], 0)
    except (FileNotFoundError, ProcessLookupError):
        return None
    except PermissionError:
        pass
    return Stack(state, values["addresses"])


def _own_environment() -> dict[str, str]:
    """Our environment without what points to other services; with the tools of this installation and PostgreSQL's on the path."""
    kept = {name: value for name, value in os.environ.items() if name not in _FOREIGN and not name.startswith(_FOREIGN_PREFIXES)}
    tools = [str(Path(sys.executable).parent), str(postgres.bin_folder()), kept.get("PATH", os.defpath)]
    # A proxy must not be asked for what is on loopback.
    proxies = {name: ",".join(filter(None, [kept.get(name), _LOOPBACK])) for name in ("NO_PROXY", "no_proxy")}
    return {**kept, **proxies, "PATH": os.pathsep.join(tools)}
