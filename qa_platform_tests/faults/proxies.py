"""Proxies between the platform and its servers: a bucket that misbehaves on request, and an address that outlives a server."""

import asyncio
import contextlib
import http.client
import json
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# The reasons of Google's own errors, by which the client recognises them.
_REASONS = {403: "forbidden", 429: "rateLimitExceeded", 500: "backendError", 503: "backendError", 412: "conditionNotMet"}
_HOP_HEADERS = {"connection", "keep-alive", "transfer-encoding", "content-length", "host"}

CUT = "cut"


def operation(method: str, path: str) -> str:
    """The operation of a request to the bucket: list, read, look, copy, delete or write."""
    if "alt=media" in path:
        return "read"
    if "/rewriteTo/" in path:
        return "copy"
    if method == "GET":
        return "look" if "/o/" in path else "list"
    return "delete" if method == "DELETE" else "write"


class FaultyBucket:
    """An HTTP proxy in front of the emulator that spoils requests on demand."""

    def __init__(self, target: str, rng: random.Random) -> None:
        self.target = target
        self._rng = rng
        self._lock = threading.Lock()
        self._armed: tuple[str, str | None, int] | None = None
        self.spoilt: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def arm(self, kind: str, *, on: str | None, count: int) -> None:
        """Spoil the next ``count`` requests of one operation, or of any, with a status or by cutting them off."""
        with self._lock:
            self._armed, self.spoilt = (kind, on, count), []

    def disarm(self) -> None:
        with self._lock:
            self._armed = None

    def take(self, method: str, path: str) -> tuple[str, bool] | None:
        """How to spoil a request, and whether the server gets it anyway; None to leave it alone."""
        with self._lock:
            if self._armed is None:
                return None
            kind, on, count = self._armed
            wanted = operation(method, path)
            # A real bucket returns 412 only for a request with a precondition. Only a read can be cut in the middle.
            if (on and on != wanted) or (kind == "412" and "enerationMatch" not in path) or (kind == CUT and wanted != "read"):
                return None
            self._armed = (kind, on, count - 1) if count > 1 else None
            self.spoilt.append(wanted)
            # Including the worst case: the operation is done, and the response is lost.
            return kind, kind in ("500", "503") and self._rng.random() < 0.5


def _handler(proxy: FaultyBucket) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            spoilt = proxy.take(self.command, self.path)
            if spoilt is None or spoilt[0] == CUT:
                self._answer(*self._ask(body), cut=spoilt is not None)
                return
            kind, done_all_the_same = spoilt
            if done_all_the_same:
                self._ask(body)
            error = {"code": int(kind), "message": "injected", "errors": [{"reason": _REASONS[int(kind)], "message": "injected"}]}
            self._answer(int(kind), {"Content-Type": "application/json"}, json.dumps({"error": error}).encode())

        def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            connection = http.client.HTTPConnection(proxy.target, timeout=60)
            with contextlib.closing(connection):
                headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_HEADERS}
                connection.request(self.command, self.path, body=body, headers={**headers, "Host": proxy.address})
                answer = connection.getresponse()
                return answer.status, dict(answer.headers.items()), answer.read()

        def _answer(self, status: int, headers: dict[str, str], content: bytes, *, cut: bool = False) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in _HOP_HEADERS | {"server", "date"}:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if cut else content)
            self.close_connection = self.close_connection or cut

        do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _pass  # noqa: N815

        def log_message(self, *args: Any) -> None:
            pass

    return Handler


class Forwarder:
    """A TCP address that stays the same while the server behind it dies and restarts elsewhere."""

    def __init__(self) -> None:
        self.target = ""
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        threading.Thread(target=self._run, args=[started], daemon=True).start()
        started.wait()

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        """Cut all connections, and accept none during the block."""
        target, self.target = self.target, ""
        self._loop.call_soon_threadsafe(self._cut)
        try:
            yield
        finally:
            self.target = target

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        started.set()
        self._loop.run_forever()

    def _cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            host, _, port = self.target.rpartition(":")
            there, back = await asyncio.open_connection(host, int(port))
        except (OSError, ValueError):
            writer.close()
            return
        self._writers |= {writer, back}
        await asyncio.gather(_pipe(reader, back), _pipe(there, writer))
        self._writers -= {writer, back}


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    with contextlib.suppress(OSError, RuntimeError):
        writer.close()
