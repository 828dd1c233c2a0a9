"""Make an empty stack usable: the bucket, the tables, the repos and pipelines. May be repeated at will.

``python -m qa_platform.embedded.prepare``: a process of its own, so that it sees the stack's environment and no other. It takes
the stack's variables from standard input, as JSON, so that it can be started, and import what it needs, while the servers start.
"""

import contextlib
import json
import os
import sys

from google.api_core.exceptions import Conflict
from google.cloud import storage

from qa_platform import pachyderm_apply
from qa_platform.loading import migrate
from qa_platform.settings import BucketSettings, PachydermSettings, PostgresSettings


def prepare() -> None:
    """Prepare what the environment points to."""
    bucket, pachyderm, postgres = BucketSettings(), PachydermSettings(), PostgresSettings()
    with contextlib.suppress(Conflict):
        storage.Client(project=bucket.google_cloud_project).create_bucket(bucket.storage_bucket)
    migrate.upgrade(postgres)
    pachyderm_apply.apply(pachyderm, postgres, bucket)


if __name__ == "__main__":
    os.environ.update(json.load(sys.stdin))
    prepare()
