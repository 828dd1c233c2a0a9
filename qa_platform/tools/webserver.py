"""``python -m qa_platform.tools.webserver ARGUMENTS`` is ``dagster-webserver ARGUMENTS`` with `qa_platform.embedded.guard` in front.

It answers only its own user, and refuses requests from other sites or for other host names.
"""

from typing import Any

from dagster_webserver import cli

from qa_platform.embedded.guard import Guard

_make_app = cli.create_app_from_workspace_process_context  # type: ignore[attr-defined]


def _make_guarded_app(*values: Any, **more: Any) -> Guard:
    return Guard(_make_app(*values, **more))


def main() -> None:
    """Run ``dagster-webserver``."""
    # Its command line cannot be given another application.
    cli.create_app_from_workspace_process_context = _make_guarded_app  # type: ignore[attr-defined,assignment]
    cli.main()


if __name__ == "__main__":
    main()
