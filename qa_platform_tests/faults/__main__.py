"""``python -m qa_platform_tests.faults``: injects hundreds of faults, in rounds, and accounts for every row."""

import argparse
import logging
import random
import signal
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qa_platform_tests.faults.campaign import Report, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=204, help="how many faults are injected")
    parser.add_argument("--round", type=int, default=34, help="faults per round, before recovery and audit")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="random seed")
    parser.add_argument("--only", default="", help="only faults whose name contains this")
    parser.add_argument("--state", type=Path, help="keep the state and the logs in this folder")
    arguments = parser.parse_args()
    # Exit normally on SIGTERM, so that the daemon and the servers are ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    for name in ("qa_platform", "alembic", "dagster"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="qa-faults-") as folder:
        report = run(
            arguments.state or Path(folder), arguments.seed, total=arguments.faults, per_round=arguments.round, only=arguments.only
        )
    show(report)
    return 0 if report.good else 1


def show(report: Report) -> None:
    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table("fault", "injected", "what it hit", title=f"seed {report.seed}")
    for name, hits in report.injected.items():
        what = ", ".join(f"{what} {times}x" for what, times in hits.most_common())
        table.add_row(name, str(hits.total()), what)
    console.print(table)
    account = report.account
    console.print(
        f"{report.total} faults in {report.seconds:.0f} s; {report.uploads} uploads under {account.files} names, {account.rows} rows: "
        f"{account.lost} lost, {account.duplicated} duplicated; {report.parked} files were parked and tried again on request; "
        f"{report.commands} commands; a file that came after a recovery was loaded in {report.innocent_seconds:.0f} s at most"
    )
    for line in account.wrong:
        console.print(f"[red]WRONG[/red] {line}")


if __name__ == "__main__":
    sys.exit(main())
