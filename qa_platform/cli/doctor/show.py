"""Prints the doctor's findings."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from qa_platform.cli.doctor.findings import Finding, State
from qa_platform.cli.terminal import one_line

if TYPE_CHECKING:
    from rich.console import Console

_STYLES = {State.OK: "green", State.WRONG: "bold red", State.UNKNOWN: "yellow"}
_STATE_WIDTH = 9


def show(findings: Sequence[Finding], out: "Console") -> None:
    """Print a line per finding, and the fix below each problem. On a terminal, lines break between words."""
    from rich.table import Table

    rows = list(_rows(findings))
    if out.is_terminal:
        grid = Table.grid(padding=(0, 2, 0, 0))
        for row in rows:
            grid.add_row(*row)
        out.print(grid)
    else:
        for state, text in rows:
            out.print(f"{state.plain:{_STATE_WIDTH}}{text}", soft_wrap=True)
    worst, verdict = _verdict(findings)
    out.print(verdict, style=_STYLES[worst], soft_wrap=True)


def _verdict(findings: Sequence[Finding]) -> tuple[State, str]:
    """The worst state, and a summary of the findings in it."""
    for state, word in ((State.WRONG, "wrong"), (State.UNKNOWN, "not checked")):
        if names := [finding.name for finding in findings if finding.state is state]:
            return state, f"{word}: {', '.join(names)}"
    return State.OK, "all is well"


def _rows(findings: Sequence[Finding]) -> list[tuple[Text, str]]:
    rows: list[tuple[Text, str]] = []
    for finding in findings:
        rows.append((Text(finding.state, _STYLES[finding.state]), one_line(f"{finding.name}: {finding.detail}")))
        if finding.fix:
            rows.append((Text(""), f"fix: {one_line(finding.fix)}"))
    return rows
