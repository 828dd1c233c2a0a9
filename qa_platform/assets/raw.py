"""`raw_questions`: the uploads themselves. People make them; the sensor reports them."""

from datetime import timedelta
from urllib.parse import quote

import dagster as dg
from google.cloud import storage

from qa_platform.assets.catalog import GROUP, OWNERS, RAW_QUESTIONS, RAW_SCHEMA, REPORTED_TAGS, REPORTED_VERSION, documentation
from qa_platform.bucket import place_when_done
from qa_platform.contract import INCOMING, FileVersion, partition_key
from qa_platform.markdown import cell
from qa_platform.partitions import question_files
from qa_platform.settings import CatalogSettings

_EXPECTED_HOURS = CatalogSettings().expected_hours
# Of an object's name, in a link to it.
_PLACE_CHARACTERS = 80

raw_questions = dg.AssetSpec(
    RAW_QUESTIONS,
    description="CSVs of questions and contexts, uploaded to `incoming/` in the bucket. The data version is the object's generation.",
    partitions_def=question_files,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"gcs", "csv"},
    code_version=REPORTED_VERSION,
    metadata={"dagster/column_schema": RAW_SCHEMA, "documentation": documentation("csv-contract.md")},
    # Only where somebody says how often files come: silence is no fault by itself. That the bucket is looked at is told by the
    # heartbeat, `incoming_listing`.
    freshness_policy=dg.FreshnessPolicy.time_window(fail_window=timedelta(hours=_EXPECTED_HOURS)) if _EXPECTED_HOURS else None,
)


def uploaded(bucket: storage.Bucket, version: FileVersion, *, archive: str) -> dg.AssetMaterialization:
    """The event that reports one upload. ``archive``: QA_ARCHIVE, for where it is found once it is answered."""
    return dg.AssetMaterialization(
        asset_key=RAW_QUESTIONS,
        partition=partition_key(version.name),
        tags={"dagster/data_version": str(version.generation), **REPORTED_TAGS},
        metadata={
            "name": version.name,
            "object": object_link(bucket, INCOMING + version.name),
            "once answered": object_link(bucket, place_when_done(version, mode=archive)),
            "generation": str(version.generation),
            "bytes": version.size,
            "crc32c": version.crc32c,
        },
    )


def object_link(bucket: storage.Bucket, place: str) -> dg.MetadataValue:
    """Where a browser shows an object: Google's console, or, at another endpoint, which has no console, the object itself."""
    if not place:
        return dg.MetadataValue.text("deleted once it is answered")
    endpoint, name = bucket.client.api_endpoint, quote(place, safe="")
    address = f"{endpoint}/download/storage/v1/b/{bucket.name}/o/{name}?alt=media"
    if endpoint.endswith("googleapis.com"):
        address = f"https://console.cloud.google.com/storage/browser/_details/{bucket.name}/{quote(place)}"
    # Not a bare address: browsers do not break it into lines, and it makes Dagster's pages wider than their windows.
    return dg.MetadataValue.md(f"[{cell(place, characters=_PLACE_CHARACTERS)}](<{address}>)")
