"""The JSON schemas of the commands. The commands' own tests check that real outputs fit them."""

import json
from collections.abc import Iterator
from typing import Any

import click
import pytest

from qa_platform.batches.restore import Restored, RestoreState
from qa_platform.cli.json_output import json_line
from qa_platform.cli.main import main
from qa_platform.tools.documentation.schemas import FOLDER, OUTPUTS, schemas
from qa_platform_tests.json_schemas import fits

LINE = {"name": "a.csv", "generation": 1, "state": "lost", "source": "", "detail": "both are gone"}


def with_json(group: click.Group, *path: str) -> Iterator[str]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from with_json(command, *path, name)
        elif any("--json" in option.opts for option in command.params):
            yield " ".join((*path, name))


def test_every_command_with_json_has_a_schema_and_no_other_lies_there() -> None:
    assert sorted(with_json(main)) == sorted(OUTPUTS)
    assert set(FOLDER.iterdir()) == set(schemas())


@pytest.mark.parametrize(
    ("changes", "is_fit"), [({}, True), ({"generation": "one"}, False), ({"state": "found"}, False), ({"more": 1}, False)]
)
def test_what_a_schema_does_not_say_does_not_fit(changes: dict[str, Any], is_fit: bool) -> None:
    assert fits("restore", json.dumps({**LINE, **changes})) == is_fit


def test_a_field_that_is_left_out_does_not_fit() -> None:
    assert not fits("restore", json.dumps({name: value for name, value in LINE.items() if name != "detail"}))


def test_a_line_holds_no_character_that_a_terminal_obeys_and_the_same_values() -> None:
    name = "a\x1b[2J\u202e\udcff.csv"
    line = json_line(Restored(name, 1, RestoreState.LOST))
    assert line.isprintable()
    assert json.loads(line)["name"] == name
