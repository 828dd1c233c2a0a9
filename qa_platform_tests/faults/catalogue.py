"""All faults by target and name. Faults of one target are injected one by one, those of different targets in parallel."""

from qa_platform_tests.faults.bucket import BUCKET
from qa_platform_tests.faults.database import DATABASE
from qa_platform_tests.faults.pachyderm import PACHYDERM
from qa_platform_tests.faults.people import PEOPLE
from qa_platform_tests.faults.processes import PROCESSES
from qa_platform_tests.faults.victims import Fault

TARGETS: dict[str, dict[str, Fault]] = {
    "bucket": BUCKET,
    "database": DATABASE,
    "pachyderm": PACHYDERM,
    "people": PEOPLE,
    "processes": PROCESSES,
}
