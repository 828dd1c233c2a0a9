"""The clocks of this machine, of PostgreSQL and of the bucket. A wrong clock makes tokens invalid and recorded times wrong."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from statistics import median

from qa_platform.cli.doctor.findings import Part, Result, ok, unknown, wrong
from qa_platform.clients.deadline import begin
from qa_platform.contract import INCOMING
from qa_platform.settings import BucketSettings, PostgresSettings

_HERE, _DATABASE, _BUCKET = "this machine", "PostgreSQL", "the bucket"
# More than network latency and the one-second resolution of HTTP dates.
_TOLERATED_SECONDS = 5.0
_TIMEOUT_SECONDS = 5
# For both clocks together; less than the doctor's deadline.
_SECONDS = 12.0


def _examine() -> Iterator[Result]:
    reading = {name: begin(read, f"clock of {name}") for name, read in ((_DATABASE, _of_database), (_BUCKET, _of_bucket))}
    until = time.monotonic() + _SECONDS
    ahead = {_HERE: 0.0}
    for name, clock in reading.items():
        # Another part reports a service that is unavailable or misconfigured.
        with suppress(Exception):
            ahead[name] = clock.result(until - time.monotonic())
    yield compare(ahead)


def compare(ahead: Mapping[str, float]) -> Result:
    """The result for clocks by name. Each value is the seconds that the clock is ahead of a common reference."""
    if len(ahead) == 1:
        return unknown("not compared: neither PostgreSQL nor the bucket answers")
    # With three clocks the majority is right. With two there is no telling.
    right = median(ahead.values()) if len(ahead) > 2 else ahead[_HERE]
    off = {name: seconds - right for name, seconds in ahead.items() if abs(seconds - right) > _TOLERATED_SECONDS}
    names = " and ".join(name for name in ahead if name not in off)
    if not off:
        return ok(f"{', '.join(ahead)} agree within {_TOLERATED_SECONDS:.0f} s")
    told = "; ".join(f"{name} is {abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} {names}" for name, seconds in off.items())
    doubt = "" if len(ahead) > 2 else "; with only two clocks, either may be wrong"
    return wrong(f"{told}{doubt}", f"synchronise the clock with NTP, and keep NTP on: timedatectl, on {' and '.join(off)}")


def _seconds_ahead(read: Callable[[], float]) -> float:
    """How far a clock is ahead of this machine's, assuming that it was read in the middle of the call."""
    begun = time.time()
    there = read()
    return there - (begun + time.time()) / 2


def _of_database() -> float:
    from qa_platform.clients.postgres import connect, only_row, transaction

    with connect(PostgresSettings()) as connection, transaction(connection) as cursor:
        return _seconds_ahead(lambda: only_row(cursor.execute("SELECT clock_timestamp()"))[0].timestamp())


def _of_bucket() -> float:
    from qa_platform.clients.bucket import open_bucket

    gcs_bucket = open_bucket(BucketSettings())
    client = gcs_bucket.client
    url = client._connection.build_api_url(f"/b/{gcs_bucket.name}/o", query_params={"prefix": INCOMING, "maxResults": 1})

    def read() -> float:
        # The library does not expose headers. Even an error response has a Date.
        date = client._http.request("GET", url, timeout=_TIMEOUT_SECONDS).headers["Date"]
        # The date is truncated to a second: take the middle of it.
        return parsedate_to_datetime(date).timestamp() + 0.5

    return _seconds_ahead(read)


PART = Part(("clocks",), _examine, lambda: "PostgreSQL and the bucket")
