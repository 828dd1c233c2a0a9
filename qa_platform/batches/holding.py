"""Holding the claims of a run for as long as it works."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from qa_platform.clients.services import Log
from qa_platform.ledger import Ledger

# A claim is renewed this many times per lease; after a failed renewal, it is tried this many times per lease.
_RENEWALS = 4
_RETRIES = 20


@contextmanager
def lease(ledger: Ledger, run_id: str, seconds: int, log: Log) -> Iterator[None]:
    """Renew the claims of a run in the background for as long as the block lasts. Errors of PostgreSQL are logged and outlived.

    A claim that has expired is renewed too, unless somebody else has taken it.

    Args:
        seconds: how long a claim holds without being renewed.
    """
    over = threading.Event()

    def renew() -> None:
        pause = seconds / _RENEWALS
        while not over.wait(pause):
            try:
                ledger.renew(run_id, seconds)
                pause = seconds / _RENEWALS
            except Exception as error:
                # Any error: if the thread ended, the claims would expire and another run would take the files.
                pause = seconds / _RETRIES
                log.warning("The claims could not be renewed, and will be tried again in %.1f s: %s", pause, error)

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
