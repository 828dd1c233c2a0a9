"""The gRPC server: methods by name, errors as statuses, and UNIMPLEMENTED for unknown methods."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import betterproto
import grpc

from qa_platform.embedded.pachd.errors import InvalidArgument, PachError

_LOG = logging.getLogger(__name__)

# The SDK sends messages of 19 MiB and accepts up to 20 MiB.
_MESSAGE_BYTES = 32 * 2**20
# Every waiting call and every stream that follows occupies a thread.
_THREADS = 512
OPTIONS = (
    ("grpc.max_receive_message_length", _MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),
    # Clients ping every 20 s, even without a call in flight.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
)


PFS_SERVICE = "pfs_v2.API"


@dataclass(frozen=True)
class Call:
    """A call in progress."""

    context: grpc.ServicerContext

    def alive(self) -> bool:
        """Whether the client still waits."""
        return bool(self.context.is_active())


@dataclass(frozen=True)
class Method:
    """A method of a service.

    Attributes:
        read: parses a request.
        run: takes the request (or an iterator of requests) and the call. It returns a message or its bytes, or an iterator of them.
        streams_in: the client sends a stream.
        streams_out: the server sends a stream.
    """

    read: Callable[[bytes], Any]
    run: Callable[[Any, Call], Any]
    streams_in: bool = False
    streams_out: bool = False


# The methods of a service as (name, request type, function).
Entries = list[tuple[str, type[betterproto.Message], Callable[[Any, Call], Any]]]


def named(service: str, entries: Entries, *, streams_out: bool = False) -> dict[str, Method]:
    """The methods of a service by their full names."""
    return {f"/{service}/{name}": Method(request.FromString, run, streams_out=streams_out) for name, request, run in entries}


class Handlers(grpc.GenericRpcHandler):
    """All methods of a server by their full names.

    Args:
        on_cancel: called when a call ends, for any reason.
    """

    def __init__(self, methods: Mapping[str, Method], *, on_cancel: Callable[[], None] = lambda: None) -> None:
        self._handlers = {name: _handler(name, method, on_cancel) for name, method in methods.items()}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return self._handlers.get(handler_call_details.method) or _unknown(handler_call_details.method)


def start_server(handlers: Handlers, *, threads: int = _THREADS) -> tuple[grpc.Server, int]:
    """Start a server on a free port of loopback. Returns it and the port."""
    server = grpc.server(ThreadPoolExecutor(threads, thread_name_prefix="rpc"), handlers=[handlers], options=OPTIONS)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server, port


def _handler(name: str, method: Method, on_cancel: Callable[[], None]) -> grpc.RpcMethodHandler:
    def unary(request: Any, context: grpc.ServicerContext) -> Any:
        context.add_callback(on_cancel)
        try:
            return method.run(request, Call(context))
        except Exception as error:
            _refuse(context, error, name)

    def stream(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        context.add_callback(on_cancel)
        try:
            yield from method.run(request, Call(context))
        except InvalidArgument as error:
            # Pachyderm validates the requests of streams elsewhere, with another prefix.
            error.args = (str(error).replace("validate request:", "validate recv:"),)
            _refuse(context, error, name)
        except Exception as error:
            _refuse(context, error, name)

    kinds = {
        (False, False): (grpc.unary_unary_rpc_method_handler, unary),
        (False, True): (grpc.unary_stream_rpc_method_handler, stream),
        (True, False): (grpc.stream_unary_rpc_method_handler, unary),
        (True, True): (grpc.stream_stream_rpc_method_handler, stream),
    }
    make, function = kinds[method.streams_in, method.streams_out]
    return make(function, request_deserializer=method.read, response_serializer=_to_bytes)


def _to_bytes(message: betterproto.Message | bytes) -> bytes:
    return message if isinstance(message, bytes) else bytes(message)


def _refuse(context: grpc.ServicerContext, error: Exception, name: str) -> None:
    if isinstance(error, InvalidArgument) and error.field:
        context.set_trailing_metadata((("grpc-status-details-bin", _bad_request(error)),))
    if isinstance(error, PachError):
        context.abort(grpc.StatusCode[error.code], str(error))
    if not context.is_active():
        context.abort(grpc.StatusCode.CANCELLED, "the client has gone")
    _LOG.exception("%s failed", name)
    context.abort(grpc.StatusCode.UNKNOWN, f"{type(error).__name__}: {error}")


def _bad_request(error: InvalidArgument) -> bytes:
    from google.protobuf.any_pb2 import Any as AnyMessage
    from google.rpc.error_details_pb2 import BadRequest
    from google.rpc.status_pb2 import Status

    detail = AnyMessage()
    detail.Pack(BadRequest(field_violations=[BadRequest.FieldViolation(field=error.field, description=error.problem)]))
    status = Status(code=grpc.StatusCode.INVALID_ARGUMENT.value[0], message=str(error), details=[detail])
    encoded: bytes = status.SerializeToString()
    return encoded


def _unknown(name: str) -> grpc.RpcMethodHandler:
    service, _, method = name.lstrip("/").rpartition("/")

    problem = f"unknown method {method} for service {service}"
    if service == "auth_v2.API":
        # Clients recognise a cluster without authentication by this text.
        problem = f"the auth service is not activated ({problem})"

    def refuse(requests: Iterable[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        context.abort(grpc.StatusCode.UNIMPLEMENTED, problem)
        yield b""

    return grpc.stream_stream_rpc_method_handler(refuse)
