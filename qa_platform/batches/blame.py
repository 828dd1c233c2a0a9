"""Who is to blame for a failed Pachyderm job: from the reasons of its failed datums to a verdict. Pure.

The programs of the two pipelines report why a datum failed as a `DatumFault`. A process that was killed reports nothing: what
failed then is known by what else failed. A datum that took longer than its pipeline allows was killed by Pachyderm, which says so.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qa_platform.contract import LOAD_PIPELINE, DatumFault

# Pachyderm's reason for a datum that reached the pipeline's datum_timeout. What follows is about the process that it started next.
_TIMED_OUT = "context deadline exceeded"
_TOO_SLOW = DatumFault(
    blameless=False,
    cause="one of its shards took longer than the pipeline's datum_timeout allows, and was stopped",
    advice="look for rows with very long questions and contexts, lower QA_SHARD_ROWS, or raise datum_timeout in the specification; then "
    "`qa-platform retry FILE`",
)
# A file loads in minutes. Only a database that hangs takes so long, and it is no file's fault.
_LOADED_TOO_SLOWLY = DatumFault(
    blameless=True,
    cause="loading took longer than the pipeline's datum_timeout allows, and was stopped",
    advice="see whether PostgreSQL hangs, or waits for a lock (pg_stat_activity); the file is tried again by itself",
)


@dataclass(frozen=True)
class FailedDatum:
    """A failed datum: the pipeline, the id of its file, and the reason that Pachyderm keeps."""

    pipeline: str
    file: str
    reason: str

    @property
    def fault(self) -> DatumFault | None:
        """What the pipeline's program reported, or Pachyderm of one that was too slow; None where nobody reported anything."""
        if self.reason.startswith(_TIMED_OUT):
            return _LOADED_TOO_SLOWLY if self.pipeline == LOAD_PIPELINE else _TOO_SLOW
        return DatumFault.of_reason(self.reason)

    @property
    def kind(self) -> str:
        """The reason without what differs from file to file."""
        text = self.fault.cause if self.fault else self.reason
        return re.sub(r"'[^']*'|\"[^\"]*\"|\b[0-9a-f]{8,}\b|\d+", "…", text.replace(self.file, "…")).strip()


@dataclass(frozen=True)
class Verdict:
    """The verdict on a failed job.

    Args:
        guilty: what each guilty file failed of, by file id.
        suspects: files whose process died without a word while others worked, by file id. They are guilty if it dies of them alone.
        blameless: the programs said themselves that no file is to blame.
        cause: what the job failed of, where there is one cause; for people.
    """

    guilty: Mapping[str, str] = field(default_factory=dict)
    suspects: Mapping[str, str] = field(default_factory=dict)
    blameless: bool = False
    cause: str = ""


def judge(failed: Sequence[FailedDatum], *, something_worked: bool) -> Verdict:
    """Say who is to blame.

    Args:
        something_worked: another datum of this job was done.
    """
    innocent = [fault for datum in failed if (fault := datum.fault) and fault.blameless]
    if innocent and len(innocent) == len(failed):
        return Verdict(blameless=True, cause=str(innocent[0]))
    accused = [datum for datum in failed if not (datum.fault and datum.fault.blameless)]
    files = {datum.file for datum in accused}
    if not something_worked and len(files) > 1 and len({datum.kind for datum in accused}) == 1:
        return Verdict(cause=f"all {len(files)} files failed alike: {_said(accused[0])}")
    guilty = {datum.file: _said(datum) for datum in accused if datum.fault}
    suspects = {datum.file: _said(datum) for datum in accused if datum.file not in guilty}
    return Verdict(guilty, suspects, cause=next(iter((guilty or suspects).values()), ""))


def _said(datum: FailedDatum) -> str:
    return str(datum.fault) if datum.fault else f"the process that worked on it ended without a word: {datum.reason or 'no reason given'}"
