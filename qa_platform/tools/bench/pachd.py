"""Throughput, latency and memory of the embedded pachd with the unmodified SDK, each compared with its limit on this machine.

``python -m qa_platform.tools.bench.pachd`` starts a server, and a bare one (see `qa_platform.tools.bench.bare_pachd`) that gets the same
calls in turn. It prints one line per figure, and exits with 1 if a figure misses its goal. A figure close to the bare server's passes even
below its floor: then the SDK or a busy machine is slow, not the server. Figures are medians.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import ParamSpec

import grpc
import psutil
from pachyderm_sdk import Client
from pachyderm_sdk.api import pfs, pps

from qa_platform.embedded.private import token_file
from qa_platform.embedded.supervise import RunningServer, ServerSpec

P = ParamSpec("P")
MEGABYTE = 10**6
# The SDK's default of 19 MiB is slower: the SDK copies each message several times.
MESSAGE_BYTES = 2**20
PUT_FLOOR = GET_FLOOR = 200.0
SMALL_FILES_FLOOR = 2_000.0
CLOSE_TO_BARE = 0.8
# In megabytes. Room for a few chunks and messages in flight, far below the size of the file.
MEMORY_LIMIT = 256.0
# The tolerance for linear growth: other processes disturb the measurement.
LINEAR = 2.0
ROUNDS = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1024, help="size of the big file")
    parser.add_argument("--files", type=int, default=10_000, help="small files in one commit")
    parser.add_argument("--commits", type=int, default=1_000, help="commits in one repo")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        _server(Path(folder), "pachd", "qa_platform.embedded.pachd") as (pachd, client),
        _server(Path(folder), "bare", "qa_platform.tools.bench.bare_pachd") as (bare_pachd, bare),
    ):
        good = [
            *_big_file(client, bare, pachd.pid, Path(folder), arguments.megabytes * 2**20),
            *_small_files(client, bare, arguments.files),
            *_prepared_files(client, pachd.address(), bare_pachd.address(), arguments.files),
            *_commits(client, arguments.commits),
            *_jobs(client),
        ]
    return 0 if all(good) else 1


@contextmanager
def _server(folder: Path, name: str, module: str) -> Iterator[tuple[RunningServer, Client]]:
    server = RunningServer(ServerSpec(name, module, guarded=True), folder)
    try:
        yield server, Client.from_pachd_address(f"grpc://{server.address()}", auth_token=token_file(folder, name).read_text())
    finally:
        server.end()
        server.wait()


def _big_file(client: Client, bare: Client, pid: int, folder: Path, size: int) -> Iterator[bool]:
    block = os.urandom(MESSAGE_BYTES)
    blocks = size // len(block)
    branch = _branch(client, "big")
    times: dict[str, list[float]] = {name: [] for name in ("plain", "put", "bare put", "finish", "get", "bare get")}
    memory = _peak_memory(pid)

    def contents() -> Iterator[bytes]:
        # All blocks differ: equal ones would be stored as one chunk.
        return (os.urandom(16) + block[16:] for _ in range(blocks))

    def plain() -> None:
        total = blake2b(digest_size=32)
        with (folder / "plain").open("wb") as file:
            for part in contents():
                total.update(part)
                file.write(part)

    def get(source: Client, commit: pfs.Commit, path: str) -> None:
        received = sum(len(message.value) for message in source.pfs.get_file(file=pfs.File(commit=commit, path=path)))
        assert received == blocks * len(block)

    for _ in range(ROUNDS):
        times["plain"].append(_seconds(plain))
        (folder / "plain").unlink()
        commit = _start(client, branch)
        for name, target in (("put", client), ("bare put", bare)):
            times[name].append(_seconds(_write, target, commit, (("/big", part) for part in contents())))
        client.pfs.finish_commit(commit=commit)
        times["finish"].append(_seconds(client.pfs.wait_commit, commit))
        for name, target, path in (("get", client, "/big"), ("bare get", bare, str(size))):
            times[name].append(_seconds(get, target, commit, path))
    rate = {name: size / MEGABYTE / statistics.median(found) for name, found in times.items()}
    yield _figure("hashing and writing the same, without a server", rate["plain"], "MB/s")
    yield _figure(f"put of a file of {size / 2**20:,.0f} MiB", rate["put"], "MB/s", floor=PUT_FLOOR, bare=rate["bare put"])
    yield _figure("get of it", rate["get"], "MB/s", floor=GET_FLOOR, bare=rate["bare get"])
    yield _figure("finishing it", statistics.median(times["finish"]) * 1e3, "ms")
    yield _figure("growth of the server's memory, peak", (_peak_memory(pid) - memory) / MEGABYTE, "MB", limit=MEMORY_LIMIT)


def _small_files(client: Client, bare: Client, number: int) -> Iterator[bool]:
    rates: dict[str, list[float]] = {name: [] for name in ("SDK", "bare", "walk")}
    finishing: dict[int, list[float]] = {number // 4: [], number: []}
    branch = _branch(client, "small")

    def walk(commit: pfs.Commit) -> list[pfs.FileInfo]:
        return list(client.pfs.walk_file(file=pfs.File(commit=commit, path="/")))

    for _ in range(ROUNDS):
        for count, found in finishing.items():
            commit = _start(client, branch)
            seconds = _seconds(_write, client, commit, _files(count))
            client.pfs.finish_commit(commit=commit)
            found.append(_seconds(client.pfs.wait_commit, commit))
        rates["SDK"].append(number / seconds)
        rates["bare"].append(number / _seconds(_write, bare, commit, _files(number)))
        rates["walk"].append(number / _seconds(walk, commit))
    median = {name: statistics.median(found) for name, found in rates.items()}
    yield _figure(f"{number:,} small files in one ModifyFile", median["SDK"], "files/s", floor=SMALL_FILES_FLOOR, bare=median["bare"])
    yield _figure("finishing them", statistics.median(finishing[number]) * 1e3, "ms")
    yield _linear("finishing a file, beside a quarter of them", finishing[number], finishing[number // 4], times=4)
    yield _figure("walking them", median["walk"], "files/s")


def _prepared_files(client: Client, address: str, bare_address: str, number: int) -> Iterator[bool]:
    """The same with pre-encoded messages: the speed of the servers without the SDK's classes."""
    rates: dict[str, list[float]] = {address: [], bare_address: []}
    branch = _branch(client, "prepared")
    for _ in range(ROUNDS):
        commit = _start(client, branch)
        messages = [bytes(request) for request in _requests(commit, _files(number))]
        for target, found in rates.items():
            with grpc.insecure_channel(target) as channel:
                modify = channel.stream_unary("/pfs_v2.API/ModifyFile")
                found.append(number / _seconds(modify, iter(messages), metadata=client._grpc_metadata))
        client.pfs.finish_commit(commit=commit)
        client.pfs.wait_commit(commit)
    own, bare = (statistics.median(found) for found in rates.values())
    yield _figure("the same, with messages encoded beforehand", own, "files/s", floor=SMALL_FILES_FLOOR, bare=bare)


