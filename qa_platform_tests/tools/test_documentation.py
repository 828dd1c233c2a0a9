"""The documentation is correct and complete: its commands work, its links lead somewhere, and nothing user-facing is missing.

Commands in ``sh`` blocks are run in order on the embedded stack, or elsewhere, as listed in `ELSEWHERE`. Those in ``console`` blocks are
for clusters, and are only parsed. Both are parsed by the real parsers of `qa-platform`, Dagster and the Makefile.
"""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import click
import pytest
import yaml  # type: ignore[import-untyped]
from dagster._cli import create_dagster_cli

from qa_platform.cli.doctor.examine import PARTS
from qa_platform.cli.main import main as qa_platform_command
from qa_platform.cli.status.observe import UPLOADED
from qa_platform.contract import FileReason, FileStatus, RowReason
from qa_platform.definitions import defs
from qa_platform.embedded.stack import Stack, open_stack
from qa_platform.orchestration.notifications import notification_sensors
from qa_platform.settings import NotificationSettings
from qa_platform.tools.documentation.reference import pages, settings_classes, variable
from qa_platform_tests.checkout import PROJECT, make_checkout
from qa_platform_tests.command_lines import parse_click
from qa_platform_tests.conftest import server_folder

PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
IDS = [str(page.relative_to(PROJECT)) for page in PAGES]

