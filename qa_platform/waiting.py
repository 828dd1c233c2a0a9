"""Everything that is waiting: what lies in the bucket and what is recorded of it, put before `planning.plan`.

The sensor and the job for CI look for work here, and only here.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import nsmallest
from itertools import chain, islice

from qa_platform import bookkeeping, bucket
from qa_platform.batch import Report, Services, archive_files
from qa_platform.bookkeeping import PutOff
from qa_platform.contract import FileStatus, FileVersion
from qa_platform.database import connect
from qa_platform.planning import DONE, Batch, Known, Limits, Plan, plan

# What one look leads to at most, so that a sensor's tick stays short however much is waiting.
BATCHES_PER_LOOK = 10
TIDIED_PER_LOOK = 500
# Dagster ends a tick after 60 s. What is not archived by then is archived at the next look.
TIDY_SECONDS = 20.0
# Versions in one query: a few pages of the listing.
_PAGE = 5_000


@dataclass(frozen=True)
class Look:
    """One look at the bucket: the plan, the names that others are working on right now, why objects were ignored, counted, and which
    files wait for something that is not their fault.
    """

    plan: Plan
    claimed: frozenset[str]
    objects: int = 0
    ignored: Mapping[str, int] = field(default_factory=dict)
    put_off: PutOff | None = None


def look(services: Services) -> Look:
    """Find what is to be done. Reads only.

    The listing is reduced page by page to what is unfinished and to the oldest of what is new, so that neither time nor memory depends
    on how much lies there.
    """
    limits = Limits(services.work.batch_files, services.work.batch_bytes, BATCHES_PER_LOOK)
    ignored: Counter[str] = Counter()
    unfinished: dict[str, FileVersion] = {}
    states: dict[tuple[str, int], Known] = {}
    new: list[FileVersion] = []
    objects = beyond = 0
    with connect(services.postgres) as connection:
        listing = bucket.list_incoming(services.bucket, services.work.suffixes, ignored=ignored)
        for page in _pages(chain(bookkeeping.waiting_elsewhere(connection), listing)):
            known = bookkeeping.known(connection, page)
            for version in page:
                state = known.get((version.name, version.generation))
                # An upload comes later than what is to be answered again under the same name, and takes its place.
                unfinished.pop(version.name, None)
                if state is None:
                    new.append(version)
                elif state.status not in DONE:
                    unfinished[version.name] = version
                    states[version.name, version.generation] = state
            objects += len(page)
            beyond += max(0, len(new) - limits.files * limits.batches)
            new = nsmallest(limits.files * limits.batches, new, key=lambda version: version.generation)
        answered = bookkeeping.latest_answered(connection, [version.name for version in new], model=services.model)
        claimed = frozenset(bookkeeping.claimed(connection))
        put_off = bookkeeping.files_put_off(connection)
    found = plan([*unfinished.values(), *new], states, claimed, limits, answered=answered)
    names = unfinished.keys() | {version.name for version in new}
    return Look(replace(found, waiting=found.waiting + beyond), claimed & names, objects, ignored, put_off)


def _pages(versions: Iterable[FileVersion]) -> Iterator[list[FileVersion]]:
    remaining = iter(versions)
    while page := list(islice(remaining, _PAGE)):
        yield page


def tidy(services: Services, found: Plan, log: logging.Logger, *, report: Report = lambda records: None) -> bool:
    """Record unchanged uploads, and archive what is done and was not archived yet, whatever kept its run from it.

    ``report`` is told of each of these that is in the table: the run that loaded it ended before it could. What it raises is logged:
    a file that cannot be told of must not hold the others.

    Returns:
        Whether all of the unchanged uploads are recorded; the others are left to the next look.
    """
    until, recorded = time.monotonic() + TIDY_SECONDS, 0
    with connect(services.postgres) as connection:
        for version in found.unchanged[:TIDIED_PER_LOOK]:
            if bookkeeping.mark_unchanged(connection, version):
                recorded += 1
                log.info("%s: the upload equals what is answered already; recorded as unchanged", version.name)
        done = bookkeeping.pending_archive(connection, limit=TIDIED_PER_LOOK)
    for record in done:
        if time.monotonic() > until:
            break
        if record.status is FileStatus.LOADED:
            try:
                report([record])
            except Exception as error:
                log.warning("%s is done, and could not be reported: %s", record.version.name, error)
        archive_files(services, [record], log=log)
    return recorded == len(found.unchanged)


def keep_claims(services: Services, tokens: Sequence[str]) -> None:
    """Renew the claims of runs that were requested and have not begun, so that they may wait in a queue for as long as it takes."""
    if tokens:
        with connect(services.postgres) as connection:
            for token in tokens:
                bookkeeping.renew(connection, token, services.work.lease_seconds)


def reconcile(services: Services) -> int:
    """Correct what is recorded where the bucket says otherwise; how many files that were.

    Concerned are uploads that are there though they count as superseded, which will be answered; files that are done and archived, and
    lie under ``incoming/`` again, which are archived once more; and files that wait, and were overwritten or deleted.
    """
    archives = services.work.archive != "keep"
    with connect(services.postgres) as connection:
        gone = {(v.name, v.generation): v for v in bookkeeping.waiting_uploads(connection)}
        wrong = 0
        for page in _pages(bucket.list_incoming(services.bucket, services.work.suffixes)):
            for version in page:
                gone.pop((version.name, version.generation), None)
            wrong += bookkeeping.reopen(connection, page, archived=archives)
        for version in gone.values():
            bookkeeping.mark_superseded(connection, version)
    return wrong + len(gone)


def claim(services: Services, batch: Batch, *, token: str) -> Batch | None:
    """Claim a batch's files with ``token``: the batch, or None if somebody else was faster with any of them."""
    with connect(services.postgres) as connection:
        lease = services.work.lease_seconds
        won = bookkeeping.claim(connection, batch.versions, owner=token, lease_seconds=lease)
        if len(won) == len(batch.versions):
            return batch
        bookkeeping.release(connection, token)
        return None
