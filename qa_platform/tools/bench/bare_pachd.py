"""A pachd without storage: it discards what it receives, and sends from memory. It shows the minimum cost of a server on this library.

It serves two of Pachyderm's methods: ModifyFile, and GetFile, whose path is the number of bytes to send.
"""

import os
from collections.abc import Iterator

from pachyderm_sdk.api import pfs

from qa_platform.embedded.pachd.protocol.rpc import Call, Handlers, Method, start_server
from qa_platform.embedded.pachd.protocol.wire import bytes_values
from qa_platform.embedded.serving import Shutdown, server_arguments, write_atomically

_BLOCK = os.urandom(4 * 2**20)


def _modify_file(requests: Iterator[bytes], call: Call) -> bytes:
    for _ in requests:
        pass
    return b""


def _get_file(request: pfs.GetFileRequest, call: Call) -> Iterator[bytes]:
    for _ in range(int(request.file.path) // len(_BLOCK)):
        yield from bytes_values(_BLOCK)


def main() -> None:
    arguments = server_arguments("A pachd that keeps nothing.")
    shutdown = Shutdown()
    methods = {
        "/pfs_v2.API/ModifyFile": Method(bytes, _modify_file, streams_in=True),
        "/pfs_v2.API/GetFile": Method(pfs.GetFileRequest.FromString, _get_file, streams_out=True),
    }
    server, port = start_server(Handlers(methods))
    write_atomically(arguments.address_file, f"127.0.0.1:{port}")
    shutdown.wait()
    server.stop(0.2).wait()


if __name__ == "__main__":
    main()
