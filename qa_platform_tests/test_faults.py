"""A short form of ``make faults``: the platform survives a dozen different faults while files are uploaded and answered."""

import tempfile
from pathlib import Path

import pytest

from qa_platform_tests.faults.campaign import run

# All kinds in turn, by chance, are `make faults`; here the seed says which.
SHORT_FORM, SEED = 12, 7


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(900)
def test_no_row_is_lost_or_there_twice_whatever_dies_on_the_way() -> None:
    with tempfile.TemporaryDirectory(prefix="qa-faults-") as folder:
        report = run(Path(folder), SEED, total=SHORT_FORM, per_round=SHORT_FORM)
    # Faults of several targets come at the same time.
    assert report.total >= SHORT_FORM
    assert (report.account.lost, report.account.duplicated, report.account.wrong) == (0, 0, [])
    assert report.account.rows > 0
