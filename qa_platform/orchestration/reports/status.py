"""The state of the platform, for a reader who knows nothing of its parts: a sentence, the last days, the times, the scores.

It contains no file's name or content, so forgetting a file need not remove anything from its history.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import dagster as dg

from qa_platform.clients.postgres import connect
from qa_platform.clients.services import Services
from qa_platform.contract import FileStatus
from qa_platform.ledger import Ledger
from qa_platform.ledger.overview import Day, Loads, Totals, quantile, stage_seconds
from qa_platform.orchestration.catalog import PLATFORM_STATUS, REPORTED_TAGS, AssetFactory
from qa_platform.orchestration.reports.markdown import bar_chart, histogram, table
from qa_platform.results.recent_scores import RecentScores, recent_scores
from qa_platform.settings import CheckSettings

_DAYS = 14
_RECENT_SECONDS = 86_400.0
# Times and scores cover at most this many of the newest files, and this many of their rows.
_RECENT_FILES = 1_000
_RECENT_ROWS = 100_000
# The time limit of a statement. There are seven, and Dagster ends a tick after 60 s.
_STATEMENT_SECONDS = 5.0
# If a file has waited longer, the sentence says so.
_LONG_WAIT_SECONDS = 3_600
_STAGES = ("waiting", "answering", "loading")


def platform_status(factory: AssetFactory) -> dg.AssetSpec:
    return factory.spec(
        PLATFORM_STATUS,
        description="How the platform is doing: whether anything needs a person, what was answered, and how long it takes. *Plots* shows "
        "how the numbers changed. The sensor `platform_status` reports it a few minutes after a change, and every hour.",
        kinds={"postgres"},
        page="operating.md",
    )


@dataclass(frozen=True)
class Figures:
    """The platform's figures, from the tables.

    Args:
        files: the number of generations of files, by status.
        failed: the number of files that are not retried automatically.
        recent: what was loaded in the last 24 hours.
        days: what was loaded on each of the last days, today last.
        stages: how long recent files took, by stage.
        scores: the scores of recent files.
    """

    files: Mapping[FileStatus, int]
    totals: Totals
    failed: int
    rejected: int
    recent: Loads
    days: Sequence[Day]
    stages: Mapping[str, Sequence[float]]
    scores: RecentScores

    @property
    def version(self) -> str:
        """A hash that changes when anything happens to a file."""
        totals = self.totals
        state = (sorted(self.files.items()), totals.last_load, totals.deferred, totals.archive_errors)
        return hashlib.sha256(repr(state).encode()).hexdigest()[:16]


def read_figures(services: Services, settings: CheckSettings) -> Figures:
    """Read the figures.

    Raises:
        TransientError: PostgreSQL is unavailable, or takes too long.
    """
    with Ledger(services.postgres) as ledger, connect(services.postgres) as connection:
        files, totals = ledger.totals(seconds=_STATEMENT_SECONDS)
        records = ledger.loaded_within(_RECENT_SECONDS, limit=_RECENT_FILES, seconds=_STATEMENT_SECONDS)
        times = [stage_seconds(record) for record in records]
        return Figures(
            files=files,
            totals=totals,
            failed=ledger.count_failed(seconds=_STATEMENT_SECONDS),
            rejected=ledger.count_rejected(_RECENT_SECONDS, seconds=_STATEMENT_SECONDS),
            recent=ledger.loads(_RECENT_SECONDS, seconds=_STATEMENT_SECONDS),
            days=ledger.days(_DAYS, seconds=_STATEMENT_SECONDS),
            stages={stage: found for stage in _STAGES if (found := [each[stage] for each in times if stage in each])},
            scores=recent_scores(connection, records, low_score=settings.low_score, limit=_RECENT_ROWS, seconds=_STATEMENT_SECONDS),
        )


def status_event(figures: Figures, settings: CheckSettings) -> dg.AssetMaterialization:
    """The event of `platform_status`."""
    worries = _worries(figures)
    return dg.AssetMaterialization(
        PLATFORM_STATUS,
        description=f"{worries or 'All is well.'} {_done(figures.recent, figures.rejected)}",
        metadata={
            "in short": dg.MetadataValue.md(f"**{worries or 'All is well.'}** {_done(figures.recent, figures.rejected)}"),
            **({"which files, and why": "qa-platform status"} if worries or figures.rejected else {}),
            **_by_day(figures.days),
            **_times(figures.stages),
            **_scores(figures.scores, low=settings.low_score),
            **_numbers(figures),
        },
        tags={**REPORTED_TAGS, "dagster/data_version": figures.version},
    )


def _worries(figures: Figures) -> str:
    """The problems that need a person, or may soon; "" if there are none."""
    totals, worries = figures.totals, []
    if figures.failed:
        worries.append(f"{_count(figures.failed, 'file')} failed for good.")
    if totals.archive_errors:
        worries.append(f"{_count(totals.archive_errors, 'file')} cannot be moved out of incoming/.")
    if totals.deferred:
        waits = "waits" if totals.deferred == 1 else "wait"
        worries.append(
            f"{_count(totals.deferred, 'file')} {waits} for something outside {'it' if totals.deferred == 1 else 'them'} to be fixed."
        )
    if totals.oldest_seconds > _LONG_WAIT_SECONDS:
        worries.append(f"One file has waited for {timedelta(seconds=round(totals.oldest_seconds))}.")
    return " ".join(worries)


def _done(recent: Loads, rejected: int) -> str:
    refused = f" Uploads that were rejected, for their owners to correct: {rejected:,}." if rejected else ""
    if recent.answered_percent is None:
        return f"Nothing was answered in the last 24 hours.{refused}"
    amount = f"{_count(recent.files, 'file')} with {_count(recent.rows, 'row')}"
    return f"Answered in the last 24 hours: {amount}. {recent.answered_percent:.1f} % of their rows have an answer.{refused}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _by_day(days: Sequence[Day]) -> dict[str, dg.MetadataValue]:
    if not any(day.files for day in days):
        return {}
    bars = [(day.answered, day.no_answer + day.rejected) for day in days]
    rows = [
        (f"{day.date:%a %d %b}", f"{day.files:,}", f"{day.rows:,}", f"{day.answered_percent:.1f} %")
        for day in reversed(days)
        if day.answered_percent is not None
    ]
    return {
        "rows by day": dg.MetadataValue.md(bar_chart(bars, "rows by day", f"{days[0].date:%d %b}", "today")),
        "by day": dg.MetadataValue.md(table(("day (UTC)", "files", "rows", "answered"), rows)),
    }


def _times(stages: Mapping[str, Sequence[float]]) -> dict[str, dg.MetadataValue]:
    rows = [(stage, *(_seconds(quantile(values, share)) for share in (0.5, 0.9, 1))) for stage, values in stages.items()]
    header = ("a file is", "half of them, up to", "nine of ten", "the longest")
    return {"time per file, last 24 hours": dg.MetadataValue.md(table(header, rows))} if rows else {}


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 60 else str(timedelta(seconds=round(value)))


def _scores(scores: RecentScores, *, low: float) -> dict[str, Any]:
    if scores.mean is None:
        return {}
    return {
        "scores, last 24 hours": dg.MetadataValue.md(histogram(scores.counts, low=low)),
        "mean score": round(scores.mean, 4),
        f"scores below {low:g}, percent": round(100 * scores.low / scores.rows, 2),
    }


def _numbers(figures: Figures) -> dict[str, float]:
    """Numbers that are reported for their plots."""
    recent, totals, files = figures.recent, figures.totals, figures.files
    share = {} if recent.answered_percent is None else {"rows with an answer, percent": round(recent.answered_percent, 2)}
    return {
        "files a day": recent.files,
        "rows a day": recent.rows,
        "files rejected a day": figures.rejected,
        **share,
        **{f"seconds {stage}, nine of ten files": round(quantile(values, 0.9), 2) for stage, values in figures.stages.items()},
        "files in work": sum(files[status] for status in (FileStatus.PENDING, FileStatus.RUNNING)),
        "files that failed": figures.failed,
        "longest wait, minutes": round(totals.oldest_seconds / 60, 1),
    }
