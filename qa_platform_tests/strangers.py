"""Runs programs as another user of this machine, for tests of what such a stranger can do."""

import os
import subprocess
import sys

import pytest

NOBODY = 65534
# The imports come first, because the other user may not be able to read this Python.
_BECOME = f"""
import encodings.idna, os, http.client, urllib.request, urllib.error, grpc
from pachyderm_sdk.api.worker import WorkerStub
os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
"""


def run_as_stranger(program: str) -> str:
    """The output of a Python program that runs as another user, including its errors. Skips the test if this user is not root."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    done = subprocess.run([sys.executable, "-c", _BECOME + program], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def status_for_stranger(url: str) -> int:
    """The status of a web server's response to another user."""
    program = f"""
try:
    print(urllib.request.urlopen({url!r}, timeout=30).status)
except urllib.error.HTTPError as error:
    print(error.code)
"""
    return int(run_as_stranger(program))
