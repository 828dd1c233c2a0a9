"""Folders and files that only their owner can read, and the tokens in them.

Every user of a machine can connect to loopback. The servers of a stack ask for a token that only the stack's owner can read.
"""

import json
import os
import secrets
import stat
from pathlib import Path

from qa_platform.embedded.serving import write_atomically
from qa_platform.errors import InputError

_OWNER_ONLY = 0o700
_NEVER = "2999-01-01T00:00:00Z"


def own_folder(path: Path) -> Path:
    """A folder of mode 0700 that belongs to this user. It is created if it does not exist. Existing parent folders are not changed.

    Raises:
        InputError: it belongs to another user, or others can write to it.
    """
    path.mkdir(mode=_OWNER_ONLY, parents=True, exist_ok=True)
    found = path.stat()
    advice = "name another folder"
    if found.st_uid != os.geteuid():
        raise InputError("the folder belongs to another user", where=str(path), advice=advice)
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise InputError("others can write to the folder", where=str(path), advice=f"{advice}, or run `chmod go-w` on it")
    if stat.S_IMODE(found.st_mode) != _OWNER_ONLY:
        path.chmod(_OWNER_ONLY)
    return path


def token_file(state: Path, server: str) -> Path:
    """The file in a state folder that contains a server's token."""
    return state / f"{server}.token"


def make_token(path: Path) -> None:
    """Write a new random token to a file, unless the file exists."""
    if not path.exists():
        write_atomically(path, secrets.token_urlsafe(32))


def google_credentials(token: str) -> str:
    """The text of a credentials file that makes Google's clients send this token. It never expires."""
    unused = {"client_id": "embedded", "client_secret": "unused", "refresh_token": "unused"}
    return json.dumps({"type": "authorized_user", **unused, "token": token, "expiry": _NEVER})
