"""The heartbeat of the bucket sensor: while it is fresh, uploads are looked for, even where there is nothing to do."""

import time
from datetime import UTC, timedelta

import dagster as dg

from qa_platform.assets.catalog import GROUP, OWNERS, REPORTED_TAGS, REPORTED_VERSION, documentation
from qa_platform.markdown import cell
from qa_platform.settings import WorkSettings
from qa_platform.waiting import Look

HEARTBEAT = dg.AssetKey("incoming_listing")

_BEAT_SECONDS = WorkSettings().heartbeat_seconds
_FAIL_AFTER = timedelta(seconds=3 * max(_BEAT_SECONDS, WorkSettings().sensor_seconds))

# Of the reason why files are put off.
_SHOWN_CHARACTERS = 500

incoming_listing = dg.AssetSpec(
    HEARTBEAT,
    description="What the bucket sensor saw, every few minutes. Not fresh means that uploads are not found: the daemon, the bucket, "
    "Postgres or the sensor is broken. Fresh, with nothing waiting, means that there is nothing to do.",
    group_name=GROUP,
    owners=OWNERS,
    kinds={"gcs"},
    code_version=REPORTED_VERSION,
    metadata={"documentation": documentation("operating.md")},
    freshness_policy=dg.FreshnessPolicy.time_window(fail_window=_FAIL_AFTER),
)


def beat(instance: dg.DagsterInstance, found: Look) -> list[dg.AssetMaterialization]:
    """The event of this look, if it is time for one."""
    last = instance.get_latest_materialization_event(HEARTBEAT)
    if last and time.time() - last.timestamp < _BEAT_SECONDS:
        return []
    ignored = {f"ignored: {why}": count for why, count in found.ignored.items()}
    off = found.put_off.files if found.put_off else 0
    counts = {"files": found.objects, "waiting": found.plan.waiting, "put off": off, "being answered": len(found.claimed), **ignored}
    # Markdown here, and plain text where a tick shows it.
    shown = "  \n".join(cell(line, characters=2 * _SHOWN_CHARACTERS) for line in summary(found).splitlines())
    return [dg.AssetMaterialization(HEARTBEAT, description=shown, metadata=counts, tags=REPORTED_TAGS)]


def summary(found: Look) -> str:
    """One line for people: why there is nothing to request, and what lies there that is none of the platform's business."""
    text = "nothing waits under incoming/"
    if found.plan.waiting or found.claimed:
        text = f"{len(found.claimed)} files are being answered right now, {found.plan.waiting} more wait"
    ignored = ", ".join(f"{count} ({why})" for why, count in sorted(found.ignored.items()))
    text = f"{text}; {found.objects} files, ignored objects: {ignored or 'none'}"
    if (off := found.put_off) is None:
        return text
    return f"{off.files} files are put off until {off.until.astimezone(UTC):%H:%M:%S} UTC or later. {off.why[:_SHOWN_CHARACTERS]}\n{text}"
