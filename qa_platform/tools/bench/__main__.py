"""Run the benchmarks, each in a separate process: all of them, or ``python -m qa_platform.tools.bench TOPIC [ARGUMENTS]`` for one.

The topic gpu needs a GPU, and runs only when named.
"""

import subprocess
import sys

TOPICS = ("answering", "ingest", "large", "loading", "pachd", "sensor", "sets", "small_files", "stack", "stages")
ON_A_GPU = ("gpu",)


def main() -> int:
    topics, arguments = (TOPICS, []) if len(sys.argv) == 1 else ((sys.argv[1],), sys.argv[2:])
    if not set(topics) <= {*TOPICS, *ON_A_GPU}:
        raise SystemExit(f"there is no benchmark {topics[0]}; the benchmarks are {', '.join((*TOPICS, *ON_A_GPU))}")
    return max(
        subprocess.run([sys.executable, "-m", f"qa_platform.tools.bench.{topic}", *arguments], check=False).returncode for topic in topics
    )


if __name__ == "__main__":
    sys.exit(main())
