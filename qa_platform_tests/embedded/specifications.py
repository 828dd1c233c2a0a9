"""Pipeline specifications for tests of the embedded pachd."""

import textwrap
from typing import Any

from qa_platform.embedded.pachd import spec

BATCH = textwrap.dedent(
    """
    import os, sys
    from pathlib import Path
    from pachyderm_sdk import Client

    print("started", flush=True)
    out = Path(os.environ.get("QA_PFS_ROOT", "/pfs"), "out")
    assert "source" not in os.environ
    worker = Client().worker
    error = ""
    while True:
        env = dict(pair.split("=", 1) for pair in worker.next_datum(error=error).env)
        source = Path(env["source"])
        print("did", source.name, flush=True)
        error = "it is bad" if source.name == "bad" else ""
        if source.name == "leave":
            sys.exit(0)
        if not error:
            (out / source.name).write_bytes(source.read_bytes() + env["PACH_DATUM_ID"].encode())
    """
)


def parsed_spec(**more: Any) -> spec.PipelineSpec:
    """A parsed minimal specification with additional fields."""
    document = {"pipeline": {"name": "p"}, "transform": {"cmd": ["true"]}, "input": {"pfs": {"repo": "r", "glob": "/*"}}, **more}
    return spec.parse(spec.with_defaults(document, now=0))
