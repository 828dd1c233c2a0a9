"""The services and settings that the platform works with: made once, at a program's entry point, and passed down."""

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
    """The bucket, the settings of Pachyderm and PostgreSQL, the requested model, and how the work is to be done."""

    bucket: storage.Bucket
    pachyderm: PachydermSettings
    postgres: PostgresSettings
    model: ModelChoice
    ingest: IngestSettings
    work: WorkSettings
    align_to_words: bool = True

    @classmethod
    def from_environment(cls, client: storage.Client | None = None) -> Self:
        """The services that the environment names. Opens no connection.

        Args:
            client: opens the bucket; by default a client with Google's default credentials.

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
