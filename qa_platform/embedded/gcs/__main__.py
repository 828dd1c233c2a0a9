"""``python -m qa_platform.embedded.gcs --state DIR --address-file FILE``: serves until SIGTERM, SIGINT or the end of standard input."""

import socket
import threading
from pathlib import Path

import uvicorn

from qa_platform.embedded.gcs.app import Emulator
from qa_platform.embedded.gcs.disk import Disk
from qa_platform.embedded.guard import Guard
from qa_platform.embedded.serving import Shutdown, server_arguments, write_atomically

# Longer than clients keep idle connections: they reuse them, and do not retry every request whose connection turns out to be closed.
_KEEP_ALIVE_SECONDS = 3600
_GRACEFUL_SECONDS = 3


def serve(state: Path, address_file: Path, token: str) -> None:
    """Serve the buckets of a state folder until asked to end.

    Args:
        state: the folder of the buckets.
        address_file: receives ``host:port`` once the emulator serves.
        token: the token that clients must send; empty for an open emulator.
    """
    shutdown = Shutdown()
    disk = Disk(state)
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        Guard(Emulator(disk), token=token),
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_GRACEFUL_SECONDS,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), name="gcs")
    thread.start()
    while thread.is_alive() and not server.started and not shutdown.wait(0.01):
        pass
    write_atomically(address_file, f"127.0.0.1:{listener.getsockname()[1]}")
    shutdown.wait(unless=lambda: not thread.is_alive())
    server.should_exit = True
    thread.join()
    disk.close()


def main() -> None:
    arguments = server_arguments("An embedded Google Cloud Storage.")
    serve(arguments.state, arguments.address_file, arguments.token)


if __name__ == "__main__":
    main()
