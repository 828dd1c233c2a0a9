"""The connection to Pachyderm: deadlines, retries, and the translation of its failures into the platform's own errors."""

import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
from grpc_interceptor import ClientInterceptor
from pachyderm_sdk import Client
from pachyderm_sdk.api import pfs, pps
from pachyderm_sdk.constants import GRPC_CHANNEL_OPTIONS

from qa_platform.errors import InputError, TransientError
from qa_platform.settings import PachydermSettings

# The states of a job that has not ended.
IN_PROGRESS = frozenset(
    {
        pps.JobState.JOB_CREATED,
        pps.JobState.JOB_STARTING,
        pps.JobState.JOB_RUNNING,
        pps.JobState.JOB_EGRESSING,
        pps.JobState.JOB_FINISHING,
    }
)
# The states of a pipeline whose workers do not run, for a reason that the pipeline names.
NOT_STARTING = frozenset({pps.PipelineState.PIPELINE_CRASHING, pps.PipelineState.PIPELINE_FAILURE})

# Deadlines and bounded retries are gRPC's own. Streams of files may last for hours. Streams that are read are not
# retried: gRPC 1.85 would wait for ever if the server dies just when such a stream opens. Nor is AddFileSet: if only
# the response was lost, the retry would add the file set twice and double the content of its files.
_PFS_LISTS = ("GlobFile", "InspectCommitSet", "ListBranch", "ListCommit", "ListCommitSet", "ListFile", "ListRepo", "WalkFile")
_PPS_LISTS = ("InspectJobSet", "ListDatum", "ListJob", "ListJobSet", "ListPipeline")
_WRITTEN = [{"service": "pfs_v2.API", "method": m} for m in ("ModifyFile", "CreateFileSet")]
_LONG = [{"service": "pfs_v2.API", "method": m} for m in ("GetFile", "GetFileTAR", "SubscribeCommit")]
_LONG += [{"service": "pps_v2.API", "method": "SubscribeJob"}]
_LISTED = [{"service": "pfs_v2.API", "method": m} for m in _PFS_LISTS]
_LISTED += [{"service": "pps_v2.API", "method": m} for m in _PPS_LISTS]
_ONCE = [{"service": "pfs_v2.API", "method": "AddFileSet"}]
# A log store that hangs must not hold up a run.
_LOGS = [{"service": "pps_v2.API", "method": "GetLogs"}]
_RETRY = {
    "maxAttempts": 5,
    "initialBackoff": "0.2s",
    "maxBackoff": "5s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}
_SERVICE_CONFIG = {
    "methodConfig": [
        {"name": _WRITTEN, "timeout": "21600s", "retryPolicy": _RETRY},
        {"name": _LONG, "timeout": "21600s"},
        {"name": _LOGS, "timeout": "120s"},
        {"name": [*_LISTED, *_ONCE], "timeout": "60s"},
        {"name": [{}], "timeout": "60s", "retryPolicy": _RETRY},
    ]
}
_CHANNEL_OPTIONS = [
    *GRPC_CHANNEL_OPTIONS,
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    ("grpc.keepalive_time_ms", 30_000),
]


def connect(settings: PachydermSettings) -> Client:
    """A client of the pachd at ``settings.pachd_address``, with a deadline on every call and retries while pachd is unavailable.

    Raises:
        InputError: the address is not ``grpc://host:port`` or ``grpcs://host:port``, or the CA bundle cannot be read.
    """
    scheme, host, port = _address(settings)
    client = Client(
        # urlsplit removes the brackets of an IPv6 address.
        host=f"[{host}]" if ":" in host else host,
        port=port,
        tls=scheme == "grpcs",
        root_certs=_roots(settings),
        auth_token=settings.pach_token.get_secret_value() or None,
    )
    # The SDK takes no channel options, so its channel is replaced.
    client._channel.close()
    client._channel = grpc.intercept_channel(open_channel(client), _Metadata(client._grpc_metadata))
    client._init_api()
    return client


def _address(settings: PachydermSettings) -> tuple[str, str, int]:
    try:
        address = urlsplit(settings.pachd_address)
        host, port = address.hostname, address.port
    # Raised for a port that is not a number or too high, and for an unbalanced bracket.
    except ValueError:
        host = port = None
    if not host or not port or address.scheme not in ("grpc", "grpcs"):
        raise InputError(
            f"PACHD_ADDRESS is {settings.pachd_address!r}", advice="set it to grpc://host:port, or to grpcs://host:port with TLS"
        )
    return address.scheme, host, port


def _roots(settings: PachydermSettings) -> bytes | None:
    try:
        return settings.pach_ca_bundle.read_bytes() if settings.pach_ca_bundle else None
    except OSError as error:
        raise InputError(
            f"PACH_CA_BUNDLE cannot be read: {error.strerror}",
            where=str(settings.pach_ca_bundle),
            advice="set it to a PEM file, or unset it",
        ) from error


class _Metadata(ClientInterceptor):
    """Sends the token with every call. The SDK's own interceptor prints a traceback for every stream that fails; this one does not."""

    def __init__(self, metadata: Sequence[tuple[str, str]]) -> None:
        self._metadata = metadata

    def intercept(self, method: Callable[..., Any], request: Any, call_details: grpc.ClientCallDetails) -> Any:
        return method(request, call_details._replace(metadata=[*(call_details.metadata or ()), *self._metadata]))


def open_channel(client: Client) -> grpc.Channel:
    """Another channel to the pachd of a client, with the same deadlines and retries."""
    if client.root_certs is None:
        return grpc.insecure_channel(client.address, options=_CHANNEL_OPTIONS)
    credentials = grpc.ssl_channel_credentials(root_certificates=client.root_certs)
    return grpc.secure_channel(client.address, credentials, options=_CHANNEL_OPTIONS)


@contextmanager
def session(settings: PachydermSettings, doing: str) -> Iterator[Client]:
    """A client for the duration of a block, with `pachd_errors` around it."""
    client = connect(settings)
    try:
        with pachd_errors(doing, settings.pachd_address):
            yield client
    finally:
        client._channel.close()


@contextmanager
def pachd_errors(doing: str, address: str = "") -> Iterator[None]:
    """Turn the exceptions of gRPC into the platform's own errors.

    Args:
        doing: what the block does, for the message.
        address: pachd's address, for the message.

    Raises:
        NotThere: pachd does not have the requested object.
        InputError: pachd refuses.
        TransientError: pachd is unavailable, or is still finishing an earlier commit.
    """
    try:
        yield
    except grpc.RpcError as error:
        code, details = error.code(), error.details()
        if code is grpc.StatusCode.UNAVAILABLE and "failed to connect" in (details or ""):
            what = f"pachd cannot be reached at {address}" if address else "pachd cannot be reached"
            raise TransientError(what, where=doing, advice="check PACHD_ADDRESS, and that pachd is up") from error
        if is_unfinished(error):
            raise TransientError(f"Pachyderm is still finishing an earlier commit ({details})", where=doing) from error
        if code in _UNAVAILABLE or (code is grpc.StatusCode.UNKNOWN and _OUTAGE.search(details or "")):
            raise TransientError(f"pachd is unavailable ({code.name}: {details})", where=doing) from error
        if code is grpc.StatusCode.NOT_FOUND:
            raise NotThere(f"not found in Pachyderm ({code.name}: {details})", where=doing) from error
        if code is grpc.StatusCode.PERMISSION_DENIED:
            raise InputError(
                f"Pachyderm denies permission ({details})",
                where=doing,
                advice="give the robot its roles; `qa-platform doctor` names the missing one",
            ) from error
        advice = "check PACH_TOKEN" if code is grpc.StatusCode.UNAUTHENTICATED else ""
        raise InputError(f"pachd refused ({code.name}: {details})", where=doing, advice=advice) from error


_UNAVAILABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED, grpc.StatusCode.ABORTED)
# pachd passes on the errors of its own database, of etcd and of the object storage as UNKNOWN.
_OUTAGE = re.compile(
    r"broken pipe|unexpected EOF|connection (refused|reset)|i/o timeout|closed network connection|context (canceled|deadline exceeded)"
    r"|no route to host|network is unreachable|no such host|bad connection|TLS handshake timeout|SQLSTATE (08|53|57P)|etcdserver: "
)