# Commands that take too long here, and who runs them.
ELSEWHERE = {
    "make demo": ".ci/run",
    "make test": ".ci/run",
    "make lint": "make test",
    "make setup": "make test",
    "make dev": "test_browser.py",
    "make screenshot": ".github/workflows/weekly.yaml, and its parts in test_browser.py",
    "make docs": "test_what_repeats_the_code_is_as_the_code_says",
    "make faults": ".github/workflows/weekly.yaml, and test_faults.py, a short form",
    "make bench": ".github/workflows/weekly.yaml",
    "make model": "training/test_train.py, a short form",
    ".venv/bin/python -m qa_platform.training.calibrate": "training/test_calibrate.py",
    ".venv/bin/python -m qa_platform.training.questions": "training/test_questions.py",
    ".venv/bin/python -m pytest": "make test",
}
# Programs of which only the names are known here: those of clusters, and the shell's own.
FOREIGN = {
    "bash",
    "cat",
    "cd",
    "cp",
    "curl",
    "dg",
    "docker",
    "export",
    "gcloud",
    "git",
    "gsutil",
    "helm",
    "jq",
    "jupyter",
    "kubectl",
    "pachctl",
    "pg_dump",
    "pg_restore",
    "pip",
    "psql",
    "sh",
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; ``line`` is where it begins."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """The commands of a shell block, without comments; in a ``console`` block what follows a prompt, if there are prompts."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console" and any(line.startswith("$ ") for line in lines):
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return [words for line in lines if (words := without_comment(line))]


def without_comment(line: str) -> str:
    return re.sub(r"(^|\s)#.*", "", line).strip()


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^( *)```([^\n]*)\n(.*?)^\1```$", text, flags=re.DOTALL | re.MULTILINE):
        yield Block(
            page, text[: found.start()].count("\n") + 1, found[2].strip(), re.sub(rf"^{found[1]}", "", found[3], flags=re.MULTILINE)
        )


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUN_HERE = [
    (block, command) for block in BLOCKS if block.language == "sh" for command in block.commands if not command.startswith(tuple(ELSEWHERE))
]


def simple_commands(command: str) -> Iterator[list[str]]:
    """The simple commands of a shell's command line, with those inside ``sh -c`` and after ``local run --``."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    words: list[str] = []
    for token in [*lexer, ";"]:
        if not set(token) <= set("|&;"):
            words.append(token)
            continue
        yield from _inner(words)
        words = []


def _inner(words: list[str]) -> Iterator[list[str]]:
    while words and re.fullmatch(r"[A-Za-z_][A-Za-z_0-9]*=.*", words[0]):
        words = words[1:]
    if ">" in words:
        words = words[: words.index(">")]
    if words and words[0] == "export":
        return
    if words:
        words = [Path(words[0]).name if words[0].startswith(".venv/bin/") else words[0], *words[1:]]
        yield words
    if words[:2] in (["sh", "-c"], ["bash", "-c"]):
        yield from simple_commands(words[2])
    elif "--" in words and "run" in words:
        yield from _inner(words[words.index("--") + 1 :])


def parse(words: Sequence[str]) -> None:
    """Parse a command by its own parser; an exception if that refuses it."""
    program, arguments = words[0], list(words[1:])
    if program == "qa-platform":
        parse_click(qa_platform_command, arguments)
    elif program == "dagster":
        parse_click(create_dagster_cli(), arguments)
        if "execute" in arguments:
            defs.resolve_job_def(arguments[arguments.index("-j") + 1])
    elif program == "make":
        makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
        for word in arguments:
            name, is_variable, _ = word.partition("=")
            wanted = rf"\$\({name}\)|\$\$\{{{name}\b" if is_variable else rf"^{name}:"
            assert re.search(wanted, makefile, re.MULTILINE), f"make knows no {word}"
    elif program in ("python", "python3"):
        assert arguments[0] == "-m", f"{' '.join(words)}: only modules are run"
        assert importlib.util.find_spec(arguments[1]), f"there is no module {arguments[1]}"
    else:
        assert program in FOREIGN, f"what is {program}?"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_is_of_a_kind_that_is_checked(block: Block) -> None:
    assert block.language in ("", "text", "csv", "sh", "console", "python", "yaml", "json")
    if block.language in ("yaml", "json"):
        assert list(yaml.safe_load_all(block.text))


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language in ("sh", "console")], ids=str)
def test_every_command_is_taken_by_its_parser(block: Block, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    for command in block.commands:
        for words in simple_commands(command):
            parse(words)


@pytest.mark.parametrize("command", ["qa-platform no-such", "qa-platform status --no-such", "make no-such", "no-such", "python -m no_such"])
def test_a_command_that_does_not_exist_is_noticed(command: str) -> None:
    with pytest.raises((click.UsageError, AssertionError)):
        parse(command.split())


def test_what_is_run_elsewhere_is_in_the_documentation() -> None:
    commands = [command for block in BLOCKS if block.language == "sh" for command in block.commands]
    assert [start for start in ELSEWHERE if not any(command.startswith(start) for command in commands)] == []


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """A stack of these tests' own: files wait in it when the pages' commands are through."""
    with server_folder() as state, open_stack(state) as stack:
        yield stack


@pytest.fixture(scope="module")
def answered(stack: Stack, checkout: Path) -> Path:
    """The folder, with its CSV answered on the stack, which is the one in its `.qa`."""
    (checkout / ".qa").symlink_to(stack.state)
    [whole_way] = {command for _, command in RUN_HERE if "dagster job execute" in command}
    _run(whole_way, stack, checkout)
    return checkout


def _run(command: str, stack: Stack, folder: Path) -> str:
    bash = shutil.which("bash")
    assert bash
    environment = {**stack.environment, "QA_CACHE_DIR": str(folder / "cache"), "COLUMNS": "120"}
    done = subprocess.run(
        [bash, "-euo", "pipefail", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.slow
def test_commands_of_the_pages_run(stack: Stack, answered: Path) -> None:
    done: set[str] = set()
    for _, command in RUN_HERE:
        if command not in done and "dagster job execute" not in command and "-- bash" not in command:
            _run(command, stack, answered)
            done.add(command)
    assert _run("qa-platform answers my.csv", stack, answered).splitlines()[1].split(",")[2] == "Ada Blum"


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=str)
def test_python_blocks_run(block: Block, stack: Stack, answered: Path) -> None:
    assert _run(shlex.join([sys.executable, "-c", block.text]), stack, answered)


@pytest.mark.slow
def test_commands_for_a_deployment_run(stack: Stack, answered: Path) -> None:
    """Those of the platform in `console` blocks. The file is forgotten last. The command `metrics` has a test of its own."""
    pages = ("deploying.md", "upgrading.md", "operating.md")
    blocks = [block for page in pages for block in BLOCKS if block.page.name == page and block.language == "console"]
    run_before = {command for _, command in RUN_HERE} | {"qa-platform metrics --listen 127.0.0.1:9464"}
    commands = [command for block in blocks for command in block.commands if command.startswith("qa-platform ")]
    lines = [command for command in commands if command not in run_before]
    assert lines[-1] == "qa-platform forget my.csv"
    for line in dict.fromkeys(lines):
        _run(line, stack, answered)
    seen = [line for line in _run("qa-platform status", stack, answered).splitlines() if "my.csv" in line]
    assert seen
    assert all("forgotten" in line for line in seen)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{target} is not there"
        assert PROJECT in linked.parents
        if anchor:
            assert anchor in headings(linked), f"{target}: no such heading"


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as Git hosts make them."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_files_that_are_named_exist(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    roots = {path.name for path in PROJECT.iterdir() if path.name not in (".venv", ".qa")}
    for name in re.findall(r"`([\w.-]+/[\w./-]*)`", text):
        # A file of secrets is the reader's own.
        if name.split("/")[0] in roots and not name.endswith(".env"):
            assert (PROJECT / name).exists(), f"{name} is not there"


def test_what_repeats_the_code_is_as_the_code_says() -> None:
    old = [str(path.relative_to(PROJECT)) for path, text in pages().items() if not path.exists() or path.read_text("utf-8") != text]
    assert not old, f"{', '.join(old)}: run `make docs`"


def test_every_setting_is_described() -> None:
    page = (PROJECT / "docs" / "configuration.md").read_text(encoding="utf-8")
    names = [variable(cls, name) for cls in settings_classes() for name in cls.model_fields]
    assert len(names) > 40
    assert [name for name in names if f"`{name}`" not in page] == []


def _things() -> dict[str, set[str]]:
    """What people meet, and the page that explains it."""
    repository = defs.get_repository_def()
    return {
        "csv-contract.md": {*FileReason, *RowReason},
        "how-it-works.md": {*FileStatus, UPLOADED},
        "operating.md": {
            *(key.name for key in repository.asset_checks_defs_by_key),
            *(sensor.name for sensor in repository.sensor_defs),
            *(sensor.name for sensor in notification_sensors(NotificationSettings(email_to=("ops@example.org",)))),
            *(name for part in PARTS for name in part.names),
            *(job.name for job in repository.get_all_jobs() if not job.name.startswith("__")),
            *(key.path[-1] for key in repository.assets_defs_by_key),
        },
    }


@pytest.mark.parametrize("page", list(_things()))
def test_everything_that_people_meet_is_explained(page: str) -> None:
    text = (PROJECT / "docs" / page).read_text(encoding="utf-8")
    assert sorted(str(thing) for thing in _things()[page] if f"`{thing}`" not in text) == []


def test_every_command_has_its_place_in_the_documentation() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in commands_of(qa_platform_command) if f"qa-platform {name}" not in text] == []


def commands_of(group: click.Group, prefix: str = "") -> Iterator[str]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands_of(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}"
