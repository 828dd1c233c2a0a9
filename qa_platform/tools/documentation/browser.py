"""A headless Chromium on Dagster's pages, for the screenshots and for the test of those pages."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qa_platform.errors import InputError

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_OPTIONS = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# A busy machine renders slowly.
_PATIENCE_MILLISECONDS = 120_000
# In a narrower window the graph hides the content of assets; in a lower one, a file's answers are out of view.
WIDTH, HEIGHT = 1760, 1500
_PARTITIONED_ASSETS = 3


def chromium() -> str | None:
    """The path of an installed browser, or None."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


@contextmanager
def open_browser() -> Iterator["Page"]:
    """An empty page of a new browser.

    Raises:
        InputError: no browser is installed.
    """
    from playwright.sync_api import sync_playwright

    path = chromium()
    if path is None:
        raise InputError(f"there is no {' or '.join(_NAMES)} on the path", advice="on Debian, apt-get install chromium")
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=path, args=list(_OPTIONS)) as browser:
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.set_default_timeout(_PATIENCE_MILLISECONDS)
        yield page


def show_assets(page: "Page", address: str) -> None:
    """Open the graph of the assets, and wait until it shows the share of materialised files. ``address``: ``http://host:port``."""
    page.goto(f"{address}/asset-groups", wait_until="domcontentloaded")
    for number in range(_PARTITIONED_ASSETS):
        page.get_by_text("% filled").nth(number).wait_for()


def show_partition(page: "Page", address: str, name: str) -> None:
    """Open the page of a file's partition of the table, and wait until it shows the metadata."""
    page.goto(f"{address}/assets/question_answer?view=partitions&partition={name}", wait_until="domcontentloaded")
    page.get_by_text("dagster/partition_row_count").wait_for()


def show_status(page: "Page", address: str) -> None:
    """Open the page of the platform's status, and wait until it shows the score distribution."""
    page.goto(f"{address}/assets/platform_status", wait_until="domcontentloaded")
    entry(page, "scores, last 24 hours")


def entry(page: "Page", name: str) -> "Locator":
    """A metadata entry on the page, once it is shown: its row, including the picture or table."""
    row = page.get_by_role("row").filter(has=page.get_by_text(name, exact=True))
    row.wait_for()
    return row
