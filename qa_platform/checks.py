"""The asset checks on the table: evidence, per file, that no row was lost and every answer stands in its context.

All of it is counted by SQL; no row travels through the run. A check never holds other files.
"""

from collections.abc import Iterator

import dagster as dg

from qa_platform.bookkeeping import FileCheck, FileRecord
from qa_platform.contract import partition_key

QUESTION_ANSWER = dg.AssetKey("question_answer")

COMPLETE = "every_row_is_accounted_for"
ANSWERED = "every_answered_row_has_an_answer"
SPANS = "every_answer_stands_in_its_context"

CHECK_SPECS = [
    dg.AssetCheckSpec(
        COMPLETE, asset=QUESTION_ANSWER, description="Rows in the file = answered + no_answer + rejected, and as many are in the tables."
    ),
    dg.AssetCheckSpec(ANSWERED, asset=QUESTION_ANSWER, description="No row that counts as answered has an empty answer."),
    dg.AssetCheckSpec(SPANS, asset=QUESTION_ANSWER, description="Every answer is the text of its context between its offsets."),
]


def file_evaluations(record: FileRecord, counted: FileCheck) -> Iterator[dg.AssetCheckEvaluation]:
    """The three checks of one loaded file, as evaluations of its partition."""
    accounted = record.answered + record.no_answer + record.rejected
    in_tables = counted.answered_rows + counted.reject_rows
    numbers = {
        "rows in the file": record.rows,
        "answered": record.answered,
        "no_answer": record.no_answer,
        "rejected": record.rejected,
        "rows in question_answer": counted.answered_rows,
        "rows in question_answer_reject": counted.reject_rows,
    }
    complete = record.rows == accounted == in_tables and record.answered == counted.answered_rows
    yield _evaluation(record, COMPLETE, passed=complete, numbers=numbers)
    yield _evaluation(
        record, ANSWERED, passed=not counted.without_answer, numbers={"answered rows without an answer": counted.without_answer}
    )
    yield _evaluation(record, SPANS, passed=not counted.wrong_spans, numbers={"answers that differ from their span": counted.wrong_spans})


def _evaluation(record: FileRecord, name: str, *, passed: bool, numbers: dict[str, int]) -> dg.AssetCheckEvaluation:
    return dg.AssetCheckEvaluation(
        asset_key=QUESTION_ANSWER,
        check_name=name,
        passed=passed,
        severity=dg.AssetCheckSeverity.ERROR,
        partition=partition_key(record.version.name),
        metadata={key: dg.MetadataValue.int(value) for key, value in numbers.items()},
    )


def batch_results(evaluations: list[dg.AssetCheckEvaluation]) -> Iterator[dg.AssetCheckResult]:
    """One result per check over all files of a run, naming the files that failed it. A run without loaded files passes."""
    for spec in CHECK_SPECS:
        mine = [e for e in evaluations if e.check_name == spec.name]
        bad = [e.partition or "" for e in mine if not e.passed]
        metadata = {"files": dg.MetadataValue.int(len(mine)), "failed": dg.MetadataValue.json(bad[:100])}
        yield dg.AssetCheckResult(asset_key=QUESTION_ANSWER, check_name=spec.name, passed=not bad, metadata=metadata)
