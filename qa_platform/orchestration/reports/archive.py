"""The check of the archive: every file under ``processed/`` is in the tables."""

from typing import Any

import dagster as dg

from qa_platform.batches.missing import Comparison, compare_archive, compare_commits
from qa_platform.clients.pachyderm import session
from qa_platform.clients.services import Services
from qa_platform.ledger import Ledger
from qa_platform.orchestration.catalog import RAW_QUESTIONS
from qa_platform.orchestration.reports.markdown import cell, table

ARCHIVED = "the_archive_is_in_the_table"
DESCRIPTION = (
    "Error. Every file whose source lies under `processed/`, or a newer upload of it, is in the table. If QA_ARCHIVE is `delete`, every "
    "file in Pachyderm's commits is. Compared every night. It fails after PostgreSQL was restored from an older backup."
)
# The maximum number of files that the metadata names.
_NAMED = 100


def archive_evaluation(services: Services) -> dg.AssetCheckEvaluation:
    """Compare the whole archive with the tables."""
    found = _compare(services)
    evidence: dict[str, Any] = {
        "compared": found.compared,
        "missing": len(found.missing),
        "on their way": len(found.coming),
        "objects with other names": found.unnamed,
    }
    if found.missing:
        rows = [(name, str(each.version.generation), each.place) for name, each in sorted(found.missing.items())[:_NAMED]]
        evidence |= {"files": dg.MetadataValue.md(table(("file", "generation", "source"), rows)), "what to do": "qa-platform restore"}
    first = ", ".join(cell(name) for name in sorted(found.missing)[:5])
    return dg.AssetCheckEvaluation(
        asset_key=RAW_QUESTIONS,
        check_name=ARCHIVED,
        passed=not found.missing,
        severity=dg.AssetCheckSeverity.ERROR,
        metadata=evidence,
        description=f"{len(found.missing)} files were answered and are not in the table: {first}" if found.missing else None,
    )


def _compare(services: Services) -> Comparison:
    gcs_bucket, suffixes = services.bucket, services.work.suffixes
    with Ledger(services.postgres) as ledger:
        if services.work.archive != "delete":
            return compare_archive(gcs_bucket, ledger, suffixes)
        with session(services.pachyderm, "comparing Pachyderm's commits with the tables") as client:
            return compare_commits(client, gcs_bucket, ledger, suffixes)
