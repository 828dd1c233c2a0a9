"""The connection to pachd: TLS, token, bounded retries, and a deadline on every call, against a real gRPC server."""

import datetime
import ipaddress
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from pachyderm_sdk.api import admin, pfs, pps
from pydantic import SecretStr

import qa_platform
from qa_platform.clients import pachyderm as pachd
from qa_platform.errors import InputError, TransientError
from qa_platform.orchestration.pipes import job_url
from qa_platform.settings import PachydermSettings
from qa_platform_tests.credentials import pem_of, private_key

Answer = Callable[[Mapping[str, str], grpc.ServicerContext], str | admin.ClusterInfo]


@contextmanager
def server(
    answer: Answer, credentials: grpc.ServerCredentials | None = None, *, more: tuple[grpc.GenericRpcHandler, ...] = ()
) -> Iterator[int]:
    """A server that knows one call, with the cluster, or just its id, that ``answer`` returns, and ``more`` calls; its port."""

    def inspect(request: bytes, context: grpc.ServicerContext) -> bytes:
        metadata = {str(item.key): str(item.value) for item in context.invocation_metadata()}
        found = answer(metadata, context)
        return bytes(found if isinstance(found, admin.ClusterInfo) else admin.ClusterInfo(id=found))

    with ThreadPoolExecutor(4) as pool:
        running = grpc.server(pool)
        handlers: dict[str, Any] = {"InspectCluster": grpc.unary_unary_rpc_method_handler(inspect)}
        running.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("admin_v2.API", handlers), *more))
        port = running.add_secure_port("127.0.0.1:0", credentials) if credentials else running.add_insecure_port("127.0.0.1:0")
        running.start()
        try:
            yield port
        finally:
            running.stop(0)


def cluster_id(settings: PachydermSettings) -> str:
    with pachd.session(settings, "asking who is there") as client:
        return client.admin.inspect_cluster().id


def self_signed() -> tuple[str, str]:
    """A certificate for 127.0.0.1 and its key."""
    key, name = private_key(), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pachd")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + datetime.timedelta(days=1))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    certificate = builder.sign(key, hashes.SHA256())
    return certificate.public_bytes(Encoding.PEM).decode(), pem_of(key)


def test_grpcs_trusts_the_given_authorities_and_sends_the_token(tmp_path: Path) -> None:
    certificate, key = self_signed()
    bundle = tmp_path / "ca.pem"
    bundle.write_text(certificate)
    credentials = grpc.ssl_server_credentials([(key.encode(), certificate.encode())])
    with server(lambda metadata, _: metadata.get("authn-token", "nobody"), credentials) as port:
        settings = PachydermSettings(pachd_address=f"grpcs://127.0.0.1:{port}", pach_token=SecretStr("t0ken"), pach_ca_bundle=bundle)
        assert cluster_id(settings) == "t0ken"


def test_grpcs_does_not_talk_to_a_server_that_no_known_authority_vouches_for(monkeypatch: pytest.MonkeyPatch) -> None:
    _short_deadlines(monkeypatch)
    certificate, key = self_signed()
    reached: list[str] = []
    credentials = grpc.ssl_server_credentials([(key.encode(), certificate.encode())])

    def answer(*_: object) -> str:
        reached.append("x")
        return "x"

    with server(answer, credentials) as port, pytest.raises(TransientError):
        cluster_id(PachydermSettings(pachd_address=f"grpcs://127.0.0.1:{port}", pach_token=SecretStr("t0ken")))
    assert reached == []


def _short_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    short = json.dumps(pachd._SERVICE_CONFIG).replace('"60s"', '"1s"').replace('"120s"', '"1s"')
    options = [(name, short if name == "grpc.service_config" else value) for name, value in pachd._CHANNEL_OPTIONS]
    monkeypatch.setattr(pachd, "_CHANNEL_OPTIONS", options)


def test_a_server_that_never_answers_is_a_transient_error(monkeypatch: pytest.MonkeyPatch) -> None:
    _short_deadlines(monkeypatch)
    over = threading.Event()
    with server(lambda *_: str(over.wait(30))) as port:
        with pytest.raises(TransientError, match=r"asking who is there.*DEADLINE_EXCEEDED"):
            cluster_id(PachydermSettings(pachd_address=f"grpc://127.0.0.1:{port}"))
        over.set()


@pytest.mark.parametrize(("failures", "succeeds"), [(2, True), (99, False)])
def test_unavailable_is_retried_a_bounded_number_of_times(failures: int, succeeds: bool) -> None:
    calls: list[int] = []

    def answer(_: Mapping[str, str], context: grpc.ServicerContext) -> str:
        calls.append(1)
        if len(calls) <= failures:
            context.abort(grpc.StatusCode.UNAVAILABLE, "starting")
        return "up"

    with server(answer) as port:
        settings = PachydermSettings(pachd_address=f"grpc://127.0.0.1:{port}")
        if succeeds:
            assert cluster_id(settings) == "up"
            assert len(calls) == 3
        else:
            with pytest.raises(TransientError, match="UNAVAILABLE"):
                cluster_id(settings)
            assert len(calls) == 5


