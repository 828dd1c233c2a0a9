"""The one object that reads and writes ``question_file``."""

from typing import Self

from qa_platform.ledger.archiving import Archiving
from qa_platform.ledger.claims import Claims
from qa_platform.ledger.forgetting import Forgetting
from qa_platform.ledger.listings import Listings
from qa_platform.ledger.outcomes import Outcomes
from qa_platform.ledger.overview import Overview
from qa_platform.ledger.publishing import Publishing
from qa_platform.ledger.restoring import Restoring
from qa_platform.ledger.retries import Retries


class Ledger(Listings, Claims, Outcomes, Archiving, Publishing, Retries, Restoring, Forgetting, Overview):
    """What is known of every generation of every file, and who works on it: the table ``question_file``.

    Each method is one short transaction, safe beside any number of others in any process; threads may share a ledger. Time is
    PostgreSQL's, never that of the caller. A connection is opened on first use and kept; `close`, or the end of a ``with`` block,
    closes it.

    Raises, in every method:
        InputError: PostgreSQL refuses the user or the statement, or the tables are missing.
        TransientError: PostgreSQL is unavailable. The next call connects anew.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
