"""The file system of a worker's process: a private ``/pfs`` and the folders of its secrets, if the machine permits.

A private mount namespace needs the privilege to mount, and a folder ``/pfs`` to mount on, which is created if possible. Without a mount
namespace, user code finds its files through ``QA_PFS_ROOT``.
"""

import functools
import logging
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

_LOG = logging.getLogger(__name__)
PFS = Path("/pfs")
_TRIAL_SECONDS = 10

# Arguments: the number of mounts, source and target of each, the working folder, and the command. The script sets its own PATH, because
# the user's may lack the tools that it needs.
_ENTER = """
user_path=$PATH; PATH=/usr/sbin:/usr/bin:/sbin:/bin
count=$1; shift
while [ "$count" -gt 0 ]; do
    mkdir -p "$2" && mount --bind "$1" "$2" || exit 126
    shift 2; count=$((count - 1))
done
if [ -n "$1" ]; then cd "$1" || exit 126; fi
shift
PATH=$user_path
exec "$@"
"""


def isolated(argv: Sequence[str], mounts: Mapping[Path, Path], folder: str) -> list[str]:
    """The command in a private mount namespace, with ``mounts`` (source by target), in the working folder if ``folder`` is not empty."""
    unshare = shutil.which("unshare") or "unshare"
    pairs = [str(path) for target, source in mounts.items() for path in (source, target)]
    return [unshare, "--mount", "--propagation", "private", "/bin/sh", "-c", _ENTER, "sh", str(len(mounts)), *pairs, folder, *argv]


@functools.cache
def can_isolate() -> bool:
    """Whether this machine permits isolation. It is tried once."""
    try:
        PFS.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "probe").touch()
            trial = isolated(["test", "-e", f"{PFS}/probe"], {PFS: Path(folder)}, "")
            done = subprocess.run(trial, capture_output=True, timeout=_TRIAL_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        _LOG.info("workers have no /pfs of their own: %s", error)
        return False
    if done.returncode:
        _LOG.info("workers have no /pfs of their own: %s", done.stderr.decode(errors="replace").strip())
    return done.returncode == 0
