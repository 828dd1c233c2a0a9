"""`raw_questions`: the uploads. People make them; the bucket sensor reports them."""

from datetime import timedelta

import dagster as dg

from qa_platform.orchestration.catalog import RAW_QUESTIONS, RAW_SCHEMA, AssetFactory
from qa_platform.orchestration.partitions import question_files


def raw_questions(factory: AssetFactory, *, expected_hours: int) -> dg.AssetSpec:
    """The uploads.

    Args:
        expected_hours: hours within which a new upload is expected. 0: none is expected, and there is no freshness policy; the
            heartbeat `incoming_listing` already shows whether the bucket is listed.
    """
    freshness = dg.FreshnessPolicy.time_window(fail_window=timedelta(hours=expected_hours)) if expected_hours else None
    return factory.spec(
        RAW_QUESTIONS,
        description="CSVs of questions and contexts, uploaded to `incoming/` in the bucket. The data version is the object's generation.",
        kinds={"gcs", "csv"},
        page="csv-contract.md",
        metadata={"dagster/column_schema": RAW_SCHEMA},
        partitions=question_files,
        freshness=freshness,
    )
