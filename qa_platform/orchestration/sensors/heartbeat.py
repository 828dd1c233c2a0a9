"""The heartbeat of the bucket sensor. While it is fresh, the bucket is listed and uploads get runs, even if there is nothing to do."""

import time
from datetime import UTC, timedelta

import dagster as dg

from qa_platform.batches.pending import Look
from qa_platform.contract import HEARTBEAT_ASSET
from qa_platform.orchestration.catalog import REPORTED_TAGS, AssetFactory
from qa_platform.orchestration.reports.markdown import cell
from qa_platform.settings import WorkSettings
from qa_platform.text import escaped_lines

HEARTBEAT = dg.AssetKey(HEARTBEAT_ASSET)

# Dagster refuses a shorter window, and with it all definitions.
_LEAST_WINDOW_SECONDS = 60.0
# How many characters are shown of the reason why files are deferred.
_SHOWN_CHARACTERS = 500


def incoming_listing(factory: AssetFactory, work: WorkSettings) -> dg.AssetSpec:
    fail_after = timedelta(seconds=max(work.heartbeat_fails_after, _LEAST_WINDOW_SECONDS))
    return factory.spec(
        HEARTBEAT,
        description="What the bucket sensor saw, every few minutes. If it is not fresh, uploads are not seen or get no run: the daemon, "
        "its storage, the bucket, PostgreSQL or the sensor is broken. If it is fresh and nothing waits, there is nothing to do.",
        kinds={"gcs"},
        page="operating.md",
        freshness=dg.FreshnessPolicy.time_window(fail_window=fail_after),
    )


def beat(instance: dg.DagsterInstance, seen: Look, *, every_seconds: float) -> list[dg.AssetMaterialization]:
    """The event of this look, unless the last one is younger than ``every_seconds``."""
    last = instance.get_latest_materialization_event(HEARTBEAT)
    # A time in the future is that of a clock that has been set back since.
    if last and 0 <= time.time() - last.timestamp < every_seconds:
        return []
    ignored = {f"ignored: {why}": count for why, count in seen.ignored.items()}
    deferred = seen.deferred.files if seen.deferred else 0
    counts = {"files": seen.objects, "waiting": seen.plan.waiting, "deferred": deferred, "being answered": len(seen.claimed), **ignored}
    # Escaped, since Dagster shows it as Markdown. A tick shows the summary as plain text.
    shown = "  \n".join(cell(line, characters=2 * _SHOWN_CHARACTERS) for line in summary(seen).splitlines())
    return [dg.AssetMaterialization(HEARTBEAT, description=shown, metadata=counts, tags=REPORTED_TAGS)]


def summary(seen: Look) -> str:
    """Why there is nothing to request, and the numbers of files and of ignored objects. Two lines if files are deferred."""
    text = "nothing waits under incoming/"
    if seen.plan.waiting or seen.claimed:
        text = f"{len(seen.claimed)} files are being answered right now, {seen.plan.waiting} more wait"
    ignored = ", ".join(f"{count} ({why})" for why, count in sorted(seen.ignored.items()))
    text = f"{text}; {seen.objects} files, ignored objects: {ignored or 'none'}"
    if (deferred := seen.deferred) is None:
        return text
    until = f"{deferred.until.astimezone(UTC):%H:%M:%S} UTC"
    return f"{deferred.files} files wait until {until} or later. {escaped_lines(deferred.why[:_SHOWN_CHARACTERS])}\n{text}"
