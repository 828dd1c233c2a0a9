"""The JSON that commands write with `--json`. Its schemas, in ``schemas/``, are written from the same types by `make docs`."""

import json
from functools import cache
from typing import Any

from pydantic import TypeAdapter

from qa_platform.text import escaped_json


@cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def json_line(value: object) -> str:
    """A dataclass as a JSON object on one line, in which a terminal obeys nothing."""
    return escaped_json(json.dumps(_plain(value), ensure_ascii=False))


def json_document(value: object) -> str:
    """A dataclass as an indented JSON document."""
    return json.dumps(_plain(value), indent=1)


def _plain(value: Any) -> Any:
    # Not pydantic's own JSON: that refuses the surrogates which a path of this machine may have.
    # Classes are hashable, which mypy does not see.
    return _adapter(type(value)).dump_python(value, mode="json")  # type: ignore[arg-type]
