"""One tick of the bucket sensor over 100,000 objects: its time, and the peak memory of its process, including Dagster.

Two ticks are measured, each in a separate process: when all objects are new, and when all are answered. The objects are written to the
emulator's folder before it starts, which is faster than uploads.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qa_platform.contract import INCOMING, FileStatus
from qa_platform.embedded.gcs.disk import Disk
from qa_platform.embedded.gcs.model import Conditions, Content
from qa_platform.embedded.gcs.storage import Storage
from qa_platform.embedded.stack import BUCKET, Stack, open_stack
from qa_platform.tools.bench.ingest import peak_mib

OBJECTS = 100_000
BOUND_SECONDS, BOUND_MIB = 20.0, 300.0


def fill(folder: Path, objects: int) -> None:
    """Write small CSV files to a bucket of an emulator that does not run yet."""
    folder.mkdir(parents=True)
    disk = Disk(folder)
    storage = Storage(disk)
    storage.buckets.create(BUCKET)
    for number in range(objects):
        path = disk.new_file()
        path.write_bytes(b"question,context\nWhere?,Here.\n")
        name = f"{INCOMING}2026/{number % 365:03d}/questions of the day, part {number}.csv"
        storage.put(BUCKET, name, Content.of(path), attributes={}, conditions=Conditions())
    disk.close()


def run(objects: int) -> bool:
    """Measure and print both ticks. Returns whether they are within the bounds."""
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
    command = [sys.executable, "-m", "qa_platform.tools.bench.sensor", "--look"]
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

    from qa_platform.definitions import defs
    from qa_platform.orchestration.resources import platform_resource
    from qa_platform.orchestration.sensors.heartbeat import HEARTBEAT
    from qa_platform.settings import BucketSettings

    with (
        dg.DagsterInstance.ephemeral() as instance,
        dg.build_sensor_context(instance=instance, resources={"platform": platform_resource(BucketSettings())}) as context,
    ):
        begun, cpu = time.monotonic(), time.process_time()
        tick = defs.resolve_sensor_def("incoming_files").evaluate_tick(context)
        seconds, cpu = time.monotonic() - begun, time.process_time() - cpu
        beat = instance.get_latest_materialization_event(HEARTBEAT)
    assert beat is not None
    assert beat.asset_materialization is not None
    figures = {"seconds": seconds, "cpu": cpu, "mib": peak_mib(), "runs": len(tick.run_requests or ())}
    print(json.dumps({**figures, "objects": beat.asset_materialization.metadata["files"].value}))


def _finish_all(stack: Stack) -> None:
    """Record everything in the bucket as answered."""
    program = """
from qa_platform.ledger import Ledger
from qa_platform.clients.bucket import list_incoming
from qa_platform.clients.postgres import connect
from qa_platform.orchestration.resources import platform_resource
from qa_platform.settings import BucketSettings, PostgresSettings
import dagster as dg
with dg.build_resources({"platform": platform_resource(BucketSettings())}) as resources, connect(PostgresSettings()) as connection:
    services = resources.platform.services()
    connection.execute("DELETE FROM question_file")
    Ledger(PostgresSettings()).claim(list(list_incoming(services.bucket, services.work.suffixes)), owner="bench", lease_seconds=60)
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
