"""Why the sensor that finds uploads is silent: the daemon, the sensor and its last tick, as recorded in Dagster's storage."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qa_platform.text import escaped

if TYPE_CHECKING:
    from dagster import DagsterInstance
    from dagster._core.instance.ref import InstanceRef
    from dagster._core.scheduler.instigation import InstigatorState, InstigatorTick
    from dagster_shared.error import SerializableErrorInfo

_SENSOR = "incoming_files"
# A daemon that has missed this many heartbeats counts as dead.
_MISSED = 4
_SHOWN = 300


@dataclass(frozen=True)
class Silence:
    """Why there is no heartbeat, and what to do."""

    reason: str
    fix: str


def why_silent(ref: "InstanceRef", *, since: float) -> Silence:
    """The first reason found.

    Args:
        since: the time of the last heartbeat. There was one, so the tables of Dagster's storage exist.
    """
    from dagster import DagsterInstance
    from dagster._core.definitions.run_request import InstigatorType

    with DagsterInstance.from_ref(ref) as instance:
        states = [state for state in instance.all_instigator_state(instigator_type=InstigatorType.SENSOR) if state.name == _SENSOR]
        return _dead_daemon(instance) or _switched_off(states) or _of_tick(_last_tick(instance, states), since)


def _dead_daemon(instance: "DagsterInstance") -> Silence | None:
    from dagster._daemon.controller import DEFAULT_HEARTBEAT_INTERVAL_SECONDS
    from dagster._daemon.daemon import SensorDaemon

    sign = instance.get_daemon_heartbeats().get(SensorDaemon.daemon_type())
    age = time.time() - sign.timestamp if sign else None
    if age is not None and age <= _MISSED * DEFAULT_HEARTBEAT_INTERVAL_SECONDS:
        return None
    last = "" if age is None else f"; it last reported {age:.0f} s ago"
    return Silence(
        f"Dagster's daemon is not running{last}", "start Dagster's daemon: its deployment or container, or on a laptop `make dev`"
    )


def _switched_off(states: list["InstigatorState"]) -> Silence | None:
    from dagster._core.scheduler.instigation import InstigatorStatus

    if not states or any(state.status is not InstigatorStatus.STOPPED for state in states):
        return None
    return Silence(f"the sensor {_SENSOR} is switched off", "switch it on in Dagster, under Automation")


def _last_tick(instance: "DagsterInstance", states: list["InstigatorState"]) -> "InstigatorTick | None":
    ticks = [tick for state in states for tick in instance.get_ticks(state.instigator_origin_id, state.selector_id, limit=1)]
    return max(ticks, key=lambda tick: tick.timestamp, default=None)


def _of_tick(tick: "InstigatorTick | None", since: float) -> Silence:
    from dagster._core.scheduler.instigation import TickStatus

    if tick is None or tick.timestamp < since:
        return Silence(
            f"Dagster's daemon runs, and the sensor {_SENSOR} has not ticked since: the code location does not load",
            "its container's log says why (docker compose logs code-location, or kubectl logs); fix that, and restart it",
        )
    age = f"{time.time() - tick.timestamp:.0f} s ago"
    if tick.status is TickStatus.STARTED:
        return Silence(f"the tick that began {age} has not ended", "look at the log of the tick in Dagster, and restart the code location")
    if tick.status is TickStatus.FAILURE:
        return Silence(f"its last tick, {age}, failed: {_shortened(_root(tick.error))}", "fix that; the next tick tries again")
    said = f": {_shortened(tick.skip_reason)}" if tick.skip_reason else " without a heartbeat"
    return Silence(
        f"its last tick, {age}, ended{said}", "look at the log of the tick in Dagster; docs/operating.md explains the sensor's messages"
    )


def _root(error: "SerializableErrorInfo | None") -> str:
    """The message of the error that caused all others."""
    while error and error.cause:
        error = error.cause
    return error.message if error else "no error was recorded"


def _shortened(text: str) -> str:
    line = " ".join(escaped(text.strip().replace("\n", " ")).split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}…"
