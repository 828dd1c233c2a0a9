"""Entry point of the pipeline ``push-answers-to-sql``: one datum is one answered file.

``python -m qa_platform.loading.worker`` migrates the tables and loads one file after another, each from the folder that the variable
``question_answer`` names. It writes the whole answered file to ``/pfs/out/<file id>.csv``.
"""

import hashlib
import logging
import os
import random
import stat
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psycopg

from qa_platform.clients.postgres import connect
from qa_platform.contract import LOAD_PIPELINE, FileStatus
from qa_platform.datum_batching import fault_of, path_of, serve
from qa_platform.errors import InputError, TransientError
from qa_platform.loading import migrate
from qa_platform.loading.answered import read_answered, write_csv
from qa_platform.loading.load import LoadResult, load_file
from qa_platform.settings import DatumSettings, PostgresSettings, WorkerSettings

logger = logging.getLogger(LOAD_PIPELINE)

# How long to wait for an unavailable PostgreSQL, all retries together. A restart takes seconds.
PATIENCE_SECONDS = 120.0
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 15.0
# After this many times `PATIENCE_SECONDS`, a remembered outage is assumed to be over even if its end was not seen.
_FORGOTTEN_AFTER = 5


class NoDatabase(InputError):
    """The database rejects this program, whatever file it loads."""

    blameless = True


class Loader:
    """Loads answered files below ``root``. It keeps one connection open as long as it works."""

    def __init__(self, root: Path, postgres: PostgresSettings) -> None:
        self._root = root
        self._postgres = postgres
        self._connection: psycopg.Connection | None = None
        self._outage = _Outage(postgres)

    def do(self, datum: DatumSettings) -> None:
        """Load one file, and write the whole answered file into ``out``.

        Raises:
            InputError: the folder is not a complete answered file, or the database refuses it.
            TransientError: the database was unavailable for longer than this program waits.
        """
        folder = self._folder(datum)
        result = self._load_with_patience(folder, datum)
        write_csv(read_answered(folder), self._root / "out" / f"{folder.name}.csv")
        logger.info("%s", _line(result))

    def _folder(self, datum: DatumSettings) -> Path:
        """The folder of the answered file."""
        if not datum.question_answer:
            raise InputError(
                "the variable question_answer is empty", advice="run this program in a pipeline whose input is question_answer"
            )
        return path_of(datum.question_answer, self._root, within=self._root)

    def _load_with_patience(self, folder: Path, datum: DatumSettings) -> LoadResult:
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                result = load_file(self._open(), folder, job_id=datum.pach_job_id, commit_id=datum.pach_output_commit_id)
            except TransientError as error:
                self._close()
                left = self._outage.seconds_left()
                if pause > left:
                    raise
                logger.warning("%s; trying again for up to %.0f s", error, left)
            else:
                self._outage.forget()
                return result
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _open(self) -> psycopg.Connection:
        if self._connection is None:
            try:
                migrate.upgrade(self._postgres, accept_newer=True)
                self._connection = connect(self._postgres)
            except InputError as error:
                raise NoDatabase(f"{error.what} (the secret dbaccess)", where=error.where, advice=error.advice) from error
        return self._connection

    def _close(self) -> None:
        if self._connection is not None:
            with suppress(psycopg.Error):
                self._connection.close()
            self._connection = None


class _Outage:
    """The beginning of an outage of PostgreSQL, remembered in a file.

    Pachyderm restarts the program for every attempt at every datum. Without the file, each datum of a batch would wait as long as the
    first one.
    """

    def __init__(self, postgres: PostgresSettings) -> None:
        where = hashlib.sha256(f"{postgres.host}:{postgres.port}/{postgres.dbname}".encode()).hexdigest()[:16]
        self._file = Path(tempfile.gettempdir(), f"{LOAD_PIPELINE}-outage-{os.geteuid()}-{where}")
        # The file's time as this process set it: the file may be refused.
        self._since: float | None = None

    def seconds_left(self) -> float:
        """How much longer to wait. The outage begins with the first call."""
        now = time.time()
        since = self._beginning()
        # The clock may have been set back.
        if not 0 <= now - since <= _FORGOTTEN_AFTER * PATIENCE_SECONDS:
            since = self._since = now
            with suppress(OSError):
                self._touch()
        return PATIENCE_SECONDS - (now - since)

    def forget(self) -> None:
        """Forget the outage."""
        self._since = None
        with suppress(OSError):
            self._file.unlink(missing_ok=True)

    def _touch(self) -> None:
        # The folder may be shared with other users: their links are not followed.
        file = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            os.utime(file)
        finally:
            os.close(file)

    def _beginning(self) -> float:
        if self._since is not None:
            return self._since
        try:
            found = self._file.lstat()
        except OSError:
            return 0.0
        return found.st_mtime if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() else 0.0


def main() -> int:
    """Load datum after datum; without datum batching, the one that the environment names. Returns exit status 1 if that fails, else 0."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    settings = WorkerSettings()
    loader = Loader(settings.pfs_root, PostgresSettings())
    datum = DatumSettings()
    if not datum.question_answer:
        serve(lambda environment: loader.do(_datum(environment)), settings.grpc_port)
    try:
        loader.do(datum)
    except Exception as error:
        logger.error("%s", fault_of(error).to_json())
        return 1
    return 0


def _datum(environment: Mapping[str, str]) -> DatumSettings:
    return DatumSettings(
        question_answer=environment["question_answer"],
        pach_job_id=environment.get("PACH_JOB_ID", ""),
        pach_output_commit_id=environment.get("PACH_OUTPUT_COMMIT_ID", ""),
    )


def _line(result: LoadResult) -> str:
    what = f"{result.name!r} (generation {result.generation}, load {result.load_id})"
    if result.status is FileStatus.SUPERSEDED:
        return f"{what}: superseded, nothing written"
    return (
        f"{what}: loaded {result.rows} rows = {result.answered} answered + {result.no_answer} no_answer + {result.rejected} rejected; "
        f"{result.inserted} inserted, {result.updated} updated, {result.deleted} deleted; {result.seconds:.2f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
