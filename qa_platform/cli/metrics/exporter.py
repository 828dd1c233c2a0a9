"""Reads everything side by side at each scrape, each reading within a deadline, and serves the result to Prometheus."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qa_platform.cli.deadline import begin
from qa_platform.cli.doctor.examine import explained
from qa_platform.cli.metrics.readings import READINGS, SERVICES, Read

# Prometheus gives up on a scrape after ten seconds, unless told otherwise.
DEADLINE_SECONDS = 8.0


class Exporter(Collector):
    """The metrics of the platform, read anew whenever they are collected.

    What cannot be read within the deadline is left out, and counts as unavailable; the rest is there all the same. Scrapes at the same
    time share their readings, and none is begun before the one before it has ended: a service that hangs holds one thread.

    Args:
        tell: is told, once, when something becomes unavailable, and when it is available again. It is told no secret.
        deadline: seconds that a scrape takes at most.
    """

    def __init__(
        self,
        tell: Callable[[str], object],
        *,
        services: Mapping[str, Read] = SERVICES,
        readings: Mapping[str, Read] = READINGS,
        deadline: float = DEADLINE_SECONDS,
    ) -> None:
        self._services = [_Reading(name, read, tell) for name, read in services.items()]
        self._readings = [_Reading(name, read, tell) for name, read in readings.items()]
        self._deadline = deadline

    def collect(self) -> Iterator[Metric]:
        over = time.monotonic() + self._deadline
        up = GaugeMetricFamily("qa_up", "Whether a service answers within the deadline.", labels=["service"])
        read = GaugeMetricFamily("qa_read_success", "Whether a part of the metrics could be read.", labels=["part"])
        begun = [(family, each, each.begin()) for family, group in ((up, self._services), (read, self._readings)) for each in group]
        for family, reading, future in begun:
            metrics = reading.result(future, over)
            family.add_metric([reading.name], metrics is not None)
            yield from metrics or ()
        yield up
        yield read


class _Reading:
    """One reading: made in a thread, one at a time."""

    def __init__(self, name: str, read: Read, tell: Callable[[str], object]) -> None:
        self.name = name
        self._read = read
        self._tell = tell
        self._lock = threading.Lock()
        self._future: Future[list[Metric]] | None = None
        self._problem = ""

    def begin(self) -> Future[list[Metric]]:
        """Begin to read, unless that is under way."""
        with self._lock:
            if self._future is None or self._future.done():
                self._future = begin(lambda: list(self._read()), f"metrics-{self.name}")
            return self._future

    def result(self, future: Future[list[Metric]], over: float) -> list[Metric] | None:
        """What was read; None if that failed, or has not ended by the time ``over``."""
        try:
            metrics = future.result(max(0.0, over - time.monotonic()))
        except TimeoutError:
            self._note("no answer within the deadline")
        except Exception as error:
            self._note(explained(error).detail)
        else:
            self._note("")
            return metrics
        return None

    def _note(self, problem: str) -> None:
        with self._lock:
            is_new, self._problem = problem != self._problem, problem
        if is_new:
            self._tell(f"{self.name}: {problem or 'is read again'}")
