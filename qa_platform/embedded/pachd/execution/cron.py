"""Creates the ticks of cron inputs."""

import logging
import threading
import time

from qa_platform.embedded.pachd import schedule
from qa_platform.embedded.pachd.errors import PachError
from qa_platform.embedded.pachd.pps import Pipeline, Pps

_LOG = logging.getLogger(__name__)
# The longest delay of a tick. Schedules are in whole seconds.
_LOOK_SECONDS = 0.25


class CronClock:
    """Creates ticks until ``stop``."""

    def __init__(self, pps: Pps) -> None:
        self._pps = pps
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cron", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(10)

    def _run(self) -> None:
        while not self._stopping.wait(_LOOK_SECONDS):
            for pipeline in self._pps.pipelines.with_crons():
                try:
                    self._tick(pipeline)
                except PachError as error:
                    _LOG.warning("no tick for %s: %s", pipeline.key, error)
                except Exception:
                    _LOG.exception("no tick for %s", pipeline.key)

    def _tick(self, pipeline: Pipeline) -> None:
        for cron in pipeline.spec.crons:
            last = self._pps.pipelines.last_tick(pipeline, cron)
            while (due := schedule.due_tick(cron.spec, last, time.time())) is not None and not self._stopping.is_set():
                self._pps.pipelines.tick(pipeline, cron, due, schedule.file_name(due))
                last = due
