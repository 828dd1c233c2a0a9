"""The embedded pachd in situations that a client cannot easily cause: between two states, for unknown calls, for idle callers."""

import inspect
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

import grpc
import pytest
from pachyderm_sdk.api import admin, auth, license, pfs, pps, storage, transaction

from qa_platform.embedded.pachd import secrets
from qa_platform.embedded.pachd.errors import Unimplemented
from qa_platform.embedded.pachd.execution.batching import BatchProcess, DatumError
from qa_platform.embedded.pachd.pfs import SCHEMA, BranchKey, CommitRef, Pfs, RepoKey
from qa_platform.embedded.pachd.storage.database import Database
from qa_platform.embedded.pachd.storage.store import Store
from qa_platform_tests.embedded.specifications import parsed_spec
from qa_platform_tests.pachd_helpers import LIMIT_SECONDS, Pachd, Server, eventually, has_ended, refused

REPO = RepoKey("default", "r")
# What the embedded server says of itself that it has not got. All the rest of the two big services is served.
NOT_SERVED = {
    "pfs_v2.API": {
        "ActivateAuth", "CheckStorage", "ClearCache", "DeleteAll", "Egress", "ForgetCommit", "GetCache", "InspectProjectV2",
        "ListTask", "PutCache", "ReposSummary", "ShardFileSet", "WalkBranchProvenance", "WalkBranchSubvenance", "WalkCommitProvenance",
        "WalkCommitSubvenance",
    },
    "pps_v2.API": {
        "ActivateAuth", "CheckStatus", "CreateDatum", "DeleteAll", "GetClusterDefaults", "GetKubeEvents", "GetProjectDefaults", "ListTask",
        "PipelinesSummary", "QueryLoki", "RenderTemplate", "RunLoadTest", "RunLoadTestDefault", "RunPipeline", "SetClusterDefaults",
        "SetProjectDefaults", "UpdateJobState",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("pachd"))
    yield server
    assert server.stop() == 0


def test_every_method_that_the_sdk_can_call_is_served_or_refused_by_name_at_once(server: Server) -> None:
    called = [m for module in (pfs, pps, admin, auth, license, storage, transaction) for m in _methods(inspect.getsource(module))]
    assert len(called) > 100
    found: dict[str, set[str]] = {}
    with grpc.insecure_channel(server.address.removeprefix("grpc://")) as channel:
        for service, method in called:
            # With a stream of nothing: all kinds of methods are reached so, and those that are there do nothing.
            call = channel.stream_stream(f"/{service}/{method}")(iter([]), timeout=LIMIT_SECONDS)
            with suppress(grpc.RpcError):
                list(call)
            code, details = call.code(), call.details()
            assert code is not grpc.StatusCode.DEADLINE_EXCEEDED, method
            if f"unknown method {method} for service {service}" in details:
                assert code is grpc.StatusCode.UNIMPLEMENTED
                found.setdefault(service, set()).add(method)
    assert {service: found[service] for service in NOT_SERVED} == NOT_SERVED
    assert "StartTransaction" in found["transaction_v2.API"]


def _methods(source: str) -> list[tuple[str, str]]:
    return re.findall(r'"/([\w.]+\.API)/(\w+)"', source)


def test_what_is_asked_for_in_a_request_is_done_or_refused_by_name(server: Server) -> None:
    client = Pachd(server.address).client
    repo = Pachd(server.address).repo()
    unimplemented = grpc.StatusCode.UNIMPLEMENTED
    with refused(unimplemented, "trigger"):
        client.pfs.create_branch(branch=pfs.Branch(repo=repo, name="b"), trigger=pfs.Trigger(branch="master", commits=2))
    with refused(unimplemented, "url"):
        next(client.pfs.get_file(file=pfs.File(commit=pfs.Commit(repo=repo, id="master"), path="/a"), url="gs://b/o"))
    for listed in (client.pps.list_job, client.pps.list_pipeline):
        with refused(unimplemented, "jq_filter"):
            next(listed(jq_filter="."))


@pytest.mark.parametrize("feature", [{"s3": True}, {"trigger": {"branch": "master"}}])
def test_an_input_that_wants_more_than_there_is_is_refused_by_name(feature: dict[str, object]) -> None:
    with pytest.raises(Unimplemented, match=next(iter(feature))):
        parsed_spec(input={"pfs": {"repo": "r", "glob": "/*", **feature}})


def test_a_caller_that_pings_all_the_time_is_not_sent_away(server: Server) -> None:
    # By hand: gRPC's own client pings every ten seconds at most.
    host, port = server.address.removeprefix("grpc://").split(":")
    settings, ping = 4, 6
    with socket.create_connection((host, int(port)), timeout=10) as connection, connection.makefile("rb") as stream:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(settings, b""))
        for _ in range(10):
            connection.sendall(_frame(ping, bytes(8)))
            while not _is_answer(stream, ping):
                pass


