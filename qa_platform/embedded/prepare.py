"""Make an empty stack usable: the bucket, the tables, the repos and pipelines. May be repeated at will.

``python -m qa_platform.embedded.prepare``: a process of its own, so that it sees the stack's environment and no other.
"""

import contextlib

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
    if pachyderm.pachd_address.endswith(":1"):  # TEMPORARY, until pachd is there
        return
    pachyderm_apply.apply(pachyderm, postgres, bucket)


if __name__ == "__main__":
    prepare()
