"""Throughput, latency and memory of the embedded pachd, by the unmodified SDK, beside what the disk and the hash alone take.

``python -m qa_platform.bench.pachd`` starts a server of its own, prints one line per figure, and ends with 1 if one misses its floor.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from pathlib import Path

import psutil
from pachyderm_sdk import Client
from pachyderm_sdk.api import pfs, pps

from qa_platform.embedded.process import RunningServer, ServerSpec

MEGABYTE = 10**6
# The SDK's own 19 MiB messages cost it more time than they save: it copies each several times.
MESSAGE_BYTES = 2**20
PUT_FLOOR = GET_FLOOR = 200.0
SMALL_FILES_FLOOR = 2_000.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1024, help="size of the big file")
    parser.add_argument("--files", type=int, default=10_000, help="small files in one commit")
    parser.add_argument("--commits", type=int, default=1_000, help="commits in one repo")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = RunningServer(ServerSpec("pachd", "qa_platform.embedded.pachd"), Path(folder))
        try:
            client = Client.from_pachd_address(f"grpc://{server.address()}")
            good = [
                *_big_file(client, Path(folder), arguments.megabytes * 2**20),
                *_small_files(client, arguments.files),
                *_commits(client, arguments.commits),
                *_jobs(client),
            ]
            print(f"server's memory now: {psutil.Process(server.pid).memory_info().rss / MEGABYTE:,.0f} MB")
        finally:
            server.end()
            server.wait()
    return 0 if all(good) else 1


def _big_file(client: Client, folder: Path, size: int) -> Iterator[bool]:
    block = os.urandom(2**20)
    blocks = size // len(block)

    def plain() -> None:
        total = blake2b(digest_size=32)
        with (folder / "plain").open("wb") as file:
            for _ in range(blocks):
                total.update(block)
                file.write(block)

    yield _figure("plain write with BLAKE2b", size / MEGABYTE / _seconds(plain), "MB/s")
    (folder / "plain").unlink()
    branch = _branch(client, "big")
    with client.pfs.commit(branch=branch) as commit:
        # Blocks that differ, or one chunk would stand for all.
        parts = ((number.to_bytes(8, "big") + block)[: len(block)] for number in range(blocks))
        seconds = _seconds(lambda: _write(client, commit, (("/big", part) for part in parts)))
    yield _figure("put of a big file", size / MEGABYTE / seconds, "MB/s", PUT_FLOOR)
    yield _figure("finishing it", _seconds(commit.wait) * 1e3, "ms")

    def get() -> None:
        received = sum(len(message.value) for message in client.pfs.get_file(file=pfs.File(commit=commit, path="/big")))
        assert received == blocks * len(block)

    yield _figure("get of a big file", size / MEGABYTE / _seconds(get), "MB/s", GET_FLOOR)


def _small_files(client: Client, number: int) -> Iterator[bool]:
    with client.pfs.commit(branch=_branch(client, "small")) as commit:
        files = ((f"/{index % 100}/{index}", b"%d" % index) for index in range(number))
        seconds = _seconds(lambda: _write(client, commit, files))
    yield _figure("small files in one ModifyFile", number / seconds, "files/s", SMALL_FILES_FLOOR)
    yield _figure("finishing them", _seconds(commit.wait) * 1e3, "ms")
    seconds = _seconds(lambda: list(client.pfs.walk_file(file=pfs.File(commit=commit, path="/"))))
    yield _figure("walking them", number / seconds, "files/s")


def _commits(client: Client, number: int) -> Iterator[bool]:
    branch = _branch(client, "commits")

    def one(index: int) -> None:
        with client.pfs.commit(branch=branch) as commit:
            commit.put_file_from_bytes(f"/{index}", b"%d" % index)
        commit.wait()

    quarter = max(1, number // 4)
    for label, start in (("the first quarter of the commits", 0), ("the last quarter of the commits", 3 * quarter)):
        if start:
            for index in range(quarter, start):
                one(index)
        began = time.perf_counter()
        for index in range(start, start + quarter):
            one(index)
        yield _figure(label, (time.perf_counter() - began) / quarter * 1e3, "ms each")
    listing = _seconds(lambda: list(client.pfs.list_commit(repo=branch.repo)))
    yield _figure("listing the commits", listing * 1e3, "ms")


def _jobs(client: Client) -> Iterator[bool]:
    branch = _branch(client, "jobs")
    source = {"pfs": {"repo": branch.repo.name, "glob": "/*"}}
    spec = {"pipeline": {"name": "bench"}, "transform": {"cmd": ["true"]}, "input": source}
    client.pps.create_pipeline_v2(create_pipeline_request_json=json.dumps(spec))
    times = []
    for index in range(10):
        with client.pfs.commit(branch=branch) as commit:
            commit.put_file_from_bytes("/a", b"%d" % index)
        job = pps.Job(pipeline=pps.Pipeline(name="bench"), id=commit.id)
        times.append(_seconds(lambda job=job: client.pps.inspect_job(job=job, wait=True)))  # type: ignore[misc]
    yield _figure("a job of one datum, from the commit's end", sorted(times)[len(times) // 2] * 1e3, "ms")


def _branch(client: Client, name: str) -> pfs.Branch:
    repo = pfs.Repo(name=name)
    client.pfs.create_repo(repo=repo)
    return pfs.Branch(repo=repo, name="master")


def _write(client: Client, commit: pfs.Commit, files: Iterable[tuple[str, bytes]]) -> None:
    def requests() -> Iterator[pfs.ModifyFileRequest]:
        yield pfs.ModifyFileRequest(set_commit=commit)
        for path, data in files:
            for start in range(0, len(data), MESSAGE_BYTES):
                yield pfs.ModifyFileRequest(add_file=pfs.AddFile(path=path, raw=data[start : start + MESSAGE_BYTES]))

    client.pfs.modify_file(requests())


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _figure(what: str, value: float, unit: str, floor: float | None = None) -> bool:
    good = floor is None or value >= floor
    goal = "" if floor is None else f"  (floor {floor:,.0f}{'' if good else ', MISSED'})"
    print(f"{what:<45} {value:>10,.1f} {unit}{goal}", flush=True)
    return good


if __name__ == "__main__":
    sys.exit(main())
