"""Reads runs from Dagster's storage page by page: a run holds the names of all its files and is large."""

from collections.abc import Iterator

import dagster as dg

_PAGE = 100


def stored_runs(instance: dg.DagsterInstance, which: dg.RunsFilter) -> Iterator[dg.DagsterRun]:
    """All runs that match a filter, newest first."""
    cursor: str | None = None
    while runs := instance.get_runs(which, cursor=cursor, limit=_PAGE):
        yield from runs
        cursor = runs[-1].run_id
