"""The API that a worker serves to its process of user code: NextDatum."""

import time
from collections.abc import Callable

import grpc
from betterproto.lib.google.protobuf import Empty
from pachyderm_sdk.api import pps as pp
from pachyderm_sdk.api import worker as pw

from qa_platform.embedded.pachd.errors import PermissionDenied
from qa_platform.embedded.pachd.protocol.rpc import Call, Handlers, Method, start_server
from qa_platform.embedded.peers import is_trusted

# Looking up the user of a connection walks through the kernel's whole table. That takes milliseconds, as long as a small datum. So a
# connection is trusted for a second. The kernel does not reuse the port of an orderly closed connection that soon. After a broken one,
# another user would have to get the same port within the rest of the second.
_TRUSTED_SECONDS = 1.0


class WorkerEndpoint:
    """The served API of one worker.

    Args:
        next_datum: takes the error of the last datum, and whether the caller still waits; returns the environment of the next datum.
    """

    def __init__(self, next_datum: Callable[[str, Callable[[], bool]], list[str]]) -> None:
        def run(request: pw.NextDatumRequest, call: Call) -> pw.NextDatumResponse:
            self._check(call)
            return pw.NextDatumResponse(env=next_datum(request.error, call.alive))

        # The time until which a connection is trusted without another lookup.
        self._trusted: dict[str, float] = {}
        methods = {
            "/pachyderm.worker.Worker/NextDatum": Method(pw.NextDatumRequest.FromString, run),
            "/pachyderm.worker.Worker/Status": Method(Empty.FromString, lambda request, call: pp.WorkerStatus()),
        }
        self._server: grpc.Server
        # Clients resolve "localhost" to IPv4, IPv6 or both, and always try IPv4. One thread serves the process's NextDatum; the others may
        # be blocked by calls of dead processes.
        self._server, self.port = start_server(Handlers(methods), threads=8)

    def _check(self, call: Call) -> None:
        """Refuse other users of this machine. Pipelines' programs send no token, because in a cluster each pod has its own network."""
        peer, now = call.context.peer(), time.monotonic()
        if self._trusted.get(peer, now) > now:
            return
        host, _, port = peer.removeprefix("ipv4:").rpartition(":")
        if not is_trusted((host, int(port)), self.port):
            raise PermissionDenied("this worker belongs to another user of this machine")
        self._trusted = {peer: now + _TRUSTED_SECONDS}

    def stop(self) -> None:
        """Stop serving."""
        self._server.stop(None)
