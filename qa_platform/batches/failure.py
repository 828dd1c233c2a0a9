"""Why a batch's jobs did not load all of its files."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from qa_platform.batches.blame import Verdict
from qa_platform.errors import TransientError


@dataclass(frozen=True)
class JobFailure:
    """Why a batch's jobs did not load all of its files.

    Args:
        message: what happened, for people.
        verdict: which files are to blame.
        killed: the job was killed from outside, for example by a pipeline update. It is launched again.
        not_started: the job could not start, and was stopped.
        missing: shards that Pachyderm counts as done but whose output is missing, by file id. They are launched again.
    """

    message: str
    verdict: Verdict = field(default_factory=Verdict)
    killed: bool = False
    not_started: bool = False
    missing: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @property
    def cause(self) -> str:
        return self.verdict.cause or self.message


class JobFailed(TransientError):
    """Carries a `JobFailure` to the code that settles the batch's files."""

    def __init__(self, failure: JobFailure) -> None:
        super().__init__(failure.message)
        self.failure = failure
