"""The types of the doctor: the parts, which group the checks, and their results."""

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass

DISTRIBUTION = "qa-platform"
IN_THE_STACK = "on a laptop: qa-platform local run -- qa-platform doctor"


class State(enum.StrEnum):
    """The outcome of a check. ``UNKNOWN``: it was not made, because something it needs is wrong or not permitted."""

    OK = "ok"
    WRONG = "wrong"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Result:
    """The outcome of one check. If something is wrong, ``fix`` says what to do: a command, or a variable to set."""

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
    """Ends a part: the current check has failed, and the later ones cannot be made."""

    def __init__(self, detail: str, fix: str) -> None:
        super().__init__(detail)
        self.result = wrong(detail, fix)


@dataclass(frozen=True)
class Part:
    """Checks that depend on each other.

    Args:
        names: the checks, in order.
        examine: yields one result per name, in this order. It reads its settings itself, so that wrong settings are a finding of this
            part and do not end the others.
        where: what is examined, for the message about a timeout.
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
