"""Uploads files, and accounts for them: every row is in the table once or rejected, every file is where it belongs."""

import csv
import io
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import dagster as dg
from dagster._core.event_api import PartitionKeyFilter
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecord
from google.api_core.exceptions import NotFound
from pydantic import SecretStr

from qa_platform.clients import bucket
from qa_platform.clients import pachyderm as pachd
from qa_platform.contract import INCOMING, LOAD_PIPELINE, FileStatus, FileVersion, file_id, partition_key
from qa_platform.ledger import FileRecord
from qa_platform.orchestration.catalog import QUESTION_ANSWER
from qa_platform.orchestration.reports.checks import COMPLETE, RECORDED, SPANS
from qa_platform.settings import PachydermSettings
from qa_platform_tests.answering_models import texts
from qa_platform_tests.faults.world import World

IN_THE_TABLE = (FileStatus.FINISHED, FileStatus.UNCHANGED)
SETTLED = (*IN_THE_TABLE, FileStatus.REJECTED)


@dataclass(frozen=True)
class Upload:
    """One uploaded generation. ``rows`` is None for a file that cannot be read."""

    version: FileVersion
    content: bytes
    rows: tuple[tuple[str, str], ...] | None


@dataclass
class Account:
    """The outcome of an audit."""

    files: int = 0
    rows: int = 0
    lost: int = 0
    duplicated: int = 0
    # Checks that Dagster does not have. Its storage may lose the last events when PostgreSQL crashes.
    unreported: int = 0
    wrong: list[str] = field(default_factory=list)


