"""`raw_questions`: the uploads themselves. People make them; the sensor reports them."""

import dagster as dg

from qa_platform.contract import FileVersion, partition_key
from qa_platform.partitions import question_files

RAW_QUESTIONS = dg.AssetKey("raw_questions")

raw_questions = dg.AssetSpec(
    RAW_QUESTIONS,
    description="CSVs of questions and contexts, uploaded to `incoming/` in the bucket. The data version is the object's generation.",
    partitions_def=question_files,
    group_name="questions",
    kinds={"gcs", "csv"},
)


def uploaded(version: FileVersion) -> dg.AssetMaterialization:
    """The event that reports one upload."""
    return dg.AssetMaterialization(
        asset_key=RAW_QUESTIONS,
        partition=partition_key(version.name),
        tags={"dagster/data_version": str(version.generation)},
        metadata={"name": version.name, "generation": str(version.generation), "bytes": version.size, "crc32c": version.crc32c},
    )
