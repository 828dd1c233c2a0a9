"""Reading a batch: each file is streamed out of the bucket, cut into shards, and becomes a file set in Pachyderm."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import grpc

from qa_platform.batches.commits import FileSets
from qa_platform.batches.locate import settle_missing_source
from qa_platform.clients import bucket
from qa_platform.clients.refusals import bucket_errors
from qa_platform.clients.services import Log, Services
from qa_platform.clients.source import SourceChanged
from qa_platform.contract import Manifest, file_id
from qa_platform.errors import QaPlatformError, TransientError
from qa_platform.ingest import FileRejected, Write, split
from qa_platform.ledger import FileRecord, Ledger


@dataclass(frozen=True)
class Intake:
    """Reads the files of one launch of a batch.

    Args:
        launch: the id of the launch.
        again: shards whose output is missing, by file id. They become new datums, which Pachyderm does not skip.
    """

    services: Services
    ledger: Ledger
    run_id: str
    log: Log
    launch: str
    again: Mapping[str, frozenset[str]]

    def read(self, files: Sequence[FileRecord], file_sets: FileSets) -> None:
        """Read the files into file sets. One that cannot be read is set aside, charged, or ends the batch there.

        Raises:
            QaPlatformError: the bucket is unavailable, and nothing was read before.
        """
        for number, record in enumerate(files):
            try:
                self._read_file(record, file_sets)
            except grpc.RpcError:
                raise
            except QaPlatformError as error:
                self._stop_at(record, files[number + 1 :], error, anything_read=bool(file_sets.ids))
                if not file_sets.ids:
                    raise
                return
            except Exception as error:
                # Whatever else one file brings up must not hold the others; it is charged to that file, and shown.
                self.log.exception("%s could not be read", record.version.shown)
                self.ledger.charge(
                    self.run_id, record.version, error=f"{type(error).__name__}: {error}", work=self.services.work, load_id=record.load_id
                )

    def _read_file(self, record: FileRecord, file_sets: FileSets) -> None:
        folder = file_id(record.version.name)

        def fill(write: Write) -> None:
            again = self.again.get(folder, frozenset())
            skipped = partial(self.ledger.record_blank, record.version)
            split_file(self.services, record, write, self.log, again=again, launch=self.launch, skipped=skipped)

        try:
            file_sets.make(folder, fill)
        except (FileRejected, SourceChanged) as error:
            set_aside(self.services, self.ledger, record, error, self.log)

    def _stop_at(self, record: FileRecord, later: Sequence[FileRecord], error: QaPlatformError, *, anything_read: bool) -> None:
        """The bucket is unavailable, and would keep each of the later files waiting as long."""
        self.log.warning("%s could not be read and is retried later, the files after it in another batch: %s", record.version.shown, error)
        reason, work = str(error), self.services.work
        versions = [other.version for other in later]
        self.ledger.defer(self.run_id, [record.version], error=reason, work=work, suspect_after=0)
        if anything_read:
            self.ledger.requeue(self.run_id, versions)
        else:
            # Otherwise each unreadable object would trigger its own run ahead of newer files.
            self.ledger.defer(self.run_id, versions, error=reason, work=work)


def split_file(
    services: Services,
    record: FileRecord,
    write: Write,
    log: Log,
    *,
    again: frozenset[str] = frozenset(),
    launch: str = "",
    skipped: Callable[[int], object] = lambda blank: None,
) -> Manifest:
    """Read a file's source out of the bucket and cut it into shards, see `ingest.split`.

    Raises:
        FileRejected, SourceChanged: it cannot be read, or is gone; see `set_aside`.
        InputError, TransientError: the bucket does not let us read it, or is unavailable.
    """
    reading = bucket_errors(f"reading {record.version.name}")
    with reading, bucket.open_version(services.bucket, record.version, record.place) as source:
        try:
            return split(
                source,
                version=record.version,
                load_id=record.load_id,
                model=services.model,
                align_to_words=services.align_to_words,
                settings=services.ingest,
                write=write,
                again=again,
                launch=launch,
                skipped=skipped,
                log=log,
            )
        except FileRejected:
            # A download that went wrong must not be taken for a file that is wrong.
            source.read_to_the_end()
            raise


def set_aside(services: Services, ledger: Ledger, record: FileRecord, error: Exception, log: Log) -> None:
    """Record why a file is not read: it is rejected, or superseded.

    Raises:
        TransientError: the source was moved meanwhile, or the bucket contradicts itself.
    """
    version = record.version
    if isinstance(error, FileRejected):
        log.warning("%s is rejected: %s", version.shown, error)
        ledger.reject_file(version, error.rejection, read=record)
        return
    now = ledger.records([version])[version.name, version.generation]
    if now.place != record.place:
        raise TransientError(f"{record.place} was archived to {now.place} while it was to be read") from error
    with bucket_errors(f"looking for {version.name}"):
        there = bucket.is_there(services.bucket, version, record.place)
    # Believed only if a second look says the same: a file that is superseded is not looked at again.
    if there:
        raise TransientError(
            f"the bucket says that generation {version.generation} is gone, yet it is there", where=record.place
        ) from error
    settle_missing_source(services.bucket, ledger, record)
    now = ledger.records([version])[version.name, version.generation]
    if now.place != record.place:
        raise TransientError(f"{record.place} was archived meanwhile, and lies in {now.place}") from error
    log.warning("%s was overwritten or deleted while it waited; generation %d is %s", version.shown, version.generation, now.status)
