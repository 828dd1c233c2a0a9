"""The code location: it loads fast, without the model's libraries, and Dagster accepts it."""

import subprocess
import sys

from qa_platform.embedded.stack import Stack

LOAD_SECONDS = 3.0


def test_definitions_import_neither_torch_nor_transformers_nor_a_runtime() -> None:
    program = (
        "import sys, qa_platform.definitions; "
        "print(sorted({'torch', 'transformers', 'openvino', 'tokenizers'} & set(sys.modules)), 'qa_platform.definitions' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:qa_platform", "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "[] True", done.stderr


def test_definitions_load_in_under_three_seconds_of_work() -> None:
    """Counted as processor time, which a busy machine does not stretch."""
    program = "import time; import qa_platform.definitions; print(time.process_time())"
    taken = [float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout) for _ in range(2)]
    assert min(taken) < LOAD_SECONDS


def test_dagster_accepts_the_workspace(stack: Stack) -> None:
    command = ["dagster", "definitions", "validate", "-w", "workspace.yaml"]
    done = subprocess.run(command, env=stack.environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "All code locations passed validation" in done.stdout + done.stderr
