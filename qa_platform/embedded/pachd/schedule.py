"""The schedules of cron inputs, in UTC: ``@every 90s``, ``@never``, ``@daily`` and similar, or the five fields of cron.

Times are seconds since the epoch.
"""

import math
import re
from datetime import UTC, datetime
from typing import Any

from qa_platform.embedded.pachd.errors import PachError

_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_DURATION = re.compile(r"(?:\d+(?:\.\d*)?|\.\d+)(?:h|ms|m|s|us|µs|ns)")


def _croniter() -> Any:
    # Imported late: only schedules in cron's own syntax need it.
    from croniter import croniter  # type: ignore[import-untyped]

    return croniter


def check(spec: str) -> None:
    """Check that a text is a schedule.

    Raises:
        PachError: the text is not a schedule.
    """
    if spec.startswith("@every "):
        _interval(spec)
    elif spec != "@never" and (not _croniter().is_valid(spec) or len(spec.split()) not in (1, 5)):
        raise PachError(f"error parsing cron-spec {spec!r}: it must be '@every <duration>', '@never', '@daily' or similar, or five fields")


def next_tick(spec: str, after: float) -> float | None:
    """The first tick after a time; None if there is none."""
    if spec == "@never":
        return None
    if spec.startswith("@every "):
        return math.floor(after) + _interval(spec)
    return float(_croniter()(spec, datetime.fromtimestamp(after, UTC)).get_next(float))


def due_tick(spec: str, after: float, now: float) -> float | None:
    """The first tick after ``after``, if it is not after ``now``. Every missed tick is made up for, as in Pachyderm."""
    tick = next_tick(spec, after)
    return tick if tick is not None and tick <= now else None


def file_name(when: float) -> str:
    """The name of the file that a tick writes: its time in RFC 3339."""
    return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _interval(spec: str) -> float:
    text = spec.removeprefix("@every ").strip()
    if not text or "".join(_DURATION.findall(text)) != text:
        raise PachError(f"error parsing cron-spec {spec!r}: {text!r} is not a duration such as 90s or 1h30m")
    seconds = 0.0
    for part in _DURATION.findall(text):
        number, unit = re.fullmatch(r"([\d.]+)(\D+)", part).groups()  # type: ignore[union-attr]
        seconds += float(number) * _UNITS[unit]
    return max(1.0, float(math.floor(seconds)))
