"""The installation: Python's version, and the versions of the packages."""

import shlex
import sys
from collections.abc import Iterator
from importlib import metadata

from qa_platform.cli.doctor.findings import DISTRIBUTION, Part, Result, ok, wrong

# Packages whose versions are shown when all is well.
_SHOWN_PACKAGES = ("dagster", "pachyderm-sdk", "google-cloud-storage", "psycopg", "openvino")


def _examine() -> Iterator[Result]:
    yield _python()
    yield _packages()


def _python() -> Result:
    from packaging.specifiers import SpecifierSet

    running = ".".join(map(str, sys.version_info[:3]))
    wanted = metadata.metadata(DISTRIBUTION)["Requires-Python"]
    text = f"{running} at {sys.executable}"
    if SpecifierSet(wanted).contains(running):
        return ok(text)
    return wrong(text, f"make a new environment with Python {wanted}: make setup PYTHON=python3.12")


def _packages() -> Result:
    unfit = list(_unfit_packages())
    if unfit:
        details, requirements = zip(*unfit, strict=True)
        return wrong("; ".join(details), f"pip install {' '.join(requirements)}")
    return ok(", ".join(f"{name} {metadata.version(name)}" for name in (DISTRIBUTION, *_SHOWN_PACKAGES) if _is_installed(name)))


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _unfit_packages() -> Iterator[tuple[str, str]]:
    """The requirements that are not met, as (problem, what to install). Packages of extras may be missing."""
    from packaging.requirements import Requirement

    seen = set()
    for line in metadata.requires(DISTRIBUTION) or ():
        requirement = Requirement(line)
        plain = f"{requirement.name}{requirement.specifier}"
        optional = requirement.marker is not None and "extra" in str(requirement.marker)
        if plain in seen or requirement.name == DISTRIBUTION:
            continue
        seen.add(plain)
        if not _is_installed(requirement.name):
            if not optional:
                yield f"{requirement.name} is not installed", shlex.quote(plain)
        elif not requirement.specifier.contains(metadata.version(requirement.name), prereleases=True):
            version = metadata.version(requirement.name)
            yield f"{requirement.name} is {version}, and must be {requirement.specifier}", shlex.quote(plain)


PART = Part(("Python", "packages"), _examine, lambda: "this installation")
