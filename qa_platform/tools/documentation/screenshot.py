"""Runs the demonstration, and takes the documentation's screenshots of Dagster. Run by ``make screenshot``.

It runs inside a stack: ``qa-platform local run -- python -m qa_platform.tools.documentation.screenshot``.
"""

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from qa_platform.errors import TransientError
from qa_platform.provisioning.project_files import project_file
from qa_platform.tools import demo
from qa_platform.tools.documentation.browser import HEIGHT, WIDTH, entry, open_browser, show_assets, show_partition, show_status

SHOWN_FILE = "lighthouses.csv"
_START_SECONDS = 240.0
_GRAPH_HEIGHT = 640
_STATUS_HEIGHT = 1150
# Time to draw fonts and lines. The page does not signal when it is done.
_DRAWN_MILLISECONDS = 3_000


def free_port() -> int:
    """A free port on loopback."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def wait_for(address: str) -> None:
    """Wait until a web server answers.

    Raises:
        TransientError: it does not answer in time.
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
    """Run Dagster's web server for the stack that the environment names. Yields its address."""
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
    """Run the demonstration and take the pictures. Returns the demonstration's exit status."""
    # A gold set, to show the model's quality too. Uploaded first, it joins the demonstration's batch.
    subprocess.run(["qa-platform", "upload", str(project_file("samples") / "gold.csv"), "--as", "gold/samples.csv"], check=True)
    status = demo.main()
    docs = project_file("docs")
    # The daemon is needed: the status is reported a little after the demonstration.
    with demo.daemon(), _webserver() as address, open_browser() as page:
        page.set_viewport_size({"width": WIDTH, "height": _GRAPH_HEIGHT})
        show_assets(page, address)
        page.wait_for_timeout(_DRAWN_MILLISECONDS)
        page.screenshot(path=docs / "dagster-assets.png")
        page.set_viewport_size({"width": WIDTH, "height": _STATUS_HEIGHT})
        show_status(page, address)
        page.wait_for_timeout(_DRAWN_MILLISECONDS)
        page.screenshot(path=docs / "dagster-status.png")
        page.set_viewport_size({"width": WIDTH, "height": HEIGHT})
        show_partition(page, address, SHOWN_FILE)
        entry(page, "first answers")
        page.wait_for_timeout(_DRAWN_MILLISECONDS)
        page.screenshot(path=docs / "dagster.png")
    return status


if __name__ == "__main__":
    sys.exit(main())
