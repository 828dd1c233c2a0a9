"""Loads the answers of files again, from the Pachyderm commits that hold them. No model runs."""

import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from qa_platform.batches.archive import archive_files
from qa_platform.batches.holding import lease
from qa_platform.batches.run import Report
from qa_platform.clients import pachyderm
from qa_platform.clients.postgres import connect
from qa_platform.clients.services import Log, Services
from qa_platform.contract import ANSWER_PIPELINE, FileStatus, FileVersion, file_id
from qa_platform.errors import InputError
from qa_platform.ledger import FileRecord, Ledger
from qa_platform.ledger.states import WITHOUT_ANSWERS
from qa_platform.loading.load import load_file
from qa_platform.text import escaped, escaped_lines

_ANSWER_FIRST = "upload a rejected file again, corrected; to have another file answered, materialise answered_questions too"


def reload_files(services: Services, keys: Sequence[str], *, run_id: str, log: Log, report: Report = lambda records: None) -> None:
    """Load the answers of these partitions' files again. Files without answers, and files that another run holds, are left out.

    Args:
        report: called once with the records of the loaded files, and of those that were left out because they are rejected.

    Raises:
        InputError: none of the files has answers, or some could not be loaded: a commit is gone, or something newer exists. Raised after
            the others were loaded and reported.
    """
    problems = list[InputError]()
    with Ledger(services.postgres) as ledger:
        recorded = {key: _with_answers(ledger, record) for key, record in ledger.newest_by_partition(keys).items()}
        without = {key: why for key in keys if (why := _why_nothing_to_load(recorded.get(key)))}
        if len(without) == len(keys):
            key, why = next(iter(without.items()))
            number = f", as for all {len(keys)} partitions" if len(keys) > 1 else ""
            raise InputError(f"there are no answers to load{number}: {why.rstrip('.')}", where=f"partition {key!r}", advice=_ANSWER_FIRST)
        for key, why in without.items():
            log.warning("%s is skipped: %s", escaped(key), why)
        versions = [recorded[key].version for key in keys if key not in without]
        seconds = services.work.lease_seconds
        owned = ledger.take_over(versions, token=run_id, owner=run_id, lease_seconds=seconds)
        for name in sorted({version.name for version in versions} - {record.version.name for record in owned}):
            log.warning("%s is skipped: another run has claimed it", escaped(name))
        loaded = []
        try:
            with lease(ledger, run_id, seconds, log):
                for record in owned:
                    try:
                        _reload(services, record)
                    except InputError as error:
                        log.warning("%s", escaped_lines(str(error)))
                        problems.append(error)
                    else:
                        log.info("%s: loaded again from commit %s", record.version.shown, record.pachyderm_commit)
                        loaded.append(record)
                archive_files(services, ledger, _records(ledger, loaded), log=log)
        finally:
            ledger.release(run_id)
        rejected = [recorded[key] for key in without if key in recorded and recorded[key].status is FileStatus.REJECTED]
        report([*_records(ledger, loaded), *rejected])
    if problems:
        first = problems[0]
        number = f" (the first of {len(problems)} such files; the log names all)" if len(problems) > 1 else ""
        raise InputError(f"{first.what}{number}", where=first.where, advice=first.advice)


def _with_answers(ledger: Ledger, newest: FileRecord) -> FileRecord:
    """The record of the file whose answers can be loaded: the one in the table, if the newest upload has no answers of its own."""
    if newest.status is not FileStatus.UNCHANGED and newest.status not in WITHOUT_ANSWERS:
        return newest
    return ledger.in_the_table(newest.version.name) or newest


def _why_nothing_to_load(record: FileRecord | None) -> str:
    """Why a file has no answers that could be loaded; "" if it has."""
    if record and record.status is FileStatus.REJECTED:
        return f"it was rejected: {escaped_lines(record.error)}"
    return "" if record and record.pachyderm_commit else "it was never answered"


def _reload(services: Services, record: FileRecord) -> None:
    if load_commit(services, record.version, record.pachyderm_commit, job_id=record.pachyderm_job) is FileStatus.SUPERSEDED:
        raise InputError(
            "not loaded again: a newer version is loaded, a retry was requested, or the file was forgotten",
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
                f"not loaded: Pachyderm no longer has commit {commit} (QA_COMMITS_KEPT_DAYS)",
                where=name,
                advice="to answer it again, materialise answered_questions",
            ) from error
        return load_file(connection, Path(folder), commit_id=commit, job_id=job_id or commit).status


def _records(ledger: Ledger, of: Sequence[FileRecord]) -> list[FileRecord]:
    versions = [record.version for record in of]
    records = ledger.records(versions)
    return [records[version.name, version.generation] for version in versions]
