"""A job's log lines, for people."""

import time
from collections import OrderedDict
from contextlib import suppress
from datetime import timedelta

import grpc
from pachyderm_sdk import Client
from pachyderm_sdk.api import pps

from qa_platform.clients.services import Log
from qa_platform.contract import shard_in
from qa_platform.text import escaped

# The minimum seconds between two polls, and the pause after a poll as a multiple of its duration: polling must not hold up the job.
_LOG_SECONDS = 2.0
_LOG_REST = 5.0
# The maximum number of lines passed on as one message.
_LINES_AT_ONCE = 200


class LogLines:
    """Passes on a job's log lines as they are written. Polls for them and ignores errors.

    Remembers which lines were passed on, because a cluster's log store does not return the true tail of a log.
    """

    # How late a line may arrive, and how many lines are remembered.
    _LATE = timedelta(seconds=60)
    _REMEMBERED = 20_000

    def __init__(self, client: Client, job: pps.Job, log: Log) -> None:
        self.last = ""
        # The shards that are answered according to the lines.
        self.answered: set[str] = set()
        self._client = client
        self._job = job
        self._log = log
        self._known: OrderedDict[tuple[object, ...], None] = OrderedDict()
        self._next = 0.0
        # When the lines were last read completely.
        self._whole: float | None = None

    def pass_on(self, *, last: bool = False) -> None:
        """Pass on new lines. Does nothing if the last poll was a moment ago, unless ``last`` is set."""
        asked = time.monotonic()
        if asked < self._next and not last:
            return
        lines: list[str] = []
        with suppress(grpc.RpcError):
            for message in self._client.pps.get_logs(pipeline=self._job.pipeline, job=self._job, since=self._since()):
                if message.user and self._is_new(message):
                    self.last = escaped(message.message.rstrip("\n"), keep="\n\t")
                    self.answered.add(shard_in(self.last))
                    lines.append(f"{self._job.pipeline.name} | {self.last}")
            self._whole = asked
        self._next = time.monotonic() + max(_LOG_SECONDS, _LOG_REST * (time.monotonic() - asked))
        for start in range(0, len(lines), _LINES_AT_ONCE):
            self._log.info("%s", "\n".join(lines[start : start + _LINES_AT_ONCE]))

    def _since(self) -> timedelta:
        # All lines the first time: an earlier run may have launched the job.
        if self._whole is None or not self._known:
            return timedelta(days=1)
        return self._LATE + timedelta(seconds=time.monotonic() - self._whole)

    def _is_new(self, message: pps.LogMessage) -> bool:
        key = (message.ts, message.worker_id, message.message)
        is_new = key not in self._known
        self._known[key] = None
        if len(self._known) > self._REMEMBERED:
            self._known.popitem(last=False)
        return is_new
