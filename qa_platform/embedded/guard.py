"""Guards a web server on loopback: only requests of the server's owner pass.

Two kinds of strangers can reach loopback. Any web page can make its reader's browser send requests there. The browser then names the page's
site in ``Origin`` and ``Sec-Fetch-Site``; or, if the page's own host name resolves to 127.0.0.1 (DNS rebinding), ``Host`` is that name. And
every other user of the machine can connect: a token, or the kernel's record of the connection, identifies the owner.

pachd is not a web server: it checks its token in `qa_platform.embedded.pachd.protocol.authentication`. PostgreSQL checks its password.
"""

import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from qa_platform.embedded.peers import TELLS_USERS, is_trusted

_NAMES = ("127.0.0.1", "localhost", "::1")
_OWN_SITE = ("same-origin", "none")


class Guard:
    """An ASGI application in front of another one. It answers refused requests with 403, and closes refused WebSockets.

    Args:
        token: clients must send it as ``Authorization: Bearer``. A browser that opens a link cannot send it: it may read pages if it runs
            as this process's user. If the token is empty, every client must run as this user.
    """

    def __init__(self, app: ASGIApp, *, token: str = "") -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = self._problem(scope) if scope["type"] in ("http", "websocket") else ""
        if not problem:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": problem})
        else:
            await PlainTextResponse(problem, status_code=403)(scope, receive, send)

    def _problem(self, scope: Scope) -> str:
        """Why a request is refused; "" if it is not."""
        headers = Headers(scope=scope)
        if not _names_loopback(headers):
            return "This server answers to 127.0.0.1 and localhost only."
        if _is_foreign(headers) and not _is_link(scope, headers):
            return "This server takes no requests from the pages of other sites."
        if self._token and not (_is_opened(scope, headers) and TELLS_USERS and is_trusted(scope["client"], scope["server"][1])):
            sent = headers.get("authorization", "").encode()
            return "" if hmac.compare_digest(sent, f"Bearer {self._token}".encode()) else "This server asks for its owner's token."
        return "" if is_trusted(scope["client"], scope["server"][1]) else "This server belongs to another user of this machine."


def _names_loopback(headers: Headers) -> bool:
    hosts = headers.getlist("host")
    return len(hosts) == 1 and _name(f"//{hosts[0]}") in _NAMES


def _name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _is_foreign(headers: Headers) -> bool:
    """Whether the request comes from a page of another site, or of another port of this machine."""
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != headers["host"]:
        return True
    return headers.get("sec-fetch-site", "none") not in _OWN_SITE


def _is_link(scope: Scope, headers: Headers) -> bool:
    """Whether the browser follows a link on another site's page. Not for GraphQL, where such a link could change something."""
    return _is_opened(scope, headers) and not scope["path"].rstrip("/").endswith("/graphql")


def _is_opened(scope: Scope, headers: Headers) -> bool:
    """Whether a browser opens the URL as a page."""
    opened = (headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")) == ("navigate", "document")
    return scope["type"] == "http" and scope["method"] == "GET" and opened