def test_a_file_set_is_never_added_twice() -> None:
    """The first call may have got through: only its answer was lost. Twice in a commit, the files would have their content twice."""
    calls: list[bytes] = []

    def add(request: bytes, context: grpc.ServicerContext) -> bytes:
        calls.append(request)
        context.abort(grpc.StatusCode.UNAVAILABLE, "upstream connect error or disconnect/reset before headers")
        raise AssertionError

    known = grpc.method_handlers_generic_handler("pfs_v2.API", {"AddFileSet": grpc.unary_unary_rpc_method_handler(add)})
    with server(lambda *_: "x", more=(known,)) as port:
        doing = pachd.session(PachydermSettings(pachd_address=f"grpc://127.0.0.1:{port}"), "committing")
        with pytest.raises(TransientError, match="UNAVAILABLE"), doing as client:
            client.pfs.add_file_set(commit=pfs.Commit(id="master"), file_set_id="a")
    assert len(calls) == 1


def test_a_store_of_logs_that_hangs_holds_nobody_for_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    _short_deadlines(monkeypatch)
    over = threading.Event()

    def hang(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        over.wait(30)
        yield b""

    known = grpc.method_handlers_generic_handler("pps_v2.API", {"GetLogs": grpc.unary_stream_rpc_method_handler(hang)})
    with server(lambda *_: "x", more=(known,)) as port:
        doing = pachd.session(PachydermSettings(pachd_address=f"grpc://127.0.0.1:{port}"), "asking for lines")
        with pytest.raises(TransientError, match="DEADLINE_EXCEEDED"), doing as client:
            list(client.pps.get_logs(job=pachd.job_of("p", "j")))
        over.set()


def test_no_stream_that_is_read_is_retried_by_grpc() -> None:
    """gRPC can wait for ever for such a stream when the server dies just while it opens."""
    sources = [Path(module.__file__).read_text() for module in (pfs, pps) if module.__file__]
    streams = {tuple(name.split("/")) for text in sources for name in re.findall(r'unary_stream\(\s*"/(p[fp]s_v2\.API/\w+)"', text)}
    called = {call for file in Path(qa_platform.__file__).parent.rglob("*.py") for call in re.findall(r"\.p[fp]s\.(\w+)", file.read_text())}
    used = {(service, method) for service, method in streams if re.sub(r"(?<!^)(?=[A-Z])", "_", method).lower() in called}
    assert ("pps_v2.API", "ListJob") in used
    configs: list[dict[str, Any]] = json.loads(json.dumps(pachd._SERVICE_CONFIG))["methodConfig"]
    named = {(n["service"], n["method"]): "retryPolicy" in config for config in configs for n in config["name"] if n}
    assert [stream for stream in used if named.get(stream, True)] == []


def test_what_the_server_refuses_is_not_retried() -> None:
    calls: list[int] = []

    def answer(_: Mapping[str, str], context: grpc.ServicerContext) -> str:
        calls.append(1)
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")
        raise AssertionError

    with server(answer) as port, pytest.raises(InputError, match="UNAUTHENTICATED"):
        cluster_id(PachydermSettings(pachd_address=f"grpc://127.0.0.1:{port}"))
    assert len(calls) == 1


@pytest.mark.parametrize("address", ["localhost:30650", "http://localhost:1", "grpc://localhost", ""])
def test_an_address_of_another_form_is_refused(address: str) -> None:
    with pytest.raises(InputError, match="grpc://host:port"):
        pachd.connect(PachydermSettings(pachd_address=address))


@pytest.mark.parametrize(
    ("cluster", "url"),
    [
        (admin.ClusterInfo(id="a"), None),
        (admin.ClusterInfo(proxy_host="pach.example"), "http://pach.example/lineage/default/pipelines/question_answer?globalIdFilter=j"),
        (
            admin.ClusterInfo(proxy_host="pach.example", proxy_tls=True),
            "https://pach.example/lineage/default/pipelines/question_answer?globalIdFilter=j",
        ),
    ],
)
def test_a_job_is_linked_to_the_console_of_a_cluster_that_says_where_it_is(cluster: admin.ClusterInfo, url: str | None) -> None:
    with server(lambda *_: cluster) as port:
        assert job_url(PachydermSettings(pachd_address=f"grpc://127.0.0.1:{port}"), "j") == url


class Refused(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self.code, self.details = lambda: code, lambda: details


@pytest.mark.parametrize(
    "details",
    [
        "failed to connect to `host=pg-bouncer user=pachyderm`: dial error (dial tcp 10.0.0.7:5432: connect: connection refused)",
        "inspect job: FATAL: terminating connection due to administrator command (SQLSTATE 57P01)",
        "FATAL: the database system is starting up (SQLSTATE 57P03)",
        "write tcp 10.0.0.4:38220->10.0.0.7:5432: write: broken pipe",
        "etcdserver: request timed out",
        "pick commit tx: context canceled",
        "dial tcp 10.0.0.7:5432: connect: no route to host",
        "dial tcp: lookup pg-bouncer: no such host",
        "driver: bad connection",
        "net/http: TLS handshake timeout",
    ],
)
def test_an_outage_behind_pachd_is_passing_trouble(details: str) -> None:
    with pytest.raises(TransientError), pachd.pachd_errors("following the jobs of commit x"):
        raise Refused(grpc.StatusCode.UNKNOWN, details)


@pytest.mark.parametrize("details", ["missing Kubernetes secret dbaccess", "name (a b) invalid: only alphanumeric characters"])
def test_a_refusal_stays_one(details: str) -> None:
    with pytest.raises(InputError), pachd.pachd_errors("applying"):
        raise Refused(grpc.StatusCode.UNKNOWN, details)


def test_an_ipv6_address_keeps_its_brackets() -> None:
    assert pachd.connect(PachydermSettings(pachd_address="grpc://[::1]:30650")).address == "[::1]:30650"