def _commits(client: Client, number: int) -> Iterator[bool]:
    branch = _branch(client, "commits")
    making: list[float] = []

    def one(index: int) -> None:
        with client.pfs.commit(branch=branch) as commit:
            commit.put_file_from_bytes(f"/{index % 100}", b"%d" % index)
        commit.wait()

    def listing() -> list[pfs.CommitInfo]:
        return list(client.pfs.list_commit(repo=branch.repo))

    quarter = max(1, number // 4)
    few: list[float] = []
    for index in range(4 * quarter):
        if index == quarter:
            few = [_seconds(listing) for _ in range(ROUNDS)]
        making.append(_seconds(one, index))
    many = [_seconds(listing) for _ in range(ROUNDS)]
    yield _figure(f"one of {number:,} commits: start, put, finish", statistics.median(making[-quarter:]) * 1e3, "ms")
    yield _linear("the last quarter of them, beside the first", making[-quarter:], making[:quarter], times=1)
    yield _figure("listing them", statistics.median(many) * 1e3, "ms")
    yield _linear("listing a commit, beside a quarter of them", many, few, times=4)


def _jobs(client: Client) -> Iterator[bool]:
    branch = _branch(client, "jobs")
    source = {"pfs": {"repo": branch.repo.name, "glob": "/*"}}
    spec = {"pipeline": {"name": "bench"}, "transform": {"cmd": ["true"]}, "input": source}
    client.pps.create_pipeline_v2(create_pipeline_request_json=json.dumps(spec))
    times = []

    def wait(job: pps.Job) -> pps.JobInfo:
        return client.pps.inspect_job(job=job, wait=True)

    for index in range(10):
        with client.pfs.commit(branch=branch) as commit:
            commit.put_file_from_bytes("/a", b"%d" % index)
        job = pps.Job(pipeline=pps.Pipeline(name="bench"), id=commit.id)
        times.append(_seconds(wait, job))
    yield _figure("a job of one datum, from the commit's end", statistics.median(times) * 1e3, "ms")


def _branch(client: Client, name: str) -> pfs.Branch:
    repo = pfs.Repo(name=name)
    client.pfs.create_repo(repo=repo)
    return pfs.Branch(repo=repo, name="master")


def _start(client: Client, branch: pfs.Branch) -> pfs.Commit:
    """Start a commit, and remove its parent's files."""
    commit = client.pfs.start_commit(branch=branch)
    client.pfs.delete_file(commit=commit, path="/")
    return commit


def _files(number: int) -> Iterator[tuple[str, bytes]]:
    return ((f"/{index % 100}/{index}", b"%d" % index) for index in range(number))


def _write(client: Client, commit: pfs.Commit, files: Iterable[tuple[str, bytes]]) -> None:
    client.pfs.modify_file(_requests(commit, files))


def _requests(commit: pfs.Commit, files: Iterable[tuple[str, bytes]]) -> Iterator[pfs.ModifyFileRequest]:
    yield pfs.ModifyFileRequest(set_commit=commit)
    for path, data in files:
        yield pfs.ModifyFileRequest(add_file=pfs.AddFile(path=path, raw=data))


def _seconds(work: Callable[P, object], *values: P.args, **more: P.kwargs) -> float:
    began = time.perf_counter()
    work(*values, **more)
    return time.perf_counter() - began


def _peak_memory(pid: int) -> int:
    """The peak memory of a process in bytes; its current memory if the system does not record the peak."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        return int(psutil.Process(pid).memory_info().rss)
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))


def _linear(what: str, many: list[float], few: list[float], *, times: int) -> bool:
    """Print how much longer one takes when there are ``times`` as many, and whether that is within LINEAR."""
    return _figure(what, statistics.median(many) / times / statistics.median(few), "times as long", limit=LINEAR)


def _figure(
    what: str, value: float, unit: str, *, floor: float | None = None, bare: float | None = None, limit: float | None = None
) -> bool:
    notes = []
    good = True
    if floor is not None:
        notes.append(f"floor {floor:,.0f}")
        good = value >= floor
    if bare is not None:
        notes.append(f"{value / bare:.0%} of the bare server's {bare:,.1f}")
        good = good or value >= CLOSE_TO_BARE * bare
    if limit is not None:
        notes.append(f"limit {limit:,.0f}")
        good = value <= limit
    if not good:
        notes.append("MISSED")
    print(f"{what:<47} {value:>10,.1f} {unit}" + (f"  ({', '.join(notes)})" if notes else ""), flush=True)
    return good


if __name__ == "__main__":
    sys.exit(main())
