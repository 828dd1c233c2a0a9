"""The events and links of uploads."""

from urllib.parse import quote

import dagster as dg
from google.cloud import storage

from qa_platform.clients.answered_csvs import answered_name
from qa_platform.clients.bucket import place_when_done
from qa_platform.contract import INCOMING, FileVersion, partition_key
from qa_platform.orchestration.catalog import RAW_QUESTIONS, REPORTED_TAGS
from qa_platform.orchestration.reports.commands import answers_query
from qa_platform.orchestration.reports.markdown import cell
from qa_platform.settings import WorkSettings
from qa_platform.text import escaped

# Characters of an object's name in the text of a link.
_NAME_CHARACTERS = 80


def uploaded(bucket: storage.Bucket, version: FileVersion, work: WorkSettings) -> dg.AssetMaterialization:
    """The event of an upload. ``work`` decides where the object and its answered CSV will be once it is answered."""
    return dg.AssetMaterialization(
        asset_key=RAW_QUESTIONS,
        partition=partition_key(version.name),
        tags={"dagster/data_version": str(version.generation), **REPORTED_TAGS},
        metadata={
            "name": version.shown,
            "object, until it is answered": object_link(bucket, INCOMING + version.name),
            "object, once answered": object_link(bucket, place_when_done(version, mode=work.archive)),
            **answered_link(bucket, version, work),
            "its answers, once answered": answers_query(version.name),
            "generation": str(version.generation),
            "bytes": version.size,
            "crc32c": version.crc32c,
        },
    )


def answered_link(bucket: storage.Bucket, version: FileVersion, work: WorkSettings) -> dict[str, dg.MetadataValue]:
    """A link to a file's answered CSV; empty if none is written. The object appears shortly after the file is finished."""
    if not work.answered_prefix:
        return {}
    return {"answered CSV": object_link(bucket, answered_name(work.answered_prefix, version.name))}


def object_link(bucket: storage.Bucket, name: str) -> dg.MetadataValue:
    """A link to an object: in Google's console, or, at an endpoint without a console, to the object itself.

    Args:
        name: the object's name; "" if it is deleted once it is answered.
    """
    if not name:
        return dg.MetadataValue.text("deleted once it is answered")
    shown = cell(escaped(name), characters=_NAME_CHARACTERS)
    # Browsers resolve such a part, and would open another page.
    if {".", ".."} & set(name.split("/")):
        return dg.MetadataValue.md(shown)
    endpoint = bucket.client.api_endpoint
    address = f"{endpoint}/download/storage/v1/b/{bucket.name}/o/{quote(name, safe='')}?alt=media"
    if endpoint.endswith("googleapis.com"):
        address = f"https://console.cloud.google.com/storage/browser/_details/{bucket.name}/{quote(name)}"
    # Not a bare address: browsers do not wrap it, and it makes Dagster's pages wider than their windows.
    return dg.MetadataValue.md(f"[{shown}](<{address}>)")
