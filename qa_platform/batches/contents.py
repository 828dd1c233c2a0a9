"""The contents of a batch's commit according to its manifests, and how many of its rows are answered."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property

import grpc
from pachyderm_sdk import Client
from pachyderm_sdk.api import pfs, pps

from qa_platform.clients.pachyderm import is_unfinished, job_of, open_tar
from qa_platform.contract import ANSWER_PIPELINE, MANIFEST, QUESTIONS_REPO, SHARD_INFO, Manifest, shard_in, shard_name

# The maximum age of the log lines that are searched.
_LOGGED = timedelta(days=1)


@dataclass(frozen=True)
class Contents:
    """The files and shards that the manifests of a commit in ``questions`` name, with their numbers of rows. Keys are file ids."""

    manifests: Mapping[str, Manifest]

    def rows(self, path: str) -> int:
        """The number of rows of a datum by its path: a shard (answering pipeline) or a file (loading pipeline); 0 for any other path."""
        return self._rows.get(path.strip("/"), 0)

    @cached_property
    def _rows(self) -> dict[str, int]:
        rows = {folder: manifest.rows for folder, manifest in self.manifests.items()}
        for folder, manifest in self.manifests.items():
            rows |= {f"{folder}/{entry.name}": entry.rows for entry in manifest.shards}
        return rows

    @property
    def total_rows(self) -> int:
        return sum(manifest.rows for manifest in self.manifests.values())

    def missing_in(self, paths: Iterable[str]) -> dict[str, frozenset[str]]:
        """The shards whose answers are not among these output paths, by file id. A file without its manifest lacks its first shard."""
        there = {path.strip("/") for path in paths}
        missing = {}
        for folder, manifest in self.manifests.items():
            lost = {entry.name for entry in manifest.shards if f"{folder}/{entry.name}/{SHARD_INFO}" not in there}
            if f"{folder}/{MANIFEST}" not in there:
                lost.add(shard_name(0))
            if lost:
                missing[folder] = frozenset(lost)
        return missing


def contents(client: Client, commit_id: str) -> Contents:
    """The manifests of a commit in ``questions``, by file id."""
    found = {}
    pattern = pfs.File.from_uri(f"{QUESTIONS_REPO}@{commit_id}:/*/*/{MANIFEST}")
    with open_tar(client, pattern) as tar:
        for member in tar:
            if content := tar.extractfile(member):
                found[member.name.strip("/").split("/")[0]] = Manifest.from_json(content.read())
    return Contents(found)


def rows_done(client: Client, commit_id: str, batch: Contents) -> Counter[str]:
    """The number of answered rows of a commit, by file id. Rows of an unfinished datum set count if the job's log is available."""
    done: Counter[str] = Counter()
    info = client.pps.inspect_job(job=job_of(ANSWER_PIPELINE, commit_id))
    for path in {*done_paths(client, info), *_logged_paths(client, info.job)}:
        done[path.split("/")[0]] += batch.rows(path)
    return done


def _logged_paths(client: Client, job: pps.Job) -> set[str]:
    paths: set[str] = set()
    # A cluster may keep no logs.
    with suppress(grpc.RpcError):
        for message in client.pps.get_logs(pipeline=job.pipeline, job=job, since=_LOGGED):
            paths.add(shard_in(message.message))
    return paths


def done_paths(client: Client, info: pps.JobInfo) -> Iterator[str]:
    """The paths of the datums that are done, without leading and trailing slashes.

    While a job runs, and after it has failed, Pachyderm also lists all datums of the previous job as skipped. These count only if the
    job itself has counted skipped datums.
    """
    for datum in _list_datums(client, info.job):
        own = datum.datum.job.id == info.job.id
        if (datum.state == pps.DatumState.SUCCESS and own) or (datum.state == pps.DatumState.SKIPPED and (own or info.data_skipped)):
            yield from (file.file.path.strip("/") for file in datum.data)


def _list_datums(client: Client, job: pps.Job) -> list[pps.DatumInfo]:
    """The datums of a job. Empty while the previous job is closing, because they cannot be listed then."""
    try:
        return list(client.pps.list_datum(job=job))
    except grpc.RpcError as error:
        if not is_unfinished(error):
            raise
        return []
