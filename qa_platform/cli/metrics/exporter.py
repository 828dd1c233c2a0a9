"""Runs all readings in parallel at each scrape, each with a deadline, and serves the result to Prometheus."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qa_platform.cli.doctor.examine import explained
from qa_platform.cli.metrics.readings import READINGS, SERVICES, Read
from qa_platform.clients.deadline import begin

# Less than Prometheus' default scrape timeout of ten seconds.
DEADLINE_SECONDS = 8.0


class Exporter(Collector):
    """The metrics of the platform, read anew at each collection.

    A reading that misses the deadline is left out and counts as unavailable; the others are still served. Concurrent scrapes share their
    readings, and a reading never starts before its predecessor has ended: a service that hangs holds one thread.

    Args:
        tell: called once when a reading fails, and once when it works again. Its text contains no secret.
        deadline: the longest that a scrape takes, in seconds.
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
        until = time.monotonic() + self._deadline
        up = GaugeMetricFamily("qa_up", "Whether a service answers within the deadline.", labels=["service"])
        read = GaugeMetricFamily("qa_read_success", "Whether a part of the metrics could be read.", labels=["part"])
        begun = [(family, each, each.begin()) for family, group in ((up, self._services), (read, self._readings)) for each in group]
        for family, reading, future in begun:
            metrics = reading.result(future, until)
            family.add_metric([reading.name], metrics is not None)
            yield from metrics or ()
        yield up
        yield read


class _Reading:
    """One reading. It runs in a thread, one at a time."""

    def __init__(self, name: str, read: Read, tell: Callable[[str], object]) -> None:
        self.name = name
        self._read = read
        self._tell = tell
        self._lock = threading.Lock()
        self._future: Future[list[Metric]] | None = None
        self._problem = ""

    def begin(self) -> Future[list[Metric]]:
        """Start the reading, unless it is in progress."""
        with self._lock:
            if self._future is None or self._future.done():
                self._future = begin(lambda: list(self._read()), f"metrics-{self.name}")
            return self._future

    def result(self, future: Future[list[Metric]], until: float) -> list[Metric] | None:
        """The metrics; None if the reading failed, or has not ended by the time ``until``."""
        try:
            metrics = future.result(max(0.0, until - time.monotonic()))
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
            self._tell(f"{self.name}: {problem or 'available again'}")
