"""How long a deferred file waits for its next attempt: about as long as it has waited already, between bounds."""

import random

from qa_platform.settings import WorkSettings

# An UPDATE sees `put_off_since` as it was before: null the first time.
DEFERRAL = """
    make_interval(secs => least(%(most)s, greatest(%(first)s, extract(epoch FROM now() - coalesce(put_off_since, now()))::float))
        * %(jitter)s)
"""


def waits(work: WorkSettings) -> dict[str, float]:
    """The parameters of `DEFERRAL`."""
    # The jitter is drawn here, so that files that are deferred together are due together, in one batch.
    return {"first": work.retry_first_seconds, "most": work.retry_most_seconds, "jitter": random.uniform(0.5, 1.0)}
