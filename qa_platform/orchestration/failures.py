"""How a run fails: with a message whose first line says what to do."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import dagster as dg
from google.auth.exceptions import GoogleAuthError, TransportError

from qa_platform.batches.failure import JobFailure
from qa_platform.batches.run import Outcome
from qa_platform.clients.refusals import platform_error
from qa_platform.contract import FileStatus, file_id
from qa_platform.errors import InputError, TransientError
from qa_platform.ledger.records import FileRecord
from qa_platform.settings import ExecutionSettings, wrong_settings
from qa_platform.text import escaped

# The maximum number of files that a message names.
_NAMED = 10

SENSOR_NEXT = "the sensor answers the files of this run again"


def advised(advice: str, what: object) -> str:
    """The message of a failure, as Dagster's pages show it: what to do on the first line, then what is wrong."""
    # On one line: the advice may quote the message of a job.
    return escaped(f"What to do: {' '.join(advice.split())}\n{what}", keep="\n\t")


def failure(advice: str, what: object) -> dg.Failure:
    """The failure of a step that Dagster does not retry."""
    return dg.Failure(advised(advice, what), allow_retries=False)


@contextmanager
def failures_for_people(
    context: dg.OpExecutionContext | dg.AssetExecutionContext, execution: ExecutionSettings, *, next_step: str = SENSOR_NEXT
) -> Iterator[None]:
    """End the step with a message that says what to do. The step is retried only while a service is unavailable.

    Wrong input stays wrong. The files of a failed job are retried by the sensor, in new batches.

    Args:
        next_step: what happens next by itself, or what to do next.
    """
    try:
        yield
    except dg.Failure:
        raise
    except InputError as error:
        raise failure(f"fix what is described here. Then {next_step}.", error) from error
    except (TransientError, TransportError) as error:
        if context.retry_number < execution.step_retries:
            raise dg.RetryRequested(max_retries=execution.step_retries, seconds_to_wait=execution.step_retry_seconds) from error
        raise failure(
            f"check that the service named here is up (`qa-platform doctor` checks all of them). Then {next_step}.", error
        ) from error
    except GoogleAuthError as error:
        # Without the original, which may quote the key.
        raise failure(
            f"check that GOOGLE_APPLICATION_CREDENTIALS names a service account that may use the bucket. Then {next_step}.",
            platform_error(error, "using the bucket"),
        ) from None
    except Exception as error:
        if wrong := wrong_settings(error):
            # Without its cause, which shows values.
            raise failure(f"correct the variables that are named here and restart what uses them. Then {next_step}.", wrong) from None
        raise failure(
            f"it may pass: {next_step}. If it happens again, it is a bug: report it.", f"{type(error).__name__}: {error}"
        ) from error


def batch_failure(outcome: Outcome, job_failure: JobFailure) -> dg.Failure:
    """The failure of a run that did not answer some of its files: what happens to each of them, and what a person must do."""
    verdict, advice = job_failure.verdict, list[str]()
    if any(file_id(record.version.name) in verdict.suspects and not record.attempts for record in outcome.records):
        advice.append(f"{job_failure.cause}. A file that may be to blame is answered alone, and charged if it fails again.")
    elif not verdict.guilty and not verdict.suspects:
        advice.append(f"{job_failure.cause}. No file is charged unless other files are loaded meanwhile.")
    if parked := _names(outcome.records, FileStatus.FAILED):
        advice.append(f"see below why {parked} failed for the last time; fix that, then `qa-platform retry FILE`.")
    if waiting := _names(outcome.records, FileStatus.PENDING):
        advice.append(f"{'Nothing else' if advice else 'nothing yet'}: the sensor answers {waiting} again.")
    return failure(" ".join(advice) or f"nothing: {SENSOR_NEXT}.", job_failure.message)


def _names(records: Sequence[FileRecord], status: FileStatus) -> str:
    names = [record.version.name for record in records if record.status is status]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(map(repr, names[:_NAMED]))}{more}"
