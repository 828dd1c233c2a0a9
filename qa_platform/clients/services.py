"""The services that the platform works with, and how the work is to be done: made once, at the door of a program, and handed down."""

import logging
from dataclasses import dataclass
from typing import Self

from google.cloud import storage

from qa_platform.clients.bucket import open_bucket
from qa_platform.contract import ModelChoice
from qa_platform.settings import (
    BucketSettings,
    IngestSettings,
    ModelSettings,
    PachydermSettings,
    PostgresSettings,
    WorkSettings,
)

Log = logging.Logger | logging.LoggerAdapter


@dataclass(frozen=True)
class Services:
    """The bucket, the addresses of Pachyderm and PostgreSQL, the model that is asked for and how, and the limits of the work."""

    bucket: storage.Bucket
    pachyderm: PachydermSettings
    postgres: PostgresSettings
    model: ModelChoice
    ingest: IngestSettings
    work: WorkSettings
    align_to_words: bool = True

    @classmethod
    def from_environment(cls, client: storage.Client | None = None) -> Self:
        """The services that the environment names. Nothing is connected to.

        Args:
            client: what opens the bucket; by default a client with Google's default credentials.

        Raises:
            InputError: no bucket is configured.
        """
        return cls(
            bucket=open_bucket(BucketSettings(), client),
            pachyderm=PachydermSettings(),
            postgres=PostgresSettings(),
            model=ModelSettings().pinned,
            ingest=IngestSettings(),
            work=WorkSettings(),
            align_to_words=ModelSettings().align_to_words,
        )
