"""Everything that is waiting: what lies in the bucket and what is recorded of it, put before `planning.plan`.

The sensor and the job for CI look for work here, and only here.
"""

import logging
from dataclasses import dataclass

from qa_platform import bookkeeping, bucket
from qa_platform.batch import Services, archive_file
from qa_platform.database import connect
from qa_platform.planning import Batch, Limits, Plan, plan

# What one look leads to at most, so that a sensor's tick stays short however much is waiting.
BATCHES_PER_LOOK = 10
TIDIED_PER_LOOK = 500


@dataclass(frozen=True)
class Look:
    """One look at the bucket: the plan, and the names that others are working on right now."""

    plan: Plan
    claimed: frozenset[str]


def look(services: Services) -> Look:
    """Find what is to be done. Reads only."""
    with connect(services.postgres) as connection:
        elsewhere = {v.name: v for v in bookkeeping.waiting_elsewhere(connection)}
        # A newer upload under the same name takes the place of what was asked to be answered again.
        listing = list((elsewhere | {v.name: v for v in bucket.list_incoming(services.bucket, services.work.suffixes)}).values())
        states = bookkeeping.known(connection, listing)
        new = [v.name for v in listing if (v.name, v.generation) not in states]
        answered = bookkeeping.latest_answered(connection, new, model=services.model.choice)
        claimed = frozenset(bookkeeping.claimed(connection))
    limits = Limits(services.work.batch_files, services.work.batch_bytes, BATCHES_PER_LOOK)
    names = {v.name for v in listing}
    return Look(plan(listing, states, claimed, limits, answered=answered), claimed & names)


def tidy(services: Services, found: Plan, log: logging.Logger) -> None:
    """Record unchanged uploads, and archive what is done and was not archived yet, whatever kept its run from it."""
    with connect(services.postgres) as connection:
        for version in found.unchanged[:TIDIED_PER_LOOK]:
            bookkeeping.mark_unchanged(connection, version)
            log.info("%s: the upload equals what is answered already; recorded as unchanged", version.name)
        done = bookkeeping.pending_archive(connection, limit=TIDIED_PER_LOOK)
    for record in done:
        archive_file(services, record, log=log)


def claim(services: Services, batch: Batch, *, token: str) -> Batch | None:
    """Claim a batch's files with ``token``: the batch, or None if somebody else was faster with any of them."""
    with connect(services.postgres) as connection:
        lease = services.work.lease_seconds
        won = bookkeeping.claim(connection, batch.versions, owner=token, lease_seconds=lease)
        if len(won) == len(batch.versions):
            return batch
        bookkeeping.release(connection, token)
        return None
