"""Prepare an empty stack: the bucket, the tables, the repos and the pipelines. It can be repeated.

``python -m qa_platform.embedded.prepare`` is a separate process, so that it sees only the stack's environment. It reads the stack's
variables as JSON from standard input, so it can start and import its libraries while the servers start.
"""

import contextlib
import json
import os
import sys

from google.api_core.exceptions import Conflict
from google.cloud import storage

from qa_platform.loading import migrate
from qa_platform.provisioning.pipelines import Options, apply
from qa_platform.settings import BucketSettings, PachydermSettings, PipelinesSettings, PostgresSettings


def prepare() -> None:
    """Prepare the services that the environment names."""
    bucket, pachyderm, postgres, sizes = BucketSettings(), PachydermSettings(), PostgresSettings(), PipelinesSettings()
    with contextlib.suppress(Conflict):
        storage.Client(project=bucket.google_cloud_project).create_bucket(bucket.storage_bucket)
    migrate.upgrade(postgres)
    apply(pachyderm, postgres, bucket, Options(workers=sizes.workers, patch=sizes.patch))


if __name__ == "__main__":
    os.environ.update(json.load(sys.stdin))
    prepare()
