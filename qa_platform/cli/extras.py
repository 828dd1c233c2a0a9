"""The extras of this package: which one installs a missing module."""

import importlib.metadata

from qa_platform.cli.doctor.findings import DISTRIBUTION


def how_to_install(module: str) -> str:
    """The command that installs a module through the smallest extra that contains it; "" if none does."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    package = canonicalize_name(module.partition(".")[0])
    requirements = [Requirement(line) for line in importlib.metadata.requires(DISTRIBUTION) or ()]
    sizes = {}
    for extra in importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or ():
        names = [canonicalize_name(r.name) for r in requirements if r.marker and r.marker.evaluate({"extra": extra})]
        # A module of a namespace package, such as google's, has another name than its package.
        if any(name == package or name.startswith(f"{package}-") for name in names):
            sizes[extra] = len(names)
    return f"pip install '{DISTRIBUTION}[{min(sizes, key=lambda extra: sizes[extra])}]'" if sizes else ""
