"""Runs the parts of the doctor in parallel, with a deadline, and collects their findings."""

import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from pydantic import ValidationError

from qa_platform.cli.doctor import archive, bucket, certificates, clocks, dagster, installation, pachyderm, postgres, variables
from qa_platform.cli.doctor.findings import DISTRIBUTION, IN_THE_STACK, Finding, Part, Result, Wrong, unknown, wrong
from qa_platform.cli.extras import how_to_install
from qa_platform.clients.deadline import begin
from qa_platform.errors import QaPlatformError
from qa_platform.settings import SETTINGS_ADVICE, wrong_settings

# Longer than the ten-second connection timeout of PostgreSQL, so that its own message is reported.
DEADLINE_SECONDS = 15.0
# In the order in which they depend on each other.
PARTS = (
    *(installation.PART, variables.PART, bucket.PART, postgres.PART, dagster.PART),
    *(pachyderm.PART, archive.PART, certificates.PART, clocks.PART),
)


@dataclass(frozen=True)
class _Running:
    """A part running in a thread: its results so far, and a future for its end."""

    part: Part
    results: list[Result]
    ended: Future[None]


def examine(deadline: float = DEADLINE_SECONDS) -> list[Finding]:
    """All findings, in the order of PARTS. A part that does not end within ``deadline`` seconds has failed."""
    until = time.monotonic() + deadline
    running = [_begin(part) for part in PARTS]
    return [finding for part in running for finding in _findings(part, until, deadline)]


def _begin(part: Part) -> _Running:
    results: list[Result] = []

    def run() -> None:
        # One by one, to keep the results before an error.
        for result in part.examine():
            results.append(result)  # noqa: PERF402

    return _Running(part, results, begin(run, f"doctor-{part.names[0]}"))


def _findings(running: _Running, until: float, deadline: float) -> Iterator[Finding]:
    problem = _problem(running, until, deadline)
    names = running.part.names
    # A copy: the thread may still run and append.
    known = list(running.results)
    for name, result in zip(names, known, strict=False):
        yield Finding.of(name, result)
    left = names[len(known) :]
    if left and problem:
        yield Finding.of(left[0], problem)
        left = left[1:]
    for name in left:
        yield Finding.of(name, unknown(f"not checked: it needs {names[len(known)]}"))


def _problem(running: _Running, until: float, deadline: float) -> Result | None:
    """Why a part ended before its last check, or None."""
    try:
        running.ended.result(max(0.0, until - time.monotonic()))
    except TimeoutError:
        where = running.part.where()
        return wrong(f"no answer within {deadline:.0f} s from {where}", f"check that it is up, and the network to it; {IN_THE_STACK}")
    except ValidationError as error:
        return unknown("not checked: it needs variables") if error.title in variables.CHECKED else explained(error)
    except Exception as error:
        return explained(error)
    return None


def explained(error: Exception) -> Result:
    """The result for an error that ended a part. It contains no secret."""
    if isinstance(error, Wrong):
        return error.result
    if message := wrong_settings(error):
        return wrong(message, SETTINGS_ADVICE)
    if isinstance(error, QaPlatformError):
        return wrong(error.cause, error.advice or "fix that, then run qa-platform doctor again")
    if isinstance(error, ImportError):
        return wrong(
            f"the package {error.name} is not installed", how_to_install(error.name or "") or f"pip install '{DISTRIBUTION}[platform]'"
        )
    # Without its message, which may contain a secret.
    return wrong(f"an unexpected {type(error).__name__}", "report it, with the version that `qa-platform --version` shows")
