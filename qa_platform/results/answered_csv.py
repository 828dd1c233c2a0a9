"""The answered CSV of a file whose rows are in the tables."""

from collections.abc import Callable, Iterator

from qa_platform.clients import pachyderm as pachd
from qa_platform.clients.postgres import connect
from qa_platform.contract import LOAD_PIPELINE, file_id
from qa_platform.ingest import with_delimiter
from qa_platform.ledger import FileRecord
from qa_platform.results.rebuilt_csv import rebuilt_csv
from qa_platform.settings import PachydermSettings, PostgresSettings

REBUILT = (
    "Pachyderm does not have them (QA_COMMITS_KEPT_DAYS has passed, the loading job has not ended or was stopped, or another file of the "
    "batch was forgotten), so they come from PostgreSQL, without the upload's other columns"
)


def answered_csv(
    pachyderm: PachydermSettings, postgres: PostgresSettings, record: FileRecord, *, tell: Callable[[str], object]
) -> Iterator[bytes]:
    """The answered CSV as it was loaded, piece by piece. If Pachyderm does not have it, `rebuilt_csv` rebuilds it.

    It has the upload's delimiter.

    Args:
        record: the generation whose rows are in the tables: `Ledger.in_the_table`.
        tell: called with `REBUILT` before the first piece of a rebuilt CSV.

    Raises, while it is iterated:
        InputError: Pachyderm or PostgreSQL refuses, or neither has all rows.
        TransientError: one of them is unavailable.
    """
    pieces = _with_commas(pachyderm, postgres, record, tell)
    return pieces if record.delimiter in (None, ",") else with_delimiter(pieces, record.delimiter)


def _with_commas(
    pachyderm: PachydermSettings, postgres: PostgresSettings, record: FileRecord, tell: Callable[[str], object]
) -> Iterator[bytes]:
    name, begun = record.version.name, False
    # A restored record may have no commit.
    if record.pachyderm_commit and _is_of_this_load(pachyderm, record):
        uri = f"{LOAD_PIPELINE}@{record.pachyderm_commit}:/{file_id(name)}.csv"
        try:
            with pachd.session(pachyderm, f"fetching the answers of {name}") as client:
                for piece in pachd.read_file(client, uri):
                    begun = True
                    yield piece
            return
        except pachd.NotThere:
            # Removed while it was read: the pieces that were yielded cannot be taken back.
            if begun:
                raise
    tell(REBUILT)
    with connect(postgres) as connection:
        yield from rebuilt_csv(connection, record)


def _is_of_this_load(pachyderm: PachydermSettings, record: FileRecord) -> bool:
    """Whether the loading job of the record's commit ended by itself. The commit of a stopped job may show an older load's files.

    Rows are in the tables before their job ends, and stay there if it is stopped. The commit of a failed job has the files that it loaded.
    """
    job = pachd.job_of(LOAD_PIPELINE, record.pachyderm_commit)
    try:
        with pachd.session(pachyderm, f"looking at the job that loaded {record.version.name}") as client:
            info = client.pps.inspect_job(job=job)
            if pachd.state_name(info.state) == "finishing":
                info = client.pps.inspect_job(job=job, wait=True)
            return pachd.state_name(info.state) in ("success", "failure")
    except pachd.NotThere:
        # The pipeline was recreated, or the commit is gone. Reading the file tells these apart.
        return True