def is_code(error: Exception, code: grpc.StatusCode) -> bool:
    """Whether an error of the SDK carries this gRPC status."""
    return isinstance(error, grpc.RpcError) and error.code() == code


def is_unfinished(error: Exception) -> bool:
    """Whether a call was refused because an earlier commit is still being finished."""
    return is_code(error, grpc.StatusCode.UNKNOWN) and isinstance(error, grpc.RpcError) and "unfinished" in (error.details() or "")


class NotThere(InputError):
    """Pachyderm does not have the requested object, or no longer has it."""


@contextmanager
def open_tar(client: Client, file: pfs.File) -> Iterator[tarfile.TarFile]:
    """The files that match a path, as a tar archive that is read as a stream."""
    try:
        with client.pfs.pfs_tar_file(file=file) as tar:
            yield tar
    except ValueError as error:
        # The SDK hides pachd's error when it opens the stream.
        if isinstance(error.__cause__, grpc.RpcError):
            raise error.__cause__ from None
        raise


def fetch_folder(client: Client, uri: str, target: Path) -> None:
    """Copy a folder of a repo (``repo@commit:/folder``) into ``target``, without the folder's own name."""
    file = pfs.File.from_uri(uri)
    prefix = file.path.strip("/") + "/"
    # Raises if it does not exist; the SDK would only fail to read an archive.
    client.pfs.inspect_file(file=file)
    with open_tar(client, file) as tar:
        for member in tar:
            name = member.name.strip("/")
            if member.isfile() and name.startswith(prefix):
                member.name = name.removeprefix(prefix)
                tar.extract(member, target, filter="data")


