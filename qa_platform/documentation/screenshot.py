"""The pictures of Dagster in the documentation: the demonstration runs, then a browser looks. Run by ``make screenshot``.

It runs inside a stack: ``qa-platform local run -- python -m qa_platform.documentation.screenshot``.
"""

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from qa_platform import demo
from qa_platform.documentation.browser import HEIGHT, WIDTH, entry, open_browser, show_assets, show_partition
from qa_platform.errors import TransientError
from qa_platform.project_files import project_file

SHOWN_FILE = "lighthouses.csv"
_START_SECONDS = 240.0
_GRAPH_HEIGHT = 640
# Until fonts and lines are drawn; nothing on the page tells.
_DRAWN_MILLISECONDS = 3_000


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


def wait_for(address: str) -> None:
    """Wait until a web server answers.

    Raises:
        TransientError: it does not.
    """
    until = time.monotonic() + _START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(f"{address}/server_info", timeout=5):
                return
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > until:
                raise TransientError(f"{address} does not answer: {error}") from error
            time.sleep(0.2)


@contextmanager
def _webserver() -> Iterator[str]:
    """Dagster's web server for the stack that the environment names; its address."""
    port = free_port()
    workspace = str(project_file("workspace.yaml"))
    process = subprocess.Popen(["dagster-webserver", "-w", workspace, "--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"])
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(address)
        yield address
    finally:
        process.terminate()
        process.wait()


def main() -> int:
    """Run the demonstration and take the pictures; the exit status is the demonstration's."""
    # Before the demonstration, whose batch it joins: so that there is something to be seen of the model's quality, too.
    subprocess.run(["qa-platform", "upload", str(project_file("samples") / "gold.csv"), "--as", "gold/samples.csv"], check=True)
    status = demo.main()
    docs = project_file("docs")
    with _webserver() as address, open_browser() as page:
        page.set_viewport_size({"width": WIDTH, "height": _GRAPH_HEIGHT})
        show_assets(page, address)
        page.wait_for_timeout(_DRAWN_MILLISECONDS)
        page.screenshot(path=docs / "dagster-assets.png")
        page.set_viewport_size({"width": WIDTH, "height": HEIGHT})
        show_partition(page, address, SHOWN_FILE)
        entry(page, "first answers")
        page.wait_for_timeout(_DRAWN_MILLISECONDS)
        page.screenshot(path=docs / "dagster.png")
    return status


if __name__ == "__main__":
    sys.exit(main())
