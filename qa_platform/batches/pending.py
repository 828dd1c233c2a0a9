"""Finds pending work: reads the bucket and the records, and lets `plan.plan` decide what to do.

The sensors, the job for CI and the cron variant look for work here, and only here.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from heapq import nsmallest
from itertools import chain, islice
from random import sample

from qa_platform.answering.version import known_revision
from qa_platform.batches.archive import archive_files
from qa_platform.batches.at_once import FILES_AT_ONCE, threads
from qa_platform.batches.locate import correct_missing_source
from qa_platform.batches.plan import Batch, Limits, Plan, is_same, plan
from qa_platform.batches.run import Report
from qa_platform.clients import bucket
from qa_platform.clients.services import Log, Services
from qa_platform.contract import FileStatus, FileVersion
from qa_platform.errors import InputError
from qa_platform.ledger import Deferred, FileRecord, Ledger
from qa_platform.ledger.states import DONE, WITHOUT_ANSWERS, Known
from qa_platform.text import escaped_lines

# The maximum work per look, so that a sensor's tick stays short however much is waiting.
BATCHES_PER_LOOK = 5
TIDIED_PER_LOOK = 500
# Dagster ends a tick after 60 s. What is not archived within this time is archived at the next look.
TIDY_SECONDS = 20.0
# A file that still cannot be reported this long after it was loaded is archived without a report.
UNREPORTED_SECONDS = 3600.0
# The reason for ignoring an upload that is recorded as superseded. Newer answers are told by a higher generation, which Google does not
# promise for a later upload.
_SUPERSEDED = "superseded"
# Versions in one query: a few pages of the listing.
_PAGE = 5_000


@dataclass(frozen=True)
class Look:
    """The result of one look at the bucket.

    Args:
        claimed: the names that other runs are working on right now.
        objects: the number of uploads, plus the files to be answered again from another place.
        ignored: the numbers of ignored objects, by reason.
        deferred: the files that wait for a reason that is not their fault.
    """

    plan: Plan
    claimed: frozenset[str]
    objects: int = 0
    ignored: Mapping[str, int] = field(default_factory=dict)
    deferred: Deferred | None = None


def look(services: Services) -> Look:
    """Find the work to do. Reads only.

    The listing is reduced page by page to the unfinished files and the oldest new ones. So memory does not grow with the new uploads, and
    by about a kilobyte for each unfinished file that has a record.
    """
    limits = Limits(services.work.batch_files, services.work.batch_bytes, BATCHES_PER_LOOK)
    ignored: Counter[str] = Counter()
    unfinished: dict[str, FileVersion] = {}
    states: dict[tuple[str, int], Known] = {}
    new: list[FileVersion] = []
    same: list[FileVersion] = []
    answered: dict[str, FileVersion] = {}
    reuploaded: set[str] = set()
    objects = beyond = awaiting_content = 0
    with Ledger(services.postgres) as ledger:
        now = ledger.now()
        claimed_before = ledger.claimed()
        listing = bucket.list_incoming(services.bucket, services.work.suffixes, ignored=ignored)
        for page in _pages(chain(ledger.waiting_elsewhere(), listing)):
            known = ledger.known(page)
            unknown = [version.name for version in page if (version.name, version.generation) not in known]
            before = ledger.latest_answered(unknown, model=services.model, revision=known_revision(services.model))
            for version in page:
                state = known.get((version.name, version.generation))
                if state and state.status in WITHOUT_ANSWERS:
                    ignored.update([_SUPERSEDED] if state.status is FileStatus.SUPERSEDED else [])
                    continue
                # Uploads are listed after the files to be answered again. An upload of the same name replaces such a file.
                unfinished.pop(version.name, None)
                if state is None and _may_get_content(version, now, services.work.empty_seconds):
                    awaiting_content += 1
                elif state is None and version.name in claimed_before:
                    reuploaded.add(version.name)
                elif state is None:
                    # Uploads that need no answer, or cannot be planned yet, take no place of those that do.
                    (same if is_same(version, before.get(version.name)) else new).append(version)
                elif state.status not in DONE:
                    unfinished[version.name] = version
                    states[version.name, version.generation] = state
            objects += len(page)
            beyond += max(0, len(new) - limits.files * limits.batches)
            new = nsmallest(limits.files * limits.batches, new, key=lambda version: version.generation)
            # One more than is recorded, so that `record_unchanged` sees that some are left.
            del same[TIDIED_PER_LOOK + 1 :]
            chosen = {version.name for version in (*new, *same)}
            answered = {name: version for name, version in {**answered, **before}.items() if name in chosen}
        # With those of before the listing: a claim may have ended since, and its file must not seem to be done.
        claimed = frozenset({*claimed_before, *ledger.claimed()})
        deferred = ledger.deferred_files()
    found = plan([*unfinished.values(), *new, *same], states, claimed, limits, answered=answered)
    names = unfinished.keys() | reuploaded | {version.name for version in (*new, *same)}
    return Look(replace(found, waiting=found.waiting + beyond + awaiting_content), claimed & names, objects, ignored, deferred)


def _may_get_content(version: FileVersion, now: datetime, seconds: float) -> bool:
    """Whether an upload is empty, and so new that its content may still come: some programs create a file before they write to it."""
    # A generation is the time of the write in microseconds. If it is any other number, the upload is rejected at once instead of waiting
    # for ever.
    return version.size == 0 and abs(now.timestamp() - version.generation / 1e6) < seconds


def _pages(versions: Iterable[FileVersion]) -> Iterator[list[FileVersion]]:
    remaining = iter(versions)
    while page := list(islice(remaining, _PAGE)):
        yield page


def tidy(services: Services, found: Plan, log: Log, *, report: Report = lambda records: None) -> bool:
    """Run `record_unchanged`, then `archive_done`. Returns whether all unchanged uploads are recorded."""
    is_recorded = record_unchanged(services, found, log)
    archive_done(services, log, report=report)
    return is_recorded


def record_unchanged(services: Services, found: Plan, log: Log) -> bool:
    """Record unchanged uploads. A failure is logged and does not affect the others.

    Returns:
        Whether all of them are recorded; the rest is left to the next look.
    """
    until, recorded = time.monotonic() + TIDY_SECONDS, 0
    with Ledger(services.postgres) as ledger:
        for version in found.unchanged[:TIDIED_PER_LOOK]:
            if time.monotonic() > until:
                break
            try:
                if ledger.mark_unchanged(version):
                    recorded += 1
                    log.info("%s: same content as the answered version; recorded as unchanged", version.shown)
            except Exception as error:
                log.warning("%s is unchanged, but this could not be recorded: %s", version.shown, escaped_lines(str(error)))
        for version in found.alike[:TIDIED_PER_LOOK]:
            log.info("%s: same size and checksum as the answered version, but an MD5 is missing; it is answered again", version.shown)
    return recorded == len(found.unchanged)


def archive_done(services: Services, log: Log, *, report: Report = lambda records: None) -> int:
    """Archive done files that their runs did not archive.

    Args:
        report: called with each loaded file before every attempt to archive it, since the run that loaded it may have died before
            reporting it. If it raises, only this file waits for its next attempt. After an hour it is archived anyway.

    Returns:
        The number of files that could not be archived, in this call or before. Their records say why.
    """
    until = time.monotonic() + TIDY_SECONDS
    with Ledger(services.postgres) as ledger:
        pending = iter(ledger.pending_archive(limit=TIDIED_PER_LOOK))
        # A few at a time, side by side: each waits mostly for the bucket.
        while time.monotonic() <= until and (some := list(islice(pending, FILES_AT_ONCE))):
            done = [r for r in some if r.status is not FileStatus.LOADED or _reported(services, ledger, r, report, log)]
            with threads() as pool:
                # Each on its own, so that one that fails does not hold up the others.
                list(pool.map(lambda record: archive_files(services, ledger, [record], log=log), done))
        return ledger.count_unarchived()


def _reported(services: Services, ledger: Ledger, record: FileRecord, report: Report, log: Log) -> bool:
    """Report a file before it is archived, since nothing reports it afterwards. Returns whether it may be archived now."""
    there = ledger.in_the_table(record.version.name)
    if there and there.version.generation > record.version.generation:
        # Its rows were replaced: the checks would count those of the newer generation.
        return True
    try:
        report([record])
    except Exception as error:
        why = escaped_lines(str(error))
        log.warning("%s is done, and could not be reported: %s", record.version.shown, why)
        if record.loaded_at and (ledger.now() - record.loaded_at).total_seconds() < UNREPORTED_SECONDS:
            ledger.record_archive_failure(record.version, error=f"it could not be reported to Dagster yet: {why}", work=services.work)
            return False
    return True


def keep_claims(services: Services, tokens: Sequence[str]) -> None:
    """Renew the claims of requested runs that have not started, so that they can wait in a queue for as long as it takes."""
    if tokens:
        with Ledger(services.postgres) as ledger:
            ledger.renew_expiring(tokens, services.work.lease_seconds)


def reconcile(services: Services, log: Log) -> int:
    """Correct records that contradict the bucket. Returns the number of corrected files.

    - An upload that exists but is recorded as superseded becomes pending.
    - A file that is recorded as archived but lies under ``incoming/`` again is archived again.
    - A waiting file whose upload is gone is answered from the archive, or else superseded.
    - A failed file whose source is gone is superseded: that is how its owner gives it up.

    A record that has changed since it was read, for example by a retry, is left alone; one that cannot be looked up waits.
    """
    archives = services.work.archive != "keep"
    with Ledger(services.postgres) as ledger:
        now = ledger.now()
        gone = {(r.version.name, r.version.generation): r for r in chain(ledger.waiting_uploads(), ledger.parked())}
        wrong = 0
        for page in _pages(bucket.list_incoming(services.bucket, services.work.suffixes)):
            for version in page:
                gone.pop((version.name, version.generation), None)
            wrong += ledger.reopen(page, archived=archives, seen_after=now)
        until = time.monotonic() + TIDY_SECONDS
        # In another order each time: those for which there is nothing to correct must not hide the others.
        for record in sample(list(gone.values()), len(gone)):
            if time.monotonic() > until:
                break
            try:
                wrong += correct_missing_source(services.bucket, ledger, record)
            except InputError as error:
                log.warning("%s: %s", record.version.shown, escaped_lines(str(error)))
        return wrong


def claim(services: Services, batch: Batch, *, token: str) -> bool:
    """Claim a batch's files with ``token``. Returns whether no other process was faster with any of them."""
    with Ledger(services.postgres) as ledger:
        won = ledger.claim(batch.versions, owner=token, lease_seconds=services.work.lease_seconds)
        if len(won) == len(batch.versions):
            return True
        ledger.release(token)
        return False
