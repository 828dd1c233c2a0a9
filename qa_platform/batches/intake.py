"""Reads a batch: streams each file from the bucket, cuts it into shards, and writes them into a file set in Pachyderm."""

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import grpc

from qa_platform.answering.version import known_revision, unstated_version
from qa_platform.batches.at_once import threads
from qa_platform.batches.commits import FileSets
from qa_platform.batches.locate import correct_missing_source
from qa_platform.clients import bucket
from qa_platform.clients.refusals import bucket_errors
from qa_platform.clients.services import Log, Services
from qa_platform.clients.source import SourceChanged
from qa_platform.contract import Manifest, ModelChoice, file_id
from qa_platform.errors import QaPlatformError, TransientError
from qa_platform.ingest import FileRejected, OnRead, Write, split
from qa_platform.ledger import FileRecord, Ledger


@dataclass(frozen=True)
class Intake:
    """Reads the files of one launch of a batch.

    Args:
        launch_id: the id of the launch.
        repeated_shards: shards whose output is missing, by file id. They become new datums, which Pachyderm does not skip.
    """

    services: Services
    ledger: Ledger
    run_id: str
    log: Log
    launch_id: str
    repeated_shards: Mapping[str, frozenset[str]]
    _unavailable: threading.Event = field(default_factory=threading.Event, init=False)
    _over: threading.Event = field(default_factory=threading.Event, init=False)

    def read(self, files: Sequence[FileRecord], file_sets: FileSets) -> None:
        """Read the files into file sets, several at once. A file that cannot be read is set aside, charged, or ends the reading.

        Raises:
            QaPlatformError: the bucket is unavailable, and nothing was read.
        """
        unreadable: list[tuple[FileRecord, QaPlatformError]] = []
        later: list[FileRecord] = []
        with threads() as pool:
            try:
                readings = [(record, pool.submit(self._read_file, record, file_sets)) for record in files]
                for record, reading in readings:
                    try:
                        self._settle(record, reading.result())
                    except _Postponed:
                        later.append(record)
                    except QaPlatformError as error:
                        unreadable.append((record, error))
            finally:
                # Also when this run is told to end: a large file must not delay that.
                self._over.set()
        if unreadable:
            self._put_back(unreadable, later, anything_read=bool(file_sets.ids))

    def _read_file(self, record: FileRecord, file_sets: FileSets) -> Exception | None:
        """Read one file, in a pool thread. Returns the error if the file itself cannot be read.

        Raises:
            _Postponed: it was not read to its end, for a reason outside the file.
            QaPlatformError: the bucket is unavailable.
            grpc.RpcError: Pachyderm is unavailable.
        """
        if self._unavailable.is_set():
            raise _Postponed
        folder = file_id(record.version.name)

        def fill(write: Write) -> None:
            def write_unless_over(path: str, chunks: Iterable[bytes]) -> None:
                if self._over.is_set():
                    raise _Postponed
                write(path, chunks)

            split_file(
                self.services,
                record,
                write_unless_over,
                self.log,
                repeated_shards=self.repeated_shards.get(folder, frozenset()),
                launch_id=self.launch_id,
                on_read=partial(self.ledger.record_layout, record.version),
            )

        try:
            file_sets.make(folder, fill)
        except (FileRejected, SourceChanged) as error:
            return error
        except TransientError:
            self._unavailable.set()
            raise
        except (QaPlatformError, grpc.RpcError, _Postponed):
            raise
        except Exception as error:
            # Any other error of one file must not hold up the others.
            return error
        return None

    def _settle(self, record: FileRecord, problem: Exception | None) -> None:
        """Set aside a file that cannot be read, or charge it with an unexpected error."""
        if isinstance(problem, (FileRejected, SourceChanged)):
            set_aside(self.services, self.ledger, record, problem, self.log)
        elif problem is not None:
            self.log.error("%s could not be read", record.version.shown, exc_info=problem)
            reason = f"{type(problem).__name__}: {problem}"
            self.ledger.charge(self.run_id, record.version, error=reason, work=self.services.work, load_id=record.load_id)

    def _put_back(
        self, unreadable: Sequence[tuple[FileRecord, QaPlatformError]], later: Sequence[FileRecord], *, anything_read: bool
    ) -> None:
        """Put back the files that were not read: while the bucket is unavailable, each of them would wait just as long.

        Raises:
            QaPlatformError: the first reason, if nothing was read.
        """
        reason, work = str(unreadable[0][1]), self.services.work
        for record, error in unreadable:
            self.log.warning("%s could not be read and is retried later, in another batch: %s", record.version.shown, error)
            self.ledger.defer(self.run_id, [record.version], error=str(error), work=work, suspect_after=0)
        versions = [record.version for record in later]
        if anything_read:
            self.ledger.requeue(self.run_id, versions)
        else:
            # Otherwise each unreadable object would trigger its own run ahead of newer files.
            self.ledger.defer(self.run_id, versions, error=reason, work=work)
            raise unreadable[0][1]


