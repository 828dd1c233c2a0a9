"""Finds answered files that are missing from the tables: compares the tables with the archive and with Pachyderm's commits.

Files go missing when PostgreSQL is restored from a backup that is older than they are. Reads only.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import grpc
from google.cloud import storage
from pachyderm_sdk import Client
from pachyderm_sdk.api import pfs, pps

from qa_platform.batches.commits import is_finished
from qa_platform.clients import bucket
from qa_platform.clients.archived import list_archived
from qa_platform.clients.pachyderm import is_code, job_of, open_tar
from qa_platform.clients.refusals import bucket_errors
from qa_platform.contract import ANSWER_PIPELINE, LOAD_PIPELINE, MANIFEST, FileVersion, Manifest, file_id
from qa_platform.ledger import Ledger
from qa_platform.ledger.restoring import AnsweredVersion, Presence
from qa_platform.ledger.states import DONE

# The number of objects compared at a time: a page of the listing.
_PAGE = 1_000
# The maximum number of missing files that one comparison names. After these are restored, the next one names the others.
MOST_MISSING = 20_000


@dataclass
class Comparison:
    """The result of a comparison.

    Args:
        compared: the number of objects, or of files in commits, that were compared.
        unnamed: the number of objects that were ignored because their names are not those of archived files.
        is_whole: everything was compared, and everything missing is named.
        missing: the newest version of each file that is missing, by name.
        coming: the same for files that wait or are being answered.
        commits: the Pachyderm commits that hold the answers of missing files, by name.
    """

    compared: int = 0
    unnamed: int = 0
    is_whole: bool = True
    missing: dict[str, AnsweredVersion] = field(default_factory=dict)
    coming: dict[str, FileVersion] = field(default_factory=dict)
    commits: dict[str, str] = field(default_factory=dict)

    def add(self, answered: Sequence[AnsweredVersion], ledger: Ledger) -> None:
        """Compare versions with the tables."""
        presences = ledger.presence(answered)
        self.compared += len(answered)
        for each in answered:
            version = each.version
            presence = presences[version.name, version.generation]
            if presence is Presence.COMING:
                self.coming[version.name] = max(version, self.coming.get(version.name, version))
            elif presence is Presence.MISSING and version.name not in self.missing and len(self.missing) >= MOST_MISSING:
                self.is_whole = False
            elif presence is Presence.MISSING:
                self.missing[version.name] = max(each, self.missing.get(version.name, each), key=lambda one: one.version.generation)

    def leave_to_the_sensor(self, ledger: Ledger, listing: Iterable[FileVersion]) -> None:
        """Move the files whose upload, or a newer one, waits under ``incoming/`` from ``missing`` to ``coming``: the sensor finds them.

        An upload that is done does not wait, although it may stay there: with QA_ARCHIVE=keep, or until it is archived. Files that were
        answered since they were compared, or are being answered now, are no longer missing.
        """
        waiting = [v for v in listing if v.name in self.missing and v.generation >= self.missing[v.name].version.generation]
        known = ledger.known(waiting)
        for version in waiting:
            state = known.get((version.name, version.generation))
            if state is None or state.status not in DONE:
                del self.missing[version.name]
                self.coming[version.name] = version
        presences = ledger.presence(list(self.missing.values()))
        for each in list(self.missing.values()):
            version = each.version
            presence = presences[version.name, version.generation]
            if presence is not Presence.MISSING:
                del self.missing[version.name]
            if presence is Presence.COMING:
                self.coming[version.name] = version


def compare_archive(
    gcs_bucket: storage.Bucket, ledger: Ledger, suffixes: tuple[str, ...], *, names: Sequence[str] = (), limit: int | None = None
) -> Comparison:
    """Compare the objects under ``processed/`` with the tables, page by page.

    Args:
        suffixes: the name endings of files that are answered.
        names: compare only these files; empty for all.
        limit: compare at most this many objects, the first by name; None for all.

    Raises:
        InputError, TransientError: the bucket or PostgreSQL refuses, or is unavailable.
    """
    comparison = Comparison()
    with bucket_errors("comparing the archive with the tables"):
        listing = list_archived(gcs_bucket, suffixes, names=names)
        counted = 0
        while page := list(islice(listing, _PAGE if limit is None else min(_PAGE, limit - counted))):
            counted += len(page)
            comparison.add([AnsweredVersion(each.version, each.place) for each in page if each.version], ledger)
            comparison.unnamed += sum(each.version is None for each in page)
        if limit is not None and counted == limit and next(listing, None):
            comparison.is_whole = False
        if comparison.missing:
            comparison.leave_to_the_sensor(ledger, bucket.list_incoming(gcs_bucket, suffixes))
    return comparison


def compare_commits(
    client: Client,
    gcs_bucket: storage.Bucket,
    ledger: Ledger,
    suffixes: tuple[str, ...],
    *,
    names: Sequence[str] = (),
    limit: int | None = None,
) -> Comparison:
    """Compare the files that Pachyderm's commits have loaded with the tables, newest commit first.

    Args:
        limit: compare at most this many commits; None for all.

    Raises:
        grpc.RpcError: pachd refuses, or is unavailable.
        InputError, TransientError: the bucket or PostgreSQL refuses, or is unavailable.
    """
    comparison = Comparison()
    held: dict[str, tuple[int, int]] = {}
    commits = _loading_commits(client)
    comparison.is_whole = limit is None or len(commits) <= limit
    for commit in commits[:limit]:
        manifests = [each for each in _loaded(client, commit) if not names or each.name in names]
        comparison.add([AnsweredVersion(FileVersion(m.name, m.generation, m.size, m.crc32c), "") for m in manifests], ledger)
        for manifest in manifests:
            # If a generation was answered several times, the last answers count.
            if held.get(manifest.name, (0, 0)) < (manifest.generation, manifest.load_id):
                held[manifest.name] = (manifest.generation, manifest.load_id)
                comparison.commits[manifest.name] = commit.commit.id
    if comparison.missing:
        with bucket_errors("looking for newer uploads"):
            comparison.leave_to_the_sensor(ledger, bucket.list_incoming(gcs_bucket, suffixes))
    return comparison


def _outputs(client: Client, info: pfs.CommitInfo) -> set[str]:
    """The paths that the loader wrote in a commit. The output of a failed job has those of an earlier commit too; its datums tell."""
    if not info.error:
        return {found.file.path for found in client.pfs.list_file(file=pfs.File.from_uri(f"{LOAD_PIPELINE}@{info.commit.id}:/"))}
    job = job_of(LOAD_PIPELINE, info.commit.id)
    datums = [each for each in client.pps.list_datum(job=job) if each.state == pps.DatumState.SUCCESS and each.datum.job.id == job.id]
    return {f"/{file.file.path.strip('/')}.csv" for datum in datums for file in datum.data}


def _loading_commits(client: Client) -> list[pfs.CommitInfo]:
    """The commits in which files were loaded, newest first."""
    try:
        infos = list(client.pfs.list_commit(repo=pfs.Repo.from_uri(LOAD_PIPELINE)))
    except grpc.RpcError as error:
        # Pachyderm is new, and nothing has been loaded yet.
        if not is_code(error, grpc.StatusCode.NOT_FOUND):
            raise
        return []
    return [info for info in infos if is_finished(info)]


def _loaded(client: Client, info: pfs.CommitInfo) -> Iterator[Manifest]:
    """The manifests of the files that were loaded in a commit."""
    commit = info.commit.id
    try:
        names = _outputs(client, info)
        # A pattern that matches nothing is an error.
        if not names:
            return
        with open_tar(client, pfs.File.from_uri(f"{ANSWER_PIPELINE}@{commit}:/*/{MANIFEST}")) as tar:
            for member in tar:
                if content := tar.extractfile(member):
                    manifest = Manifest.from_json(content.read())
                    if f"/{file_id(manifest.name)}.csv" in names:
                        yield manifest
    except grpc.RpcError as error:
        # Removed while it was read.
        if not is_code(error, grpc.StatusCode.NOT_FOUND):
            raise
