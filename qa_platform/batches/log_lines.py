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

# Lines are asked for so often at most, and not before so many times as long have passed as asking took: a job is not held up by its lines.
_LOG_SECONDS = 2.0
_LOG_REST = 5.0
# Lines that are passed on as one message.
_LINES_AT_ONCE = 200


class LogLines:
    """Passes a job's log lines on while they are written. They are polled, and no error of theirs matters.

    Which lines were passed on is remembered here: what a cluster's log store gives as the tail of a log is not the tail.
    """

    # Lines may come late; of so many the place is remembered.
    _LATE = timedelta(seconds=60)
    _REMEMBERED = 20_000

    def __init__(self, client: Client, job: pps.Job, log: Log) -> None:
        self.last = ""
        # The shards that the lines say are answered.
        self.answered: set[str] = set()
        self._client = client
        self._job = job
        self._log = log
        self._known: OrderedDict[tuple[object, ...], None] = OrderedDict()
        self._next = 0.0
        # When all lines were last there.
        self._whole: float | None = None

    def pass_on(self, *, last: bool = False) -> None:
        """Pass on what is new, if it was not asked for just now."""
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
        # All of them the first time: the job may be one that an earlier run launched.
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
