"""How a batch becomes one commit, on a server whose file sets expire quickly and whose commits finish slowly."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from pachyderm_sdk.api import pfs

from qa_platform.batches import commits
from qa_platform.batches.file_commits import remove_commits
from qa_platform.contract import QUESTIONS_REPO
from qa_platform.errors import InputError, TransientError
from qa_platform.ingest import Write
from qa_platform_tests.pachd_helpers import CLUSTER, Pachd, Server, eventually

# File sets that nobody renews are gone after a second; a commit is finished a while after it was told to.
OPTIONS = {"QA_PACHD_FILE_SET_SECONDS": "1", "QA_PACHD_FILE_SET_MOST_SECONDS": "2", "QA_PACHD_FINISH_SECONDS": "0.7"}

pytestmark = pytest.mark.skipif(bool(CLUSTER), reason="a cluster's file sets live too long for a test")


@pytest.fixture(scope="module")
def pachd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pachd]:
    server = Server(tmp_path_factory.mktemp("pachd"), OPTIONS)
    pachd = Pachd(server.address)
    pachd.client.pfs.create_repo(repo=pfs.Repo.from_uri(QUESTIONS_REPO))
    pachd.client.pfs.create_branch(branch=pfs.Branch.from_uri(f"{QUESTIONS_REPO}@master"))
    yield pachd
    assert server.stop() == 0


def fill(write: Write) -> None:
    write("part-00000/questions.csv", [b"question,context\r\n"])


def paths(pachd: Pachd, commit: str) -> list[str]:
    return pachd.paths(pfs.Repo.from_uri(QUESTIONS_REPO), commit)


def test_the_file_sets_of_a_batch_live_for_as_long_as_it_is_read(pachd: Pachd) -> None:
    forgotten = commits._make_file_set(pachd.client, "forgotten", fill)

    def is_gone() -> bool:
        # Not renewed, which would keep it.
        try:
            pachd.client.pfs.get_file_set(commit=pfs.Commit(repo=pfs.Repo(name="__filesets__"), id=forgotten))
            pachd.client.pfs.compose_file_set(file_set_ids=[forgotten], ttl_seconds=1)
        except grpc.RpcError:
            return True
        return False

    with commits.FileSets(pachd.client, life=2, every=0.3) as file_sets:
        file_sets.make("a", fill)
        file_sets.make("b", fill)
        begun = time.monotonic()
        eventually(lambda: time.monotonic() - begun > 4 and is_gone())
        commit = commits.commit_batch(pachd.client, "long batch", file_sets.ids)
    assert commit
    assert paths(pachd, commit) == ["/a/part-00000/questions.csv", "/b/part-00000/questions.csv"]


def test_a_renewal_that_fails_does_not_end_the_renewals(pachd: Pachd, monkeypatch: pytest.MonkeyPatch) -> None:
    renew, calls = pachd.client.pfs.renew_file_set, []

    def fails_once(**request: Any) -> object:
        calls.append(request)
        # The first call is that of `make`.
        if len(calls) == 2:
            raise grpc.RpcError
        return renew(**request)

    monkeypatch.setattr(pachd.client.pfs, "renew_file_set", fails_once)
    with commits.FileSets(pachd.client, life=2, every=0.3) as file_sets:
        file_sets.make("a", fill)
        eventually(lambda: len(calls) > 4)


def test_a_file_that_turns_out_to_be_damaged_leaves_no_file_set_and_no_traceback(pachd: Pachd, caplog: pytest.LogCaptureFixture) -> None:
    def damaged(write: Write) -> None:
        fill(write)
        raise InputError("damaged at byte 8")

    with commits.FileSets(pachd.client) as file_sets:
        with pytest.raises(InputError, match="damaged at byte 8"):
            file_sets.make("a", damaged)
        assert file_sets.ids == []
    assert caplog.records == []


def test_a_batch_follows_one_that_is_still_being_finished_and_holds_nothing_of_it(pachd: Pachd) -> None:
    made = []
    for name in ("first", "second"):
        with commits.FileSets(pachd.client, life=2, every=0.3) as file_sets:
            file_sets.make(name, fill)
            made.append(commits.commit_batch(pachd.client, name, file_sets.ids))
    assert [paths(pachd, str(commit)) for commit in made] == [[f"/{n}/part-00000/questions.csv"] for n in ("first", "second")]


def test_waiting_for_the_head_ends_when_it_is_finished(pachd: Pachd) -> None:
    with commits.FileSets(pachd.client, life=2, every=0.3) as file_sets:
        file_sets.make("a", fill)
        commits.commit_batch(pachd.client, "waited for", file_sets.ids)
    head = commits.head(pachd.client)
    assert commits.is_finishing(head)
    commits.wait_until_finished(pachd.client, head)
    assert commits.is_finished(commits.head(pachd.client))


def test_a_head_that_is_never_finished_is_a_passing_trouble(pachd: Pachd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commits, "_FINISHING_SECONDS", 0.2)
    with commits.FileSets(pachd.client, life=2, every=0.3) as file_sets:
        file_sets.make("a", fill)
        commits.commit_batch(pachd.client, "slow", file_sets.ids)
    with pytest.raises(TransientError, match="has been finishing commit"):
        commits.wait_until_finished(pachd.client, commits.head(pachd.client))


def test_a_batch_that_fails_halfway_leaves_no_open_commit(pachd: Pachd) -> None:
    with pytest.raises(TransientError, match="has expired"):
        commits.commit_batch(pachd.client, "lost file set", ["0" * 12 + "4" + "0" * 19])
    assert commits.is_finishing(commits.head(pachd.client))
    assert commits.find_batch(pachd.client, "lost file set") is None


def test_a_commit_that_was_finished_although_the_answer_was_lost_counts(pachd: Pachd, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = pachd.client.pfs.finish_commit

    def twice(**request: object) -> None:
        finish(**request)
        finish(**request)

    with commits.FileSets(pachd.client, life=2, every=0.3) as file_sets, monkeypatch.context() as patch:
        file_sets.make("a", fill)
        patch.setattr(pachd.client.pfs, "finish_commit", twice)
        commit = commits.commit_batch(pachd.client, "finished twice", file_sets.ids)
    found = commits.find_batch(pachd.client, "finished twice")
    assert found is not None
    assert found.commit.id == commit


def abandon(pachd: Pachd, commit: pfs.Commit) -> None:
    """What another run does with an open commit that it cannot drop."""
    pachd.client.pfs.finish_commit(commit=commit, error="abandoned")


def drop(pachd: Pachd, commit: pfs.Commit) -> None:
    """What another run does with an open commit."""
    commits.drop_commit(pachd.client, commit.id)


Loss = Callable[[Pachd, pfs.Commit], None]
LOSSES = pytest.mark.parametrize("lose", [abandon, drop])


def lost_before(pachd: Pachd, patch: pytest.MonkeyPatch, step: str, lose: Loss, *, times: int = 1) -> None:
    """Let another run come in between, just before the next calls of this step of a commit."""
    call, left = getattr(pachd.client.pfs, step), [step] * times

    def late(*arguments: Any, **request: Any) -> object:
        if left and "error" not in request:
            left.pop()
            lose(pachd, commits.head(pachd.client).commit)
        return call(*arguments, **request)

    patch.setattr(pachd.client.pfs, step, late)


@LOSSES
@pytest.mark.parametrize("step", ["modify_file", "add_file_set", "finish_commit"])
def test_a_commit_that_another_run_abandoned_or_dropped_is_no_success(
    pachd: Pachd, monkeypatch: pytest.MonkeyPatch, step: str, lose: Loss
) -> None:
    commits.wait_until_finished(pachd.client, commits.head(pachd.client))
    with commits.FileSets(pachd.client, life=2, every=0.3) as file_sets, monkeypatch.context() as patch:
        file_sets.make("a", fill)
        lost_before(pachd, patch, step, lose)
        with pytest.raises(commits.CommitLost, match="was abandoned by another run"):
            commits.commit_batch(pachd.client, "lost", file_sets.ids)
    assert commits.is_finishing(commits.head(pachd.client))
    assert commits.find_batch(pachd.client, "lost") is None


def committed(pachd: Pachd, name: str) -> str:
    with commits.FileSets(pachd.client, life=2, every=0.3) as file_sets:
        file_sets.make(name, fill)
        commit = commits.commit_batch(pachd.client, name, file_sets.ids)
    assert commit
    return commit


def test_of_several_commits_of_a_batch_the_newest_is_found(pachd: Pachd) -> None:
    _, second = committed(pachd, "twice"), committed(pachd, "twice")
    found = commits.find_batch(pachd.client, "twice")
    assert found is not None
    assert found.commit.id == second


def descriptions(pachd: Pachd) -> list[str]:
    return [info.description for info in pachd.client.pfs.list_commit(repo=pfs.Repo.from_uri(QUESTIONS_REPO))]


def test_the_empty_commit_waits_for_the_head_and_is_never_open_meanwhile(pachd: Pachd, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = committed(pachd, "still finishing")
    assert not commits.is_finished(commits.head(pachd.client))
    start, heads = pachd.client.pfs.start_commit, []

    def started(**request: Any) -> pfs.Commit:
        heads.append(commits.head(pachd.client))
        return start(**request)

    monkeypatch.setattr(pachd.client.pfs, "start_commit", started)
    assert remove_commits(pachd.client, [commit]) == {}
    assert [commits.is_finished(head) for head in heads] == [True]
    assert "still finishing" not in descriptions(pachd)


@LOSSES
def test_an_empty_commit_that_another_run_took_away_is_made_once_more(pachd: Pachd, monkeypatch: pytest.MonkeyPatch, lose: Loss) -> None:
    commit = committed(pachd, "to be removed")
    with monkeypatch.context() as patch:
        lost_before(pachd, patch, "finish_commit", lose)
        assert remove_commits(pachd.client, [commit]) == {}
    assert "to be removed" not in descriptions(pachd)


def test_a_commit_that_stays_since_the_empty_one_is_taken_away_each_time_is_said_to(pachd: Pachd, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = committed(pachd, "stays")
    refused = "Pachyderm does not let it go"
    monkeypatch.setattr("qa_platform.batches.file_commits._remove", lambda *_: refused)
    lost_before(pachd, monkeypatch, "finish_commit", drop, times=2)
    (reason,) = remove_commits(pachd.client, [commit]).values()
    assert "was abandoned by another run" in reason
    assert reason.endswith(f"; {refused}")


def drop_and_start(pachd: Pachd, commit: pfs.Commit) -> None:
    drop(pachd, commit)
    pachd.client.pfs.start_commit(branch=pfs.Branch.from_uri(f"{QUESTIONS_REPO}@master"), description="the other run's")


@pytest.mark.parametrize("lose", [drop, drop_and_start])
def test_a_batch_whose_commit_was_dropped_writes_nothing_by_the_name_of_the_branch(
    pachd: Pachd, monkeypatch: pytest.MonkeyPatch, lose: Callable[[Pachd, Any], None]
) -> None:
    committed(pachd, "before")
    commits.wait_until_finished(pachd.client, commits.head(pachd.client))
    known = descriptions(pachd)
    with commits.FileSets(pachd.client, life=2, every=0.3) as file_sets, monkeypatch.context() as patch:
        file_sets.make("a", fill)
        lost_before(pachd, patch, "modify_file", lose)
        with pytest.raises(commits.CommitLost):
            commits.commit_batch(pachd.client, "lost", file_sets.ids)
    assert [each for each in descriptions(pachd) if each != "the other run's"] == known
