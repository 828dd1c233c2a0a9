"""What the assets, sensors and jobs talk to, as Dagster resources."""

import dagster as dg
from dagster_gcp.gcs import GCSResource

from qa_platform.batch import Services
from qa_platform.bucket import open_bucket
from qa_platform.settings import (
    BucketSettings,
    IngestSettings,
    ModelSettings,
    PachydermSettings,
    PostgresSettings,
    WorkSettings,
)


class PlatformResource(dg.ConfigurableResource):
    """The bucket through dagster-gcp's client, and the settings of everything else, read from the environment when used."""

    gcs: dg.ResourceDependency[GCSResource]

    def services(self) -> Services:
        return Services(
            bucket=open_bucket(self.gcs.get_client(), BucketSettings().storage_bucket),
            pachyderm=PachydermSettings(),
            postgres=PostgresSettings(),
            model=ModelSettings().pinned,
            ingest=IngestSettings(),
            work=WorkSettings(),
        )


platform_resource = PlatformResource(gcs=GCSResource(project=BucketSettings().google_cloud_project))
