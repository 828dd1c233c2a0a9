"""One look of the bucket sensor at 100,000 objects: its time, and the most memory of the process that looks, Dagster included.

Two looks are measured, each in a process of its own: all objects are new; and all of them are answered, so that nothing is to be
done. The objects are put into the emulator's folder before it starts, which is faster than as many uploads.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qa_platform.bench.ingest import peak_mib
from qa_platform.contract import INCOMING, FileStatus
from qa_platform.embedded.gcs_storage import Conditions, Content, Storage
from qa_platform.embedded.stack import BUCKET, Stack, open_stack

OBJECTS = 100_000
BOUND_SECONDS, BOUND_MIB = 20.0, 300.0


def fill(folder: Path, objects: int) -> None:
    """Put small CSVs into a bucket of an emulator that does not run yet."""
    folder.mkdir(parents=True)
    storage = Storage(folder)
    storage.create_bucket(BUCKET)
    for number in range(objects):
        path = storage.new_file()
        path.write_bytes(b"question,context\nWhere?,Here.\n")
        name = f"{INCOMING}2026/{number % 365:03d}/questions of the day, part {number}.csv"
        storage.put(BUCKET, name, Content.of(path), attributes={}, conditions=Conditions())
    storage.close()


def run(objects: int) -> bool:
    """Print both looks; whether they are within the bounds."""
    with tempfile.TemporaryDirectory(prefix="qa-bench-") as folder:
        state = Path(folder) / "state"
        fill(state / "gcs", objects)
        with open_stack(state) as stack:
            new = _looked(stack, "all of them new")
            _finish_all(stack)
            nothing = _looked(stack, "nothing new")
    print(f"the bounds at {OBJECTS:,} objects: {BOUND_SECONDS:.0f} s, {BOUND_MIB:.0f} MB")
    return max(new["seconds"], nothing["seconds"]) < BOUND_SECONDS and max(new["mib"], nothing["mib"]) < BOUND_MIB


def _looked(stack: Stack, what: str) -> dict[str, float]:
    command = [sys.executable, "-m", "qa_platform.bench.sensor", "--look"]
    environment = {**stack.environment, "QA_ARCHIVE": "keep"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{figures['objects']:,.0f} objects, {what}: {figures['seconds']:.1f} s ({figures['cpu']:.1f} s of its own work), "
        f"peak {figures['mib']:.0f} MiB, {figures['runs']:.0f} runs requested"
    )
    return figures


def _look() -> None:
    """One tick of the sensor in this process, as JSON on standard output."""
    import dagster as dg

    from qa_platform.resources import platform_resource
    from qa_platform.sensors.heartbeat import HEARTBEAT
    from qa_platform.sensors.incoming import incoming_files

    with (
        dg.DagsterInstance.ephemeral() as instance,
        dg.build_sensor_context(instance=instance, resources={"platform": platform_resource}) as context,
    ):
        begun, cpu = time.monotonic(), time.process_time()
        tick = incoming_files.evaluate_tick(context)
        seconds, cpu = time.monotonic() - begun, time.process_time() - cpu
    beats = [event for event in tick.asset_events if event.asset_key == HEARTBEAT]
    figures = {"seconds": seconds, "cpu": cpu, "mib": peak_mib(), "runs": len(tick.run_requests or ())}
    print(json.dumps({**figures, "objects": beats[0].metadata["files"].value}))


def _finish_all(stack: Stack) -> None:
    """Record everything in the bucket as answered."""
    program = """
from qa_platform import bookkeeping
from qa_platform.bucket import list_incoming
from qa_platform.database import connect
from qa_platform.resources import platform_resource
from qa_platform.settings import PostgresSettings
import dagster as dg
with dg.build_resources({"platform": platform_resource}) as resources, connect(PostgresSettings()) as connection:
    services = resources.platform.services()
    connection.execute("DELETE FROM question_file")
    bookkeeping.claim(connection, list(list_incoming(services.bucket, services.work.suffixes)), owner="bench", lease_seconds=60)
    connection.execute("UPDATE question_file SET status = %s, archived_at = now(), claim_owner = NULL, claim_until = NULL", [FINISHED])
"""
    subprocess.run([sys.executable, "-c", program.replace("FINISHED", repr(str(FileStatus.FINISHED)))], env=stack.environment, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", type=int, default=OBJECTS)
    parser.add_argument("--look", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.look:
        _look()
        return 0
    return 0 if run(arguments.objects) else 1


if __name__ == "__main__":
    sys.exit(main())
