import sys
from pathlib import Path

import pytest

from qa_platform.provisioning import project_files
from qa_platform.provisioning.project_files import project_file


def test_a_file_is_found_in_the_checkout() -> None:
    assert "storage:" in project_file("dagster.yaml").read_text()
    assert (project_file("pachyderm") / "question_answer" / "pipeline.json").exists()


def test_a_file_is_found_where_an_installation_has_put_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "share" / "qa-platform" / "dagster.yaml"
    place.parent.mkdir(parents=True)
    place.touch()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(project_files, "__file__", str(tmp_path / "lib" / "qa_platform" / "project_files.py"))
    assert project_file("dagster.yaml") == place


def test_a_missing_file_is_named_with_its_places() -> None:
    with pytest.raises(FileNotFoundError, match=r"no-such\.yaml is neither at .*/no-such\.yaml nor at .*/share/qa-platform/no-such\.yaml"):
        project_file("no-such.yaml")
