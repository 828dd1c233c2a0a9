"""Versions of files and steps of their processing, for the tests of the ledger. A lease of 0 seconds has expired."""

from pathlib import Path

import psycopg

from qa_platform.contract import FileReason, FileStatus, FileVersion, ModelChoice
from qa_platform.ingest import FileRejection
from qa_platform.ledger import FileRecord, Ledger
from qa_platform.loading.load import load_file
from qa_platform.settings import WorkSettings
from qa_platform_tests.loading_helpers import BUNDLED, AnsweredUpload, answered_rows

A1 = FileVersion("a.csv", 1, 10, "aaaa")
A2 = FileVersion("a.csv", 2, 11, "bbbb")
B1 = FileVersion("b.csv", 1, 20, "cccc")
C1 = FileVersion("c.csv", 1, 30, "dddd")
NOT_UTF8 = FileRejection(FileReason.NOT_UTF8, "the bytes e9 are not UTF-8", line=2, offset=17)
HELD = 60
WORK = WorkSettings(max_attempts=3, retry_first_seconds=8, retry_most_seconds=100)
EXPIRED = 0


def known(ledger: Ledger, version: FileVersion) -> FileRecord:
    return ledger.records([version])[version.name, version.generation]


def load(connection: psycopg.Connection, folder: Path, version: FileVersion, *, load_id: int = 1, wanted: ModelChoice = BUNDLED) -> None:
    upload = AnsweredUpload(answered_rows(2), name=version.name, generation=version.generation, load_id=load_id, wanted=wanted)
    load_file(connection, upload.write(folder / f"{version.name}-{version.generation}-{load_id}"))


def claimed_by_run(ledger: Ledger, *versions: FileVersion, run: str = "run") -> None:
    assert ledger.claim(versions, owner=run, lease_seconds=HELD) == list(versions)
    ledger.start(run, versions, run_id=run, batch_id="batch")


def charge(ledger: Ledger, version: FileVersion, error: str, *, owner: str = "run") -> FileStatus | None:
    return ledger.charge(owner, version, error=error, work=WORK)


def wait_of(connection: psycopg.Connection, version: FileVersion) -> float:
    query = "SELECT extract(epoch FROM retry_at - now())::float FROM question_file WHERE source_file = %s AND generation = %s"
    row = connection.execute(query, [version.name, version.generation]).fetchone()
    assert row
    return float(row[0])
