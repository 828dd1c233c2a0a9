"""The record of a file whose answers are in the table."""

from collections.abc import Mapping

from qa_platform.contract import FileStatus
from qa_platform.errors import InputError
from qa_platform.ledger import FileRecord, Ledger
from qa_platform.text import as_argument

_ENDED: Mapping[FileStatus, str] = {
    FileStatus.REJECTED: "it was rejected",
    FileStatus.FAILED: "it failed",
    FileStatus.FORGOTTEN: "it was forgotten",
    FileStatus.SUPERSEDED: "a newer version came, or the upload was deleted, before it was loaded",
}


def answered_record(ledger: Ledger, name: str) -> FileRecord:
    """The record of the generation whose answers are in the table, even while the file is answered again.

    Raises:
        InputError: there is none. The message gives the state of the newest generation.
    """
    if record := ledger.in_the_table(name):
        return record
    newest = ledger.newest([name]).get(name)
    if newest is None:
        raise InputError("it is not answered", where=name, advice="`qa-platform status` lists the files")
    reason = _ENDED.get(newest.status, f"it is {newest.status}")
    raise InputError(f"it is not answered: {reason}", where=name, advice=f"see `qa-platform status {as_argument(name)}`")
