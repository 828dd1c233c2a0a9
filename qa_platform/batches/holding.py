"""Keeps a run's claims alive while it works."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from qa_platform.clients.services import Log
from qa_platform.ledger import Ledger

# Renewals per lease, and attempts per lease after a failed renewal.
_RENEWALS = 4
_RETRIES = 20


@contextmanager
def lease(ledger: Ledger, run_id: str, seconds: int, log: Log) -> Iterator[None]:
    """Renew a run's claims in the background until the block ends. Errors are logged, and the renewal is retried.

    An expired claim is renewed too, unless another owner has taken it.

    Args:
        seconds: how long a claim lasts without renewal.
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
                log.warning("The claims could not be renewed; retry in %.1f s: %s", pause, error)

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
