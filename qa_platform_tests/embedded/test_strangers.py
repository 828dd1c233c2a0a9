"""The servers of a stack, as seen by strangers: another user of the machine, or a web page in its owner's browser."""

import asyncio
import json
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
import requests
from pachyderm_sdk import Client
from pachyderm_sdk.api import pfs
from pachyderm_sdk.api.worker import WorkerStub
from starlette.responses import PlainTextResponse

from qa_platform.embedded import peers, postgres_access
from qa_platform.embedded.account import Account, _copy
from qa_platform.embedded.environment import inherited
from qa_platform.embedded.guard import Guard
from qa_platform.embedded.pachd.protocol import worker_api
from qa_platform.embedded.pachd.protocol.worker_api import WorkerEndpoint
from qa_platform.embedded.private import own_folder, token_file
from qa_platform.embedded.stack import Stack
from qa_platform.embedded.supervise import ServerSpec, running
from qa_platform.errors import InputError
from qa_platform_tests.pachd_helpers import SUCCESS, Pachd, Server, refused
from qa_platform_tests.strangers import NOBODY, run_as_stranger, status_for_stranger

UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED


def bucket_url(stack: Stack) -> str:
    return f"{stack.variables['API_ENDPOINT_OVERRIDE']}/storage/v1/b"


