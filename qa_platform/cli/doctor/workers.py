"""The pipelines' workers: whether they reach PostgreSQL, judged by their last job, and whether the model fits into their memory."""

import re
from itertools import islice
from typing import TYPE_CHECKING

from qa_platform.cli.doctor.findings import Result, ok, unknown, wrong
from qa_platform.contract import LOAD_PIPELINE
from qa_platform.settings import ModelSettings

if TYPE_CHECKING:
    from pachyderm_sdk import Client
    from pachyderm_sdk.api import pps

# How many of the loader's newest jobs are examined. Jobs with nothing to load are inconclusive.
_JOBS = 20
# How many datums of a failed job are examined. A killed process leaves no reason.
_DATUMS = 20
# Parameter counts of the models in the images: the bundled one and a deployment's default. The code location has no weights to count.
PARAMETERS = {"bundled": 22_566_146, "distilbert/distilbert-base-uncased-distilled-squad": 66_364_418}
# Peak memory of an answering process, in any precision: about this, plus twice its weights in 32 bits. See the tables of
# `make bench ARGS=answering`.
_PROCESS_BYTES = 400 * 2**20
_BYTES_OF_PARAMETER = 2 * 4
_UNITS = {unit: 1000**power for power, unit in enumerate(("", "k", "M", "G", "T"))} | {
    unit: 1024**power for power, unit in enumerate(("Ki", "Mi", "Gi", "Ti"), start=1)
}


def reach(client: "Client") -> Result:
    """Whether the workers reach PostgreSQL, by the newest job that loaded something or failed to."""
    import grpc

    from qa_platform.clients.pachyderm import is_code, is_unfinished, job_of

    try:
        for job in client.pps.list_job(pipeline=job_of(LOAD_PIPELINE, "").pipeline, number=_JOBS):
            if result := _result_of_job(client, job):
                return result
    except grpc.RpcError as error:
        if is_code(error, grpc.StatusCode.PERMISSION_DENIED):
            return unknown("not permitted to see the jobs of the pipeline: a role is missing")
        # The pipeline does not exist, or a job is just ending.
        if not is_code(error, grpc.StatusCode.NOT_FOUND) and not is_unfinished(error):
            raise
    return ok("not known yet: no job has loaded a file, or failed to")


def _result_of_job(client: "Client", job: "pps.JobInfo") -> Result | None:
    """What a job says about the database; None if inconclusive. A fault of the file itself proves that the worker has connected."""
    from pachyderm_sdk.api import pps

    from qa_platform.batches.blame import FailedDatum
    from qa_platform.batches.jobs import datum_reason

    if job.data_processed:
        return ok(f"job {job.job.id} loaded {job.data_processed} files")
    if job.state != pps.JobState.JOB_FAILURE:
        return None
    failed = (each for each in client.pps.list_datum(job=job.job) if each.state == pps.DatumState.FAILED)
    for datum in islice(failed, _DATUMS):
        fault = FailedDatum(LOAD_PIPELINE, "", datum_reason(client, job.job, datum.datum.id)).fault
        if fault and fault.blameless:
            advice = f"{fault.advice}; " if fault.advice else ""
            return wrong(
                f"job {job.job.id}: {fault.cause}",
                f"{advice}if its pods cannot connect, set QA_PIPELINES_PG_HOST to a host that they can reach, then: "
                "qa-platform pachyderm apply",
            )
        if fault:
            return ok(f"job {job.job.id} reached it")
    return None


def memory(info: "pps.PipelineInfo | None") -> Result:
    """Whether the model fits into the memory of an answering worker."""
    model = ModelSettings().model
    if info is None:
        return unknown("not checked: there is no pipeline")
    limit = info.details.resource_limits.memory
    if not limit:
        return ok("the workers have no memory limit")
    if model not in PARAMETERS:
        return ok(f"limited to {limit}; the memory need of {model} is unknown: measure it with make bench ARGS=answering")
    needed = _PROCESS_BYTES + PARAMETERS[model] * _BYTES_OF_PARAMETER
    text = f"limited to {limit}; {model} takes about {needed / 2**20:.0f} MiB"
    if bytes_of(limit) >= needed:
        return ok(text)
    return wrong(f"{text}: workers will be killed", "raise resource_limits.memory in QA_PIPELINES_PATCH, then: qa-platform pachyderm apply")


def bytes_of(quantity: str) -> float:
    """The bytes of a Kubernetes memory quantity, such as ``2Gi`` or ``1.5e9``.

    Raises:
        ValueError: the text is not a quantity.
    """
    found = re.fullmatch(r"([0-9.]+(?:[eE]\d+)?)([kMGT]?|[KMGT]i)", quantity)
    if not found:
        raise ValueError(f"{quantity!r} is not a quantity of memory")
    return float(found[1]) * _UNITS[found[2]]
