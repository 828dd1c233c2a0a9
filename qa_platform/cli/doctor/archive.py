"""The archive: every answered file is in the tables. Some are missing if PostgreSQL was restored from an older backup."""

import shlex
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from qa_platform.cli.doctor.findings import Part, Result, ok, unknown, wrong
from qa_platform.clients.deadline import within
from qa_platform.contract import PROCESSED
from qa_platform.errors import QaPlatformError
from qa_platform.settings import BucketSettings, PachydermSettings, PostgresSettings, WorkSettings

if TYPE_CHECKING:
    from google.cloud import storage

    from qa_platform.ledger import Ledger

# As many as can be compared within the doctor's deadline. `qa-platform restore --dry-run` compares all.
_OBJECTS = 5_000
_COMMITS = 20
_SECONDS = 13.0
_PROBE_SECONDS = 5
_NAMED = 3
_FIX = "qa-platform restore"


def _examine() -> Iterator[Result]:
    # If a service is unavailable, another part reports it with its fix.
    try:
        yield within(_SECONDS, _compare, "the archive")
    except QaPlatformError as error:
        yield unknown(f"not checked: {error.cause}")
    except TimeoutError:
        yield unknown(f"not compared within {_SECONDS:.0f} s; `{_FIX} --dry-run` compares all")


def _compare() -> Result:
    from qa_platform.batches.missing import compare_archive
    from qa_platform.clients.bucket import open_bucket
    from qa_platform.clients.refusals import bucket_errors
    from qa_platform.ledger import Ledger

    suffixes, gcs_bucket = WorkSettings().suffixes, open_bucket(BucketSettings())
    with bucket_errors("listing the archive"):
        # No retries: the doctor has no time for them.
        list(gcs_bucket.list_blobs(prefix=PROCESSED, max_results=1, timeout=_PROBE_SECONDS, retry=None))
    with Ledger(PostgresSettings()) as ledger:
        archive = compare_archive(gcs_bucket, ledger, suffixes, limit=_OBJECTS)
        missing = archive.missing.keys() | _missing_in_commits(gcs_bucket, ledger, suffixes)
    return _result(sorted(missing), f"{archive.compared} objects", is_whole=archive.is_whole)


def _missing_in_commits(gcs_bucket: "storage.Bucket", ledger: "Ledger", suffixes: tuple[str, ...]) -> set[str]:
    """The files that only Pachyderm's newest commits have. Empty if Pachyderm is unavailable, which another part reports."""
    from qa_platform.batches.missing import compare_commits
    from qa_platform.clients.pachyderm import session

    with suppress(QaPlatformError), session(PachydermSettings(), "comparing commits with the tables") as client:
        return set(compare_commits(client, gcs_bucket, ledger, suffixes, limit=_COMMITS).missing)
    return set()


def _result(missing: list[str], compared: str, *, is_whole: bool) -> Result:
    limit = "" if is_whole else f"; only the first were compared, and `{_FIX} --dry-run` compares all"
    if not missing:
        return ok(f"every file that was answered is in the tables: {compared} under processed/{limit}")
    named = ", ".join(shlex.quote(name) for name in missing[:_NAMED]) + (", …" if len(missing) > _NAMED else "")
    return wrong(f"{len(missing)} files were answered and are not in the tables: {named}{limit}", _FIX)


PART = Part(("archive",), _examine, lambda: f"the bucket {BucketSettings().storage_bucket}, PostgreSQL and pachd")
