"""The JSON schemas of the commands' `--json` output, generated from its types."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import TypeAdapter

from qa_platform import cli
from qa_platform.batches.forget import Trace
from qa_platform.batches.restore import Restored
from qa_platform.cli.doctor.findings import Report
from qa_platform.cli.pachyderm import JobState, PipelineState
from qa_platform.cli.status.line import RecordedFile, UnseenFile
from qa_platform.evaluation.evaluate import Evaluation

FOLDER = Path(cli.__file__).parent / "schemas"
# By command. `doctor` and `evaluate` write one document, the others one per line.
OUTPUTS: Mapping[str, TypeAdapter[Any]] = MappingProxyType(
    {
        "doctor": TypeAdapter(Report),
        "evaluate": TypeAdapter(Evaluation),
        "forget": TypeAdapter(Trace),
        "pachyderm jobs": TypeAdapter(JobState),
        "pachyderm status": TypeAdapter(PipelineState),
        "restore": TypeAdapter(Restored),
        "status": TypeAdapter(RecordedFile | UnseenFile),
    }
)


def schemas() -> dict[Path, str]:
    """The text of every schema, by path."""
    return {FOLDER / f"{command.replace(' ', '-')}.json": _schema(command, adapter) for command, adapter in OUTPUTS.items()}


def _schema(command: str, adapter: TypeAdapter[Any]) -> str:
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    schema = adapter.json_schema(mode="serialization")
    return json.dumps({**head, **schema, "title": f"qa-platform {command} --json"}, indent=1) + "\n"