class Uploader:
    """A user who uploads new files, overwrites files, repeats uploads, and sometimes uploads something that is not a CSV."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self._world, self._rng = world, rng
        self._texts = list(texts(300, seed=rng.randrange(2**30), longest=25))
        self.newest: dict[str, Upload] = {}
        self.all: list[Upload] = []

    def upload(self) -> None:
        with self._world.uploading:
            self._upload()

    def innocent(self) -> Upload:
        """Upload a readable file under a new name."""
        with self._world.uploading:
            return self._put(f"innocent/{len(self.all)}.csv", *self._questions())

    def _upload(self) -> None:
        name, earlier = f"day {len(self.all) // 20}/file-{len(self.newest)}.csv", None
        if self.newest and self._rng.random() < 0.3 and self._world.overwriting:
            name = self._rng.choice(list(self.newest)[-8:])
            earlier = self.newest[name]
        if earlier and self._rng.random() < 0.3:
            content, rows = earlier.content, earlier.rows
        elif self._rng.random() < 0.1:
            content, rows = b"PK\x03\x04" + self._rng.randbytes(self._rng.randint(1, 400)), None
        else:
            content, rows = self._questions()
        self._put(name, content, rows)

    def _put(self, name: str, content: bytes, rows: tuple[tuple[str, str], ...] | None) -> Upload:
        upload = Upload(bucket.upload(self._world.bucket, name, io.BytesIO(content)), content, rows)
        self.newest[name] = upload
        self.all.append(upload)
        return upload

    def _questions(self) -> tuple[bytes, tuple[tuple[str, str], ...]]:
        rows = tuple((self._question(), self._rng.choice(self._texts)) for _ in range(self._rng.randint(1, 60)))
        text = io.StringIO()
        csv.writer(text).writerows([("question", "context"), *rows])
        return text.getvalue().encode(), rows

    def _question(self) -> str:
        return "" if self._rng.random() < 0.05 else self._rng.choice(self._texts)[:80]


def unsettled(world: World, uploads: dict[str, Upload]) -> list[str]:
    """The names whose newest upload is not done, and those that still have an object under ``incoming/``."""
    versions = [upload.version for upload in uploads.values()]
    with world.ledger() as ledger:
        found = ledger.records(versions)
    done = {name for (name, _), record in found.items() if record.status in SETTLED and record.archived_at}
    done |= {v.name for v in versions if _is_lost_with_the_bucket(world, v, found.get((v.name, v.generation)))}
    with world.uploading:
        waiting = {blob.name.removeprefix(INCOMING) for blob in world.bucket.list_blobs(prefix=INCOMING)}
    return sorted(({version.name for version in versions} - done) | waiting)


def _is_lost_with_the_bucket(world: World, version: FileVersion, record: FileRecord | None) -> bool:
    """Whether a restore of the bucket removed an upload before it was loaded. Then it cannot be answered."""
    return world.is_vanished(version.generation) and (record is None or record.status is FileStatus.SUPERSEDED)


def parked(world: World) -> list[str]:
    """The names of the files that the platform has given up on."""
    with world.ledger() as ledger:
        return sorted({record.version.name for record in ledger.history(limit=1_000_000) if record.status is FileStatus.FAILED})


def audit(world: World, uploader: Uploader) -> Account:
    """Compare the uploads, row by row, with every place that records them. The platform must be idle."""
    account = Account(files=len(uploader.newest))
    versions = [upload.version for upload in uploader.all]
    with world.ledger() as ledger, world.database() as connection:
        records = ledger.records(versions)
        answers = _rows(connection.execute("SELECT source_file, row_number, question, context FROM question_answer"))
        rejects = _rows(connection.execute("SELECT source_file, row_number, '', reason FROM question_answer_reject"))
    for name, upload in uploader.newest.items():
        record = records.get((name, upload.version.generation))
        if _is_lost_with_the_bucket(world, upload.version, record):
            continue
        if record is None:
            account.wrong.append(f"{name}: no record")
            account.lost += len(upload.rows or ())
            continue
        _audit_file(account, upload, record, answers.pop(name, []), rejects.pop(name, []))
        if upload.rows is not None and not _answered_csv_is_complete(world, upload, record):
            account.wrong.append(f"{name}: the answered CSV is not that of its rows")
    for name, left in (answers | rejects).items():
        account.wrong.append(f"{name}: {len(left)} rows of no upload")
        account.duplicated += len(left)
    _audit_objects(world, account, uploader, records)
    _audit_checks(world, account, uploader, records)
    _audit_commands(world, account, uploader)
    return account


def _rows(cursor: object) -> dict[str, list[tuple[int, str, str]]]:
    found: dict[str, list[tuple[int, str, str]]] = {}
    for name, number, question, context in cursor:  # type: ignore[attr-defined]
        found.setdefault(name, []).append((number, question, context))
    return found


def _audit_file(
    account: Account,
    upload: Upload,
    record: FileRecord,
    answers: list[tuple[int, str, str]],
    rejects: list[tuple[int, str, str]],
) -> None:
    name, wrong = upload.version.name, account.wrong
    if upload.rows is None:
        # The rows of an earlier, readable generation stay.
        if record.status is not FileStatus.REJECTED:
            wrong.append(f"{name}: is {record.status}, not rejected")
        return
    account.rows += len(upload.rows)
    if record.status not in IN_THE_TABLE:
        wrong.append(f"{name}: is {record.status} {record.error}")
    times = Counter(number for number, *_ in (*answers, *rejects))
    account.lost += sum(1 for number in range(1, len(upload.rows) + 1) if not times[number])
    account.duplicated += sum(count - (1 <= number <= len(upload.rows)) for number, count in times.items())
    for number, question, context in answers:
        if number <= len(upload.rows) and upload.rows[number - 1] != (question, context):
            wrong.append(f"{name}: row {number} is not what was uploaded")
    counted = (len(upload.rows), len(answers), len(rejects))
    if counted != (record.rows, record.answered, record.no_answer + record.rejected):
        wrong.append(f"{name}: has (rows, answers, rejects) {counted}, question_file says otherwise: {record}")
    empty = {number for number, (question, _) in enumerate(upload.rows, 1) if not question.strip()}
    if not empty <= {number for number, *_ in rejects}:
        wrong.append(f"{name}: rows with an empty question are not all rejected")


def _answered_csv_is_complete(world: World, upload: Upload, record: FileRecord) -> bool:
    settings = PachydermSettings(pachd_address=world.variables["PACHD_ADDRESS"], pach_token=SecretStr(world.variables["PACH_TOKEN"]))
    file = f"{file_id(upload.version.name)}.csv"
    if not record.pachyderm_commit:
        return False
    with tempfile.TemporaryFile() as target:
        try:
            with pachd.session(settings, "reading an answered file") as client:
                target.writelines(pachd.read_file(client, f"{LOAD_PIPELINE}@{record.pachyderm_commit}:/{file}"))
        except pachd.NotThere:
            # The answers are in the tables, and users get them from there.
            return world.pachyderm_restored
        target.seek(0)
        found = list(csv.DictReader(io.TextIOWrapper(target, "utf-8", newline="")))
    return [(row["question"], row["context"]) for row in found] == list(upload.rows or ())


def _audit_objects(world: World, account: Account, uploader: Uploader, records: dict[tuple[str, int], FileRecord]) -> None:
    """Check that ``incoming/`` is empty, and that every upload is archived unless it was overwritten before it was read."""
    for blob in world.bucket.list_blobs(prefix=INCOMING):
        account.wrong.append(f"{blob.name}: still there")
    for upload in uploader.all:
        record = records.get((upload.version.name, upload.version.generation))
        newest = uploader.newest[upload.version.name] is upload
        if record is None or (not newest and record.status not in SETTLED) or world.is_vanished(upload.version.generation):
            continue
        if (newest or (record.place and record.archived_at)) and not _lies_at(world, record, upload):
            account.wrong.append(f"{upload.version.name}: its source is not at {record.place!r}")


def _lies_at(world: World, record: FileRecord, upload: Upload) -> bool:
    try:
        return bool(Path(record.place).name) and world.bucket.blob(record.place).download_as_bytes() == upload.content
    except NotFound:
        return False


def _audit_checks(world: World, account: Account, uploader: Uploader, records: dict[tuple[str, int], FileRecord]) -> None:
    """Check that every loaded file was reported to Dagster, and that its checks passed."""
    keys = [dg.AssetCheckKey(QUESTION_ANSWER, name) for name in (COMPLETE, RECORDED, SPANS)]
    with world.dagster() as instance:
        for name, upload in uploader.newest.items():
            record = records.get((name, upload.version.generation))
            if record is None or record.status is not FileStatus.FINISHED:
                continue
            partition = PartitionKeyFilter(key=partition_key(name))
            for key in keys:
                executions = instance.event_log_storage.get_asset_check_execution_history(key, limit=1, partition_filter=partition)
                problem = _problem_of_check(executions, record)
                if problem == "was not evaluated":
                    account.unreported += 1
                elif problem:
                    account.wrong.append(f"{name}: its check {key.name} {problem}")
    if account.unreported and not world.postgres_crashed:
        account.wrong.append(f"{account.unreported} checks were not evaluated")


def _problem_of_check(executions: Sequence[AssetCheckExecutionRecord], record: FileRecord) -> str:
    evaluation = executions[0].evaluation if executions else None
    if evaluation is None:
        return "was not evaluated"
    return "" if evaluation.passed else f"failed: {evaluation.metadata}"


def _audit_commands(world: World, account: Account, uploader: Uploader) -> None:
    """Check that every command did its work, or said why it could not."""
    account.wrong += [fault for command in world.commands if (fault := command.fault)]
    accepted = [command for command in world.commands if command.is_accepted_retry]
    with world.ledger() as ledger:
        for command in accepted:
            upload = uploader.newest[command.arguments[1]]
            record = ledger.records([upload.version]).get((upload.version.name, upload.version.generation))
            if not (_happened_after(record, command.started) or upload.version.generation > command.started * 1e6):
                account.wrong.append(f"{upload.version.name}: a retry was accepted, and nothing followed: {record}")
    world.commands.clear()


def _happened_after(record: FileRecord | None, started: float) -> bool:
    if record is None or record.status is FileStatus.REJECTED:
        return True
    return record.loaded_at is not None and record.loaded_at.timestamp() > started
