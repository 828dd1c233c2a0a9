"""``python -m qa_platform.tools.dev ARGUMENTS`` is ``dagster dev ARGUMENTS``, accessible only to its own user. ``make dev`` runs it.

Dagster's web server has no login. Every user of the machine can reach it. So can every web page in its owner's browser, because Dagster
accepts GraphQL from forms and links of other sites. So `qa_platform.tools.webserver` replaces it: the same server behind a guard. The
sockets of the code servers are private, as are all files that Dagster creates.
"""

import os
import warnings
from collections.abc import Sequence
from typing import Any

from dagster._cli import dev
from dagster._utils.warnings import SupersessionWarning

_ITS_OWN, _GUARDED = "dagster_webserver", "qa_platform.tools.webserver"
_start = dev.open_ipc_subprocess  # type: ignore[attr-defined]


def _start_guarded(command: Sequence[str], **options: Any) -> Any:
    return _start([_GUARDED if word == _ITS_OWN else word for word in command], **options)


def main() -> None:
    """Run ``dagster dev``."""
    os.umask(0o077)
    # `dagster dev` has no option for another web server.
    dev.open_ipc_subprocess = _start_guarded  # type: ignore[attr-defined,assignment]
    # The warning is about a command that the user has not typed.
    warnings.simplefilter("ignore", SupersessionWarning)
    dev.dev_command()


if __name__ == "__main__":
    main()
