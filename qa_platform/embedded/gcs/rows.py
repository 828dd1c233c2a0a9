"""The rows of objects in the index: their columns are the fields of `StoredObject`, in this order."""

import dataclasses
import json
from typing import Any

from qa_platform.embedded.gcs.model import StoredObject

_FIELDS = tuple(column.name for column in dataclasses.fields(StoredObject))
LIVE_COLUMNS = ", ".join(_FIELDS)


def stored_object(row: tuple[Any, ...]) -> StoredObject:
    """The object of a row."""
    values = dict(zip(_FIELDS, row, strict=True))
    return StoredObject(**{**values, "attributes": json.loads(values["attributes"])})


def row_of(stored: StoredObject) -> tuple[Any, ...]:
    """The row of an object."""
    return (*(getattr(stored, name) for name in _FIELDS[:-1]), json.dumps(stored.attributes))
