"""The Unix account that PostgreSQL runs as: that of this process. PostgreSQL refuses root, so root creates an account for it.

That account cannot enter the folders of root. It inherits the folders that it needs as open files, which it reaches as
``/proc/self/fd/N``. So no folder has to be opened to others.
"""

import contextlib
import os
import pwd
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypedDict

from qa_platform.errors import InputError

_NAME = "pgserver"
# Not $TMPDIR, which may be root's own.
_COPIES = Path("/tmp")


class Identity(TypedDict):
    """The arguments that make a subprocess run as another user, without the groups of this process."""

    user: int | None
    group: int | None
    extra_groups: list[str | int] | None


@dataclass(frozen=True)
class Opened:
    """Folders as a program of the account sees them, and the descriptors that it must inherit for that."""

    paths: tuple[str, ...]
    descriptors: tuple[int, ...]

    @property
    def path(self) -> str:
        """The only one."""
        (path,) = self.paths
        return path


@dataclass(frozen=True)
class Account:
    """A Unix account. ``is_own``: it is that of this process."""

    uid: int
    gid: int
    is_own: bool

    @classmethod
    def for_servers(cls) -> Self:
        """The account for servers that do not run as root.

        Raises:
            InputError: this process is root, and the account is not there and cannot be made.
        """
        if os.geteuid() != 0:
            return cls(os.geteuid(), os.getegid(), is_own=True)
        with contextlib.suppress(KeyError):
            return cls._named(_NAME)
        made = subprocess.run(["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", _NAME], check=False)
        try:
            return cls._named(_NAME)
        except KeyError as error:
            what = f"PostgreSQL does not run as root, and its account {_NAME} could not be created (useradd: status {made.returncode})"
            raise InputError(what, advice="create the account, or run as another user") from error

    @classmethod
    def _named(cls, name: str) -> Self:
        found = pwd.getpwnam(name)
        return cls(found.pw_uid, found.pw_gid, is_own=False)

    @property
    def identity(self) -> Identity:
        if self.is_own:
            return {"user": None, "group": None, "extra_groups": None}
        return {"user": self.uid, "group": self.gid, "extra_groups": []}

    def give(self, folder: Path) -> None:
        """Give the account a folder that only it can read. The folder is created if it does not exist."""
        folder.mkdir(mode=0o700, exist_ok=True)
        os.chown(folder, self.uid, self.gid)

    @contextlib.contextmanager
    def opened(self, *folders: Path) -> Iterator[Opened]:
        """Open folders of the account for the programs that are started in the block."""
        if self.is_own:
            yield Opened(tuple(map(str, folders)), ())
            return
        descriptors = tuple(os.open(folder, os.O_RDONLY | os.O_DIRECTORY) for folder in folders)
        try:
            yield Opened(tuple(f"/proc/self/fd/{number}" for number in descriptors), descriptors)
        finally:
            for number in descriptors:
                os.close(number)

    def reachable(self, installation: Path) -> Path:
        """A folder of PostgreSQL's programs that the account can run: the installation, or a copy if only root can enter that.

        PostgreSQL's programs need their own path, so they cannot be inherited as open files.

        Raises:
            InputError: the folder of the copy belongs to another user, or others can write to it.
        """
        if self.is_own or _is_open(installation):
            return installation
        place = _COPIES / f"qa-platform-{_NAME}-{installation.stat().st_mtime_ns}"
        if not place.exists():
            _copy(installation, place)
        found = place.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise InputError(
                "the folder, in which root keeps a copy of PostgreSQL, was made by another user", where=str(place), advice="remove it"
            )
        return place / installation.parent.name / installation.name


def _is_open(installation: Path) -> bool:
    """Whether everybody can reach and run an installation. Only its first files are checked: all were made with one umask."""
    return all(folder.stat().st_mode & stat.S_IXOTH for folder in installation.parents) and all(
        path.stat().st_mode & stat.S_IROTH for path in (installation, installation / "bin", installation / "bin" / "postgres")
    )


def _copy(installation: Path, place: Path) -> None:
    """Copy an installation, and the libraries beside its package, so that everybody can run it; complete or not at all."""
    package = installation.parent
    libraries = package.with_suffix(".libs")
    new = Path(tempfile.mkdtemp(prefix=f"{place.name}.", dir=place.parent))
    shutil.copytree(installation, new / package.name / installation.name, symlinks=True)
    if libraries.exists():
        shutil.copytree(libraries, new / libraries.name, symlinks=True)
    for path in (new, *new.rglob("*")):
        if not path.is_symlink():
            mode = path.stat().st_mode
            path.chmod(mode | (mode & 0o500) >> 6 | (mode & 0o500) >> 3)
    with contextlib.suppress(OSError):
        new.rename(place)
    # Another process was faster.
    shutil.rmtree(new, ignore_errors=True)
