"""How a run fails: with a message whose first line says what to do."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import dagster as dg
from google.auth.exceptions import GoogleAuthError, TransportError

from qa_platform.batch import Outcome
from qa_platform.bookkeeping import FileRecord
from qa_platform.contract import FileStatus
from qa_platform.errors import InputError, TransientError
from qa_platform.following import JobFailed
from qa_platform.settings import ExecutionSettings, wrong_settings

# Files that a message names.
_NAMED = 10

_BY_ITSELF = "the sensor answers the files of this run again by itself"


@contextmanager
def failures_for_people(context: dg.OpExecutionContext | dg.AssetExecutionContext, *, by_itself: str = _BY_ITSELF) -> Iterator[None]:
    """End the step with a message that says what to do. Only a service that is away is worth another try of the step.

    Wrong input stays wrong, and the files of a failed job are batched anew by the sensor, which owns their retries.

    Args:
        by_itself: what happens next without anybody's doing.
    """
    try:
        yield
    except dg.Failure:
        raise
    except InputError as error:
        raise _failure(f"mend what is said here, then {by_itself}, or start this run again.", error) from error
    except (TransientError, TransportError) as error:
        settings = ExecutionSettings()
        if context.retry_number < settings.step_retries:
            raise dg.RetryRequested(max_retries=settings.step_retries, seconds_to_wait=settings.step_retry_seconds) from error
        raise _failure(f"see that the service named here is up (`qa-platform doctor` looks at all of them); {by_itself}.", error) from error
    except GoogleAuthError as error:
        raise _failure(
            f"see that GOOGLE_APPLICATION_CREDENTIALS names a service account that the bucket takes; then {by_itself}.", error
        ) from error
    except Exception as error:
        if wrong := wrong_settings(error):
            # Without its cause, which shows values.
            raise _failure(f"correct the variables that are named here and start what uses them again; then {by_itself}.", wrong) from None
        raise _failure(
            f"nothing, if it stays at one run: {by_itself}. If it comes again it is a fault of the program: report it.",
            f"{type(error).__name__}: {error}",
        ) from error


def batch_failure(outcome: Outcome, failure: JobFailed) -> dg.Failure:
    """The failure of a run some of whose files were not answered: what becomes of each by itself, and what does not."""
    advice = [] if failure.guilty else [f"{failure.cause}. No file is to blame, unless others are loaded meanwhile."]
    if parked := _names(outcome.records, FileStatus.FAILED):
        advice.append(f"see below why {parked} failed for the last time, mend that, then `qa-platform retry FILE`.")
    if waiting := _names(outcome.records, FileStatus.PENDING):
        advice.append(f"{'Nothing else' if parked else 'nothing yet'}: the sensor answers {waiting} again by itself.")
    return _failure(" ".join(advice) or f"nothing: {_BY_ITSELF}.", failure)


def _names(records: Sequence[FileRecord], status: FileStatus) -> str:
    names = [record.version.name for record in records if record.status is status]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(map(repr, names[:_NAMED]))}{more}"


def _failure(advice: str, what: object) -> dg.Failure:
    # The advice may quote what a job said.
    return dg.Failure(f"What to do: {' '.join(advice.split())}\n{what}", allow_retries=False)
