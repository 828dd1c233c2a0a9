"""The platform as a Dagster resource: the clients and the settings of assets, ops and sensors."""

import dagster as dg
from dagster_gcp.gcs import GCSResource

from qa_platform.clients.services import Services
from qa_platform.orchestration.reports.events import Reporter
from qa_platform.settings import BucketSettings, CatalogSettings, CheckSettings


class PlatformResource(dg.ConfigurableResource):
    """The entry point of a run or a tick. It reads the environment when it is used. The bucket's client comes from dagster-gcp."""

    gcs: dg.ResourceDependency[GCSResource]

    def services(self) -> Services:
        """The clients and settings of the pipeline.

        Raises:
            InputError: no bucket is configured, or the model's precision is not pinned.
        """
        return Services.from_environment(self.gcs.get_client())

    def reporter(self, services: Services) -> Reporter:
        return Reporter(services, CheckSettings(), CatalogSettings())


def platform_resource(settings: BucketSettings) -> PlatformResource:
    return PlatformResource(gcs=GCSResource(project=settings.google_cloud_project))
