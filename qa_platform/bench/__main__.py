"""Run the benchmarks, each in a process of its own: all of them, or ``python -m qa_platform.bench TOPIC [its arguments]``."""

import subprocess
import sys

TOPICS = ("answering", "ingest", "loading", "pachd", "sensor", "stack")


def main() -> int:
    topics, arguments = (TOPICS, []) if len(sys.argv) == 1 else ((sys.argv[1],), sys.argv[2:])
    if not set(topics) <= set(TOPICS):
        raise SystemExit(f"there is no benchmark {topics[0]}; there are {', '.join(TOPICS)}")
    return max(subprocess.run([sys.executable, "-m", f"qa_platform.bench.{topic}", *arguments], check=False).returncode for topic in topics)


if __name__ == "__main__":
    sys.exit(main())
