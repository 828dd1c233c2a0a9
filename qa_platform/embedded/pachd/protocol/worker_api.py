"""The API that a worker offers to its user's process: NextDatum."""

from collections.abc import Callable

import grpc
from betterproto.lib.google.protobuf import Empty
from pachyderm_sdk.api import pps as pp
from pachyderm_sdk.api import worker as pw

from qa_platform.embedded.pachd.protocol.rpc import Call, Handlers, Method, start_server


class WorkerEndpoint:
    """A served worker API. One thread waits in NextDatum, others may be left behind by processes that are gone."""

    def __init__(self, next_datum: Callable[[str, Callable[[], bool]], list[str]]) -> None:
        def run(request: pw.NextDatumRequest, call: Call) -> pw.NextDatumResponse:
            return pw.NextDatumResponse(env=next_datum(request.error, call.alive))

        methods = {
            "/pachyderm.worker.Worker/NextDatum": Method(pw.NextDatumRequest.FromString, run),
            "/pachyderm.worker.Worker/Status": Method(Empty.FromString, lambda request, call: pp.WorkerStatus()),
        }
        self._server: grpc.Server
        # "localhost" may be either family for the process that calls; IPv4 is what a client tries in any case.
        self._server, self.port = start_server(Handlers(methods), "127.0.0.1:0", threads=8)

    def stop(self) -> None:
        self._server.stop(None)
