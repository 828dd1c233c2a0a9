"""The readings of a scrape, and their metrics. Settings are read each time, because mounted secrets may have changed.

No label contains a file name or any other text that users choose.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from prometheus_client.core import GaugeMetricFamily, Metric

from qa_platform.contract import INCOMING, PIPELINES
from qa_platform.settings import BucketSettings, CheckSettings, PachydermSettings, PostgresSettings, WorkSettings

if TYPE_CHECKING:
    from pachyderm_sdk.api import pps

    from qa_platform.ledger import FileRecord

Read = Callable[[], Iterable[Metric]]

# Shorter than the deadline of a scrape, so that no statement outlives it.
_STATEMENT_SECONDS = 5.0
# Recent files: loaded within this time, at most this many, the newest first. At most this many of their rows are read.
_RECENT_SECONDS = 3600.0
_RECENT_FILES = 1_000
_RECENT_ROWS = 100_000
_JOBS = 100
_QUANTILES = (0.5, 0.9, 1.0)


def _postgres() -> Iterator[Metric]:
    from qa_platform.clients.postgres import connect, transaction

    with connect(PostgresSettings()) as connection, transaction(connection) as cursor:
        cursor.execute("SELECT 1")
    yield from ()


def _bucket() -> Iterator[Metric]:
    from qa_platform.clients.bucket import open_bucket
    from qa_platform.clients.refusals import bucket_errors

    with bucket_errors("listing the bucket"):
        list(open_bucket(BucketSettings()).list_blobs(prefix=INCOMING, max_results=1, timeout=_STATEMENT_SECONDS, retry=None))
    yield from ()


def _pachd() -> Iterator[Metric]:
    from qa_platform.clients.pachyderm import session

    with session(PachydermSettings(), "asking for the version") as client:
        client.get_version()
    yield from ()


def _dagster() -> Iterator[Metric]:
    from qa_platform.cli.doctor.dagster import last_heartbeat

    yield _gauge(
        "qa_heartbeat_limit_seconds", "Age after which the heartbeat incoming_listing is not fresh.", WorkSettings().heartbeat_fails_after
    )
    if (beaten_at := last_heartbeat()) is not None:
        yield _gauge("qa_heartbeat_timestamp_seconds", "When the heartbeat incoming_listing last came.", beaten_at)


def _files() -> Iterator[Metric]:
    from qa_platform.ledger import Ledger

    with Ledger(PostgresSettings()) as ledger:
        files, totals = ledger.totals(seconds=_STATEMENT_SECONDS)
        parked = ledger.count_failed(seconds=_STATEMENT_SECONDS)
    yield _gauges("qa_files", "Generations of files on record, by state.", "state", {str(k): n for k, n in files.items()})
    rows = {"answered": totals.answered, "no_answer": totals.no_answer, "rejected": totals.rejected}
    yield _gauges("qa_rows", "Rows of all generations that were loaded, by result, as they were last loaded.", "result", rows)
    yield _gauge(
        "qa_oldest_waiting_seconds", "Age of the file that has waited longest to be loaded; 0 if none waits.", totals.oldest_seconds
    )
    yield _gauge("qa_deferred_files", "Deferred files: they wait for an external cause, and are not charged.", totals.deferred)
    yield _gauge(
        "qa_parked_files", "Files parked as failed: they wait until they are retried, uploaded again, or their source is deleted.", parked
    )
    yield _gauge("qa_charged_failures", "Failures charged to files that wait or are parked as failed.", totals.charged)
    yield _gauges("qa_claims", "Claims on files, by state.", "state", {"held": totals.held, "expired": totals.expired})
    yield _gauge("qa_archive_errors", "Files that are done and whose source could not be archived.", totals.archive_errors)
    last = totals.last_load.timestamp() if totals.last_load else 0
    yield _gauge("qa_last_load_timestamp_seconds", "When a file was last loaded; 0 if none ever was.", last)


def _recent() -> Iterator[Metric]:
    from qa_platform.clients.postgres import connect
    from qa_platform.ledger import Ledger
    from qa_platform.results.recent_scores import recent_scores

    settings = PostgresSettings()
    with Ledger(settings) as ledger:
        records = ledger.loaded_within(_RECENT_SECONDS, limit=_RECENT_FILES, seconds=_STATEMENT_SECONDS)
    yield _gauge("qa_recent_files", "Files loaded within the last hour, among the 1000 newest.", len(records))
    rows = {kind: sum(getattr(record, kind) for record in records) for kind in ("answered", "no_answer", "rejected")}
    yield _gauges("qa_recent_rows", "Rows of the recent files, by result.", "result", rows)
    yield _stages(records)
    with connect(settings) as connection:
        low_score = CheckSettings().low_score
        scores = recent_scores(connection, records, low_score=low_score, limit=_RECENT_ROWS, seconds=_STATEMENT_SECONDS)
    yield _gauge("qa_recent_scored_answers", "Answers of the recent files whose scores were read, at most 100000.", scores.rows)
    yield _gauge("qa_recent_low_score_answers", "Scored answers of the recent files with a score below QA_LOW_SCORE.", scores.low)


def _stages(records: Sequence["FileRecord"]) -> Metric:
    from qa_platform.ledger.overview import quantile, stage_seconds

    family = GaugeMetricFamily("qa_recent_stage_seconds", "Seconds that the recent files took, by stage.", labels=["stage", "quantile"])
    stages = [stage_seconds(record) for record in records]
    for stage in ("waiting", "answering", "loading"):
        values = [seconds[stage] for seconds in stages if stage in seconds]
        for share in _QUANTILES if values else ():
            family.add_metric([stage, f"{share:g}"], quantile(values, share))
    return family


def _jobs() -> Iterator[Metric]:
    from pachyderm_sdk.api import pps

    from qa_platform.clients.pachyderm import job_of, session, state_name

    states = [state_name(state) for state in pps.JobState if state != pps.JobState.JOB_STATE_UNKNOWN]
    jobs = GaugeMetricFamily("qa_pachyderm_jobs", "The 100 newest jobs of each pipeline, by state.", labels=["pipeline", "state"])
    restarts = GaugeMetricFamily(
        "qa_pachyderm_recent_job_restarts",
        "The most restarts of a job that was created within the last hour and has processed nothing since.",
        labels=["pipeline"],
    )
    with session(PachydermSettings(), "asking for the jobs") as client:
        for pipeline in PIPELINES:
            infos = list(client.pps.list_job(pipeline=job_of(pipeline, "").pipeline, number=_JOBS))
            names = [state_name(info.state) for info in infos]
            for state in states:
                jobs.add_metric([pipeline, state], names.count(state))
            restarts.add_metric([pipeline], max(map(_restarts, infos), default=0))
    yield jobs
    yield restarts


def _restarts(info: "pps.JobInfo") -> int:
    is_recent = info.created.timestamp() > time.time() - _RECENT_SECONDS
    # A job that has processed something did start eventually.
    return info.restart if is_recent and not info.data_processed else 0


def _certificates() -> Iterator[Metric]:
    from qa_platform.clients.credentials import certificate_expiries

    expiries = certificate_expiries(PostgresSettings(), PachydermSettings())
    left = {expiry.variable: expiry.expires_at.timestamp() - time.time() for expiry in expiries}
    yield _gauges("qa_certificate_expiry_seconds", "Seconds until the first certificate of a setting ends.", "setting", left)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _gauges(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


# `qa_up` says whether each service answers, `qa_read_success` whether each of the other readings worked.
SERVICES: Mapping[str, Read] = {"postgres": _postgres, "bucket": _bucket, "pachd": _pachd, "dagster": _dagster}
READINGS: Mapping[str, Read] = {"files": _files, "recent": _recent, "jobs": _jobs, "certificates": _certificates}