def with_token(stack: Stack, **more: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {stack.tokens['gcs']}", **more}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


class TestTokens:
    def test_each_server_has_a_token_of_its_own(self, stack: Stack) -> None:
        assert len(set(stack.tokens.values())) == 3
        assert min(map(len, stack.tokens.values())) >= 32
        assert not any(token in repr(stack) for token in stack.tokens.values())

    @pytest.mark.parametrize("token", [None, "", "wrong"])
    def test_pachd_refuses_a_call_without_its_token(self, stack: Stack, token: str | None) -> None:
        host, port = stack.addresses["pachd"].split(":")
        client = Client(host, int(port), auth_token=token)
        for ask in (client.pfs.list_repo, client.pps.list_pipeline, client.pps.list_job, client.pps.list_secret):
            with refused(UNAUTHENTICATED, "token"):
                list(ask())
        with refused(UNAUTHENTICATED, "token"):
            client.pps.create_pipeline_v2(create_pipeline_request_json="{}")
        with refused(UNAUTHENTICATED, "token"):
            client.pfs.create_file_set(iter([pfs.ModifyFileRequest()]))

    def test_the_owner_of_the_stack_has_the_three_roles_that_the_platform_needs(self, stack: Stack) -> None:
        host, port = stack.addresses["pachd"].split(":")
        client = Client(host, int(port), auth_token=stack.variables["PACH_TOKEN"])
        assert client.auth.who_am_i().username == "robot:owner"
        assert list(client.pps.list_pipeline())

    def test_a_file_of_no_tokens_lets_nobody_in(self, tmp_path: Path) -> None:
        (tmp_path / "tokens.json").write_text("{}")
        server = Server(tmp_path, {"QA_PACHD_TOKENS": str(tmp_path / "tokens.json")})
        with refused(UNAUTHENTICATED, "token"):
            list(Client.from_pachd_address(server.address).pfs.list_repo())
        assert server.stop() == 0

    @pytest.mark.parametrize(
        "headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}, {"Authorization": "Basic eA=="}]
    )
    def test_the_bucket_refuses_a_request_without_its_token(self, stack: Stack, headers: dict[str, str]) -> None:
        for method in ("GET", "POST", "DELETE"):
            assert requests.request(method, bucket_url(stack), headers=headers, timeout=10).status_code == 403
        assert requests.get(bucket_url(stack), headers=with_token(stack), timeout=10).status_code == 200

    def test_a_browser_of_the_owner_opens_a_link_and_changes_nothing(self, stack: Stack) -> None:
        opened = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document", "Sec-Fetch-Site": "cross-site"}
        statuses = [
            requests.request(method, bucket_url(stack), headers=opened, timeout=10).status_code for method in ("GET", "POST", "DELETE")
        ]
        assert statuses == [200, 403, 403]

    @pytest.mark.parametrize(("is_linux", "is_trusted", "status"), [(True, True, 200), (True, False, 403), (False, True, 403)])
    def test_the_browser_of_another_user_opens_nothing(
        self, is_linux: bool, is_trusted: bool, status: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("qa_platform.embedded.guard.TELLS_USERS", is_linux)
        monkeypatch.setattr("qa_platform.embedded.guard.is_trusted", lambda client, port: is_trusted)
        headers = [(b"host", b"127.0.0.1"), (b"sec-fetch-mode", b"navigate"), (b"sec-fetch-dest", b"document")]
        scope = {"type": "http", "method": "GET", "path": "/", "headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2)}
        answered: list[int] = []

        async def send(message: Any) -> None:
            answered.extend([message["status"]] if "status" in message else [])

        asyncio.run(Guard(PlainTextResponse("content"), token="token")(scope, lambda: None, send))  # type: ignore[arg-type, return-value]
        assert answered == [status]

    @pytest.mark.parametrize("password", ["", "wrong"])
    def test_postgres_refuses_a_connection_without_its_password(self, stack: Stack, password: str) -> None:
        for database in ("answers", "dagster", "postgres"):
            with pytest.raises(psycopg.OperationalError, match="password"):
                psycopg.connect(postgres_access.database_url(stack.addresses["postgres"], database, password))

    def test_postgres_keeps_only_a_digest_of_the_password_and_asks_for_it_on_every_way(self, stack: Stack) -> None:
        with psycopg.connect(postgres_access.database_url(stack.addresses["postgres"], "answers", stack.tokens["postgres"])) as connection:
            stored = connection.execute("select rolpassword from pg_authid where rolcanlogin").fetchall()
            rules = connection.execute("select distinct auth_method from pg_hba_file_rules").fetchall()
            assert connection.execute("show listen_addresses").fetchone() == ("",)
        assert [kept.startswith("SCRAM-SHA-256$") for (kept,) in stored] == [True]
        assert rules == [("scram-sha-256",)]

    def test_a_cluster_that_let_everybody_in_asks_for_a_password_once_it_has_one(self, tmp_path: Path) -> None:
        with running([ServerSpec("postgres", "qa_platform.embedded.postgres")], tmp_path) as addresses:
            psycopg.connect(postgres_access.database_url(addresses["postgres"], "answers")).close()
        with running([ServerSpec("postgres", "qa_platform.embedded.postgres", guarded=True)], tmp_path) as addresses:
            with pytest.raises(psycopg.OperationalError, match="password"):
                psycopg.connect(postgres_access.database_url(addresses["postgres"], "answers"))
            password = token_file(tmp_path, "postgres").read_text()
            psycopg.connect(postgres_access.database_url(addresses["postgres"], "answers", password)).close()

    def test_no_token_is_on_a_command_line_that_others_can_read(self, stack: Stack) -> None:
        # What people pass to psql as it is.
        assert stack.tokens["postgres"] not in stack.variables["QA_DATABASE_URL"]
        running_now = subprocess.run(
            ["sh", "-c", 'psql "$QA_DATABASE_URL" -Atc "select pg_sleep(0)" && cat /proc/[0-9]*/cmdline'],
            env=stack.environment,
            capture_output=True,
            check=False,
        ).stdout
        assert b"qa_platform.embedded.pachd" in running_now
        assert [name for name, token in stack.tokens.items() if token.encode() in running_now] == []

    def test_a_token_is_in_no_file_but_those_that_only_the_owner_reads(self, stack: Stack) -> None:
        holding = {
            path.name: mode(path)
            for path in stack.state.rglob("*")
            if path.is_file() and any(token.encode() in path.read_bytes() for token in stack.tokens.values())
        }
        assert holding == dict.fromkeys(["gcs.token", "google-credentials.json", "pachd.token", "postgres.token"], 0o600)


class TestBrowsers:
    @pytest.mark.parametrize(
        "headers",
        [
            {"Host": "evil.example"},
            {"Host": "127.0.0.1.evil.example:80"},
            {"Host": "[::1"},
            {"Host": ""},
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {"Origin": "http://127.0.0.1:1"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site"},
        ],
    )
    def test_another_host_name_and_the_pages_of_other_sites_are_refused_even_with_the_token(
        self, stack: Stack, headers: dict[str, str]
    ) -> None:
        for method in ("GET", "POST"):
            assert requests.request(method, bucket_url(stack), headers=with_token(stack, **headers), timeout=10).status_code == 403

    @pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "LOCALHOST"])
    def test_every_name_of_this_machine_is_good(self, stack: Stack, host: str) -> None:
        for name in (host, f"{host}:1"):
            headers = with_token(stack, Host=name, Origin=f"http://{name}", **{"Sec-Fetch-Site": "same-origin"})
            assert requests.get(bucket_url(stack), headers=headers, timeout=10).status_code == 200


class TestOtherUsers:
    def test_another_user_reads_nothing_of_the_state(self, stack: Stack) -> None:
        for path in (stack.state, stack.state / "logs", stack.state / "postgres" / "socket"):
            assert "PermissionError" in run_as_stranger(f"os.stat({str(path / 'x')!r})")

    def test_another_user_is_told_from_this_one_by_the_kernel(self, tmp_path: Path) -> None:
        with running([ServerSpec("gcs", "qa_platform.embedded.gcs")], tmp_path) as addresses:
            url = f"http://{addresses['gcs']}/storage/v1/b"
            assert requests.get(url, timeout=10).status_code == 200
            assert status_for_stranger(url) == 403

    @pytest.fixture
    def worker(self) -> Iterator[WorkerEndpoint]:
        endpoint = WorkerEndpoint(lambda error, alive: ["got=it"])
        yield endpoint
        endpoint.stop()

    def test_a_worker_gives_its_datums_to_its_own_user_only(self, worker: WorkerEndpoint) -> None:
        ask = f'WorkerStub(grpc.insecure_channel("localhost:{worker.port}")).next_datum(error="").env'
        own = f"import grpc; from pachyderm_sdk.api.worker import WorkerStub; print({ask})"
        assert subprocess.run([sys.executable, "-c", own], capture_output=True, text=True, check=True).stdout == "['got=it']\n"
        said = run_as_stranger(f"print({ask})")
        assert "PERMISSION_DENIED" in said
        assert "this worker belongs to another user" in said

    def test_a_worker_refuses_whom_the_kernel_calls_another_user(self, worker: WorkerEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(worker_api, "_TRUSTED_SECONDS", 3600.0)
        with grpc.insecure_channel(f"localhost:{worker.port}") as channel:
            assert WorkerStub(channel).next_datum(error="").env == ["got=it"]
            monkeypatch.setattr(peers, "_ROOT", -1)
            monkeypatch.setattr(os, "geteuid", lambda: NOBODY - 1)
            assert WorkerStub(channel).next_datum(error="").env == ["got=it"], "its user is known"
            another = grpc.insecure_channel(f"localhost:{worker.port}", [("grpc.use_local_subchannel_pool", 1)])
            with another, refused(grpc.StatusCode.PERMISSION_DENIED, "this worker belongs to another user"):
                WorkerStub(another).next_datum(error="")

    def test_a_worker_looks_again_at_a_connection_that_is_older(self, worker: WorkerEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(worker_api, "_TRUSTED_SECONDS", 0.0)
        with grpc.insecure_channel(f"localhost:{worker.port}") as channel:
            assert WorkerStub(channel).next_datum(error="").env == ["got=it"]
            monkeypatch.setattr(peers, "_ROOT", -1)
            monkeypatch.setattr(os, "geteuid", lambda: NOBODY - 1)
            with refused(grpc.StatusCode.PERMISSION_DENIED, "this worker belongs to another user"):
                WorkerStub(channel).next_datum(error="")

    def test_a_connection_that_a_stranger_has_closed_is_not_taken_for_one_of_root(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(30)
            port = server.getsockname()[1]
            run_as_stranger(f"import socket; socket.create_connection(('127.0.0.1', {port})).close()")
            connection, client = server.accept()
            with connection:
                assert not peers.is_trusted(client, port)

    def test_a_connection_that_is_not_there_belongs_to_nobody(self) -> None:
        assert not peers.is_trusted(("127.0.0.1", 1), 1)


SECRETS = {
    "PG_PASSWORD": "planted-1",
    "PGPASSWORD": "planted-2",
    "PACH_TOKEN": "planted-3",
    "GOOGLE_APPLICATION_CREDENTIALS": "planted-4",
    "AWS_SECRET_ACCESS_KEY": "planted-5",
    "HF_TOKEN": "planted-6",
    "HTTPS_PROXY": "http://u:planted-7@proxy.example",
    "QA_SLACK_WEBHOOK": "planted-8",
    "SSH_AUTH_SOCK": "planted-9",
}


class TestWorkers:
    def test_a_program_of_a_pipeline_sees_no_secret_of_the_user_who_started_the_stack(self, tmp_path: Path) -> None:
        server = Server(tmp_path, {**SECRETS, "OMP_NUM_THREADS": "1"})
        pachd = Pachd(server.address)
        repo = pachd.repo()
        spec_of_its_own = {"env": {"ASKED_FOR": "yes"}}
        name = pachd.pipeline("p", "env > $pfs/out/env", repo, transform=spec_of_its_own)
        commit = pachd.put(repo, {"/a": b"1"})
        assert pachd.wait(name, commit).state == SUCCESS
        seen = pachd.read(name, commit, "/env")
        assert b"ASKED_FOR=yes" in seen
        assert b"OMP_NUM_THREADS=1" in seen
        meta = pfs.Repo(name=name, type="meta")
        stored = [pachd.read(meta, commit, path) for path in pachd.paths(meta, commit) if path.endswith("/.env")]
        assert stored
        assert [line for content in (seen, *stored) for line in content.splitlines() if b"planted" in line] == []
        assert server.stop() == 0

    def test_a_proxy_is_inherited_unless_its_address_has_a_password(self) -> None:
        open_proxy = {"https_proxy": "http://proxy.example:3128"}
        assert inherited({**SECRETS, **open_proxy, "LC_ALL": "C"}) == {**open_proxy, "LC_ALL": "C"}


class TestFolders:
    def test_the_folders_of_the_state_are_the_owners_alone(self, stack: Stack) -> None:
        made = [stack.state, *(path for path in stack.state.iterdir() if path.is_dir())]
        for server in ("gcs", "pachd", "postgres", "logs"):
            made += [path for path in (stack.state / server).rglob("*") if path.is_dir() and "workers" not in path.parts]
        assert len(made) > 10
        assert [path for path in made if mode(path) != 0o700] == []

    def test_they_are_so_from_the_moment_they_are_made_whatever_the_umask_is(self, tmp_path: Path) -> None:
        seen: set[tuple[str, int]] = set()
        over = threading.Event()

        def watch() -> None:
            while not over.is_set():
                for path in (*tmp_path.rglob("*.token"), *tmp_path.rglob(".*.token.*"), tmp_path / "gcs", tmp_path / "logs"):
                    if path.exists():
                        seen.add((path.name if path.is_dir() else "secret", mode(path)))

        watcher = threading.Thread(target=watch)
        before = os.umask(0)
        try:
            watcher.start()
            with running([ServerSpec("gcs", "qa_platform.embedded.gcs", guarded=True)], tmp_path):
                over.set()
                watcher.join()
                inside = {mode(path) & 0o077 for path in (tmp_path / "gcs").rglob("*")}
        finally:
            os.umask(before)
        assert seen == {("secret", 0o600), ("gcs", 0o700), ("logs", 0o700)}
        assert inside == {0}

    def test_no_folder_above_the_state_is_changed(self, tmp_path: Path) -> None:
        shut, there = tmp_path / "shut", tmp_path / "shut" / "there"
        there.mkdir(parents=True)
        shut.chmod(0o700)
        there.chmod(0o750)
        above = [Path(parent) for parent in there.parents]
        modes = [mode(path) for path in above]
        state = own_folder(there / "state")
        with running([ServerSpec("postgres", "qa_platform.embedded.postgres", guarded=True)], state) as addresses:
            password = token_file(state, "postgres").read_text()
            psycopg.connect(postgres_access.database_url(addresses["postgres"], "answers", password)).close()
            assert [mode(path) for path in above] == modes
            assert (mode(there), mode(state)) == (0o750, 0o700)

    def test_a_folder_that_others_can_write_to_is_refused(self, tmp_path: Path) -> None:
        for wrong in (0o770, 0o707, 0o777):
            (tmp_path / "x").mkdir(exist_ok=True)
            (tmp_path / "x").chmod(wrong)
            with pytest.raises(InputError, match=r"x: others can write to the folder; name another folder"):
                own_folder(tmp_path / "x")
            assert mode(tmp_path / "x") == wrong

    def test_a_folder_of_another_user_is_refused_with_a_message(self, tmp_path: Path) -> None:
        if os.geteuid() != 0:
            pytest.skip("only root can give a folder away")
        (tmp_path / "x").mkdir(mode=0o755)
        os.chown(tmp_path / "x", NOBODY, NOBODY)
        command = [sys.executable, "-m", "qa_platform.cli.main", "local", "run", "--state", str(tmp_path / "x"), "--", "true"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "x: the folder belongs to another user; name another folder" in done.stderr
        assert "Traceback" not in done.stderr
        assert (mode(tmp_path / "x"), list((tmp_path / "x").iterdir())) == (0o755, [])

    def test_a_folder_of_an_older_stack_becomes_private(self, tmp_path: Path) -> None:
        (tmp_path / "state").mkdir(mode=0o755)
        assert mode(own_folder(tmp_path / "state")) == 0o700

    def test_programs_that_root_keeps_to_itself_are_copied_for_the_account(self, tmp_path: Path) -> None:
        installation = tmp_path / "package" / "installed"
        (installation / "bin").mkdir(parents=True, mode=0o700)
        (installation / "bin" / "postgres").touch(0o700)
        (tmp_path / "package.libs").mkdir(mode=0o700)
        (tmp_path / "package.libs" / "lib.so").touch(0o600)
        before = [mode(path) for path in sorted(tmp_path.rglob("*"))]
        _copy(installation, tmp_path / "copy")
        copied = {str(path.relative_to(tmp_path / "copy")): mode(path) for path in (tmp_path / "copy").rglob("*") if path.is_file()}
        assert copied == {"package/installed/bin/postgres": 0o755, "package.libs/lib.so": 0o644}
        assert mode(tmp_path / "copy") == 0o755
        assert [mode(path) for path in sorted(tmp_path.rglob("*")) if "copy" not in path.parts] == before
        own = Account(os.geteuid(), os.getegid(), is_own=True)
        assert own.reachable(installation) == installation


def test_the_credentials_of_the_bucket_are_those_of_googles_own_client(stack: Stack) -> None:
    credentials = json.loads(Path(stack.variables["GOOGLE_APPLICATION_CREDENTIALS"]).read_text())
    assert credentials["token"] == stack.tokens["gcs"]
    code = "from google.cloud import storage; print(storage.Client().bucket('questions').exists())"
    done = subprocess.run([sys.executable, "-c", code], env=stack.environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("True\n", "")
