"""The schedules of cron inputs."""

from datetime import UTC, datetime

import pytest

from qa_platform.embedded.pachd import schedule
from qa_platform.embedded.pachd.errors import PachError

NOON = datetime(2025, 1, 1, 12, 0, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("spec", "seconds"),
    [("@every 60s", 60), ("@every 1h30m", 5400), ("@every 10ms", 1), ("*/5 * * * *", 300), ("@hourly", 3600), ("@never", None)],
)
def test_the_next_tick(spec: str, seconds: float | None) -> None:
    schedule.check(spec)
    assert schedule.next_tick(spec, NOON) == (None if seconds is None else NOON + seconds)


@pytest.mark.parametrize(
    ("spec", "late", "due"),
    [
        ("@every 60s", 59, None),
        ("@every 60s", 60, 60),
        ("@every 60s", 200, 60),
        ("*/5 * * * *", 299, None),
        ("*/5 * * * *", 700, 300),
        ("@never", 9e9, None),
    ],
)
def test_missed_ticks_are_made_up_for_from_the_first_on(spec: str, late: float, due: float | None) -> None:
    assert schedule.due_tick(spec, NOON, NOON + late) == (None if due is None else NOON + due)


@pytest.mark.parametrize("spec", ["", "@every", "@every 5", "@every -5s", "* * * *", "* * * * * *", "x"])
def test_what_is_no_schedule_is_refused(spec: str) -> None:
    with pytest.raises(PachError, match="cron-spec"):
        schedule.check(spec)


def test_files_are_named_by_the_time_in_utc() -> None:
    assert schedule.file_name(NOON + 0.5) == "2025-01-01T12:00:00Z"