class _Postponed(Exception):
    """A file was not read, or not to its end: the bucket is unavailable, or the run ends."""


def split_file(
    services: Services,
    record: FileRecord,
    write: Write,
    log: Log,
    *,
    repeated_shards: frozenset[str] = frozenset(),
    launch_id: str = "",
    on_read: OnRead = lambda *, blank, delimiter: None,
) -> Manifest:
    """Read a file's source from the bucket and cut it into shards; see `ingest.split`.

    Raises:
        FileRejected, SourceChanged: it cannot be read, or is gone; see `set_aside`.
        InputError, TransientError: the bucket refuses access, or is unavailable.
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
                repeated_shards=repeated_shards,
                launch_id=launch_id,
                answers_version=_answers_version(record, services.model),
                on_read=on_read,
                log=log,
            )
        except FileRejected:
            # A corrupted download must not be mistaken for an invalid file.
            source.read_to_the_end()
            raise


def _answers_version(record: FileRecord, model: ModelChoice) -> str:
    """The text that makes new datums of shards to which Pachyderm has the answers of another version.

    If this generation was answered before, by another revision or by one of which nobody knows whether it is the same, all its shards
    become new datums, once for each request. The next request after that has no such text, and so answers all of them once more.
    """
    is_other = record.model_revision not in ("", known_revision(model) or model.revision)
    request = f"{record.version.generation}-{record.load_id}" if is_other else ""
    return " ".join(filter(None, [unstated_version(model), request]))


def set_aside(services: Services, ledger: Ledger, record: FileRecord, error: Exception, log: Log) -> None:
    """Record a file that cannot be read as rejected or superseded.

    Raises:
        TransientError: the source was moved meanwhile, or the bucket contradicts itself.
    """
    version = record.version
    if isinstance(error, FileRejected):
        log.warning("%s is rejected: %s", version.shown, error)
        ledger.reject_file(version, error.rejection, as_read=record)
        return
    now = ledger.records([version])[version.name, version.generation]
    if now.place != record.place:
        raise TransientError(f"{record.place} was archived to {now.place} while it was to be read") from error
    with bucket_errors(f"looking for {version.name}"):
        there = bucket.is_there(services.bucket, version, record.place)
    # Trust this only if a second look agrees: a superseded file is not looked at again.
    if there:
        raise TransientError(f"the bucket reports generation {version.generation} as gone, but it exists", where=record.place) from error
    correct_missing_source(services.bucket, ledger, record)
    now = ledger.records([version])[version.name, version.generation]
    if now.place != record.place:
        raise TransientError(f"{record.place} was archived meanwhile, and lies in {now.place}") from error
    log.warning("%s was overwritten or deleted while it waited; generation %d is %s", version.shown, version.generation, now.status)
