"""Restores files that an older backup of the database lacks: from the copy in the bucket, or else from Pachyderm's commits."""

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qa_platform.batches.missing import Comparison, compare_archive, compare_commits
from qa_platform.batches.reload import load_commit
from qa_platform.clients import pachyderm
from qa_platform.clients.services import Services
from qa_platform.contract import FileStatus, FileVersion
from qa_platform.errors import InputError
from qa_platform.ledger import Ledger
from qa_platform.ledger.restoring import AnsweredVersion, Presence


class RestoreState(enum.StrEnum):
    """What was done about a file that is missing from the table. A dry run does nothing."""

    # Answered again from its copy in the bucket, by the next runs.
    REQUESTED = "requested"
    # Loaded from Pachyderm's commit.
    LOADED = "loaded"
    # It is already waiting or being answered.
    COMING = "coming"
    # In a dry run: it would be requested or loaded.
    MISSING = "missing"
    # Neither the bucket nor Pachyderm has it.
    LOST = "lost"


@dataclass(frozen=True)
class Restored:
    """The result for one file.

    Args:
        generation: 0 if no version is known.
        source: where it comes from: an object of the bucket, a commit of Pachyderm, or "".
        detail: why it is lost.
    """

    name: str
    generation: int
    state: RestoreState
    source: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Restoration:
    """Restores files.

    Args:
        names: restore only these files; empty for all that are missing.
        dry_run: only report what would be done.
    """

    services: Services
    ledger: Ledger
    names: Sequence[str] = ()
    dry_run: bool = False

    def restore(self) -> Iterator[Restored]:
        """Restore the missing files.

        It can be repeated: files that were requested are then coming, and files that were loaded are in the table.

        Yields:
            Every file that is missing or coming. Files that are in the table already are left out.

        Raises:
            InputError, TransientError: a service refuses, or is unavailable. What was restored before stays restored.
        """
        suffixes = self.services.work.suffixes
        archive = compare_archive(self.services.bucket, self.ledger, suffixes, names=self.names)
        yield from self._request(archive)
        with pachyderm.session(self.services.pachyderm, "comparing Pachyderm's commits with the tables") as client:
            commits = compare_commits(client, self.services.bucket, self.ledger, suffixes, names=self.names)
        # The bucket takes precedence: the files that it has are answered from there.
        in_bucket = archive.missing.keys() | archive.coming.keys()
        for name, answered in commits.missing.items():
            if name not in in_bucket:
                yield self._load(answered.version, commits.commits[name])
        coming = {**commits.coming, **archive.coming}
        missing = archive.missing.keys() | commits.missing.keys()
        yield from (Restored(name, each.generation, RestoreState.COMING) for name, each in coming.items() if name not in missing)
        yield from self._lost({*in_bucket, *commits.missing, *commits.coming})

    def _request(self, archive: Comparison) -> Iterator[Restored]:
        missing = list(archive.missing.values())
        done = set[tuple[str, int]]() if self.dry_run else self.ledger.restore(missing)
        for each in missing:
            version = each.version
            if self.dry_run:
                state = RestoreState.MISSING
            else:
                # If it was not requested here, another process was faster.
                state = RestoreState.REQUESTED if (version.name, version.generation) in done else RestoreState.COMING
            yield Restored(version.name, version.generation, state, f"gs://{self.services.bucket.name}/{each.place}")

    def _load(self, version: FileVersion, commit: str) -> Restored:
        source = f"Pachyderm commit {commit}"
        if self.dry_run:
            return Restored(version.name, version.generation, RestoreState.MISSING, source)
        try:
            status = load_commit(self.services, version, commit)
        except InputError as error:
            return Restored(version.name, version.generation, RestoreState.LOST, source, str(error))
        state = RestoreState.COMING if status is FileStatus.SUPERSEDED else RestoreState.LOADED
        return Restored(version.name, version.generation, state, source)

    def _lost(self, found: set[str]) -> Iterator[Restored]:
        """The requested files that were found nowhere."""
        newest = self.ledger.newest([name for name in self.names if name not in found])
        records = list(newest.values())
        presences = self.ledger.presence([AnsweredVersion(record.version, record.place) for record in records])
        for name in dict.fromkeys(self.names):
            record = newest.get(name)
            if name in found or (record and presences[name, record.version.generation] is not Presence.MISSING):
                continue
            detail = "neither the bucket nor Pachyderm has it; upload it again" if record else "no file of that name is known"
            yield Restored(name, record.version.generation if record else 0, RestoreState.LOST, detail=detail)
