"""A process that does the platform's work in parallel to the daemon, like a second sensor or a second copy of a run.

``python -m qa_platform_tests.faults.agent`` reads a JSON document per line: ``{"do": "sensors"}`` looks for work twice in parallel, and
does it; ``{"do": "again", …}`` runs a batch that is already running, under the same run id. It prints a line when done.
"""

import json
import logging
import sys
import threading
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

import dagster as dg

from qa_platform.batches.pending import claim, look, tidy
from qa_platform.batches.plan import Batch
from qa_platform.batches.run import answer_batch
from qa_platform.clients.services import Services
from qa_platform.contract import FileVersion
from qa_platform.orchestration.resources import platform_resource
from qa_platform.settings import BucketSettings

_log = logging.getLogger("agent")


def main() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(threadName)s %(message)s")
    with dg.build_resources({"platform": platform_resource(BucketSettings())}) as resources:
        print("ready", flush=True)  # noqa: T201
        for line in sys.stdin:
            order = json.loads(line)
            _together(partial(_do, resources.platform.services(), order), 2 if order["do"] == "sensors" else 1)
            print("done", flush=True)  # noqa: T201


def _do(services: Services, order: dict[str, Any]) -> None:
    if order["do"] == "again":
        batch = Batch(order["batch"], tuple(FileVersion(*version) for version in order["versions"]))
        answer_batch(services, batch, token=order["run"], run_id=order["run"], log=_log)
        return
    found = look(services)
    tidy(services, found.plan, _log, report=lambda records: None)
    for batch in found.plan.batches:
        token = f"agent-{uuid.uuid4()}"
        if claim(services, batch, token=token):
            answer_batch(services, batch, token=token, run_id=token, log=_log)


def _together(work: Callable[[], None], count: int) -> None:
    barrier = threading.Barrier(count)

    def one() -> None:
        barrier.wait()
        try:
            work()
        except Exception:
            # Like a failed run: it ends, and others find what it left.
            _log.exception("ended")

    threads = [threading.Thread(target=one) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
