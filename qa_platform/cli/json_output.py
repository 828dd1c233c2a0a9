"""The JSON that commands write with `--json`. `make docs` generates its schemas, in ``schemas/``, from the same types."""

import json
from functools import cache
from typing import Any

import click
from pydantic import TypeAdapter

from qa_platform.text import escaped_json


@cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def json_line(value: object) -> str:
    """A dataclass as a JSON object on one line, without control characters that a terminal would obey."""
    return escaped_json(json.dumps(_plain(value), ensure_ascii=False))


def echo_json(value: object) -> None:
    """Write `json_line` to standard output, in UTF-8 whatever the terminal's encoding."""
    click.echo(json_line(value).encode())


def json_document(value: object) -> str:
    """A dataclass as an indented JSON document."""
    return json.dumps(_plain(value), indent=1)


def _plain(value: Any) -> Any:
    # Not `dump_json`: it refuses the lone surrogates that a local path may contain.
    # mypy does not see that classes are hashable.
    return _adapter(type(value)).dump_python(value, mode="json")  # type: ignore[arg-type]
