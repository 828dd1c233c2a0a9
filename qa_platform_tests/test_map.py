"""The map in `docs/contributing.md` is correct: the rooms, their floors, and the functions that a file passes through."""

import importlib
import re
import tomllib
from types import ModuleType
from typing import Any

import dagster as dg
import pytest
import yaml  # type: ignore[import-untyped]

import qa_platform
from qa_platform_tests.checkout import PROJECT

PAGE = (PROJECT / "docs" / "contributing.md").read_text(encoding="utf-8")
MAP = PAGE.partition("## The map\n")[2].partition("\n## ")[0]
STATIONS = sorted(set(re.findall(r"`(\w+(?:\.\w+)+)`", MAP.partition("### The path of a file")[2].partition("### ")[0])))


def floors() -> list[set[str]]:
    """The rooms of the diagram, floor by floor, the highest first."""
    return [set(line.split()[1:]) for line in MAP.partition("```text")[2].partition("```")[0].splitlines() if re.match(r" +\d+ ", line)]


def layers() -> list[set[str]]:
    contracts = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    names = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [{room for room in map(str.strip, layer.split("|")) if not room.startswith("(")} for layer in names]


def test_the_floors_of_the_diagram_are_the_layers_that_are_enforced() -> None:
    assert floors() == layers()


def test_every_room_is_on_the_map_and_every_room_of_the_map_exists() -> None:
    package = PROJECT / "qa_platform"
    modules = {path.stem for path in package.glob("*.py") if path.stem != "__init__"}
    packages = {path.parent.name for path in package.glob("*/__init__.py")}
    assert set().union(*floors()) == modules | packages
    described = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\|([^|]*)\|", MAP, re.MULTILINE))))
    assert described == modules | packages


def test_there_are_stations_from_the_upload_to_the_archive() -> None:
    assert len(STATIONS) > 15
    assert {"clients.bucket.upload", "batches.archive.archive_file"} <= set(STATIONS)


@pytest.mark.parametrize("station", STATIONS)
def test_a_station_exists(station: str) -> None:
    where: Any = qa_platform
    for name in station.split("."):
        if isinstance(where, ModuleType) and not hasattr(where, name):
            importlib.import_module(f"{where.__name__}.{name}")
        where = getattr(where, name)
    assert callable(where)


def test_dg_finds_the_definitions_that_the_workspace_names() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["dg"]["project"]
    (location,) = yaml.safe_load((PROJECT / "workspace.yaml").read_text())["load_from"]
    assert project["code_location_target_module"] == location["python_module"]
    assert project["root_module"] == qa_platform.__name__
    assert isinstance(importlib.import_module(project["code_location_target_module"]).defs, dg.Definitions)
