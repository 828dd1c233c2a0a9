"""Checks whether a command's output matches its JSON schema."""

import json

from pydantic import ValidationError

from qa_platform.tools.documentation.schemas import OUTPUTS


def fits(command: str, text: str) -> bool:
    """Whether a document has exactly the fields of the command's schema, with values of their types."""
    adapter = OUTPUTS[command]
    try:
        value = adapter.validate_json(text)
    except ValidationError:
        return False
    same: bool = adapter.dump_python(value, mode="json") == json.loads(text)
    return same
