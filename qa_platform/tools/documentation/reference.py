"""Generates the parts of the documentation that repeat the code: ``python -m qa_platform.tools.documentation.reference``.

It writes the whole of ``configuration.md``, the blocks between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` of other pages, and the
JSON schemas, which are next to the commands.
"""

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from qa_platform import settings
from qa_platform.ingest import FILE_HINTS, ROW_HINTS
from qa_platform.provisioning.project_files import project_file
from qa_platform.tools.documentation.schemas import schemas

_CONFIGURATION_HEAD = """\
# Configuration

<!-- Written by `make docs` from qa_platform/settings.py; changes here are lost. -->

The platform is configured by environment variables. Their names may be in upper or lower case, except those that Google's client and
Dagster read themselves: `GOOGLE_APPLICATION_CREDENTIALS`, `API_ENDPOINT_OVERRIDE` and all that begin with `DAGSTER_`. A process needs only
the variables of the parts that it uses, and a variable without a default need not be set. On a laptop `qa-platform local run` sets the
variables of the services, and passes on every `QA_` variable.

Values marked **secret** are never shown in logs, messages, or what `--dry-run` prints.
"""


def configuration_page() -> str:
    """The reference of all settings: a section per class, a line per variable."""
    return "\n".join([_CONFIGURATION_HEAD, *(_section(cls) for cls in settings_classes())])


def settings_classes() -> list[type[BaseSettings]]:
    """The settings classes of `qa_platform.settings`, in source order."""
    return [
        value
        for value in vars(settings).values()
        if isinstance(value, type)
        and issubclass(value, BaseSettings)
        and value.__module__ == settings.__name__
        and value.__name__[0] != "_"
    ]


def variable(cls: type[BaseSettings], name: str) -> str:
    """The environment variable that a field is read from."""
    alias = cls.model_fields[name].validation_alias
    return alias if isinstance(alias, str) else f"{cls.model_config.get('env_prefix', '')}{name}".upper()


def _section(cls: type[BaseSettings]) -> str:
    title = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", cls.__name__.removesuffix("Settings"))
    about = " ".join((cls.__doc__ or "").replace("``", "`").split())
    lines = (f"- `{variable(cls, name)}`{_facts(field)}: {field.description}" for name, field in cls.model_fields.items())
    return "\n".join([f"## {title}", "", about, "", *lines, ""])


def _facts(field: FieldInfo) -> str:
    """A field's facts: whether it is a secret, its choices, its bounds and its default."""
    facts = ["**secret**"] if SecretStr in (field.annotation, *get_args(field.annotation)) else []
    choices = [value for value in get_args(field.annotation) if isinstance(value, str)]
    if choices:
        facts.append(" or ".join(f"`{choice}`" for choice in choices))
    for bound, text in (("ge", "at least"), ("gt", "more than"), ("le", "at most"), ("lt", "less than")):
        facts += [f"{text} {value}" for item in field.metadata if (value := getattr(item, bound, None)) is not None]
    if shown := _default(field.get_default(call_default_factory=True)):
        facts.append(f"default `{shown}`")
    return f" ({', '.join(facts)})" if facts else ""


def _default(value: Any) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, tuple):
        return ",".join(value)
    return "" if value is None or value == {} else str(value)


def _hints(hints: Mapping[Any, str]) -> Iterator[str]:
    return (f"- `{reason}`: {hint}" for reason, hint in hints.items())


# The generated blocks of other pages, by name.
_BLOCKS: dict[str, Callable[[], Iterator[str]]] = {
    "file reasons": lambda: _hints(FILE_HINTS),
    "row reasons": lambda: _hints(ROW_HINTS),
}


def with_blocks(page: str) -> str:
    """A page with its blocks up to date."""
    for name, lines in _BLOCKS.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        before, opening, rest = page.partition(begin)
        if opening:
            page = "\n".join([f"{before}{begin}", *lines(), f"{end}{rest.partition(end)[2]}"])
    return page


def pages() -> dict[Path, str]:
    """The up-to-date text of every generated page and schema, by path."""
    docs = project_file("docs")
    with_block = {path: with_blocks(path.read_text(encoding="utf-8")) for path in docs.glob("*.md")}
    return {**with_block, docs / "configuration.md": configuration_page(), **schemas()}


def main() -> int:
    """Write the pages that have changed. Returns the exit status."""
    for path, text in pages().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            sys.stdout.write(f"wrote {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
