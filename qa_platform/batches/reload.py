"""Loads the answers of files again, from the Pachyderm commits that hold them. No model runs."""

import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from qa_platform.batches.archive import archive_files
from qa_platform.batches.holding import lease
from qa_platform.clients import pachyderm
from qa_platform.clients.postgres import connect
from qa_platform.clients.services import Log, Services
from qa_platform.contract import ANSWER_PIPELINE, FileStatus, FileVersion, file_id
from qa_platform.errors import InputError
from qa_platform.ledger import FileRecord, Ledger
from qa_platform.loading.load import load_file
from qa_platform.text import escaped


def reload_files(services: Services, keys: Sequence[str], *, run_id: str, log: Log) -> tuple[FileRecord, ...]:
    """Load the answers of these partitions' files again.

    Returns:
        Their records. Files that another run holds are left out.

    Raises:
        InputError: a file was never answered, its commit is gone, or it is superseded.
    """
    with Ledger(services.postgres) as ledger:
        versions = _answered(ledger, keys)
        seconds = services.work.lease_seconds
        owned = ledger.take_over(versions, token=run_id, owner=run_id, lease_seconds=seconds)
        for name in sorted({version.name for version in versions} - {record.version.name for record in owned}):
            log.warning("%s is skipped: another run has claimed it", escaped(name))
        try:
            with lease(ledger, run_id, seconds, log):
                for record in owned:
                    _reload(services, record)
                    log.info("%s: loaded again from commit %s", record.version.shown, record.pachyderm_commit)
                archive_files(services, ledger, _records(ledger, owned), log=log)
        finally:
            ledger.release(run_id)
        return tuple(_records(ledger, owned))


def _answered(ledger: Ledger, keys: Sequence[str]) -> list[FileVersion]:
    recorded = ledger.newest_by_partition(keys)
    for key in keys:
        if key not in recorded or not recorded[key].pachyderm_commit:
            raise InputError(
                f"partition {key!r} was never answered, so there is nothing to load", advice="materialise answered_questions with it"
            )
    return [recorded[key].version for key in keys]


def _reload(services: Services, record: FileRecord) -> None:
    if load_commit(services, record.version, record.pachyderm_commit, job_id=record.pachyderm_job) is FileStatus.SUPERSEDED:
        raise InputError(
            "not reloaded: a newer version is loaded, a retry was requested, or the file was forgotten",
            where=record.version.name,
            advice="nothing to do: the sensor answers what is still waiting",
        )


def load_commit(services: Services, version: FileVersion, commit: str, *, job_id: str = "") -> FileStatus:
    """Load the answers of one file from the Pachyderm commit that holds them. Returns the file's new status.

    Raises:
        InputError: the commit is gone, or does not hold all answers of the file.
    """
    name = version.name
    with tempfile.TemporaryDirectory(prefix="qa-reload-") as folder, connect(services.postgres) as connection:
        try:
            with pachyderm.session(services.pachyderm, f"fetching the answers of {name}") as client:
                pachyderm.fetch_folder(client, f"{ANSWER_PIPELINE}@{commit}:/{file_id(name)}", Path(folder))
        except (pachyderm.NotThere, tarfile.TarError) as error:
            raise InputError(
                f"Pachyderm no longer has commit {commit} (QA_COMMITS_KEPT_DAYS)",
                where=name,
                advice="to answer it again, materialise answered_questions",
            ) from error
        return load_file(connection, Path(folder), commit_id=commit, job_id=job_id or commit).status


def _records(ledger: Ledger, of: Sequence[FileRecord]) -> list[FileRecord]:
    versions = [record.version for record in of]
    records = ledger.records(versions)
    return [records[version.name, version.generation] for version in versions]