def read_file(client: Client, uri: str) -> Iterator[bytes]:
    """The content of one file of a repo (``repo@commit:/path``), piece by piece."""
    # Not the SDK's `pfs_file`, which hides pachd's message.
    return (piece.value for piece in client.pfs.get_file(file=pfs.File.from_uri(uri)))


def state_name(state: int) -> str:
    """The state of a job: ``running``, ``success`` and so on. The SDK leaves numbers where the protocol has enums."""
    return str(pps.JobState(state).name).removeprefix("JOB_").lower()


def pipeline_state(info: pps.PipelineInfo) -> str:
    """The state of a pipeline: ``running``, ``crashing`` and so on. The SDK leaves numbers where the protocol has enums."""
    return str(pps.PipelineState(info.state).name).removeprefix("PIPELINE_").lower()


def have_workers(client: Client, jobs: Iterable[pps.JobInfo]) -> bool:
    """Whether a worker is working on any of the jobs now.

    Pachyderm also reports a pipeline as crashing if only some of its pods cannot be scheduled while others work.
    """
    return any(client.pps.inspect_job(job=info.job, details=True).details.worker_status for info in jobs)


def job_of(pipeline: str, job_id: str) -> pps.Job:
    """The job of a pipeline in the default project."""
    return pps.Job(pipeline=pps.Pipeline(project=pfs.Project(name="default"), name=pipeline), id=job_id)


def lists_the_bucket(pipeline: pps.PipelineInfo) -> bool:
    """Whether a pipeline, inspected with its details, is the answering pipeline's cron variant."""
    return bool(pipeline.details.input.cron.name)


def user_lines(messages: Iterable[pps.LogMessage]) -> list[str]:
    """The lines of the pipeline's own program, without Pachyderm's lines about it."""
    return [message.message.rstrip("\n") for message in messages if message.user]
