"""Times as the API writes them: RFC 3339 in UTC with microseconds, so that comparing the texts compares the times."""

from datetime import UTC, datetime, timedelta


def now_text() -> str:
    """The current time."""
    return _text(datetime.now(UTC))


def in_seconds(moment: str, seconds: float) -> str:
    """The time this many seconds after a moment."""
    return _text(datetime.fromisoformat(moment) + timedelta(seconds=seconds))


def normalised(moment: str) -> str:
    """A client's time in the format of this module.

    Raises:
        ValueError: it is not in RFC 3339.
    """
    parsed = datetime.fromisoformat(moment)
    return _text(parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC))


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
