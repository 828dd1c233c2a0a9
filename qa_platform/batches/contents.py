"""What a batch's commit holds, by its manifests, and which of it is answered."""

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

# How old log lines may be that are looked through.
_LOGGED = timedelta(days=1)


@dataclass(frozen=True)
class Contents:
    """What the manifests of a commit in ``questions`` name: files and their shards, with their rows."""

    manifests: Mapping[str, Manifest]

    def rows(self, path: str) -> int:
        """The rows of a datum by its path: a shard of the answering pipeline, or a file of the loading one; 0 for anything else."""
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
        """The shards of which these paths, those of an output, have no answers. A file without its manifest lacks its first shard."""
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
    """The rows of a commit that are answered, by file id, those of an unfinished set too where its log lines can be had."""
    done: Counter[str] = Counter()
    info = client.pps.inspect_job(job=job_of(ANSWER_PIPELINE, commit_id))
    for path in {*done_paths(client, info), *_logged_paths(client, info.job)}:
        done[path.split("/")[0]] += batch.rows(path)
    return done


def _logged_paths(client: Client, job: pps.Job) -> set[str]:
    paths: set[str] = set()
    # Logs are missing where a cluster keeps none.
    with suppress(grpc.RpcError):
        for message in client.pps.get_logs(pipeline=job.pipeline, job=job, since=_LOGGED):
            paths.add(shard_in(message.message))
    return paths


def done_paths(client: Client, info: pps.JobInfo) -> Iterator[str]:
    """The paths of the datums that are done, without the slashes around them.

    While a job runs, and after it failed, Pachyderm lists all datums of the job before it too, as skipped. They are only believed
    where the job itself has counted skipped datums.
    """
    for datum in _list_datums(client, info.job):
        own = datum.datum.job.id == info.job.id
        if (datum.state == pps.DatumState.SUCCESS and own) or (datum.state == pps.DatumState.SKIPPED and (own or info.data_skipped)):
            yield from (file.file.path.strip("/") for file in datum.data)


def _list_datums(client: Client, job: pps.Job) -> list[pps.DatumInfo]:
    """The datums of a job; none as long as the job before it is closing, when they cannot be listed."""
    try:
        return list(client.pps.list_datum(job=job))
    except grpc.RpcError as error:
        if not is_unfinished(error):
            raise
        return []
