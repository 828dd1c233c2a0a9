"""The platform survives: a short form of ``make faults``, every kind of fault once while files are uploaded and answered."""

import random
import tempfile
from pathlib import Path

import pytest

from qa_platform_tests.faults.campaign import run
from qa_platform_tests.faults.injection import FAULTS


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(900)
def test_no_row_is_lost_or_there_twice_whatever_dies_on_the_way() -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}: `python -m qa_platform_tests.faults --faults {len(FAULTS)} --seed {seed}` draws the same")  # noqa: T201
    with tempfile.TemporaryDirectory(prefix="qa-faults-") as folder:
        report = run(Path(folder), seed, faults=len(FAULTS), per_round=len(FAULTS))
    assert report.total == len(FAULTS)
    assert (report.account.lost, report.account.duplicated, report.account.wrong) == (0, 0, [])
    assert report.account.rows > 0
