"""Entry point of the pipeline ``push-answers-to-sql``: one datum is one answered file.

``python -m qa_platform.loading.worker`` brings the tables up to date, loads the folder that the variable ``question_answer`` names,
and writes the whole answered file to ``/pfs/out/<file id>.csv``.
"""

import logging
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from qa_platform.contract import BLAMELESS, LOAD_PIPELINE, FileStatus
from qa_platform.database import connect
from qa_platform.errors import InputError, QaPlatformError, TransientError
from qa_platform.loading import migrate
from qa_platform.loading.answered import read_answered, write_csv
from qa_platform.loading.load import LoadResult, load_file
from qa_platform.settings import DatumSettings, PostgresSettings, WorkerSettings

logger = logging.getLogger(LOAD_PIPELINE)

# How long one datum waits for a PostgreSQL that is away, all tries together. A restart takes seconds, and a datum that fails
# charges its file with an attempt that the file is not guilty of.
PATIENCE_SECONDS = 120.0
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 15.0


def main() -> int:
    """Load the datum that the environment names. Exit status 0, or 1 with one line that says why."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        datum, worker = DatumSettings(), WorkerSettings()
        if not datum.question_answer:
            raise InputError("the variable question_answer is empty: this is the program of a pipeline whose input is question_answer")
        folder = _below(worker.pfs_root, Path(datum.question_answer))
        result = _load_with_patience(PostgresSettings(), folder, datum)
        write_csv(read_answered(folder), worker.pfs_root / "out" / f"{folder.name}.csv")
    except (TransientError, OSError, _NoDatabase) as error:
        logger.error("%s%s", BLAMELESS, " ".join(str(error).split()))
        return 1
    except QaPlatformError as error:
        logger.error("%s", error)
        return 1
    logger.info("%s", _line(result))
    return 0


class _NoDatabase(InputError):
    """The database does not take this program in, whatever it wants to load."""


@contextmanager
def _open(postgres: PostgresSettings) -> Iterator[psycopg.Connection]:
    try:
        migrate.upgrade(postgres)
        connection = connect(postgres)
    except InputError as error:
        raise _NoDatabase(f"{error} (the secret dbaccess)") from error
    with connection:
        yield connection


def _load_with_patience(postgres: PostgresSettings, folder: Path, datum: DatumSettings) -> LoadResult:
    deadline, pause = time.monotonic() + PATIENCE_SECONDS, _FIRST_PAUSE_SECONDS
    while True:
        try:
            with _open(postgres) as connection:
                return load_file(connection, folder, job_id=datum.pach_job_id, commit_id=datum.pach_output_commit_id)
        except TransientError as error:
            if time.monotonic() + pause > deadline:
                raise
            logger.warning("%s; trying again for up to %.0f s", error, deadline - time.monotonic())
        time.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def _below(root: Path, path: Path) -> Path:
    """The folder as this process sees it: paths in the environment begin with ``/pfs``, wherever the root is."""
    return root / path.relative_to("/pfs") if path.is_relative_to("/pfs") else path


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
