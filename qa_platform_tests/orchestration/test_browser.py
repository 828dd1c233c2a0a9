"""What users see: a file goes from `qa-platform upload` to its answers in a browser, on the stack that `make dev` starts."""

import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import SecretStr

from qa_platform.contract import FileStatus
from qa_platform.embedded.stack import Stack, open_stack
from qa_platform.ledger import FileRecord, Ledger
from qa_platform.settings import PostgresSettings
from qa_platform.tools.documentation.browser import chromium, entry, open_browser, show_assets, show_partition, show_status
from qa_platform.tools.documentation.screenshot import free_port, wait_for
from qa_platform_tests.checkout import make_checkout
from qa_platform_tests.conftest import server_folder
from qa_platform_tests.processes import processes_of, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium() is None, reason="there is no Chromium on this machine: apt-get install chromium"),
]


@dataclass(frozen=True)
class Dev:
    """A running `make dev`: the folder that it was called in, its stack, and the address of Dagster's UI."""

    folder: Path
    stack: Stack
    address: str

    def command(self, line: str) -> None:
        subprocess.run(["sh", "-c", line], cwd=self.folder, check=True, capture_output=True, timeout=60)

    def record(self, name: str) -> FileRecord | None:
        variables = self.stack.variables
        password = SecretStr(variables["PG_PASSWORD"])
        settings = PostgresSettings(host=variables["PG_HOST"], user=variables["PG_USER"], password=password, dbname=variables["PG_DBNAME"])
        with Ledger(settings) as ledger:
            return ledger.newest([name]).get(name)


@pytest.fixture
def dev() -> Iterator[Dev]:
    with server_folder() as folder:
        make_checkout(folder)
        port = free_port()
        environment = {**os.environ, "QA_SENSOR_SECONDS": "1", "QA_HEARTBEAT_SECONDS": "1"}
        with (folder / "dev.log").open("wb") as log:
            # Whatever these tests run in is set up already.
            command = ["make", "--old-file=.venv/.installed", "dev", f"PORT={port}"]
            make = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            until(lambda: (folder / ".qa" / "stack.json").exists() or make.poll() is not None)
            assert make.poll() is None, (folder / "dev.log").read_text()
            with open_stack(folder / ".qa") as stack:
                yield Dev(folder, stack, f"http://127.0.0.1:{port}")
        finally:
            if make.poll() is None:
                os.killpg(make.pid, signal.SIGTERM)
                make.wait()
            # What make had started ends a little later than make itself.
            until(lambda: not processes_of(folder))


def test_an_upload_ends_as_answers_in_the_browser(dev: Dev) -> None:
    dev.command(".venv/bin/qa-platform local run -- qa-platform upload my.csv")
    with open_browser() as page:
        wait_for(dev.address)
        record = until(lambda: (found := dev.record("my.csv")) and found.status is FileStatus.FINISHED and found)
        assert record
        assert (record.rows, record.answered, record.rejected) == (2, 1, 1)

        show_assets(page, dev.address)
        for asset in ("raw_questions", "answered_questions", "question_answer"):
            assert page.get_by_text(asset, exact=True).count()

        show_partition(page, dev.address, "my.csv")
        # The page shows an entry first, and what is in it later.
        answer = entry(page, "first answers").get_by_role("row").nth(1)
        answer.wait_for()
        assert answer.inner_text().split("\t")[:3] == ["1", "Who built the bridge?", "Ada Blum"]
        picture = entry(page, "scores").locator("img").first
        picture.evaluate("image => image.decode()")
        assert picture.evaluate("image => image.naturalWidth") > 0

        page.goto(f"{dev.address}/assets/question_answer?view=checks", wait_until="domcontentloaded")
        for check in ("every_row_is_accounted_for", "every_answered_row_has_an_answer", "every_answer_stands_in_its_context"):
            # Long names are shown without their middle; the whole one is hidden beside it.
            page.get_by_text(check, exact=True).first.wait_for(state="attached")
        page.get_by_text("Succeeded", exact=True).nth(2).wait_for()

        show_status(page, dev.address)
        assert "All is well. Answered in the last 24 hours: 1 file with 2 rows. 50.0 %" in entry(page, "in short").inner_text()
        for picture in (entry(page, "rows by day").locator("img").first, entry(page, "scores, last 24 hours").locator("img").first):
            picture.evaluate("image => image.decode()")
            assert picture.evaluate("image => image.naturalWidth") > 0
