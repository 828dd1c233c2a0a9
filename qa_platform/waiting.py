"""Everything that is waiting: what lies in the bucket and what is recorded of it, put before `planning.plan`.

The sensor and the job for CI look for work here, and only here.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

from google.api_core.exceptions import GoogleAPIError

from qa_platform import bookkeeping, bucket
from qa_platform.batch import Services, archive_file
from qa_platform.contract import FileVersion
from qa_platform.database import connect
from qa_platform.errors import QaPlatformError
from qa_platform.planning import DONE, Batch, Known, Limits, Plan, plan

# What one look leads to at most, so that a sensor's tick stays short however much is waiting.
BATCHES_PER_LOOK = 10
TIDIED_PER_LOOK = 500
# Versions in one query: a few pages of the listing.
_PAGE = 5_000


@dataclass(frozen=True)
class Look:
    """One look at the bucket: the plan, the names that others are working on right now, and why objects were ignored, counted."""

    plan: Plan
    claimed: frozenset[str]
    objects: int = 0
    ignored: Mapping[str, int] = field(default_factory=dict)


def look(services: Services) -> Look:
    """Find what is to be done. Reads only. What is done is forgotten page by page, so that memory follows what waits."""
    ignored: Counter[str] = Counter()
    waiting: dict[str, FileVersion] = {}
    states: dict[tuple[str, int], Known] = {}
    objects = 0
    with connect(services.postgres) as connection:
        listing = bucket.list_incoming(services.bucket, services.work.suffixes, ignored=ignored)
        for page in _pages(chain(bookkeeping.waiting_elsewhere(connection), listing)):
            objects += len(page)
            known = bookkeeping.known(connection, page)
            open_states = {key: state for key, state in known.items() if state.status not in DONE}
            states |= open_states
            for version in page:
                key = (version.name, version.generation)
                if key in open_states or key not in known:
                    # A newer upload comes later in the listing, and takes the place of what was asked to be answered again.
                    waiting[version.name] = version
                else:
                    waiting.pop(version.name, None)
        new = [v.name for v in waiting.values() if (v.name, v.generation) not in states]
        answered = bookkeeping.latest_answered(connection, new, model=services.model.choice)
        claimed = frozenset(bookkeeping.claimed(connection))
    limits = Limits(services.work.batch_files, services.work.batch_bytes, BATCHES_PER_LOOK)
    return Look(plan(waiting.values(), states, claimed, limits, answered=answered), claimed & waiting.keys(), objects, ignored)


def _pages(versions: Iterable[FileVersion]) -> Iterator[list[FileVersion]]:
    remaining = iter(versions)
    while page := list(islice(remaining, _PAGE)):
        yield page


def tidy(services: Services, found: Plan, log: logging.Logger) -> None:
    """Record unchanged uploads, and archive what is done and was not archived yet, whatever kept its run from it."""
    with connect(services.postgres) as connection:
        for version in found.unchanged[:TIDIED_PER_LOOK]:
            bookkeeping.mark_unchanged(connection, version)
            log.info("%s: the upload equals what is answered already; recorded as unchanged", version.name)
        done = bookkeeping.pending_archive(connection, limit=TIDIED_PER_LOOK)
    for record in done:
        try:
            archive_file(services, record, log=log)
        except (QaPlatformError, GoogleAPIError) as error:
            # It is tried again at the next look; what else there is to do must not wait for it.
            log.warning("%s is done, and could not be archived now: %s", record.version.name, error)


def keep_claims(services: Services, tokens: Sequence[str]) -> None:
    """Renew the claims of runs that were requested and have not begun, so that they may wait in a queue for as long as it takes."""
    if tokens:
        with connect(services.postgres) as connection:
            for token in tokens:
                bookkeeping.renew(connection, token, services.work.lease_seconds)


def reconcile(services: Services) -> int:
    """Correct what is recorded where the bucket says otherwise; how many files that were.

    Concerned are uploads that are there though they count as superseded, and files that are done and archived, and lie under
    ``incoming/`` again: the one will be answered, the other archived once more.
    """
    listing = bucket.list_incoming(services.bucket, services.work.suffixes)
    archives = services.work.archive != "keep"
    with connect(services.postgres) as connection:
        return sum(bookkeeping.reopen(connection, page, archived=archives) for page in _pages(listing))


def claim(services: Services, batch: Batch, *, token: str) -> Batch | None:
    """Claim a batch's files with ``token``: the batch, or None if somebody else was faster with any of them."""
    with connect(services.postgres) as connection:
        lease = services.work.lease_seconds
        won = bookkeeping.claim(connection, batch.versions, owner=token, lease_seconds=lease)
        if len(won) == len(batch.versions):
            return batch
        bookkeeping.release(connection, token)
        return None
