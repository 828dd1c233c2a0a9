"""The platform as a Dagster resource: the clients and the settings of assets, ops and sensors."""

import dagster as dg
from dagster_gcp.gcs import GCSResource

from qa_platform.clients.refusals import bucket_errors
from qa_platform.clients.services import Services
from qa_platform.orchestration.reports.events import Reporter
from qa_platform.settings import BucketSettings, CatalogSettings, CheckSettings, settings_errors


class PlatformResource(dg.ConfigurableResource):
    """The entry point of a run or a tick. It reads the environment when it is used. The bucket's client comes from dagster-gcp."""

    gcs: dg.ResourceDependency[GCSResource]

    def services(self) -> Services:
        """The clients and settings of the pipeline.

        Raises:
            InputError: no bucket is configured, there are no credentials, the model's precision is not pinned, or a variable is invalid.
        """
        # Dagster shows a sensor's errors as they are.
        with settings_errors(), bucket_errors("opening the bucket"):
            return Services.from_environment(self.gcs.get_client())

    def reporter(self, services: Services) -> Reporter:
        """What reports files to Dagster.

        Raises:
            InputError: a variable is invalid.
        """
        with settings_errors():
            return Reporter(services, CheckSettings(), CatalogSettings())


def platform_resource(settings: BucketSettings) -> PlatformResource:
    return PlatformResource(gcs=GCSResource(project=settings.google_cloud_project))
