"""The table ``question_file``: the state of every file, and who works on it."""

from qa_platform.ledger.ledger import Ledger
from qa_platform.ledger.records import Deferred, FileRecord

__all__ = ["Deferred", "FileRecord", "Ledger"]
