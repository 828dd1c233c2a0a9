"""The embedded pachd with the options that make it slower and stricter."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from pachyderm_sdk import Client
from pachyderm_sdk.api import auth, pfs, pps
from pachyderm_sdk.api.auth import Permission

from qa_platform.embedded.pachd.errors import PachError
from qa_platform.embedded.pachd.protocol.authentication import read_tokens
from qa_platform.embedded.pachd.secrets import FOREIGN_FOLDER
from qa_platform_tests.pachd_helpers import SUCCESS, Pachd, Server, eventually, refused

NOT_FOUND, UNKNOWN = grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNKNOWN
UNAUTHENTICATED, DENIED = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED
TOKENS = {
    "all-token": {"robot": "all", "roles": ["projectWriter", "secretAdmin", "repoWriter"]},
    "maker-token": {"robot": "maker", "roles": ["projectWriter", "secretAdmin"]},
    "none-token": {"robot": "none", "roles": []},
}


def made_file_set(client: Client) -> str:
    request = pfs.ModifyFileRequest(add_file=pfs.AddFile(path="/a", raw=b"1"))
    return client.pfs.create_file_set(iter([request])).file_set_id


@pytest.fixture(scope="module")
def short_lives(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pachd]:
    server = Server(tmp_path_factory.mktemp("pachd"), {"QA_PACHD_FILE_SET_SECONDS": "0.5", "QA_PACHD_FILE_SET_MOST_SECONDS": "4"})
    yield Pachd(server.address)
    assert server.stop() == 0


@pytest.fixture(scope="module")
def slow_finishing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pachd]:
    server = Server(tmp_path_factory.mktemp("pachd"), {"QA_PACHD_FINISH_SECONDS": "1"})
    yield Pachd(server.address)
    assert server.stop() == 0


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("pachd")
    (folder / "tokens.json").write_text(json.dumps(TOKENS))
    server = Server(folder, {"QA_PACHD_TOKENS": str(folder / "tokens.json")})
    yield server.address.removeprefix("grpc://")
    assert server.stop() == 0


class TestFileSets:
    def test_a_file_set_that_is_not_renewed_expires(self, short_lives: Pachd) -> None:
        kept, lost = made_file_set(short_lives.client), made_file_set(short_lives.client)
        commit = short_lives.client.pfs.start_commit(branch=short_lives.branch(short_lives.repo()))
        short_lives.client.pfs.renew_file_set(file_set_id=kept, ttl_seconds=4)

        def gone() -> bool:
            try:
                short_lives.client.pfs.add_file_set(commit=commit, file_set_id=lost)
            except grpc.RpcError:
                return True
            return False

        eventually(gone)
        with refused(NOT_FOUND, f"tracker does not contain item: (fileset/{lost})"):
            short_lives.client.pfs.renew_file_set(file_set_id=lost, ttl_seconds=1)
        short_lives.client.pfs.add_file_set(commit=commit, file_set_id=kept)

    def test_a_renewed_file_set_lives_for_the_time_given(self, short_lives: Pachd) -> None:
        made = made_file_set(short_lives.client)
        with refused(UNKNOWN, "ttl (5000000000) exceeds max ttl (4000000000)"):
            short_lives.client.pfs.renew_file_set(file_set_id=made, ttl_seconds=5)
        began = time.monotonic()
        short_lives.client.pfs.renew_file_set(file_set_id=made, ttl_seconds=2)

        def gone() -> bool:
            try:
                short_lives.client.pfs.compose_file_set(file_set_ids=[made], ttl_seconds=1)
            except grpc.RpcError:
                return True
            return False

        eventually(gone)
        assert time.monotonic() - began >= 2


class TestFinishing:
    def test_an_open_commit_cannot_be_read_or_cleared_before_its_parent_is_finished(self, slow_finishing: Pachd) -> None:
        repo = slow_finishing.repo()
        parent = slow_finishing.client.pfs.start_commit(branch=slow_finishing.branch(repo))
        slow_finishing.client.pfs.put_file_from_bytes(commit=parent, path="/old", data=b"1")
        slow_finishing.client.pfs.finish_commit(commit=parent)
        commit = slow_finishing.client.pfs.start_commit(branch=slow_finishing.branch(repo))
        file = pfs.File(commit=commit, path="/new")
        slow_finishing.client.pfs.put_file_from_bytes(commit=commit, path="/new", data=b"2", append=True)
        for look in (
            lambda: list(slow_finishing.client.pfs.list_file(file=pfs.File(commit=commit, path="/"))),
            lambda: list(slow_finishing.client.pfs.walk_file(file=pfs.File(commit=commit, path="/"))),
            lambda: list(slow_finishing.client.pfs.glob_file(commit=commit, pattern="/*")),
            lambda: list(slow_finishing.client.pfs.diff_file(new_file=file)),
            lambda: list(slow_finishing.client.pfs.get_file(file=file)),
            lambda: slow_finishing.client.pfs.inspect_file(file=file),
            lambda: slow_finishing.client.pfs.delete_file(commit=commit, path="/"),
        ):
            with refused(UNKNOWN, f"base commit default/{repo.name}@{parent.id} for commit default/{repo.name}@{commit.id} unfinished"):
                look()
        slow_finishing.client.pfs.inspect_commit(commit=parent, wait=pfs.CommitState.FINISHED)
        assert slow_finishing.paths(repo, commit.id) == ["/new", "/old"]
        slow_finishing.client.pfs.delete_file(commit=commit, path="/")
        assert slow_finishing.paths(repo, commit.id) == []

    def test_a_finishing_commit_is_read_once_it_is_finished(self, slow_finishing: Pachd) -> None:
        repo = slow_finishing.repo("finishing")
        commit = slow_finishing.client.pfs.start_commit(branch=slow_finishing.branch(repo))
        slow_finishing.client.pfs.put_file_from_bytes(commit=commit, path="/a", data=b"1")
        slow_finishing.client.pfs.finish_commit(commit=commit)
        info = slow_finishing.client.pfs.inspect_commit(commit=commit)
        assert info.finishing.year > 2000
        assert info.finished.year == 1970
        assert slow_finishing.read(repo, commit.id, "/a") == b"1"
        info = slow_finishing.client.pfs.inspect_commit(commit=commit)
        assert (info.finished - info.finishing).total_seconds() >= 1


class TestForeignSecrets:
    @pytest.fixture
    def server(self, tmp_path: Path) -> Iterator[Server]:
        server = Server(tmp_path)
        (server.state / FOREIGN_FOLDER).mkdir()
        yield server
        assert server.stop() == 0

    @staticmethod
    def put(server: Server, name: str, labels: dict[str, str] | None = None) -> None:
        document = {"kind": "Secret", "metadata": {"name": name, "labels": labels or {}}, "stringData": {"key": "by kubectl"}}
        (server.state / FOREIGN_FOLDER / f"{name}.json").write_text(json.dumps(document))

    def test_a_secret_that_kubectl_made_is_found_but_not_listed(self, server: Server) -> None:
        client = Pachd(server.address).client
        self.put(server, "foreign")
        self.put(server, "labelled", {"secret-source": "pachyderm-user"})
        client.pps.create_secret(name="own", data={"key": "value"})
        assert [info.secret.name for info in client.pps.list_secret().secret_info] == ["labelled", "own"]
        assert client.pps.inspect_secret(secret=pps.Secret(name="foreign")).type == "Opaque"
        with refused(UNKNOWN, 'failed to create secret: secrets "foreign" already exists'):
            client.pps.create_secret(name="foreign", data={"key": "value"})
        client.pps.delete_secret(secret=pps.Secret(name="foreign"))
        with refused(UNKNOWN, 'failed to get secret: secrets "foreign" not found'):
            client.pps.inspect_secret(secret=pps.Secret(name="foreign"))

    def test_a_pipeline_can_use_a_secret_that_kubectl_made(self, server: Server) -> None:
        pachd = Pachd(server.address)
        self.put(server, "foreign")
        repo = pachd.repo()
        uses = [{"name": "foreign", "envVar": "KEPT", "key": "key"}]
        name = pachd.pipeline("p", 'echo "$KEPT" > $pfs/out/a', repo, transform={"secrets": uses})
        commit = pachd.put(repo, {"/a": b"1"})
        assert pachd.wait(name, commit).state == SUCCESS
        assert pachd.read(name, commit, "/a") == b"by kubectl\n"


class TestAuthentication:
    @staticmethod
    def client(address: str, token: str | None) -> Client:
        host, port = address.split(":")
        return Client(host=host, port=int(port), auth_token=token)

    def pachd(self, address: str, robot: str) -> Pachd:
        pachd = Pachd(f"grpc://{address}")
        pachd.client = self.client(address, f"{robot}-token")
        return pachd

    def test_a_call_without_a_valid_token_is_unauthenticated(self, guarded: str) -> None:
        for token, text in (
            (None, "no authentication token (try logging in)"),
            ("wrong", "provided auth token is corrupted or has expired"),
        ):
            client = self.client(guarded, token)
            assert client.get_version().major == 2
            assert client.admin.inspect_cluster().id
            for ask in (client.pfs.list_repo, client.pps.list_job, client.pps.get_logs):
                with refused(UNAUTHENTICATED, text):
                    list(ask())
            with refused(UNAUTHENTICATED, text):
                client.auth.who_am_i()
            with refused(UNAUTHENTICATED, text):
                client.pfs.create_file_set(iter([pfs.ModifyFileRequest()]))

    def test_the_three_roles_are_enough_for_the_platform(self, guarded: str) -> None:
        pachd = self.pachd(guarded, "all")
        assert pachd.client.auth.who_am_i().username == "robot:all"
        pachd.client.pps.create_secret(name=pachd.name("s"), data={"key": "value"})
        repo = pachd.repo()
        uses = [{"name": pachd.name("s"), "envVar": "KEPT", "key": "key"}]
        name = pachd.pipeline("p", "cp $source $pfs/out/", repo, transform={"secrets": uses})
        kept, left = (pachd.put(repo, {"/a": b"%d" % number}) for number in range(2))
        assert pachd.wait(name, left).state == SUCCESS
        assert pachd.read(name, left, "/a") == b"1"
        assert pachd.datums(name, left)
        assert pachd.jobs(name)
        pachd.client.pfs.squash_commit_set(commit_set=pfs.CommitSet(id=kept))
        pachd.client.pfs.drop_commit_set(commit_set=pfs.CommitSet(id=left))
        pachd.clean_up()

    def test_the_owner_of_a_repo_cannot_drop_or_squash_without_repo_writer_on_the_cluster(self, guarded: str) -> None:
        pachd = self.pachd(guarded, "maker")
        repo = pachd.repo()
        commit = pachd.put(repo, {"/a": b"1"})
        assert pachd.read(repo, commit, "/a") == b"1"
        text = "robot:maker is not authorized to perform this operation - needs permissions [REPO_DELETE_COMMIT] on CLUSTER"
        named = pachd.commit(repo, commit)
        for forget in (
            lambda: pachd.client.pfs.drop_commit_set(commit_set=pfs.CommitSet(id=commit)),
            lambda: pachd.client.pfs.squash_commit_set(commit_set=pfs.CommitSet(id=commit)),
            lambda: pachd.client.pfs.drop_commit(commit=named),
            lambda: pachd.client.pfs.squash_commit(commit=named),
        ):
            with refused(DENIED, text):
                forget()
        theirs = self.pachd(guarded, "all").repo()
        with refused(DENIED, f"needs permissions [REPO_WRITE] on REPO default/{theirs.name}"):
            pachd.client.pfs.start_commit(branch=pachd.branch(theirs))
        pachd.clean_up()

    def test_a_robot_without_roles_sees_no_repo_and_creates_nothing(self, guarded: str) -> None:
        theirs = self.pachd(guarded, "all")
        repo = theirs.repo()
        commit = theirs.put(repo, {"/a": b"1"})
        theirs.pipeline("p", "true", repo)
        pachd = self.pachd(guarded, "none")
        assert list(pachd.client.pfs.list_repo()) == []
        assert list(pachd.client.pps.list_pipeline()) == []
        assert pachd.client.pfs.inspect_repo(repo=repo).repo.name == repo.name
        with refused(DENIED, f"needs permissions [REPO_INSPECT_COMMIT] on REPO default/{repo.name}"):
            pachd.client.pfs.inspect_commit(commit=theirs.commit(repo, commit))
        with refused(DENIED, "needs permissions [PROJECT_CREATE_REPO] on PROJECT default"):
            pachd.repo()
        with refused(DENIED, f"needs permissions [REPO_READ] on REPO default/{repo.name}"):
            pachd.pipeline("p", "true", repo)
        for ask, permission in (
            (lambda: pachd.client.pps.create_secret(name="s", data={"key": "value"}), "CLUSTER_CREATE_SECRET"),
            (lambda: pachd.client.pps.inspect_secret(secret=pps.Secret(name="s")), "SECRET_INSPECT"),
            (lambda: pachd.client.pps.list_secret(), "CLUSTER_LIST_SECRETS"),
            (lambda: pachd.client.pps.delete_secret(secret=pps.Secret(name="s")), "SECRET_DELETE"),
        ):
            with refused(DENIED, f"robot:none is not authorized to perform this operation - needs permissions [{permission}] on CLUSTER"):
                ask()
        theirs.clean_up()

    def test_a_dry_run_needs_no_more_than_a_token(self, guarded: str) -> None:
        theirs = self.pachd(guarded, "all")
        repo = theirs.repo()
        spec = theirs.spec(theirs.pipeline("p", "true", repo), "false", repo)
        pachd = self.pachd(guarded, "none")
        assert pachd.create(spec, update=True, dry_run=True)["pipeline"]["name"] == spec["pipeline"]["name"]
        with refused(DENIED, f"needs permissions [REPO_READ] on REPO default/{repo.name}"):
            pachd.create(spec, update=True)
        theirs.clean_up()

    def test_a_robot_can_ask_what_it_may_do(self, guarded: str) -> None:
        cluster = auth.Resource(type=auth.ResourceType.CLUSTER)
        asked = [Permission.REPO_DELETE_COMMIT, Permission.SECRET_INSPECT]
        reply = self.client(guarded, "maker-token").auth.authorize(resource=cluster, permissions=asked)
        assert not reply.authorized
        assert (reply.satisfied, reply.missing) == ([Permission.SECRET_INSPECT], [Permission.REPO_DELETE_COMMIT])
        assert self.client(guarded, "all-token").auth.authorize(resource=cluster, permissions=asked).authorized

    @pytest.mark.parametrize(
        ("content", "problem"), [("[]", "it must be a JSON object"), ('{"t": {"robot": "r", "roles": ["admin"]}}', "unknown role admin")]
    )
    def test_a_file_of_tokens_that_cannot_be_used_is_named(self, tmp_path: Path, content: str, problem: str) -> None:
        file = tmp_path / "tokens.json"
        file.write_text(content)
        with pytest.raises(PachError, match=problem) as caught:
            read_tokens(file)
        assert str(file) in str(caught.value)
