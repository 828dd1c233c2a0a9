"""The asset checks on the table, per file: no row was lost, every answer is in its context, and the scores are as usual.

PostgreSQL counts the rows, see `results.facts`; only the few rows that are shown are read. A failed check never holds back other
files. An error means that the table is wrong; a warning, that a person should look at the file.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import dagster as dg

from qa_platform.contract import RowReason, partition_key
from qa_platform.orchestration.catalog import QUESTION_ANSWER
from qa_platform.orchestration.reports.markdown import cell, histogram, table
from qa_platform.results.facts import AnsweredRow, FileFacts, PastFile
from qa_platform.settings import CheckSettings
from qa_platform.text import escaped

COMPLETE = "every_row_is_accounted_for"
RECORDED = "the_table_holds_what_is_recorded"
ANSWERED = "every_answered_row_has_an_answer"
SPANS = "every_answer_stands_in_its_context"
REVIEW = "few_rows_need_a_look"
DRIFT = "scores_are_as_usual"

# Evaluations that are read from Dagster's log at once.
_EVALUATIONS_AT_ONCE = 1_000
# With fewer earlier files than this there is no usual score.
_LEAST_HISTORY = 5
# A smaller difference of means does not matter, however regular the earlier files were.
_LEAST_DRIFT = 0.05

_SPECS = {
    COMPLETE: "Severity: error. Rows of the file = answered + no_answer + rejected, and as many are in the two tables.",
    RECORDED: "Severity: error. The tables hold as many answers, rows without an answer and rejected rows as `question_file` records, of "
    "the recorded generation and model, and no other rows of the file.",
    ANSWERED: "Severity: error. No row that counts as answered has an empty answer.",
    SPANS: "Severity: error. Every answer is the text of its context between its offsets.",
    REVIEW: "Severity: warning. The share of rows without an answer, or with a score below QA_LOW_SCORE, is at most QA_REVIEW_SHARE.",
    DRIFT: "Severity: warning. The file's mean score is not further from the mean of the last QA_DRIFT_FILES files of the same model "
    "than QA_DRIFT_DEVIATIONS standard deviations.",
}
CHECK_SPECS = [dg.AssetCheckSpec(name, asset=QUESTION_ANSWER, description=description) for name, description in _SPECS.items()]
_WARNINGS = frozenset({REVIEW, DRIFT})


def run_evaluations(instance: dg.DagsterInstance, run_id: str) -> Iterator[dg.AssetCheckEvaluation]:
    """The check evaluations of a run, in all attempts of its steps. They are read page by page: there are several per file."""
    cursor, has_more = None, True
    while has_more:
        kind = dg.DagsterEventType.ASSET_CHECK_EVALUATION
        page = instance.get_records_for_run(run_id, cursor, of_type=kind, limit=_EVALUATIONS_AT_ONCE)
        events = (record.event_log_entry.dagster_event for record in page.records)
        yield from (event.asset_check_evaluation_data for event in events if event)
        cursor, has_more = page.cursor, page.has_more


def file_evaluations(facts: FileFacts, settings: CheckSettings) -> Iterator[dg.AssetCheckEvaluation]:
    """The checks of one loaded file, as evaluations of its partition."""
    yield _complete(facts)
    yield _recorded(facts)
    empty = facts.counted.without_answer
    yield _evaluation(facts, ANSWERED, passed=not empty, evidence={"answered rows without an answer": empty})
    yield _spans(facts)
    yield _review(facts, settings)
    yield _drift(facts, settings)


def _complete(facts: FileFacts) -> dg.AssetCheckEvaluation:
    record, counted = facts.record, facts.counted
    accounted = record.answered + record.no_answer + record.rejected
    in_tables = counted.answered_rows + counted.reject_rows
    evidence = {
        "rows in the file": record.rows,
        "answered": record.answered,
        "no_answer": record.no_answer,
        "rejected": record.rejected,
        "rows in question_answer": counted.answered_rows,
        "rows in question_answer_reject": counted.reject_rows,
    }
    return _evaluation(facts, COMPLETE, passed=record.rows == accounted == in_tables, evidence=evidence)


def _recorded(facts: FileFacts) -> dg.AssetCheckEvaluation:
    record, no_answer = facts.record, facts.reasons.get(RowReason.NO_ANSWER, 0)
    compared = [
        ("answered", record.answered, facts.counted.answered_rows),
        ("no_answer", record.no_answer, no_answer),
        ("rejected", record.rejected, sum(facts.reasons.values()) - no_answer),
        ("rows of another generation", 0, facts.other_generation),
        ("rows of another model", 0, facts.other_model),
    ]
    return _evaluation(
        facts,
        RECORDED,
        passed=all(recorded == counted for _, recorded, counted in compared),
        evidence={
            "comparison": dg.MetadataValue.md(table(("", "question_file", "tables"), compared)),
            "model": f"{record.model} {record.model_revision}".strip(),
            "generation": str(record.version.generation),
        },
    )


def _spans(facts: FileFacts) -> dg.AssetCheckEvaluation:
    evidence: dict[str, Any] = {"answers": facts.counted.answered_rows, "answers that differ from their span": facts.counted.wrong_spans}
    if facts.wrong_rows:
        evidence["first of them"] = dg.MetadataValue.md(rows_table(facts.wrong_rows))
    return _evaluation(facts, SPANS, passed=not facts.counted.wrong_spans, evidence=evidence)


def _review(facts: FileFacts, settings: CheckSettings) -> dg.AssetCheckEvaluation:
    record, low = facts.record, facts.scores.low
    share = (record.no_answer + record.rejected + low) / max(record.rows, 1)
    evidence = {
        "share": round(share, 4),
        "warns above": settings.review_share,
        f"score below {settings.low_score:g}": low,
        "without an answer": dg.MetadataValue.md(reasons_table(facts)),
        "lowest scores": dg.MetadataValue.md(rows_table(facts.lowest)),
    }
    return _evaluation(facts, REVIEW, passed=share <= settings.review_share, evidence=evidence)


def _drift(facts: FileFacts, settings: CheckSettings) -> dg.AssetCheckEvaluation:
    """Compare the file's mean score with the means of earlier files.

    The allowed deviation is a multiple of the square root of the sum of two variances: the sample variance of the earlier means, and the
    variance of this file's mean (the variance of its scores divided by their number).
    """
    scores, past = facts.scores, facts.history
    evidence: dict[str, Any] = {
        "mean score": round(scores.mean, 4),
        "answers with a score": scores.scored,
        "scores": dg.MetadataValue.md(histogram(scores.counts, low=settings.low_score)),
        "earlier files": dg.MetadataValue.md(_history_table(past)),
    }
    if len(past) < _LEAST_HISTORY or not scores.scored:
        evidence["note"] = f"not compared: this needs {_LEAST_HISTORY} earlier files of this model, and an answer in this one"
        return _evaluation(facts, DRIFT, passed=True, evidence=evidence)
    means = [file.mean for file in past]
    usual = statistics.fmean(means)
    deviation = math.sqrt(statistics.variance(means) + scores.variance / scores.scored)
    allowed = max(_LEAST_DRIFT, settings.drift_deviations * deviation)
    evidence |= {"usual mean score": round(usual, 4), "difference": round(scores.mean - usual, 4), "allowed difference": round(allowed, 4)}
    return _evaluation(facts, DRIFT, passed=abs(scores.mean - usual) <= allowed, evidence=evidence)


def rows_table(rows: Sequence[AnsweredRow]) -> str:
    """Rows of the table as a Markdown table, each with the part of the context around its answer."""
    return table(
        ("row", "question", "answer", "score", "around it"),
        [(row.number, row.question, row.answer, row.score, row.passage) for row in rows],
    )


def reasons_table(facts: FileFacts) -> str:
    """The numbers of rows without an answer, by reason, as a Markdown table."""
    return table(("reason", "rows"), list(facts.reasons.items()))


def _history_table(past: Sequence[PastFile]) -> str:
    return table(("file", "answers", "mean score"), [(escaped(file.name), file.answered, file.mean) for file in past])


def _evaluation(facts: FileFacts, name: str, *, passed: bool, evidence: dict[str, Any]) -> dg.AssetCheckEvaluation:
    return dg.AssetCheckEvaluation(
        asset_key=QUESTION_ANSWER,
        check_name=name,
        passed=passed,
        severity=_severity(name),
        description=cell(facts.record.version.shown),
        partition=partition_key(facts.record.version.name),
        metadata=evidence,
    )


def _severity(name: str) -> dg.AssetCheckSeverity:
    return dg.AssetCheckSeverity.WARN if name in _WARNINGS else dg.AssetCheckSeverity.ERROR


# The maximum number of files that the metadata names.
_NAMED = 100


def run_results(evaluations: Sequence[dg.AssetCheckEvaluation]) -> Iterator[dg.AssetCheckEvaluation]:
    """One evaluation per check over all loaded files of a run, naming the files that failed it; none if no file was loaded.

    They have no partition. The evidence of each file is in its own evaluation. Dagster shows the newest evaluation of a check, so these
    come last.
    """
    # Without loaded files there is nothing to say: "passed" would be taken for a result.
    for name in _SPECS if evaluations else ():
        mine = [e for e in evaluations if e.check_name == name]
        bad = [e for e in mine if not e.passed]
        metadata: dict[str, Any] = {
            "files": dg.MetadataValue.int(len(mine)),
            "failed": dg.MetadataValue.json([escaped(e.partition or "") for e in bad[:_NAMED]]),
        }
        # With a single file, its evidence is the run's evidence.
        if len(mine) == 1:
            metadata = {**metadata, **mine[0].metadata}
        yield dg.AssetCheckEvaluation(
            asset_key=QUESTION_ANSWER,
            check_name=name,
            passed=not bad,
            severity=_severity(name),
            metadata=metadata,
            description=_summary(mine, bad),
        )


def without_evidence(evaluation: dg.AssetCheckEvaluation) -> dg.AssetCheckEvaluation:
    """An evaluation without its metadata, which may quote many rows: enough for `run_results`."""
    return dg.AssetCheckEvaluation(
        asset_key=evaluation.asset_key,
        check_name=evaluation.check_name,
        passed=evaluation.passed,
        severity=evaluation.severity,
        partition=evaluation.partition,
    )


def as_result(evaluation: dg.AssetCheckEvaluation) -> dg.AssetCheckResult:
    """An evaluation as a step returns it."""
    return dg.AssetCheckResult(
        asset_key=evaluation.asset_key,
        check_name=evaluation.check_name,
        passed=evaluation.passed,
        severity=evaluation.severity,
        metadata=evaluation.metadata,
        description=evaluation.description,
    )


def _summary(mine: Sequence[dg.AssetCheckEvaluation], bad: Sequence[dg.AssetCheckEvaluation]) -> str:
    if bad:
        return f"{len(bad)} of {len(mine)} files: {', '.join(cell(e.partition) for e in bad[:5])}{' …' if len(bad) > 5 else ''}"
    return "1 file" if len(mine) == 1 else f"{len(mine)} files"
