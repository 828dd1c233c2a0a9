"""Parses the reports for owners of files."""

import csv
import io
from collections.abc import Iterable

from qa_platform.ingest import REPORT_COLUMNS


def parsed(report: bytes | Iterable[bytes]) -> list[dict[str, str]]:
    """The records of a report. Its header must be the documented one."""
    text = (report if isinstance(report, bytes) else b"".join(report)).decode()
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    records = list(reader)
    assert tuple(reader.fieldnames or ()) == REPORT_COLUMNS
    return records
