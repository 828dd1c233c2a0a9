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
    """The table ``question_file``: the state of every generation of every file, and who works on it.

    Methods run in short transactions, safe beside any number of others in any process; threads may share a ledger. Time is
    PostgreSQL's, never the caller's. A connection is opened on first use and kept; `close`, or the end of a ``with`` block, closes it.

    Raises, in every method:
        InputError: PostgreSQL refuses the user or the statement, or the tables are missing.
        TransientError: PostgreSQL is unavailable. The next call reconnects.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
