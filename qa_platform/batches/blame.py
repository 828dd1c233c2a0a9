"""Judges a failed Pachyderm job: turns the reasons of its failed datums into a verdict on its files. Pure.

The programs of the two pipelines report why a datum failed as a `DatumFault`. A killed process reports nothing; its file is judged by
what else failed. Pachyderm itself kills a datum that exceeds the pipeline's datum_timeout, and says so in the reason.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qa_platform.contract import LOAD_PIPELINE, DatumFault

# Pachyderm's reason for a datum that reached the pipeline's datum_timeout. The rest of it is about the process that it started next.
_TIMED_OUT = "context deadline exceeded"
_TOO_SLOW = DatumFault(
    blameless=False,
    cause="one of its shards took longer than the pipeline's datum_timeout allows, and was stopped",
    advice="look for rows with very long questions and contexts, lower QA_SHARD_ROWS, or raise datum_timeout in the specification; then "
    "`qa-platform retry FILE`",
)
# A file loads in minutes. Only a hanging database takes this long, so no file is charged.
_LOADED_TOO_SLOWLY = DatumFault(
    blameless=True,
    cause="loading took longer than the pipeline's datum_timeout allows, and was stopped",
    advice="check whether PostgreSQL hangs or waits for a lock (pg_stat_activity); the file is retried automatically",
)


@dataclass(frozen=True)
class FailedDatum:
    """A failed datum: the pipeline, the id of its file, and the reason that Pachyderm keeps."""

    pipeline: str
    file: str
    reason: str

    @property
    def fault(self) -> DatumFault | None:
        """The fault that the pipeline's program reported, or the timeout that Pachyderm reported; None if there is neither."""
        if self.reason.startswith(_TIMED_OUT):
            return _LOADED_TOO_SLOWLY if self.pipeline == LOAD_PIPELINE else _TOO_SLOW
        return DatumFault.of_reason(self.reason)

    @property
    def kind(self) -> str:
        """The reason without the parts that differ between files."""
        text = self.fault.cause if self.fault else self.reason
        return re.sub(r"'[^']*'|\"[^\"]*\"|\b[0-9a-f]{8,}\b|\d+", "…", text.replace(self.file, "…")).strip()


@dataclass(frozen=True)
class Verdict:
    """The verdict on a failed job.

    Args:
        guilty: why each guilty file failed, by file id.
        suspects: files whose process died without reporting a reason, by file id. A suspect is guilty if it also fails alone.
        blameless: every failed datum reported a fault that no file caused.
        cause: why the job failed, for people: the first cause if there are several; "" if none is known.
    """

    guilty: Mapping[str, str] = field(default_factory=dict)
    suspects: Mapping[str, str] = field(default_factory=dict)
    blameless: bool = False
    cause: str = ""


def judge(failed: Sequence[FailedDatum], *, something_worked: bool) -> Verdict:
    """Judge the failed datums of a job.

    Args:
        something_worked: another datum of this job succeeded.
    """
    innocent = [fault for datum in failed if (fault := datum.fault) and fault.blameless]
    if innocent and len(innocent) == len(failed):
        return Verdict(blameless=True, cause=str(innocent[0]))
    accused = [datum for datum in failed if not (datum.fault and datum.fault.blameless)]
    files = {datum.file for datum in accused}
    if not something_worked and len(files) > 1 and len({datum.kind for datum in accused}) == 1:
        return Verdict(cause=f"all {len(files)} files failed for the same reason: {_explanation(accused[0])}")
    guilty = {datum.file: _explanation(datum) for datum in accused if datum.fault}
    suspects = {datum.file: _explanation(datum) for datum in accused if datum.file not in guilty}
    return Verdict(guilty, suspects, cause=next(iter((guilty or suspects).values()), ""))


def _explanation(datum: FailedDatum) -> str:
    if datum.fault:
        return str(datum.fault)
    # Pachyderm's own reason, such as the exit status.
    return f"its worker process died without reporting a reason{f': {datum.reason}' if datum.reason else ''}"
