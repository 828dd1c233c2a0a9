"""What the doctor reports: the results of the checks, and the parts that the checks are grouped in."""

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass

DISTRIBUTION = "qa-platform"
IN_THE_STACK = "on a laptop: qa-platform local run -- qa-platform doctor"


class State(enum.StrEnum):
    """The outcome of a check. ``UNKNOWN``: it was not made, because something that it needs is wrong or not permitted."""

    OK = "ok"
    WRONG = "wrong"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Result:
    """The outcome of one check. ``fix`` says, where something is wrong, what to do: a command, or a variable to set."""

    state: State
    detail: str
    fix: str = ""


def ok(detail: str) -> Result:
    return Result(State.OK, detail)


def wrong(detail: str, fix: str) -> Result:
    return Result(State.WRONG, detail, fix)


def unknown(detail: str) -> Result:
    return Result(State.UNKNOWN, detail)


class Wrong(Exception):
    """Ends a part: the check that raises it is wrong, and the ones after it cannot be made."""

    def __init__(self, detail: str, fix: str) -> None:
        super().__init__(detail)
        self.result = wrong(detail, fix)


@dataclass(frozen=True)
class Part:
    """Checks that depend on each other.

    Args:
        names: the checks, in order.
        examine: yields one result for each name, in this order. It reads the settings of its part itself: wrong settings are a finding
            of this part, and must not end the others.
        where: what is examined, for the message that it did not answer in time.
    """

    names: tuple[str, ...]
    examine: Callable[[], Iterator[Result]]
    where: Callable[[], str]


@dataclass(frozen=True)
class Finding:
    """A check by name, with its result."""

    name: str
    state: State
    detail: str
    fix: str = ""

    @staticmethod
    def of(name: str, result: Result) -> "Finding":
        return Finding(name, result.state, result.detail, result.fix)


@dataclass(frozen=True)
class Report:
    """All findings, and whether all of them are ok: what ``qa-platform doctor --json`` writes."""

    ok: bool
    findings: tuple[Finding, ...]
