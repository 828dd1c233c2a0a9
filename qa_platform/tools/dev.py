"""``python -m qa_platform.tools.dev ARGUMENTS`` is ``dagster dev ARGUMENTS``, accessible only to its own user. ``make dev`` runs it.

Dagster's web server has no login. Every user of the machine can reach it. So can every web page in its owner's browser, because Dagster
accepts GraphQL from forms and links of other sites. So `qa_platform.tools.webserver` replaces it: the same server behind a guard. The
sockets of the code servers are private, as are all files that Dagster creates.
"""

import argparse
import os
import socket
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from dagster._cli import dev
from dagster._utils.warnings import SupersessionWarning

_ITS_OWN, _GUARDED = "dagster_webserver", "qa_platform.tools.webserver"
_start = dev.open_ipc_subprocess  # type: ignore[attr-defined]


def _start_guarded(command: Sequence[str], **options: Any) -> Any:
    return _start([_GUARDED if word == _ITS_OWN else word for word in command], **options)


def _check_port(arguments: Sequence[str]) -> None:
    """Refuse a port that is taken. The web server would fail to bind it and hang, while `dagster dev` says that it serves."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=3000)
    options, _ = parser.parse_known_args(arguments)
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((options.host, options.port))
        except OSError as error:
            another = f"make dev PORT={options.port + 1}"
            sys.exit(f"Error: {options.host}:{options.port}: {error.strerror}; end what uses it, or choose another port: {another}")


def main() -> None:
    """Run ``dagster dev``."""
    os.umask(0o077)
    _check_port(sys.argv[1:])
    # `dagster dev` has no option for another web server.
    dev.open_ipc_subprocess = _start_guarded  # type: ignore[attr-defined,assignment]
    # The warning is about a command that the user has not typed.
    warnings.simplefilter("ignore", SupersessionWarning)
    dev.dev_command()


if __name__ == "__main__":
    main()
