"""Building without Internet access, as in docs/deploying.md: only what the page collects is needed."""

import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

PROJECT = Path(__file__).parents[1]
PAGE = (PROJECT / "docs" / "deploying.md").read_text()
SECTION = PAGE.partition("### Without access to the Internet")[2].partition("\n## ")[0]
COMMANDS = [shlex.split(line) for block in re.findall(r"```console\n(.*?)```", SECTION, re.DOTALL) for line in block.splitlines()]
PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text())


def dockerfiles() -> dict[str, str]:
    paths = [PROJECT / "deploy" / "Dockerfile", *(PROJECT / "pachyderm").glob("*/Dockerfile")]
    return {str(path.relative_to(PROJECT)): path.read_text() for path in paths}


def builds() -> dict[str, list[str]]:
    """The build arguments that the page gives, by Dockerfile."""
    found = {}
    for words in COMMANDS:
        if words[:2] == ["docker", "build"]:
            found[words[words.index("--file") + 1]] = [words[i + 1] for i, word in enumerate(words) if word == "--build-arg"]
    return found


def test_the_page_builds_every_image_with_arguments_that_it_takes() -> None:
    assert set(builds()) == set(dockerfiles())
    for path, text in dockerfiles().items():
        taken = re.findall(r"^ARG (\w+)", text, re.MULTILINE)
        assert sorted(argument.partition("=")[0] for argument in builds()[path]) == sorted(set(taken) - {"MODEL_REVISION", "EXTRA"})
        # pip reads them as its own options: they must be known where it runs.
        stage = text.partition(" AS dependencies\n")[2]
        assert stage.index("ARG PIP_NO_INDEX\n") < stage.index("pip install")
        assert stage.index("ARG PIP_FIND_LINKS\n") < stage.index("pip install")


def test_the_page_builds_on_the_image_that_was_loaded() -> None:
    """What `docker load` brings has a tag, and no digest."""
    [pinned] = {found[1] for text in dockerfiles().values() if (found := re.search(r"^FROM (\S+)@sha256:\w+ AS base$", text, re.MULTILINE))}
    commands = [words for words in COMMANDS if words[:2] == ["docker", "build"]]
    assert [words[words.index("--build-context") + 1] for words in commands] == [f"base=docker-image://{pinned}"] * len(dockerfiles())


def test_the_page_collects_what_the_images_need() -> None:
    [collect] = [words for words in COMMANDS if "wheel" in words]
    [project] = [word for word in collect if word.startswith(".[")]
    collected = set(project[2:-1].split(","))
    extras = PYPROJECT["project"]["optional-dependencies"]
    while more := {name for extra in collected for line in extras[extra] for name in _own_extras(line)} - collected:
        collected |= more
    assert {extra for text in dockerfiles().values() for extra in re.findall(r"requirements\.py (\w+)", text)} <= collected
    # What builds the project's own wheel, in the image.
    assert {re.split(r"\W", requirement)[0] for requirement in PYPROJECT["build-system"]["requires"]} <= set(collect)
    [saved] = [words for words in COMMANDS if words[:2] == ["docker", "save"]]
    named = {image for text in dockerfiles().values() for image in re.findall(r"^FROM (\S+:\S+)@", text, re.MULTILINE)}
    assert named
    compose = yaml.safe_load((PROJECT / "deploy" / "compose.yaml").read_text())
    named |= {service["image"] for service in compose["services"].values() if "build" not in service}
    assert named <= set(saved)


def _own_extras(requirement: str) -> list[str]:
    own = re.match(r"qa-platform\[([\w,]+)\]", requirement)
    return own[1].split(",") if own else []


@pytest.mark.slow
def test_the_wheel_installs_without_an_index_and_answers_with_the_model_in_it(tmp_path: Path) -> None:
    """The packages that it needs are those of this interpreter: collecting them again is the page's own command, and takes minutes."""
    wheels, home = tmp_path / "wheels", tmp_path / "venv"
    _run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(wheels), str(PROJECT)], tmp_path)
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    install = ["install", "--no-index", "--find-links", str(wheels), "--no-deps", "qa-platform[cron,kubernetes]"]
    _run([sys.executable, "-m", "pip", "--python", str(python), *install], tmp_path)
    [site] = home.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))

    where = (
        "from qa_platform.provisioning.project_files import project_file; print(project_file('dagster.yaml'), project_file('pachyderm'))"
    )
    assert _run([str(python), "-c", where], tmp_path).split() == [
        str(home / "share/qa-platform" / name) for name in ("dagster.yaml", "pachyderm")
    ]
    (tmp_path / "my.csv").write_text("question,context\nWho built the bridge?,The bridge was built by Ada Blum in 1872.\n")
    answered = _run([str(home / "bin" / "qa-platform"), "answer", "my.csv"], tmp_path)
    assert answered.splitlines()[1].split(",")[2] == "Ada Blum"


def _run(command: list[str], folder: Path) -> str:
    environment = {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    environment |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
