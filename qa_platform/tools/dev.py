"""``python -m qa_platform.tools.dev ARGUMENTS`` is ``dagster dev ARGUMENTS`` for its own user: ``make dev`` runs it.

Dagster's web server has no log-in. Every user of the machine can reach it, and so can every web page in its owner's browser, since
Dagster also accepts GraphQL from forms and links of other sites. So `qa_platform.tools.webserver` runs in its place: the same server with
a guard in front. The sockets of the code servers are private, as are all files that Dagster makes.
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
    # `dagster dev` has no option for it.
    dev.open_ipc_subprocess = _start_guarded  # type: ignore[attr-defined,assignment]
    # Nobody has typed the command that it warns of.
    warnings.simplefilter("ignore", SupersessionWarning)
    dev.dev_command()


if __name__ == "__main__":
    main()
