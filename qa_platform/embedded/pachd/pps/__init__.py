"""The rules of pipelines, jobs and datums. Nothing runs here: ``execution`` runs the jobs."""

from qa_platform.embedded.pachd.pfs import Pfs, RepoKey
from qa_platform.embedded.pachd.pps.datums import Datums
from qa_platform.embedded.pachd.pps.jobs import Jobs
from qa_platform.embedded.pachd.pps.pipelines import Pipelines
from qa_platform.embedded.pachd.pps.records import (
    GOOD,
    SCHEMA,
    TERMINAL,
    Datum,
    DatumInput,
    DatumState,
    Job,
    JobState,
    MetaEntries,
    Pipeline,
    PipelineKey,
    PipelineState,
    Stats,
    add_missing_columns,
)
from qa_platform.embedded.pachd.secrets import Secrets

__all__ = [
    "GOOD",
    "SCHEMA",
    "TERMINAL",
    "Datum",
    "DatumInput",
    "DatumState",
    "Job",
    "JobState",
    "MetaEntries",
    "Pipeline",
    "PipelineKey",
    "PipelineState",
    "Pps",
    "Stats",
]


class Pps:
    """Pipelines, jobs and datums on one store."""

    def __init__(self, pfs: Pfs, secrets: Secrets) -> None:
        add_missing_columns(pfs.store.metadata)
        self.pfs = pfs
        self.secrets = secrets
        self.store = pfs.store
        self.jobs = Jobs(pfs)
        self.datums = Datums(self.jobs, pfs.store)
        self.pipelines = Pipelines(pfs, secrets, self.jobs)
        pfs.on_propagated = self.pipelines.create_jobs
        pfs.is_pipeline = lambda repo: self.owner(repo) is not None

    def owner(self, repo: RepoKey) -> PipelineKey | None:
        """The pipeline that a repo belongs to."""
        key = PipelineKey(repo.project, repo.name)
        return key if self.pipelines.find(key) is not None else None

    def roots(self) -> list[str]:
        """The trees that datums have written."""
        return self.datums.roots()
