"""`qa-platform status --watch` while a batch is answered, on a terminal of 80 columns and into a file."""

import codecs
import contextlib
import os
import pty
import re
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from rich.cells import cell_len

from qa_platform.cli.status.observe import Observer, ObserverSettings
from qa_platform.embedded.stack import Stack
from qa_platform_tests.flow import Flow, bridge, csv_of, flow, put_pipeline
from qa_platform_tests.processes import until

__all__ = ["flow"]

pytestmark = pytest.mark.slow

COLUMNS = 80
ROWS = 6
NAME = f"{'a long name ' * 8}.csv"
PROGRAM = [sys.executable, "-m", "qa_platform.cli.main", "status", "--watch"]

# The real worker, which comes to a shard when there is a file of its number: what is done at a moment is no matter of luck.
GATED_WORKER = """
import time
from pathlib import Path
from qa_platform.answering import worker
from qa_platform.contract import QUESTIONS_REPO
from qa_platform.datum_batching import path_of
do = worker.Worker.do
begun = []
def gated(self, datum):
    if (path_of(datum, self._root, within=self._root / QUESTIONS_REPO) / "questions.csv").exists():
        begun.append(datum)
        while not Path({gates!r}, str(len(begun))).exists():
            time.sleep(0.02)
    do(self, datum)
worker.Worker.do = gated
worker.main()
"""

# What a terminal obeys instead of showing it: colours, and moves of the cursor.
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def gates(flow: Flow, tmp_path: Path) -> Iterator[Path]:
    """The folder in which the worker waits for the file ``1`` before the first shard, ``2`` before the second, and so on."""
    put_pipeline(cmd=["python", "-c", GATED_WORKER.format(gates=str(tmp_path))])
    try:
        yield tmp_path
    finally:
        open_gates(tmp_path)
        put_pipeline()


def open_gates(gates: Path, upto: int = ROWS) -> None:
    for number in range(1, upto + 1):
        (gates / str(number)).touch()


class Watch:
    """A watch on a terminal of 80 columns, and all that it has shown so far."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.shown = ""
        self._terminal, end = pty.openpty()
        termios.tcsetwinsize(end, (24, COLUMNS))
        self.process = subprocess.Popen(PROGRAM, env=environment, stdin=end, stdout=end, stderr=end, start_new_session=True)
        os.close(end)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")()
        # Reading fails once the program is gone.
        with contextlib.suppress(OSError):
            while part := os.read(self._terminal, 65536):
                self.shown += decoder.decode(part)

    def exit_status(self) -> int:
        """Wait for the program to end by itself."""
        status = self.process.wait(60)
        self._reader.join(10)
        os.close(self._terminal)
        return status

    @property
    def lines(self) -> list[str]:
        return [_CONTROL.sub("", line) for line in re.split(r"[\r\n]+", self.shown)]


@contextlib.contextmanager
def killed_at_the_end(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """A test that fails leaves nothing behind that would wait for ever."""
    try:
        yield
    finally:
        process.kill()
        process.wait()


def test_a_batch_is_watched_while_it_is_answered(
    flow: Flow, stack: Stack, gates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A watch ends with all work, that of other tests too.
    until(lambda: not flow.tick_and_run() and not Observer(ObserverSettings.from_environment()).snapshot().in_progress)
    monkeypatch.setenv("QA_SHARD_ROWS", "1")
    flow.upload(NAME, csv_of(*(bridge(f"Ort {n}") for n in range(ROWS))))
    flow.upload("watched/photo.csv", b"\x89PNG\r\n\x1a\n" + bytes(100))
    (request,) = flow.tick()
    out = tmp_path / "out"
    with out.open("wb") as target:
        piped = subprocess.Popen(PROGRAM, env=stack.environment, stdout=target, stderr=target)
    terminal = Watch({**{k: v for k, v in stack.environment.items() if k not in ("COLUMNS", "LINES")}, "TERM": "xterm-256color"})
    with ThreadPoolExecutor(1) as pool, killed_at_the_end(piped), killed_at_the_end(terminal.process):
        try:
            until(lambda: "pending" in terminal.shown and f"{NAME}: pending" in out.read_text())
            batch = pool.submit(flow.run, request)
            for done in (2, 5):
                open_gates(gates, done)
                until(partial(shows, out, terminal, done))
        finally:
            open_gates(gates)
        # One of the two files is rejected.
        assert (piped.wait(60), terminal.exit_status()) == (1, 1)
        assert batch.result().success

    written = out.read_text()
    lines = written.splitlines()
    assert all(line.isprintable() for line in lines), "no control codes in a file"
    assert f"{NAME}: finished, {ROWS} rows, {ROWS} answered, 0 without answer, 0 rejected" in written
    assert "watched/photo.csv: rejected: " in written
    assert lines[-1] == "nothing is in progress: 1 finished, 1 rejected"

    assert "\x1b[" in terminal.shown
    assert max(map(cell_len, terminal.lines)) <= COLUMNS
    # The file's name is cut, its figures are not.
    answering = [line.split() for line in terminal.lines if line.startswith("a long name") and "…" in line]
    assert any(words[-4:-2] == ["answering", f"5/{ROWS}"] and words[-2].startswith("~") for words in answering)
    assert f"{NAME}: answering, 5 of {ROWS} rows, about " in written
    assert terminal.lines[-2:] == ["nothing is in progress: 1 finished, 1 rejected", ""]


def shows(out: Path, terminal: Watch, done: int) -> bool:
    """Whether both watches tell that so many rows are done, and the rest is not."""
    return f"{NAME}: answering, {done} of {ROWS} rows" in out.read_text() and f" {done}/{ROWS} " in terminal.shown
