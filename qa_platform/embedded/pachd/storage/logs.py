"""The workers' log lines. They have their own database, so that a chatty process does not slow down the metadata."""

import functools
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qa_platform.embedded.pachd.storage.database import Database

_SCHEMA = """
CREATE TABLE IF NOT EXISTS line (
    seq INTEGER PRIMARY KEY, project TEXT, pipeline TEXT, job TEXT, worker TEXT, datum TEXT, data TEXT, user INTEGER, master INTEGER,
    time REAL, message TEXT
);
CREATE INDEX IF NOT EXISTS line_by_job ON line (pipeline, job, seq);
CREATE INDEX IF NOT EXISTS line_by_datum ON line (datum, seq);
"""
_PAGE = 1000


@dataclass(frozen=True)
class LogLine:
    """A log line. ``data`` has (path, hex hash) of the datum's inputs. ``user`` marks output of user code. ``time`` is in seconds."""

    project: str
    pipeline: str
    job: str
    worker: str
    datum: str
    data: tuple[tuple[str, str], ...]
    user: bool
    master: bool
    time: float
    message: str


@dataclass(frozen=True)
class LogQuery:
    """A filter for lines. Empty fields match everything. A line must have all paths or hashes in ``data``, and any of ``workers``."""

    project: str = ""
    pipeline: str = ""
    job: str = ""
    datum: str = ""
    data: tuple[str, ...] = ()
    master: bool | None = None
    user: bool | None = None
    since: float = 0.0
    until: float = 0.0
    tail: int = 0
    workers: tuple[str, ...] = ()

    def matches(self, line: LogLine) -> bool:
        names = {name for pair in line.data for name in pair}
        return not self.data or all(wanted in names for wanted in self.data)


class LogStore:
    """Appends and reads lines. Readers see a line after ``delay`` seconds. A new line wakes readers that follow."""

    def __init__(self, path: Path) -> None:
        self._database = Database(path, _SCHEMA)
        self.delay = 0.0

    def append(self, line: LogLine) -> None:
        self._database.execute(
            "INSERT INTO line (project, pipeline, job, worker, datum, data, user, master, time, message) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            line.project,
            line.pipeline,
            line.job,
            line.worker,
            line.datum,
            json.dumps(line.data),
            line.user,
            line.master,
            line.time,
            line.message,
        )

    def read(self, query: LogQuery, *, follow: bool, alive: Callable[[], bool]) -> Iterator[LogLine]:
        """The matching lines, the oldest first. With ``follow``, new lines are added until ``alive`` is false."""
        after = 0
        last: deque[LogLine] = deque(maxlen=query.tail)
        while (page := self._page(query, after)) is not None:
            lines, after = page
            if query.tail:
                last.extend(lines)
            else:
                yield from lines
        yield from last
        while follow:
            look = functools.partial(self._page, query, after)
            page = self._database.wait_until(look, alive=alive)
            if page is None:
                return
            lines, after = page
            yield from lines

    def delete_pipeline(self, project: str, pipeline: str) -> None:
        self._database.execute("DELETE FROM line WHERE project = ? AND pipeline = ?", project, pipeline)

    def close(self) -> None:
        self._database.close()

    def _page(self, query: LogQuery, after: int) -> tuple[list[LogLine], int] | None:
        """The next page after a position: the matching lines, and the position to continue from. None if there are no more lines."""
        where = ["seq > ?"]
        values: list[object] = [after]
        for column, wanted in (("project", query.project), ("pipeline", query.pipeline), ("job", query.job), ("datum", query.datum)):
            if wanted:
                where.append(f"{column} = ?")
                values.append(wanted)
        for column, flag in (("master", query.master), ("user", query.user)):
            if flag is not None:
                where.append(f"{column} = ?")
                values.append(flag)
        if query.since:
            where.append("time >= ?")
            values.append(query.since)
        until = min(query.until or math.inf, time.time() - self.delay if self.delay else math.inf)
        if until < math.inf:
            where.append("time <= ?")
            values.append(until)
        if query.workers:
            where.append(f"worker IN ({', '.join('?' * len(query.workers))})")
            values.extend(query.workers)
        rows = self._database.rows(f"SELECT * FROM line WHERE {' AND '.join(where)} ORDER BY seq LIMIT {_PAGE}", *values)  # noqa: S608
        if not rows:
            return None
        lines = [
            LogLine(
                project=row["project"],
                pipeline=row["pipeline"],
                job=row["job"],
                worker=row["worker"],
                datum=row["datum"],
                data=tuple((path, name) for path, name in json.loads(row["data"])),
                user=bool(row["user"]),
                master=bool(row["master"]),
                time=row["time"],
                message=row["message"],
            )
            for row in rows
        ]
        return [line for line in lines if query.matches(line)], rows[-1]["seq"]
