"""One SQLite file behind one lock, with short transactions, and waiting for changes by other threads."""

import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

# How often a waiter checks whether its caller is still alive.
_LIVENESS_SECONDS = 1.0


class Database:
    """A SQLite database in WAL mode. A killed process leaves the last committed transaction, never a partial one."""

    def __init__(self, path: Path, schema: str) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=512)
        self._connection.row_factory = sqlite3.Row
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "busy_timeout=10000"):
            self._connection.execute(f"PRAGMA {pragma}")
        self._connection.executescript(schema)
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._depth = 0

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """A transaction. A nested one joins the outer one. Waiters are woken after the commit."""
        with self._lock:
            if self._depth:
                yield
                return
            self._connection.execute("BEGIN IMMEDIATE")
            self._depth = 1
            try:
                yield
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            else:
                self._connection.execute("COMMIT")
                self._changed.notify_all()
            finally:
                self._depth = 0

    def execute(self, sql: str, *values: Any) -> int:
        """Run one statement, and return the row id of an insert."""
        with self.transaction():
            return self._connection.execute(sql, values).lastrowid or 0

    def execute_many(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        """Run one statement for each row of values."""
        with self.transaction():
            self._connection.executemany(sql, rows)

    def rows(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        """All rows of a query."""
        with self._lock:
            return self._connection.execute(sql, values).fetchall()

    def row(self, sql: str, *values: Any) -> sqlite3.Row | None:
        """The first row of a query, or None."""
        with self._lock:
            row: sqlite3.Row | None = self._connection.execute(sql, values).fetchone()
            return row

    def value(self, sql: str, *values: Any) -> Any:
        """The first column of the first row, or None."""
        row = self.row(sql, *values)
        return None if row is None else row[0]

    def wait_until(self, look: Callable[[], T], *, alive: Callable[[], bool]) -> T | None:
        """Call ``look`` after every commit until it returns a true value, and return that value. None once ``alive`` is false."""
        with self._lock:
            assert not self._depth, "a wait inside a transaction would release its lock"
            while alive():
                found = look()
                if found:
                    return found
                self._changed.wait(_LIVENESS_SECONDS)
        return None

    def wake(self) -> None:
        """Make all waiters look again, even though nothing was written."""
        with self._lock:
            self._changed.notify_all()

    def close(self) -> None:
        with self._lock:
            self._connection.close()
