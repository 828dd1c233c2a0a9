"""`make dev`'s Dagster, as seen by a stranger."""

import base64
import http.client
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import psutil
import pytest
import requests

from qa_platform.embedded.stack import Stack
from qa_platform.provisioning.project_files import project_file
from qa_platform.tools.documentation.screenshot import free_port, wait_for
from qa_platform_tests.strangers import status_for_stranger

pytestmark = pytest.mark.slow

# It changes something, though nothing that anybody misses.
MUTATION = "mutation { setNuxSeen }"
ORIGIN = {"Origin": "http://evil.example"}
CROSS_SITE = {"Sec-Fetch-Site": "cross-site"}
LINK = {**CROSS_SITE, "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}


@pytest.fixture(scope="module")
def dagster(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Dagster that was started as `make dev` starts it."""
    port = free_port()
    command = [sys.executable, "-m", "qa_platform.tools.dev", "-w", str(project_file("workspace.yaml")), "--host", "127.0.0.1"]
    with (tmp_path_factory.mktemp("dev") / "log").open("wb") as log:
        process = subprocess.Popen([*command, "--port", str(port)], env=stack.environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
    finally:
        # It has nothing to lose, and would take long to end by itself.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def post(address: str, headers: dict[str, str], *, query: str = MUTATION) -> requests.Response:
    return requests.post(f"{address}/graphql", json={"query": query}, headers=headers, timeout=30)


def test_the_owner_can_change_what_dagster_does(dagster: str) -> None:
    for headers in ({}, {"Origin": dagster, "Sec-Fetch-Site": "same-origin"}):
        answer = post(dagster, headers)
        assert answer.status_code == 200
        assert answer.json() == {"data": {"setNuxSeen": True}}


@pytest.mark.parametrize(
    "headers", [ORIGIN, CROSS_SITE, LINK, {"Origin": "null"}, {"Host": "evil.example"}, {"Sec-Fetch-Site": "same-site"}]
)
def test_other_sites_change_nothing(dagster: str, headers: dict[str, str]) -> None:
    assert post(dagster, headers).status_code == 403
    # As a form or an image of a page does, of which no browser asks first.
    as_form = f"{dagster}/graphql?query={quote(MUTATION)}"
    assert requests.post(as_form, headers={**headers, "Content-Type": "text/plain"}, timeout=30).status_code == 403
    assert requests.get(as_form, headers=headers, timeout=30).status_code == 403
    assert requests.post(f"{dagster}/report_asset_materialization/a", json={}, headers=headers, timeout=30).status_code == 403


def test_a_link_to_a_page_works_and_a_frame_does_not(dagster: str) -> None:
    assert requests.get(f"{dagster}/runs", headers=LINK, timeout=30).status_code == 200
    assert requests.get(f"{dagster}/runs", headers={**LINK, "Sec-Fetch-Dest": "iframe"}, timeout=30).status_code == 403


@pytest.mark.parametrize(("origin", "status"), [(None, 101), ("own", 101), ("http://evil.example", 403)])
def test_a_socket_is_opened_for_dagsters_own_pages_only(dagster: str, origin: str | None, status: int) -> None:
    connection = http.client.HTTPConnection(urlsplit(dagster).netloc, timeout=30)
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Protocol": "graphql-ws"}
    key = {"Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode()}
    own = {"Origin": dagster if origin == "own" else origin} if origin else {}
    connection.request("GET", "/graphql", headers={**upgrade, **key, **own})
    assert connection.getresponse().status == status
    connection.close()


def test_another_user_of_the_machine_is_refused(dagster: str) -> None:
    assert status_for_stranger(dagster) == 403


def test_no_token_is_on_a_command_line_and_the_code_servers_sockets_are_private(dagster: str, stack: Stack) -> None:
    sockets = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            ours = process.environ().get("DAGSTER_HOME") == stack.variables["DAGSTER_HOME"]
        except psutil.Error:
            continue
        assert not any(token in word for token in stack.tokens.values() for word in words), process
        if ours and "--socket" in words:
            sockets.append(Path(words[words.index("--socket") + 1]))
    assert sockets
    assert [socket for socket in sockets if socket.stat().st_mode & 0o077] == []


def test_a_port_that_is_taken_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "qa_platform.tools.dev", "--host", "127.0.0.1", "--port", str(port)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert (
        ended.stderr
        == f"Error: 127.0.0.1:{port}: Address already in use; end what uses it, or choose another port: make dev PORT={port + 1}\n"
    )
