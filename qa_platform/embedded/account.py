"""The Unix account that PostgreSQL runs as. It is this process's own, except for root: PostgreSQL refuses root, which creates an account.

That account cannot enter root's folders. It inherits the folders that it needs as open files, and reaches them as ``/proc/self/fd/N``. So
no folder has to be opened to others.
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
# Not $TMPDIR, which may be private to root.
_COPIES = Path("/tmp")


class Identity(TypedDict):
    """The arguments that make a subprocess run as another user, without the groups of this process."""

    user: int | None
    group: int | None
    extra_groups: list[str | int] | None


@dataclass(frozen=True)
class Opened:
    """Folders as the account's programs see them, and the descriptors that these must inherit."""

    paths: tuple[str, ...]
    descriptors: tuple[int, ...]

    @property
    def path(self) -> str:
        """The path, if there is only one folder."""
        (path,) = self.paths
        return path


@dataclass(frozen=True)
class Account:
    """A Unix account. ``is_own``: it is this process's account."""

    uid: int
    gid: int
    is_own: bool

    @classmethod
    def for_servers(cls) -> Self:
        """The account for servers that do not run as root.

        Raises:
            InputError: this process is root, and the account does not exist and cannot be created.
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
        """Make a folder the account's own, readable only by it. The folder is created if it does not exist."""
        folder.mkdir(mode=0o700, exist_ok=True)
        os.chown(folder, self.uid, self.gid)

    @contextlib.contextmanager
    def opened(self, *folders: Path) -> Iterator[Opened]:
        """Open folders of the account for the programs that the block starts."""
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
        """A folder of PostgreSQL's programs that the account can run: the installation, or a copy if only root can enter it.

        PostgreSQL's programs need to know their own path, so they cannot be inherited as open files.

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
                "the folder of root's copy of PostgreSQL belongs to another user, or others can write to it",
                where=str(place),
                advice="remove it",
            )
        return place / installation.parent.name / installation.name


def _is_open(installation: Path) -> bool:
    """Whether every user can reach and run an installation. It checks only a few files: all were created with one umask."""
    return all(folder.stat().st_mode & stat.S_IXOTH for folder in installation.parents) and all(
        path.stat().st_mode & stat.S_IROTH for path in (installation, installation / "bin", installation / "bin" / "postgres")
    )


def _copy(installation: Path, place: Path) -> None:
    """Copy an installation and the libraries next to its package, so that every user can run it. The copy is atomic."""
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
    # Left over if another process was faster.
    shutil.rmtree(new, ignore_errors=True)
