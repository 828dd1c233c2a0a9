"""Estimates a job's remaining time from the rows done while it was watched."""


class Pace:
    """Estimates the time left from the rows done per second since the first count."""

    def __init__(self) -> None:
        self._begun: tuple[float, int] | None = None

    def seconds_left(self, done: int, total: int, *, at: float) -> float | None:
        """The seconds until all rows are done; None while there is nothing to estimate them from.

        Args:
            at: when the rows were counted, in seconds of any clock.
        """
        begun, before = self._begun = self._begun or (at, done)
        return (total - done) * (at - begun) / (done - before) if done > before else None
