"""The extras of this package: which one brings a module that is not installed."""

import importlib.metadata

from qa_platform.cli.doctor.findings import DISTRIBUTION


def how_to_install(module: str) -> str:
    """The command that installs a module, with the smallest extra that brings it; "" if none does."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    package = canonicalize_name(module.partition(".")[0])
    requirements = [Requirement(line) for line in importlib.metadata.requires(DISTRIBUTION) or ()]
    sizes = {}
    for extra in importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or ():
        names = [canonicalize_name(r.name) for r in requirements if r.marker and r.marker.evaluate({"extra": extra})]
        # Packages of a namespace, such as google's, are not called what they are imported as.
        if any(name == package or name.startswith(f"{package}-") for name in names):
            sizes[extra] = len(names)
    return f"pip install '{DISTRIBUTION}[{min(sizes, key=lambda extra: sizes[extra])}]'" if sizes else ""