def _is_answer(stream: IO[bytes], kind: int) -> bool:
    """Reads a frame: whether it is the answer to one of that kind. The end of the connection is an error."""
    header = stream.read(9)
    assert len(header) == 9, "the server has closed the connection"
    stream.read(int.from_bytes(header[:3]))
    return header[3] == kind and header[4] == 1


def _frame(kind: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, 0]) + bytes(4) + payload


def test_a_finishing_commit_is_not_finished_yet_and_takes_no_more(tmp_path: Path) -> None:
    store = Store(tmp_path, SCHEMA)
    files = Pfs(store)
    files.create_repo(REPO)
    ref = CommitRef(REPO, files.start_commit(BranchKey(REPO, "master")).id)
    files.finish_commit(ref)
    finishing = files.commit(ref)
    assert finishing.finishing is not None
    assert finishing.finished is None
    with pytest.raises(Exception, match="has already finished"):
        files.writable(ref)
    # Whoever reads it waits for it.
    reader = threading.Thread(target=files.readable_root, args=(finishing,), kwargs={"alive": lambda: True}, daemon=True)
    reader.start()
    reader.join(0.2)
    assert reader.is_alive()
    assert files.finish_next(alive=lambda: True)
    reader.join(10)
    assert not reader.is_alive()
    assert files.commit(ref).finished is not None
    store.close()


def test_a_server_that_was_killed_while_it_made_its_key_makes_another(tmp_path: Path) -> None:
    database = Database(tmp_path / "db", secrets.SCHEMA)
    (tmp_path / "secrets.new").write_bytes(b"")
    made = secrets.Secrets(database, tmp_path)
    made.create(b'{"metadata": {"name": "s"}, "stringData": {"k": "v"}}')
    assert secrets.Secrets(database, tmp_path).values("s") == {"k": b"v"}
    assert (tmp_path / "secrets.key").stat().st_mode & 0o077 == 0
    database.close()


class AskingProcess:
    """Asks for one datum after the other until it is let go, and says each time that the last one was ``bad``, or not."""

    def __init__(self, process: BatchProcess, bad: str, log: list[str]) -> None:
        self.exit_status: int | None = None
        self._process = process
        self._bad = bad
        self._log = log
        threading.Thread(target=self._ask, daemon=True).start()

    def _ask(self) -> None:
        asked = ""
        with suppress(Exception):
            while True:
                self._process.next_datum(asked, lambda: True)
                asked = self._bad
        self._log.append("returned")

    def kill(self) -> None:
        # Long enough for a call that is let go too early.
        time.sleep(0.1)
        self._log.append("killed")
        self.exit_status = -9
        self._process.wake()


@pytest.mark.parametrize("bad", ["", "it is bad"])
def test_a_batching_process_is_dead_before_its_last_next_datum_returns(bad: str) -> None:
    log: list[str] = []
    process = BatchProcess(launch=lambda process, again: AskingProcess(process, bad, log), note=lambda text: None)
    process.start()
    try:
        process.process_datum([], 10)
    except DatumError as error:
        assert str(error) == bad  # noqa: PT017
    process.kill()
    starts = 2 if bad else 1
    eventually(lambda: log.count("returned") == starts)
    assert log[0] == "killed"
    assert log.index("returned") > 0
    assert log.count("killed") == starts


def test_a_stopped_job_leaves_none_of_its_processes(server: Server) -> None:
    pachd = Pachd(server.address)
    repo = pachd.repo()
    name = pachd.pipeline("p", "sleep 600 &\necho $!\nsleep 600", repo)
    commit = pachd.put(repo, {"/a": b"1"})
    [behind] = eventually(lambda: pachd.lines(name, commit))
    assert not has_ended(int(behind))
    pachd.client.pps.stop_job(job=pachd.job(name, commit))
    eventually(lambda: has_ended(int(behind)))
    pachd.clean_up()
