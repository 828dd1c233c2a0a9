"""The connection of a `Ledger`: opened on first use, kept between calls, replaced when it breaks."""

import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import psycopg

from qa_platform.clients.postgres import connect, notice_lost_client, transaction
from qa_platform.errors import TransientError
from qa_platform.settings import PostgresSettings

# A firewall may forget an idle connection without telling either end, and the next statement would hang.
_IDLE_SECONDS = 30.0
# Claims are taken one transaction at a time: taking several names in different orders would deadlock.
_CLAIM_LOCK = 0x7161636C


class _Kept:
    """The open connection, if any, and when it was last used. A separate object, so that it can be closed when the ledger is gone."""

    def __init__(self) -> None:
        self.connection: psycopg.Connection | None = None
        self.used_at = 0.0

    def close(self) -> None:
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.close()


class LedgerConnection:
    """Short transactions on one connection, one at a time. Threads may share it."""

    def __init__(self, settings: PostgresSettings) -> None:
        self._settings = settings
        self._lock = threading.RLock()
        self._kept = _Kept()
        weakref.finalize(self, self._kept.close)

    def close(self) -> None:
        """Close the connection. The next call opens another one."""
        with self._lock:
            self._kept.close()

    @contextmanager
    def _transaction(self) -> Iterator[psycopg.Cursor]:
        """One transaction, see `clients.postgres.transaction`. The connection is closed after any exception."""
        with self._lock:
            try:
                with ExitStack() as stack:
                    yield self._begin(stack)
            except BaseException:
                self._kept.close()
                raise
            self._kept.used_at = time.monotonic()

    @contextmanager
    def _exclusive(self) -> Iterator[psycopg.Cursor]:
        """A transaction that excludes all others that take claims or lock the records of several files."""
        with self._transaction() as cursor:
            notice_lost_client(cursor)
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", [_CLAIM_LOCK])
            yield cursor

    def _begin(self, stack: ExitStack) -> psycopg.Cursor:
        kept = self._kept
        if kept.connection is not None and time.monotonic() - kept.used_at < _IDLE_SECONDS:
            # An error means that the server closed it while it was idle. No statement has run yet.
            with suppress(TransientError):
                return stack.enter_context(transaction(kept.connection))
        kept.close()
        kept.connection = connect(self._settings)
        return stack.enter_context(transaction(kept.connection))
