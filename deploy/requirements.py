"""Writes the packages that extras of the project need, without the project itself: ``requirements.py EXTRA… < pyproject.toml``.

The images install them before the project, in a separate layer. The output changes only if the packages change.
"""

import re
import sys
import tomllib
from collections.abc import Iterator
from typing import Any


def packages(project: dict[str, Any], extra: str) -> Iterator[str]:
    """The requirements of an extra, including those of the project's other extras that it names."""
    for requirement in project["optional-dependencies"][extra]:
        if own := re.fullmatch(rf"{project['name']}\[([\w,-]+)\]", requirement):
            for other in own[1].split(","):
                yield from packages(project, other)
        else:
            yield requirement


if __name__ == "__main__":
    project = tomllib.load(sys.stdin.buffer)["project"]
    wanted = {requirement for extra in sys.argv[1:] for requirement in packages(project, extra)}
    sys.stdout.writelines(f"{line}\n" for line in sorted({*project["dependencies"], *wanted}))
