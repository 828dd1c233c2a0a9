"""The states of a file, in groups that decide what happens next. No SQL."""

from dataclasses import dataclass

from qa_platform.contract import FileStatus

# This generation needs no more answering, unless a retry is requested. The source of a `loaded` file still has to be archived.
DONE = frozenset(FileStatus) - {FileStatus.PENDING, FileStatus.RUNNING}
# The source leaves `incoming/`. A failed file stays where its owner sees it; a superseded or forgotten one has no object left to move.
ARCHIVABLE = DONE - {FileStatus.FAILED, FileStatus.SUPERSEDED, FileStatus.FORGOTTEN}
# Done without answers: such an upload does not replace an earlier one that is to be answered again.
WITHOUT_ANSWERS = frozenset({FileStatus.FAILED, FileStatus.REJECTED, FileStatus.SUPERSEDED, FileStatus.FORGOTTEN})


@dataclass(frozen=True)
class Known:
    """What planning needs from the record of one generation of a file.

    Args:
        batch_id: the batch in which the file was last worked on, if that batch can be resumed; else empty.
        due: false while a failed or deferred file waits for its next attempt.
    """

    status: FileStatus
    attempts: int = 0
    load_id: int = 1
    batch_id: str = ""
    due: bool = True
